"""Show what a dense and a compressed network look at: class-activation maps and feature maps in one picture.

python tools/visualize.py resnet50 small.safetensors --pretrained --image photo.jpg --output maps.png
python tools/visualize.py resnet56_cifar small.safetensors --weights dense.safetensors --image a.jpg --output maps.png
"""

from __future__ import annotations

from pathlib import Path

from _cli import Parser, run


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument('dense', help='timm name with --pretrained or --weights, or a .safetensors of norton_timm.save')
    parser.add_argument('compressed', type=Path, help='.safetensors of norton_timm.save')
    parser.add_argument('--image', type=Path, required=True, help='picture to look at')
    parser.add_argument('--output', type=Path, required=True, help='picture to write, .png')
    parser.add_argument('--pretrained', action='store_true', help="the dense network's published weights")
    parser.add_argument('--weights', type=Path, help='file with the weights of the dense network')
    parser.add_argument('--class', dest='target', type=int, help='whose maps; default: what the dense network says')
    parser.add_argument('--classes', nargs='+', default=[], help='names of the classes, for the headings')
    parser.add_argument('--layer', help='for the class-activation map; default: the last stage')
    parser.add_argument('--features', help='layer for the feature maps; default: the first stage')
    parser.add_argument('--size', type=int, help='side of the picture in pixels; default: as the network is made for')
    args = parser.parse_args()

    from norton_timm import load
    from norton_timm.models import dense_model
    from norton_timm.studies import compare_looks, plot_comparison
    from norton_timm.utils import check_output

    check_output(args.output, '.png')
    if args.size is not None and args.size < 8:
        parser.error(f'--size is {args.size}, expected 8 or more')
    if args.dense.endswith('.safetensors'):
        dense = load(args.dense)
    elif args.pretrained == (args.weights is not None):
        parser.error(f'{args.dense} needs one of --pretrained and --weights FILE')
    else:
        sizes = {} if args.weights is None else {'num_classes': load(args.compressed).num_classes}
        dense = dense_model(args.dense, args.pretrained, args.weights, **sizes)
    found = compare_looks(
        (Path(args.dense).stem, dense), (args.compressed.stem, load(args.compressed)), args.image,
        target=args.target, layer=args.layer, features=args.features, size=args.size,
    )  # fmt: skip
    plot_comparison(found, args.output, args.classes)
    for look in (found.dense, found.compressed):
        print(f'{look.name}: class {look.label}, {100 * look.confidence:.1f} %, {len(look.features)} feature maps')
    print(f'class-activation maps of class {found.target}: correlation {found.agreement:.3f}')
    print(f'feature maps: correlation with the nearest dense one {float(found.correlation.mean()):.3f} on average')
    print(f'wrote {args.output}')


if __name__ == '__main__':
    run(main)
