"""Train a detector (boxes, masks or keypoints) on a timm backbone, evaluate it, and draw what it finds.

Without --data it takes data/coco if that exists. Otherwise it draws a small sample set and takes a configuration that a
laptop can train. All settings are in configs/detection. torchrun starts it on several devices, or on machines that
share the output folder. The same command again continues from the last checkpoint, also on fewer or more devices; with
--resume it does so with another configuration, such as a longer run.
"""

from __future__ import annotations

import os
from pathlib import Path

from _cli import Parser, run, when_stopped

import torch

CONFIGS = Path(__file__).resolve().parents[1] / 'configs' / 'detection'


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument('--task', help='box, mask or keypoint')
    parser.add_argument('--data', help='folder in COCO layout')
    parser.add_argument('--config', help='YAML file, instead of the one for this task and data')
    parser.add_argument('--backbone', help='timm name, such as norton_resnet50.r078')
    parser.add_argument('--weights', help='file to start from: of norton_timm.save or timm, or a whole detector; '
                        '`authors`: what they released for --task and --backbone; or a name of torchvision, such as '
                        'fasterrcnn_resnet50_fpn, which says task and backbone')  # fmt: skip
    parser.add_argument('--partial', action='store_true', help='layers that --weights lacks start at random')
    parser.add_argument('--output', help='folder for what is written, by default runs/TASK')
    parser.add_argument(
        '--resume', action='store_true', help='continue the run in the output folder, however configured'
    )
    parser.add_argument('--check-data', action='store_true', help='only read all of the data and list what is wrong')
    parser.add_argument('--iterations', type=int, help='length of the run in steps')
    parser.add_argument('--epochs', type=float, help='length of the run in passes over the data')
    parser.add_argument('--device', help='auto, cpu, cuda, cuda:1, ...')
    parser.add_argument('--seed', type=int)
    parser.add_argument('--deterministic', action='store_true', help='only operations that give equal bits each time')
    parser.add_argument('--workers', type=int, help='loading processes')
    parser.add_argument('--set', action='append', default=[], metavar='KEY=VALUE', help='e.g. optim.lr=0.01')
    args = parser.parse_args()

    from detection.data import check_data, find_data
    from detection.training import (
        DetectorTrainer,
        describe_data,
        describe_run,
        detector_from_config,
        format_table,
        load_config,
        same_run,
        save_predictions,
        training_sets,
        values_of_weights,
    )
    from norton_timm.utils import check_not_written, choose_device, is_main, make_deterministic, process_group

    if args.task is None and args.config is None and not values_of_weights(args.weights):
        raise ValueError('--task is missing, expected box, mask or keypoint')
    overrides = list(args.set) if args.epochs is None else ['optim.iterations=null', *args.set]
    values = {'task': args.task, 'data.root': args.data, 'model.backbone': args.backbone,
              'model.weights': args.weights, 'model.partial': args.partial or None,
              'device': args.device, 'seed': args.seed, 'data.workers': args.workers,
              'deterministic': args.deterministic or None,
              'optim.epochs': args.epochs, 'optim.iterations': args.iterations}  # fmt: skip
    config = load_config(args.config, overrides, values)
    device = choose_device(config.device)
    if config.deterministic:
        make_deterministic()
    output = Path(args.output or f'runs/{config.task}')
    source = find_data(config.data.root)
    if args.config is None:
        kind = 'sample_' if (source.root / 'sample.json').is_file() else ''
        given = {key: value for key, value in values.items() if value is not None}
        values = {**values_of_weights(config.model.weights), **given}
        config = load_config(CONFIGS / f'{kind}{config.task}.yaml', overrides, values)
    if args.check_data:
        splits = (config.data.train_split, config.data.val_split)
        print(report := check_data(source.root, config.task, tuple(dict.fromkeys(splits)), images=config.data.images))
        raise SystemExit(0 if report.ok else 1)
    latest = output / 'checkpoint.pt'
    if args.resume and not latest.is_file() and 'TORCHELASTIC_RUN_ID' not in os.environ:  # torchrun may restart
        raise FileNotFoundError(f'--resume: no {latest}')
    goes_on = latest.is_file() and (same_run(latest, config) or args.resume)
    if latest.is_file() and not goes_on:
        raise ValueError(f'{output} holds a run with another configuration: choose another --output, or --resume it')

    if not goes_on:
        check_not_written([config.model.weights], output, ('best.pt', 'checkpoint*.pt'))

    def how_to_go_on() -> str:
        if latest.is_file():
            return f'the same command goes on from {latest}'
        return 'no checkpoint was written yet, the same command begins again'

    with when_stopped(how_to_go_on):
        train_set, val_set = training_sets(config, source.root)
        torch.manual_seed(config.seed)
        model = detector_from_config(config, describe_data(train_set, config.task))
        with process_group(device):
            trainer = DetectorTrainer(config, model, train_set, val_set, output, device=device)
            if goes_on:
                trainer.resume(latest)
            if is_main():
                print(describe_run(trainer, source.name))
            results = trainer.run()
            if is_main():
                save_predictions(trainer.trained, val_set, output / 'predictions.jpg', device=device)
                print(format_table(results), f'written to {output}', sep='\n')


if __name__ == '__main__':
    run(main)
