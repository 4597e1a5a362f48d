"""Accuracy of a classifier on the test split of a data set.

python tools/eval_cls.py norton_resnet56_cifar.r071 --data cifar10.tar.xz
python tools/eval_cls.py runs/r071/model.safetensors --data cifar10.tar.xz --output accuracy.json
torchrun --nproc-per-node 2 tools/eval_cls.py ...
"""

from __future__ import annotations

import json
from pathlib import Path

from _cli import Parser, run


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument('model', help='timm name with published or own weights, or a .safetensors of norton_timm.save')
    parser.add_argument('--data', default='cifar10', help='cifar10, an archive, a folder with val/, or a name of timm')
    parser.add_argument('--weights', type=Path, help='file with the weights of the model named')
    parser.add_argument('--batch-size', type=int, default=256, help='images of one process')
    parser.add_argument('--workers', type=int, default=4, help='loading processes')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda, cuda:1, ...')
    parser.add_argument('--amp', default='none', choices=('none', 'bf16', 'fp16'))
    parser.add_argument('--output', type=Path, help='file to write, .json')
    args = parser.parse_args()

    from norton_timm.training import evaluate_file
    from norton_timm.utils import check_output, choose_device, is_main, process_group, write_text

    if args.output is not None:
        check_output(args.output, '.json')
    for name, least in (('batch_size', 1), ('workers', 0)):
        if getattr(args, name) < least:
            parser.error(f'--{name.replace("_", "-")} is {getattr(args, name)}, expected {least} or more')
    device = choose_device(args.device)
    with process_group(device):
        results = evaluate_file(
            args.model, args.data, device,
            weights=args.weights, batch_size=args.batch_size, amp=args.amp, workers=args.workers,
        )  # fmt: skip
        main_process = is_main()
    if main_process:
        print(f'{args.model}: top-1 {results["top1"]:.2f} %, top-5 {results["top5"]:.2f} %, loss {results["loss"]:.4f} '
              f'on {results["test_images"]:,} images of {results["data"]}')  # fmt: skip
        if args.output is not None:
            write_text(args.output, json.dumps(results, indent=1) + '\n')
            print(f'wrote {args.output}')


if __name__ == '__main__':
    run(main)
