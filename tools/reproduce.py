"""Repeat the published CIFAR-10 results, one row per command, with controls, ablations without tuning, and figures.

python tools/reproduce.py norton_resnet56_cifar.r071 --dense dense.safetensors --data cifar10.tar.xz
python tools/reproduce.py norton_resnet56_cifar.r089 --control l1 --dense dense.safetensors --data cifar10.tar.xz
python tools/reproduce.py --study rank --dense dense.safetensors --data cifar10.tar.xz
python tools/reproduce.py --plot docs/images

The same command continues a run or a study that was stopped.
"""

from __future__ import annotations

from pathlib import Path

from _cli import Parser, run


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument('model', nargs='?', help='a compressed tag such as norton_resnet56_cifar.r071')
    parser.add_argument('--study', choices=('rank', 'tag', 'criterion'), help='ablation on ResNet-56 without tuning')
    parser.add_argument('--dense', type=Path, help='file with the weights of the dense network')
    parser.add_argument('--data', default='cifar10', help='as for train_cls.py')
    parser.add_argument('--config', type=Path, help='YAML file, such as configs/classification/distill_cifar10.yaml')
    parser.add_argument('--control', help='choose filters by l1, l2, geometric_median, random, authors_order instead')
    parser.add_argument('--epochs', type=int, help='of tuning')
    parser.add_argument('--no-tuning', action='store_true', help='compress and repair only: --epochs 0')
    parser.add_argument('--output', type=Path, help='CSV file; results/cifar10.csv, for studies cifar10_repair.csv')
    parser.add_argument('--runs', type=Path, default=Path('runs'), help='folder of the runs')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda, cuda:1, ...')
    parser.add_argument('--set', nargs='+', default=[], metavar='KEY=VALUE', help='change any key, e.g. optim.lr=0.01')
    parser.add_argument('--plot', type=Path, metavar='FOLDER', help='draw the studies of --output')
    args = parser.parse_args()
    if (args.model is None) == (args.study is None) and (args.model or not args.plot):
        parser.error('expected a tag, or --study, or only --plot')
    if args.dense is None and not args.plot:
        parser.error('expected --dense FILE, the weights of the dense network')
    if args.no_tuning and args.epochs:
        parser.error(f'got --no-tuning and --epochs {args.epochs}, expected one of them')
    output = args.output or Path('results') / ('cifar10.csv' if args.model else 'cifar10_repair.csv')

    from norton_timm.studies import plot_studies, read_rows, reproduce_tag, run_study, write_row
    from norton_timm.training import load_train_config
    from norton_timm.utils import choose_device, is_main, process_group

    device = choose_device(args.device)
    if args.study:
        values = {'data.source': args.data, 'weights': str(args.dense)}
        for row in run_study(
            args.study, args.dense, args.data, output, device, load_train_config(args.config, args.set, values)
        ):
            what = ' '.join(f'{key} {row[key]}' for key in ('rank', 'criterion') if row[key])
            print(f'{row["model"]} {what}: {row["top1_compressed"] or "-"} -> {row["top1_repaired"]} %', flush=True)
    elif args.model:
        with process_group(device):
            row = reproduce_tag(
                args.model, args.dense, args.data, args.runs, device, control=args.control, config=args.config,
                overrides=args.set, epochs=0 if args.no_tuning else args.epochs,
            )  # fmt: skip
            main_process = is_main()
        if main_process:
            write_row(output, row)
            told = ' -> '.join(f'{row[k]:.2f}' for k in ('top1_dense', 'top1_compressed', 'top1_repaired', 'top1'))
            print(f'{args.model} {args.control or ""}: {told} %, difference {row["difference"]:+.2f} '
                  f'(published {row["published_difference"]:+.2f}); wrote {output}')  # fmt: skip
    if args.plot:
        for path in plot_studies(read_rows(output), args.plot):
            print(f'wrote {path}')


if __name__ == '__main__':
    run(main)
