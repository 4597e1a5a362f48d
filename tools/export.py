"""Export a network to ONNX, OpenVINO or torch.export; the file is compared with PyTorch on images before it is kept.

python tools/export.py --weights small.safetensors --images photos/ --output small.onnx
"""

from __future__ import annotations

import json
from pathlib import Path

from _cli import Parser, run

import torch


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument('--weights', type=Path, help='.safetensors of norton_timm.save, or .pt of train_det.py')
    parser.add_argument('--task', choices=('box', 'mask', 'keypoint'), help='refuse a detector for another')
    parser.add_argument('--model', help='timm name or tag, instead of --weights')
    parser.add_argument('--pretrained', action='store_true', help='with --model: the weights that timm knows')
    parser.add_argument('--random-weights', action='store_true', help='with --model: to measure time only')
    parser.add_argument('--images', type=Path, required=True, help='folder of pictures to compare on')
    parser.add_argument('--count', type=int, default=8, help='how many of them')
    parser.add_argument('--size', nargs=2, type=int, metavar=('H', 'W'), help='of the pictures in pixels')
    parser.add_argument('--output', type=Path, required=True, help='.onnx, .xml (OpenVINO) or .pt2')
    parser.add_argument('--no-deploy', action='store_true', help='export the layers as they are')
    parser.add_argument('--int8', action='store_true', help='quantise a classifier; says what agreement it costs')
    parser.add_argument('--json', type=Path, help='file for the agreement')
    args = parser.parse_args()
    if (args.weights is None) == (args.model is None):
        parser.error('got both or none of --weights and --model, expected one')
    if args.model is not None and args.pretrained == args.random_weights:
        parser.error('--model needs one of --pretrained and --random-weights')
    if args.task is not None and (args.weights is None or args.weights.suffix != '.pt'):
        parser.error('--task goes with a .pt file of a detector')
    if args.count < 1 or (args.size is not None and min(args.size) < 1):
        parser.error('--count and --size must be 1 or more')

    from norton_timm.inference import CHANNEL_MULTIPLES, deploy, export_checked, fastest_variant, format_of, size_mb
    from norton_timm.utils import write_text

    kind = format_of(args.output)
    for path in filter(None, (args.output, args.json)):
        if not path.parent.is_dir() or path.is_dir():
            parser.error(f'{path}: expected a file in a folder that exists')
    if args.int8 and (args.output.suffix == '.pt2' or (args.weights is not None and args.weights.suffix == '.pt')):
        parser.error('--int8 quantises classifiers to .onnx or .xml only')
    model, images = _load(args)
    torch.set_grad_enabled(False)
    detector = args.weights is not None and args.weights.suffix == '.pt'
    example = [images[0][0]] if detector else images[0]
    try:
        model(example)
    except RuntimeError as error:
        raise ValueError(f'the network does not take these images: {error}') from error
    if args.no_deploy:
        source = model
    elif not detector and kind != 'pt2':
        source = fastest_variant(model, images[0], kind)
    else:
        source = deploy(model, example, channel_multiple=CHANNEL_MULTIPLES[kind])
    if detector:
        from detection.rcnn import exportable

        source, model = exportable(source), exportable(model)
    agreement = export_checked(source, args.output, images, model, args.int8)
    print(f'wrote {args.output}: {size_mb(args.output):.1f} MB{", int8" if args.int8 else ""}')
    print(agreement)
    if args.json is not None:
        content = {'file': args.output.name, 'int8': args.int8, **agreement.to_dict()}
        write_text(args.json, json.dumps(content, indent=2))


def _load(args) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    """The network, and batches of one image each, prepared as the network expects."""
    from norton_timm import load
    from norton_timm.inference import find_pictures, read_images
    from norton_timm.models import dense
    from norton_timm.training import calibration_images

    if args.weights is not None and args.weights.suffix == '.pt':
        from detection.training import load_detector

        size = tuple(args.size or (800, 1066))
        model = load_detector(args.weights, args.task)[0]
        model.transform.min_size, model.transform.max_size = (min(size),), max(size)
        return model, [image[None] for image in read_images(find_pictures(args.images, args.count), size)]
    if args.weights is not None:
        model = load(args.weights).eval()
    else:
        model = dense.dense_model(args.model, pretrained=args.pretrained)
    batches = calibration_images(args.images, model, args.count, args.size)
    return model, [image for batch in batches for image in batch.split(1)]


if __name__ == '__main__':
    run(main)
