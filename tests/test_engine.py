"""Training: exact resume, order of batches, learning rate, metrics, checkpoints; on small drawn data."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from detection.data.coco import CocoDataset, Draw
from detection.data.loader import eval_loader
from detection.data.sample import write_sample
from detection.evaluation.coco_metrics import IOU_TYPES
from detection.evaluation.loop import evaluate_detector
from detection.training.checkpoint import (
    describe_data,
    detector_from_config,
    load_checkpoint,
    load_detector,
    save_checkpoint,
    save_latest,
)
from detection.training.config import OptimConfig, RunConfig, config_from_dict, load_config
from detection.training.engine import DetectorTrainer
from detection.training.loader import BatchStream, train_loader, training_sets
from detection.training.optim import build_optimizer, learning_rate
from detection.training.report import format_table

CPU = torch.device('cpu')


@pytest.fixture(scope='module')
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample(tmp_path_factory.mktemp('sample'), train=10, val=4, size=(96, 96))


def settings(task: str = 'box', data: dict | None = None, **optim) -> RunConfig:
    return config_from_dict(
        {
            'task': task,
            'log_every': 1,
            'data': {'batch_size': 2, 'workers': 0, **(data or {})},
            'model': {
                'backbone': 'resnet18',
                'min_size': 64,
                'max_size': 96,
                'fpn_channels': 16,
                'box_head': 16,
                'mask_layers': [8],
                'keypoint_layers': [8],
                'anchor_sizes': [8, 16, 32, 48, 64],
            },
            'optim': {'name': 'adamw', 'lr': 1e-3, 'lr_batch': None, 'iterations': 2, 'schedule': 'cosine', **optim},
        }
    )


def trainer(config: RunConfig, root: Path, output: Path) -> DetectorTrainer:
    train_set, val_set = training_sets(config, root)
    torch.manual_seed(config.seed)
    model = detector_from_config(config, describe_data(train_set, config.task))
    return DetectorTrainer(config, model, train_set, val_set, output, device=CPU, progress=False)


def rows(output: Path) -> list[dict]:
    return [json.loads(line) for line in (output / 'metrics.jsonl').read_text().splitlines()]


@pytest.mark.parametrize('task', ['box', 'mask', 'keypoint'])
def test_each_task_trains_evaluates_and_comes_back_from_its_file(task: str, sample: Path, tmp_path: Path) -> None:
    run = trainer(settings(task), sample, tmp_path)
    before = {k: v.clone() for k, v in run.model.state_dict().items()}
    results = run.run()
    assert tuple(results) == tuple(IOU_TYPES[task])
    assert any(not torch.equal(v, before[k]) for k, v in run.model.state_dict().items())
    assert json.loads((tmp_path / 'results.json').read_text()) == results

    model, meta = load_detector(tmp_path / 'checkpoint.pt')
    assert (meta['task'], meta['iteration'], meta['results']) == (task, 2, results)
    assert meta['class_names'] == run.train_set.class_names
    assert not model.training
    again = evaluate_detector(model, run.val_set, device=CPU, progress=False)
    for kind, figures in results.items():  # memory layouts differ, hence not to the last digit
        assert again[kind] == pytest.approx(figures, abs=1e-3)


@pytest.mark.parametrize('task', ['box', 'mask', 'keypoint'])
def test_real_coco_images_train(task: str, tiny_coco: Path, tmp_path: Path) -> None:
    results = trainer(settings(task), tiny_coco, tmp_path).run()
    assert set(results) == set(IOU_TYPES[task])


def test_metrics_hold_losses_rate_speed_and_memory(sample: Path, tmp_path: Path) -> None:
    trainer(settings('keypoint', iterations=3), sample, tmp_path).run()
    *steps, last = rows(tmp_path)
    assert [r['iteration'] for r in steps] == [1, 2, 3]
    for row in steps:
        parts = [v for k, v in row.items() if k.startswith('loss_')]
        assert row['loss'] == pytest.approx(sum(parts))
        assert len(parts) == 5
        assert min(row['lr'], row['images_per_s'], row['memory_mb']) > 0
    assert last['results']['bbox'].keys() >= {'AP', 'AP50'}


class Stop(Exception):
    """Stands for a machine that goes down."""


MIXED = {'copy_paste': 1.0, 'repeat_threshold': 1.0, 'jitter': [0.5, 1.5], 'crop': [64, 64], 'color': 0.5}


@pytest.mark.parametrize(
    'options',
    [
        {},
        {'accumulate': 2, 'ema': 0.9},
        {'name': 'sgd', 'schedule': 'multistep'},
        {'task': 'mask', 'data': MIXED},
        {'task': 'mask', 'data': {**MIXED, 'workers': 2}},
    ],
)
def test_interrupted_run_ends_with_the_same_weights(options: dict, sample: Path, tmp_path: Path) -> None:
    config = settings(**{'iterations': 6, **options})
    whole = trainer(config, sample, tmp_path / 'whole')
    whole.run()

    for stop in (2, 5):  # in the middle of an epoch, and at the end of one or more
        part = trainer(config, sample, tmp_path / 'parts')
        if (tmp_path / 'parts' / 'checkpoint.pt').is_file():
            part.resume(tmp_path / 'parts' / 'checkpoint.pt')
        step = part._step

        def failing(batches, part=part, step=step, stop=stop):
            if part.iteration == stop:
                raise Stop
            step(batches)
            part.save('checkpoint.pt')

        part._step = failing  # type: ignore[method-assign]
        with pytest.raises(Stop):
            part.run()
        assert load_checkpoint(tmp_path / 'parts' / 'checkpoint.pt')['iteration'] == stop
    last = trainer(config, sample, tmp_path / 'parts')
    last.resume(tmp_path / 'parts' / 'checkpoint.pt')
    last.run()
    for (name, one), other in zip(whole.trained.state_dict().items(), last.trained.state_dict().values()):
        assert torch.equal(one, other), name
    assert [r['iteration'] for r in rows(tmp_path / 'parts')] == [1, 2, 3, 4, 5, 6, 6]
    assert last.results == whole.results


def test_a_run_in_epochs_goes_on_after_as_many_images(sample: Path, tmp_path: Path) -> None:
    def config(batch_size: int, **optim) -> RunConfig:
        return settings('box', {'batch_size': batch_size}, **{'iterations': None, 'epochs': 2, **optim})

    run = trainer(config(2), sample, tmp_path)
    assert (run.total, run.step_images) == (10, 2)  # 10 images
    run.iteration = 7
    run.save('checkpoint.pt')
    for batch_size, optim, iteration in ((2, {}, 7), (5, {}, 2), (1, {}, 14), (5, {'iterations': 9}, 7)):
        other = trainer(config(batch_size, **optim), sample, tmp_path)
        other.resume(tmp_path / 'checkpoint.pt')
        assert other.iteration == iteration


def test_resume_refuses_another_task_or_network(sample: Path, tmp_path: Path) -> None:
    trainer(settings('box', iterations=1), sample, tmp_path).run()
    with pytest.raises(ValueError, match='another task'):
        trainer(settings('mask'), sample, tmp_path).resume(tmp_path / 'checkpoint.pt')
    wider = config_from_dict({**settings().to_dict(), 'model': {**settings().to_dict()['model'], 'box_head': 24}})
    with pytest.raises(ValueError, match='does not fit this configuration'):
        trainer(wider, sample, tmp_path).resume(tmp_path / 'checkpoint.pt')


def test_best_checkpoint_is_kept(sample: Path, tmp_path: Path) -> None:
    tree = settings('box', iterations=10).to_dict()
    run = trainer(config_from_dict({**tree, 'eval_every': 1}), sample, tmp_path)
    run.run()
    evaluations = [r for r in rows(tmp_path) if 'results' in r]
    assert [r['iteration'] for r in evaluations] == [5, 10]  # 10 images, 2 a step
    best = max(evaluations, key=lambda r: r['results']['bbox']['AP'])
    stored = load_checkpoint(tmp_path / 'best.pt')
    assert stored['results']['bbox']['AP'] == best['results']['bbox']['AP'] == run.best


def test_the_newest_checkpoints_stay_beside_the_best(sample: Path, tmp_path: Path) -> None:
    tree = {**settings('box', iterations=20).to_dict(), 'eval_every': 1, 'keep_checkpoints': 2}
    run = trainer(config_from_dict(tree), sample, tmp_path)
    (tmp_path / '.checkpoint.pt.x1').write_text('half a file of a killed process')
    run.run()
    names = {p.name for p in tmp_path.iterdir() if p.suffix == '.pt' or p.name.startswith('.')}
    assert names == {'best.pt', 'checkpoint.pt', 'checkpoint_00000015.pt', 'checkpoint_00000020.pt'}
    assert [load_checkpoint(tmp_path / f'checkpoint{n}.pt')['iteration'] for n in ('', '_00000015')] == [20, 15]
    assert load_config(tmp_path / 'config.yaml') == run.config
    # an earlier one is no worse to go on from
    again = trainer(run.config, sample, tmp_path / 'again')
    again.resume(tmp_path / 'checkpoint_00000015.pt')
    again.run()
    for one, other in zip(run.model.state_dict().values(), again.model.state_dict().values()):
        assert torch.equal(one, other)


@pytest.mark.parametrize('links', [True, False])
def test_rotation_goes_by_time_and_needs_no_links(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not links:
        monkeypatch.setattr('os.link', lambda *_: (_ for _ in ()).throw(OSError('no links here')))
    for iteration in (500, 10, 20, 20, 30):
        content = {'model': {}, 'config': {}, 'meta': {}, 'iteration': iteration}
        assert load_checkpoint(save_latest(tmp_path, content, keep=2))['iteration'] == iteration
    assert sorted(p.name for p in tmp_path.iterdir()) == ['checkpoint.pt'] + [
        f'checkpoint_000000{n}.pt' for n in (20, 30)
    ]


def test_loss_that_is_not_finite_names_its_images(sample: Path, tmp_path: Path) -> None:
    run = trainer(settings('box'), sample, tmp_path)
    torch.nn.init.constant_(run.model.roi_heads.box_predictor.cls_score.bias, float('inf'))
    with pytest.raises(FloatingPointError, match=r'iteration 0: loss_classifier nan.*image ids \[\d+, \d+\]'):
        run.run()
    assert not (tmp_path / 'checkpoint.pt').exists()


def test_averaged_weights_follow_their_formula(sample: Path, tmp_path: Path) -> None:
    run = trainer(settings('box', iterations=1, ema=0.75), sample, tmp_path)
    assert run.ema is not None
    start = run.model.backbone.fpn.inner_blocks[0][0].weight.detach().clone()
    run.run()
    end = run.model.backbone.fpn.inner_blocks[0][0].weight.detach()
    mean = run.trained.backbone.fpn.inner_blocks[0][0].weight
    decay = run.ema.get_decay(0)
    torch.testing.assert_close(mean, decay * start + (1 - decay) * end)
    stored, _ = load_detector(tmp_path / 'checkpoint.pt')
    torch.testing.assert_close(stored.backbone.fpn.inner_blocks[0][0].weight, mean)


def test_learning_rate_follows_the_schedule() -> None:
    steps = OptimConfig(lr=0.02, lr_batch=16, epochs=26, steps=(16, 22), warmup=10)
    rate = [learning_rate(steps, i, 260, 8) for i in range(260)]
    assert rate[0] == pytest.approx(0.01 / 11)
    assert rate[10] == rate[159] == pytest.approx(0.01)
    assert rate[160] == rate[219] == pytest.approx(0.001)
    assert rate[220] == rate[259] == pytest.approx(0.0001)
    cosine = OptimConfig(lr=1.0, lr_batch=None, schedule='cosine', warmup=1000)
    assert learning_rate(cosine, 0, 100, 8) == pytest.approx(1 / 11)  # warm-up is a tenth of a short run
    assert learning_rate(cosine, 55, 100, 8) == pytest.approx(0.5)
    assert learning_rate(cosine, 99, 100, 8) < 1e-3


def test_norms_and_biases_do_not_decay_with_adamw() -> None:
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    decayed, free = build_optimizer(net, OptimConfig(name='adamw', weight_decay=0.1)).param_groups
    assert [p.ndim for p in decayed['params']] == [4]
    assert (decayed['weight_decay'], free['weight_decay'], len(free['params'])) == (0.1, 0, 3)


def test_batches_take_each_image_once_and_can_start_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [i % 3 == 0 for i in range(26)]
    stream = BatchStream(groups, 4, seed=5)
    epochs = []
    for epoch in (0, 1, 0):
        stream.set_epoch(epoch)
        epochs.append(list(stream))
    assert epochs[0] == epochs[2] != epochs[1]
    flat = [draw for b in epochs[0] for draw in b]
    assert len(epochs[0]) == len(stream) == 6
    assert len({draw.image for draw in flat}) == len(flat) == 24
    assert [draw.position for draw in flat] == list(range(24))
    assert sum(len({groups[draw.image] for draw in b}) > 1 for b in epochs[0]) <= 1
    stream.set_epoch(0, start=4)
    assert list(stream) == epochs[0][4:]

    monkeypatch.setattr('detection.training.loader.world_size', lambda: 2)
    shares = []
    for r in (0, 1):
        monkeypatch.setattr('detection.training.loader.rank', lambda r=r: r)
        shares.append(list(BatchStream(groups, 2, seed=5)))
    assert [a + b for a, b in zip(*shares)] == epochs[0]  # two processes do together what one does


def test_fewer_images_than_a_step_takes() -> None:
    (batch,) = BatchStream([0] * 3, 7)
    images = [draw.image for draw in batch]
    assert sorted(images.count(i) for i in range(3)) == [2, 2, 3]


@pytest.mark.parametrize('copy_paste', [0.0, 1.0])
def test_an_image_that_comes_again_is_augmented_anew(copy_paste: float, sample: Path) -> None:
    data = {'copy_paste': copy_paste, 'repeat_threshold': 1.0, 'color': 1.0, 'batch_size': 12, 'flip': 0.0}
    config = settings('mask', data)
    train_set, _ = training_sets(config, sample)

    def epoch() -> list[tuple[int, torch.Tensor]]:
        loader = train_loader(train_set, config.data, config.seed)
        return [(t['image_id'], image) for images, targets in loader for image, t in zip(images, targets)]

    seen = epoch()
    again = [(a, b) for k, (i, a) in enumerate(seen) for j, b in seen[:k] if i == j]
    assert len(again) >= 2
    assert not any(torch.equal(a, b) for a, b in again)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(seen, epoch()))
    first = train_set.augmented(0, train_set.item_seed(0))[0]
    assert torch.equal(first, train_set[0][0])
    assert torch.equal(first, train_set[Draw(0, 0)][0])
    assert not torch.equal(first, train_set[Draw(0, 1)][0])


def test_keypoints_are_paired_as_configured(sample: Path) -> None:
    sets = training_sets(settings('keypoint', {'flip_pairs': ['nose:left_knee']}), sample)
    assert [s.flip_indices[:3] + s.flip_indices[13:14] for s in sets] == [(13, 1, 2, 0)] * 2
    by_name, _ = training_sets(settings('keypoint'), sample)
    assert by_name.flip_indices[:3] == (0, 2, 1)


def test_processes_share_the_evaluation_without_overlap(sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = CocoDataset(sample, 'train', 'box')
    monkeypatch.setattr('detection.data.loader.world_size', lambda: 3)
    seen = []
    for r in range(3):
        monkeypatch.setattr('detection.data.loader.rank', lambda r=r: r)
        seen += [t['image_id'] for _, targets in eval_loader(dataset, 2, 0) for t in targets]
    assert sorted(seen) == dataset.image_ids


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match='no checkpoint file'):
        load_checkpoint(tmp_path / 'none.pt')
    for content in (b'', b'not a checkpoint at all'):
        (tmp_path / 'bad.pt').write_bytes(content)
        with pytest.raises(ValueError, match=r'bad\.pt is not a checkpoint'):
            load_checkpoint(tmp_path / 'bad.pt')
    torch.save({'model': {}}, tmp_path / 'other.pt')
    with pytest.raises(ValueError, match='it lacks config, meta'):
        load_checkpoint(tmp_path / 'other.pt')


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / 'c.pt', {'model': 1, 'config': 2, 'meta': 3})
    with pytest.raises(Exception, match='pickle'):
        save_checkpoint(path, {'model': lambda: None})
    assert load_checkpoint(path)['model'] == 1
    assert [p.name for p in tmp_path.iterdir()] == ['c.pt']


def test_repeated_images_come_as_often_as_their_factors_say(monkeypatch: pytest.MonkeyPatch) -> None:
    factors = torch.tensor([1.0] * 8 + [2.5, 3.0])
    stream = BatchStream([0] * 10, 2, seed=1, factors=factors)
    assert len(stream) == 6  # 13.5 images
    counts = torch.zeros(10)
    for epoch in range(400):
        stream.set_epoch(epoch)
        batches = list(stream)
        assert len(batches) == 6
        counts += torch.bincount(torch.tensor(batches)[..., 0].flatten(), minlength=10)
    assert torch.allclose(counts / counts[:8].mean(), factors, rtol=0.08)
    stream.set_epoch(3)
    whole = list(stream)
    stream.set_epoch(3, 4)
    assert list(stream) == whole[4:]
    monkeypatch.setattr('detection.training.loader.world_size', lambda: 3)
    parts = []
    for r in range(3):
        monkeypatch.setattr('detection.training.loader.rank', lambda r=r: r)
        parts.append(list(stream))
    assert [len(p) for p in parts] == [0, 0, 0]  # started at batch 4 of 2
    assert len(stream) == 2


def test_sampling_and_copy_paste_reach_the_network(sample: Path, tmp_path: Path) -> None:
    plain = trainer(settings('mask'), sample, tmp_path / 'plain')
    config = settings('mask')
    data = dataclasses.replace(config.data, copy_paste=1.0, repeat_threshold=1.0)
    mixed = trainer(dataclasses.replace(config, data=data), sample, tmp_path / 'mixed')
    assert mixed.steps_per_epoch > plain.steps_per_epoch
    objects = [
        sum(len(t['labels']) for _, targets in run.loader for t in targets) / len(run.loader) for run in (plain, mixed)
    ]
    assert objects[1] > 1.2 * objects[0]
    assert set(mixed.run()) == {'bbox', 'segm'}


def test_table_has_every_figure() -> None:
    text = format_table({'bbox': {'AP': 0.5, 'AP50': 1.0}, 'keypoints': {'AP': -1.0}})
    assert text.splitlines()[0].split() == ['bbox', 'keypoints']
    assert text.splitlines()[1].split() == ['AP', '0.500', 'AP', '-1.000']
    assert text.splitlines()[2].split() == ['AP50', '1.000']
