"""Compress a timm model by a recipe and keep it in one file.

python tools/compress.py resnet50 --pretrained --spec configs/recipes/norton_resnet50.r078.yaml --output out.safetensors
python tools/compress.py mobilenetv2_100 --method norton --rank 4 --rates 0.3 --output out.safetensors
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from _cli import Parser, run

FIELDS = ('method', 'rank', 'rates', 'criterion', 'strategy', 'order', 'shots', 'round_to', 'seed')


def make_spec(args: Any) -> Any:
    """The recipe of --spec (a file, or a tag of ours), with single fields changed by other options."""
    from norton_timm import CompressionSpec
    from norton_timm.models import spec_of

    given = {name: getattr(args, name) for name in FIELDS if getattr(args, name) is not None}
    if 'rates' in given and not given['rates'].lstrip().startswith('['):
        given['rates'] = float(given['rates'])
    if args.spec is None:
        if not {'rank', 'rates'} & set(given):
            raise ValueError('got no recipe, expected --spec FILE, or --rank or --rates')
        return CompressionSpec.from_dict(given)
    is_tag = args.spec.startswith(('norton_', 'coring_')) and not Path(args.spec).exists()
    spec = spec_of(args.spec) if is_tag else CompressionSpec.from_yaml(Path(args.spec))
    return CompressionSpec.from_dict({**spec.to_dict(), **given})


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument('model', help='timm name, such as resnet50')
    parser.add_argument('--output', required=True, type=Path, help='file to write, .safetensors')
    parser.add_argument('--spec', help='recipe: a YAML file, or a tag such as norton_resnet50.r078')
    parser.add_argument('--method', choices=('norton', 'coring'))
    parser.add_argument('--rates', help='pruning rate of all layers, or the list "[0.]+[0.1]*2+..."')
    for name in ('criterion', 'strategy', 'order'):
        parser.add_argument(f'--{name}', help='as in CompressionSpec')
    for name in ('rank', 'shots', 'round-to', 'seed'):
        parser.add_argument(f'--{name}', type=int, help='as in CompressionSpec')
    parser.add_argument('--pretrained', action='store_true', help="start from the model's published weights")
    parser.add_argument('--checkpoint', type=Path, help='weights of the dense model: .safetensors, .pt or .pth')
    parser.add_argument('--num-classes', type=int, help='outputs of the dense model')
    parser.add_argument('--input-size', type=int, help='pixels a side, for MACs and latency')
    parser.add_argument('--report', type=Path, help='per-layer figures to write, .json')
    args = parser.parse_args()

    from norton_timm import compress, tune_forms
    from norton_timm.checkpoint import check_output, save, write_text
    from norton_timm.dense import dense_model, image_of
    from norton_timm.latency import compare_latency

    spec = make_spec(args)
    check_output(args.output, '.safetensors')
    if args.report is not None:
        check_output(args.report, '.json')
    dense = dense_model(args.model, args.pretrained, args.checkpoint, num_classes=args.num_classes)
    image = image_of(dense, args.input_size)
    model, report = compress(dense, spec, image)
    tuned = copy.deepcopy(model)
    tune_forms(tuned, image)  # a copy: what is fastest on this machine is not written into the file
    before, after = compare_latency({'dense': dense, 'compressed': tuned}, image).values()
    save(model, args.output, spec=spec, latency_ms={'dense': before, 'compressed': after})
    if args.report is not None:
        write_text(args.report, report.to_json())
    print(report)
    print(
        f'measured: {before:.1f} -> {after:.1f} ms ({before / after:.2f} times as fast) for one image of '
        f'{tuple(image.shape[1:])} on {image.device.type} with {torch.get_num_threads()} threads, median of 7'
    )
    print(f'wrote {args.output}: {args.output.stat().st_size / 2**20:.1f} MB')


if __name__ == '__main__':
    run(main)
