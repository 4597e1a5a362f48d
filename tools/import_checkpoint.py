"""Convert a checkpoint that the authors of NORTON or CORING released into a file of ours.

A classification network becomes a .safetensors file. A detector of torchvision's reference training becomes a .pt file
as of train_det.py, or, with a .safetensors name, its backbone alone. eval_det.py and demo_video.py take it as it is.
"""

from __future__ import annotations

from pathlib import Path

from _cli import Parser, run


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument('checkpoint', type=Path, help='.pt, .pth or .pth.tar file')
    parser.add_argument('--output', required=True, type=Path, help='file to write, .safetensors, or .pt for a detector')
    parser.add_argument('--architecture', help='dense network, such as resnet50; default: told from the tensors')
    args = parser.parse_args()

    from norton_timm import count
    from norton_timm.checkpoints import save
    from norton_timm.models import convert_authors_checkpoint
    from norton_timm.utils import check_output

    if args.output.suffix == '.pt':
        from detection.training import import_detector, save_checkpoint

        check_output(args.output, '.pt')
        content = import_detector(args.checkpoint)
        save_checkpoint(args.output, content)
        print(f'{content["meta"]["task"]} detector on {content["config"]["model"]["backbone"]}')
    else:
        check_output(args.output, '.safetensors')
        model = convert_authors_checkpoint(args.checkpoint, args.architecture)
        save(model, args.output, source=args.checkpoint.name)
        cfg = model.pretrained_cfg
        macs, params = count(model, cfg['input_size'])
        name = '.'.join(filter(None, (cfg['architecture'], cfg.get('tag'))))
        print(f'{name}: {params:,} parameters, {macs:,} MACs')
    print(f'wrote {args.output}')


if __name__ == '__main__':
    run(main)
