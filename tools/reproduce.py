"""Repeat the published CIFAR-10 results with controls, ablations and figures; compression without labels beside others.

python tools/reproduce.py norton_resnet56_cifar.r071 --dense dense.safetensors --data cifar10.tar.xz
python tools/reproduce.py norton_resnet56_cifar.r089 --control l1 --dense dense.safetensors --data cifar10.tar.xz
python tools/reproduce.py --study rank --dense dense.safetensors --data cifar10.tar.xz
python tools/reproduce.py --plot docs/images
python tools/reproduce.py --study label-free --networks resnet20_cifar --dense FOLDER --data cifar10.tar

The same command continues a run or a study that was stopped.
"""

from __future__ import annotations

from pathlib import Path

from _cli import Parser, run

import _label_free


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument('model', nargs='?', help='a compressed tag such as norton_resnet56_cifar.r071')
    parser.add_argument('--study', choices=_label_free.STUDIES, help='ablation without tuning, or label-free')
    parser.add_argument(
        '--dense', type=Path, help='weights of the dense network; label-free: folder of resnet20_cifar10.th'
    )
    parser.add_argument('--data', default='cifar10', help='as for train_cls.py')
    parser.add_argument('--config', type=Path, help='YAML file, such as configs/classification/distill_cifar10.yaml')
    parser.add_argument('--control', help='choose filters by l1, l2, geometric_median, random, authors_order instead')
    parser.add_argument('--epochs', type=int, help='of tuning')
    parser.add_argument('--no-tuning', action='store_true', help='as --epochs 0')
    parser.add_argument('--output', type=Path, help='CSV file; results/cifar10.csv, cifar10_repair.csv, label_free.csv')
    parser.add_argument('--runs', type=Path, default=Path('runs'), help='folder of the runs')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda, cuda:1, ...')
    parser.add_argument('--set', nargs='+', default=[], metavar='KEY=VALUE', help='change any key, e.g. optim.lr=0.01')
    parser.add_argument('--plot', type=Path, metavar='FOLDER', help='draw the studies of --output')
    _label_free.add(parser)
    args = parser.parse_args()
    if _label_free.is_asked(args) and not args.model:
        return _label_free.measure(args)
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
        config = load_train_config(args.config, args.set, values)
        for row in run_study(args.study, args.dense, args.data, output, device, config):
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
