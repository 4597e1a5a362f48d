"""Compress a timm model by a recipe, or to a budget, and keep it in one file.

python tools/compress.py resnet50 --pretrained --spec configs/recipes/norton_resnet50.r078.yaml --output out.safetensors
python tools/compress.py densenet121 --pretrained --macs 0.5 --images FOLDER --output out.safetensors
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _cli import Parser, run

import torch

FIELDS = ('method', 'rates', 'criterion', 'strategy', 'order', 'rank', 'shots', 'round_to', 'seed')
BUDGETS = {
    'macs': 'share of MACs to keep', 'params': 'share of parameters to keep', 'latency_ms': 'milliseconds here',
    'memory_mb': 'megabytes of weights and activations',
}  # fmt: skip


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument('model', help='timm name, such as resnet50')
    parser.add_argument('--output', required=True, type=Path, help='file to write, .safetensors')
    parser.add_argument('--spec', help='recipe: a YAML file, or a tag such as norton_resnet50.r078')
    parser.add_argument('--method', choices=('norton', 'coring'))
    parser.add_argument('--rates', help='pruning rate of all layers, or the list "[0.]+[0.1]*2+..."')
    for name in FIELDS[2:]:
        kind = str if name in ('criterion', 'strategy', 'order') else int
        parser.add_argument(f'--{name.replace("_", "-")}', type=kind, help='as in CompressionSpec')
    for name, told in BUDGETS.items():
        parser.add_argument(f'--{name.replace("_", "-")}', type=float, help=f'budget instead of a recipe: {told}')
    parser.add_argument('--pretrained', action='store_true', help="start from the model's published weights")
    parser.add_argument('--checkpoint', type=Path, help='weights of the dense model: .safetensors, .pt or .pth')
    parser.add_argument('--num-classes', type=int, help='outputs of the dense model')
    parser.add_argument('--input-size', type=int, help='pixels a side, for MACs and latency')
    parser.add_argument('--images', '--calibration', type=Path, help='images without labels: a folder, or a .tar.xz')
    parser.add_argument('--calibration-images', type=int, default=1000, help='how many of them')
    parser.add_argument('--minutes', type=float, help='with a budget and images: time to tune for')
    parser.add_argument('--steps', type=int, help='or the number of steps to tune')
    for name in ('mean', 'std'):
        parser.add_argument(f'--{name}', type=float, nargs=3, help="of the images, if not as the model's name says")
    parser.add_argument('--report', type=Path, help='per-layer figures to write, .json or .html')
    args = parser.parse_args()

    from norton_timm import find_spec, save, to_html, tune_forms
    from norton_timm.compression import compress
    from norton_timm.models import dense_model, read_recipe, set_normalisation
    from norton_timm.profiling import channels_last, compare_latency, default_input, ready_to_run
    from norton_timm.training import calibration_images, shrink
    from norton_timm.utils import check_output, write_text

    check_output(args.output, '.safetensors')
    page = args.report is not None and check_output(args.report, '.json', '.html').suffix == '.html'
    fields, budget = ({k: getattr(args, k) for k in n if getattr(args, k) is not None} for n in (FIELDS, BUDGETS))
    if budget and (args.spec or set(fields) - {'method'}):
        raise ValueError(f'got a budget ({", ".join(budget)}) and a recipe, expected one of them')
    spec = None if budget else read_recipe(args.spec, **fields)
    dense = dense_model(args.model, args.pretrained, args.checkpoint, num_classes=args.num_classes)
    set_normalisation(dense, args.mean, args.std)
    image = default_input(dense, args.input_size)
    tuning = {k: getattr(args, k) for k in ('minutes', 'steps') if getattr(args, k)}
    if tuning and not (budget and args.images):
        raise ValueError(f'got --{next(iter(tuning))}, expected a budget and --images with it')
    batches = args.images and calibration_images(args.images, dense, args.calibration_images, image.shape[2:])
    result = None
    if budget and batches:
        result = shrink(
            dense.eval(), torch.cat(batches), budget, example_input=image, seed=args.seed or 0, latency=False,
            method=args.method or 'norton', progress=True, **tuning,
        )  # fmt: skip
        spec, model, report = result.spec, result.model, result.report
    else:
        spec = spec or find_spec(dense, **budget, **fields, example_input=image)
        model, report = compress(dense, spec, image, calibration=batches)
    tuned = ready_to_run(model)  # a copy: the file does not keep what is fastest on this machine
    tune_forms(tuned, channels_last(image))
    times = compare_latency({'dense': dense, 'compressed': model, 'tuned': tuned}, image)
    before, after, best = times.values()
    found = None if result is None else result.to_dict()
    save(model, args.output, spec=spec, latency_ms=times, label_free=found)
    if args.report is not None:
        write_text(args.report, to_html(report, args.model, (before, after)) if page else report.to_json())
    where = f'one image of {tuple(image.shape[1:])} on {image.device.type}, {torch.get_num_threads()} threads'
    speed = f'{before / after:.2f} times as fast; {best:.1f} ms with forms tuned here'
    print(f'{report}\nmeasured: {before:.1f} -> {after:.1f} ms ({speed}) for {where}')
    if result is not None:
        print(result)
    for told in notes(result, args.pretrained or args.checkpoint is not None):
        print(f'note: {told}')
    print(f'wrote {args.output}: {args.output.stat().st_size / 1e6:.1f} MB')


def notes(result: Any, trained: bool) -> list[str]:
    """What the user should know of a result before it is relied on."""
    if result is not None:
        told = list(result.warnings)
    else:
        told = ['nothing measured the accuracy; tools/eval_cls.py does, and a budget with --images compares outputs']
    return told if trained else ['the weights are random; --pretrained or --checkpoint gives others', *told]


if __name__ == '__main__':
    run(main)
