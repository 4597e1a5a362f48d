"""Compress a timm model by a recipe, or to a budget, and keep it in one file.

python tools/compress.py resnet50 --pretrained --spec configs/recipes/norton_resnet50.r078.yaml --output out.safetensors
python tools/compress.py densenet121 --pretrained --macs 0.5 --images FOLDER --minutes 10 --output out.safetensors
"""

from __future__ import annotations

from pathlib import Path

from _cli import Parser, run

FIELDS = ('method', 'rates', 'criterion', 'strategy', 'order', 'rank', 'shots', 'round_to', 'seed')
BUDGETS = {
    'macs': 'share of MACs to keep', 'params': 'share of parameters to keep', 'latency_ms': 'milliseconds here',
    'memory_mb': 'megabytes of weights and activations',
}  # fmt: skip


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument('model', help='timm name, such as resnet50')
    parser.add_argument('--output', required=True, type=Path, help='file to write, .safetensors')
    parser.add_argument('--spec', help='recipe: a YAML file, a tag (norton_resnet50.r078), or a file of this tool')
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
    parser.add_argument('--calibration-images', type=int, help='how many of them: 1000, and 144 with --quick')
    parser.add_argument('--minutes', type=float, help='with a budget and images: time to tune for')
    parser.add_argument('--steps', type=int, help='or the number of steps to tune')
    parser.add_argument('--quick', action='store_true', help='with a budget and images: a first look, without tuning')
    parser.add_argument(
        '--allow-resolution', action='store_true', help='with --macs and images: smaller images are a choice, too'
    )
    parser.add_argument('--labelled', help='images in class folders, on which only the accuracy is measured')
    for name in ('mean', 'std'):
        parser.add_argument(f'--{name}', type=float, nargs=3, help="of the images, if not as the model's name says")
    parser.add_argument('--report', type=Path, help='per-layer figures to write, .json or .html')
    args = parser.parse_args()

    from _compress import next_commands, run_search, run_spec, write

    from norton_timm.models import dense_model, read_recipe, set_input_size, set_normalisation
    from norton_timm.utils import check_output

    check_output(args.output, '.safetensors')
    if args.report is not None:
        check_output(args.report, '.json', '.html')
    fields, budget = ({k: getattr(args, k) for k in n if getattr(args, k) is not None} for n in (FIELDS, BUDGETS))
    if budget and (args.spec or set(fields) - {'method'} - ({'seed'} if args.images else set())):
        raise ValueError(f'got a budget ({", ".join(budget)}) and a recipe, expected one of them')
    if budget and args.images:
        check_output(args.output.with_suffix('.html'), '.html')  # the page
    tuning = {k: getattr(args, k) for k in ('minutes', 'steps') if getattr(args, k)}
    alone = [name for name in (*tuning, 'quick', 'allow_resolution') if getattr(args, name)]
    if alone and not (budget and args.images):
        raise ValueError(f'got --{alone[0].replace("_", "-")}, expected a budget and --images with it')
    if args.quick and tuning:
        raise ValueError(f'got --quick and --{alone[0]}, expected one of them: a quick look does not tune')
    spec = None if budget else read_recipe(args.spec, **fields)
    dense = dense_model(args.model, args.pretrained, args.checkpoint, num_classes=args.num_classes)
    set_normalisation(dense, args.mean, args.std)
    set_input_size(dense, args.input_size)
    outcome = run_search(args, dense, budget, tuning) if budget and args.images else run_spec(args, dense, spec, budget)
    commands = next_commands(args)
    written = write(args, outcome, commands)
    print(outcome.report, outcome.table, *(f'note: {note}' for note in outcome.notes), written, sep='\n')
    print('next:', *(f'  {words}:\n    {command}' for words, command in commands), sep='\n')


if __name__ == '__main__':
    run(main)
