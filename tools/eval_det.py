"""Evaluate a checkpoint of train_det.py, of torchvision's training, or a detector by name, with COCO's figures."""

from __future__ import annotations

import json
from pathlib import Path

from _cli import Parser, run


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        'checkpoint',
        nargs='?',
        help='checkpoint.pt of a training run, or a detector as torchvision or the authors saved it',
    )
    parser.add_argument('--weights', help='the same; `authors`: what they released for --task and --backbone; or '
                        'a name of torchvision, such as fasterrcnn_resnet50_fpn')  # fmt: skip
    parser.add_argument('--task', choices=('box', 'mask', 'keypoint'), help='refuse a checkpoint for another')
    parser.add_argument('--backbone', help='refuse another; of `authors`: norton_resnet50.r078 by default')
    parser.add_argument('--data', help='folder in COCO layout, by default data/coco or the sample set')
    parser.add_argument('--images', help='folder of the pictures, where it is not found beside the annotations')
    parser.add_argument('--split', default='val', help='val, train, or any split with an annotation file')
    parser.add_argument('--output', help='JSON file for the figures, by default eval_SPLIT.json beside the checkpoint')
    parser.add_argument('--detections', help='folder for the detections in the format of COCO submissions')
    parser.add_argument('--report', help='folder for precision-recall curves, AP by category, and the worst images')
    parser.add_argument('--flip', action='store_true', help='look at the mirrored images too and merge both answers')
    parser.add_argument('--batch-size', type=int, default=2)
    parser.add_argument('--workers', type=int, default=2, help='loading processes')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda, cuda:1, ...')
    args = parser.parse_args()

    from detection.data import CocoDataset, find_data
    from detection.evaluation import CocoEvaluator, FlipDetector, evaluate_detector, write_report
    from detection.training import AUTHORS, format_table, load_authors_detector, load_detector
    from norton_timm.utils import choose_device, is_main, process_group, write_text

    if args.batch_size < 1 or args.workers < 0:
        raise ValueError('--batch-size must be 1 or more and --workers 0 or more')
    device = choose_device(args.device)
    if (args.checkpoint is None) == (args.weights is None):
        raise ValueError('expected a checkpoint, or --weights: one of them')
    name = args.checkpoint or args.weights
    if args.weights == AUTHORS:
        model, meta = load_authors_detector(args.task, args.backbone or 'norton_resnet50.r078')
    else:
        model, meta = load_detector(name, args.task, args.backbone)
    source = find_data(args.data)
    pairs = meta['config'].data.keypoint_pairs() if meta['task'] == 'keypoint' else None
    dataset = CocoDataset(source.root, args.split, meta['task'], flip_pairs=pairs, images=args.images,
                          class_names=meta['class_names'], keypoint_names=meta['keypoint_names'] or None)  # fmt: skip
    path = Path(args.output or Path(name).with_name(f'eval_{args.split}.json'))
    if path.exists() and path.samefile(dataset.annotation_file):
        raise ValueError(f'{path} is read and would be overwritten: choose another --output')
    network = FlipDetector(model, dataset.flip_indices) if args.flip else model
    with process_group(device):
        evaluator = CocoEvaluator(dataset.coco, meta['task'], dataset.label_to_category)
        results = evaluate_detector(network.to(device), dataset, device=device, batch_size=args.batch_size,
                           workers=args.workers, evaluator=evaluator)  # fmt: skip
        if not is_main():
            return
        flipped = ', with their mirror images' if args.flip else ''
        print(f'{name} on {len(dataset)} images{flipped}, {args.split} of {source.name}')
        print(format_table(results))
        print(f'written: {write_text(path, json.dumps(results, indent=1) + chr(10))}')
        if args.detections:
            print('written:', *evaluator.write_results(args.detections))
        if args.report:
            print('written:', *write_report(evaluator, dataset, args.report))


if __name__ == '__main__':
    run(main)
