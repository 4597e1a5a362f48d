"""Convert a checkpoint that the authors of NORTON or CORING released into a file of ours.

A classification network becomes a .safetensors file. A detector of torchvision's reference training becomes a .pt file
for eval_det.py and demo_video.py, or, with a .safetensors name, its backbone alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _cli import Parser, run


def detector_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint for eval_det.py: the tensors, a configuration that builds their detector, and COCO's classes."""
    from torchvision.models import detection as tv

    from detection.rcnn import convert_detector_state_dict
    from detection.training import detector_from_config, load_config
    from detection.visual import COCO_SKELETON

    state, backbone = convert_detector_state_dict(path)
    cfg = backbone.pretrained_cfg
    name = '.'.join(filter(None, (cfg['architecture'], cfg.get('tag'))))
    task = next((t for t in ('mask', 'keypoint') if f'roi_heads.{t}_predictor' in ' '.join(state)), 'box')
    known = {'box': tv.FasterRCNN_ResNet50_FPN_Weights, 'mask': tv.MaskRCNN_ResNet50_FPN_Weights,
             'keypoint': tv.KeypointRCNN_ResNet50_FPN_Weights}[task].COCO_V1.meta  # fmt: skip
    classes = len(state['roi_heads.box_predictor.cls_score.weight'])
    if classes != len(known['categories']):
        raise ValueError(f'{path} has {classes} classes, expected the {len(known["categories"])} of COCO for {task}')
    labels = [i for i, label in enumerate(known['categories']) if i and label != 'N/A']
    points = list(known.get('keypoint_names', ()))
    config = load_config(None, [], {'task': task, 'model.backbone': name})
    meta = {'task': task, 'num_classes': classes, 'class_names': ['__background__', *known['categories'][1:]],
            'label_to_category': {i: i for i in labels}, 'num_keypoints': len(points), 'keypoint_names': points,
            'skeleton': [list(edge) for edge in COCO_SKELETON] if points else []}  # fmt: skip
    try:
        detector_from_config(config, meta).load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f'{path} does not fit a {task} detector on {name}: {error}') from error
    return {'model': state, 'ema': None, 'iteration': None, 'results': None, 'config': config.to_dict(), 'meta': meta}


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
        from detection.training import save_checkpoint

        check_output(args.output, '.pt')
        content = detector_checkpoint(args.checkpoint)
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
