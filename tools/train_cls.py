"""Train a classifier: compress a dense network, repair it, distil the dense one into it; or train a dense one.

python tools/train_cls.py norton_resnet56_cifar.r071 --weights dense.safetensors --data cifar10.tar --output runs/r071
python tools/train_cls.py resnet56_cifar --config configs/classification/dense_cifar10.yaml --output runs/dense
torchrun --nproc-per-node 2 tools/train_cls.py ...

The same command continues a run that was stopped.
"""

from __future__ import annotations

from pathlib import Path

from _cli import Parser, run, when_stopped


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument('model', nargs='?', help='timm name; a compressed tag is made from its dense network')
    parser.add_argument('--output', required=True, type=Path, help='folder of the run')
    parser.add_argument('--config', type=Path, help='YAML file, such as configs/classification/distill_cifar10.yaml')
    parser.add_argument('--data', help='cifar10, an archive, a folder with train/ and val/, or a name of timm')
    parser.add_argument('--weights', help='file with the weights of the dense network')
    parser.add_argument('--pretrained', action='store_true', help='start from the published weights')
    parser.add_argument('--recipe', help='compress by this tag or YAML file')
    parser.add_argument('--epochs', type=int)
    parser.add_argument('--seed', type=int)
    parser.add_argument('--deterministic', action='store_true', help='only operations that give equal bits each time')
    parser.add_argument('--device', help='auto, cpu, cuda, cuda:1, ...')
    parser.add_argument('--set', nargs='+', default=[], metavar='KEY=VALUE', help='change any key, e.g. optim.lr=0.01')
    args = parser.parse_args()

    from norton_timm.training import MODEL, Recovery, load_train_config
    from norton_timm.utils import choose_device, is_main, make_deterministic, process_group

    values = {'model': args.model, 'data.source': args.data, 'weights': args.weights, 'recipe': args.recipe,
              'optim.epochs': args.epochs, 'device': args.device, 'pretrained': args.pretrained or None,
              'seed': args.seed, 'deterministic': args.deterministic or None}  # fmt: skip
    config = load_train_config(args.config, args.set, values)
    device = choose_device(config.device)
    if config.deterministic:
        make_deterministic()

    def how_to_go_on() -> str:
        return f'the same command {"goes on with the run" if args.output.is_dir() else "begins a run"} in {args.output}'

    with when_stopped(how_to_go_on), process_group(device):
        results = Recovery(config, args.output, device).run()
        main_process = is_main()
    if main_process:
        steps = ('top1_dense', 'top1_compressed', 'top1_repaired', 'top1')
        told = ', '.join(f'{k} {results[k]:.2f} %' for k in steps if results[k] is not None)
        print(f'{results["model"]}: {told}')
        print(f'MACs {results["macs_dense"]:,} -> {results["macs"]:,}, parameters {results["params_dense"]:,} -> '
              f'{results["params"]:,}, {results["ms_dense"]:.2f} -> {results["ms"]:.2f} ms for one image on '
              f'{results["device"]}, {results["threads"]} threads')  # fmt: skip
        print(f'wrote {args.output / MODEL}')


if __name__ == '__main__':
    run(main)
