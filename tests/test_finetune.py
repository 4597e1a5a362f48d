"""The training loop: what a step is, that a stopped run goes on bit for bit, and that NaN stops it."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from image_sets import coloured
from torch import Tensor, nn

from norton_timm.training.config import DistillConfig, OptimConfig
from norton_timm.training.data import ArrayData, Preprocessing
from norton_timm.training.distill import Distillation
from norton_timm.training.loop import Trainer, evaluate

CPU = torch.device('cpu')
OPTIM = OptimConfig(lr=0.02, epochs=3, warmup=1, batch_size=16)


def colours(train: int = 64, size: int = 16) -> ArrayData:
    preprocessing = Preprocessing((size, size), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    splits = (coloured(n, seed=seed, size=size) for seed, n in enumerate((train, 30)))
    return ArrayData(*splits, list('abcd'), preprocessing, CPU)


def small(norm: bool = True, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8) if norm else nn.Identity(), nn.ReLU(), nn.Conv2d(8, 8, 3, 2),
              nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(8, 4)]  # fmt: skip
    return nn.Sequential(*layers)


def trainer(folder: Path, optim: OptimConfig = OPTIM, model: nn.Module | None = None, **options) -> Trainer:
    folder.mkdir(exist_ok=True)
    model = small() if model is None else model
    data = options.pop('data', None) or colours()
    return Trainer(model, data, optim, folder, device=CPU, progress=False, **options)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_evaluate_counts_as_a_loop_does() -> None:
    images, labels = torch.randn(37, 10), torch.randint(10, (37,))

    class Logits:
        def test_batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
            yield from zip(images.split(batch_size), labels.split(batch_size))

    model = nn.Sequential(nn.Dropout(0.5)).train()
    found = evaluate(model, Logits(), CPU, batch_size=8)  # type: ignore[arg-type]
    ranks = [sorted(row, reverse=True).index(row[y]) for row, y in zip(images.tolist(), labels.tolist())]
    losses = [math.log(sum(map(math.exp, row))) - row[y] for row, y in zip(images.tolist(), labels.tolist())]
    assert found['top1'] == pytest.approx(100 * sum(r == 0 for r in ranks) / 37)
    assert found['top5'] == pytest.approx(100 * sum(r < 5 for r in ranks) / 37)
    assert found['loss'] == pytest.approx(sum(losses) / 37, rel=1e-5)
    assert model.training


def test_it_learns_and_writes_what_it_measures(tmp_path: Path) -> None:
    run = trainer(tmp_path, dataclasses.replace(OPTIM, epochs=8, eval_every=4, lr=0.1))
    results = run.run()
    written = rows(tmp_path)
    assert [row['epoch'] for row in written] == list(range(1, 9))
    assert [row['epoch'] for row in written if 'top1' in row] == [4, 8]
    assert written[-1]['top1'] == results['top1'] == evaluate(run.trained, run.data, CPU)['top1'] > 60
    assert written[-1]['loss'] < 0.7 * written[0]['loss']
    assert written[-1]['test_loss'] == results['loss'] != written[-1]['loss']
    assert all(row['memory_mb'] > 1 and row['images_per_s'] > 0 and row['run'] == 'checkpoint' for row in written)


def test_tensorboard_gets_the_metrics(tmp_path: Path) -> None:
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    trainer(tmp_path).run()
    events = accumulator.EventAccumulator(str(tmp_path / 'tensorboard' / 'checkpoint')).Reload()
    losses = [row['loss'] for row in rows(tmp_path)]
    assert [(e.step, e.value) for e in events.Scalars('loss')] == [(k + 1, pytest.approx(v)) for k, v in
                                                                  enumerate(losses)]  # fmt: skip


def test_one_step_is_sgd_with_momentum(tmp_path: Path) -> None:
    """A whole run against the update written out: Nesterov momentum, weight decay, warm-up and cosine."""
    optim = dataclasses.replace(OPTIM, epochs=2, momentum=0.9, weight_decay=0.01)
    run = trainer(tmp_path, optim)
    other = copy.deepcopy(run.model).train()
    run.run()
    velocity = [torch.zeros_like(p) for p in other.parameters()]
    for step in range(8):
        if step < 4:
            lr = optim.lr / 100 + step * (optim.lr - optim.lr / 100) / 4
        else:
            lr = optim.lr * 0.5 * (1 + math.cos(math.pi * step / 8))
        images, labels = list(run.data.train_batches(step // 4, 16, 0))[step % 4]
        other.zero_grad()
        F.cross_entropy(other(images), labels).backward()
        with torch.no_grad():
            for p, v in zip(other.parameters(), velocity):
                g = p.grad + (0.01 * p if p.ndim > 1 else 0.0)
                v.mul_(0.9).add_(g)
                p.sub_(lr * (g + 0.9 * v))
    for (name, p), q in zip(run.model.named_parameters(), other.parameters()):
        torch.testing.assert_close(p, q, msg=name, rtol=1e-4, atol=1e-6)


def test_accumulated_batches_are_one_batch(tmp_path: Path) -> None:
    whole = trainer(tmp_path / 'a', OPTIM, small(norm=False))
    halves = trainer(tmp_path / 'b', dataclasses.replace(OPTIM, batch_size=8, accumulate=2), small(norm=False))
    for run in (whole, halves):
        run.run()
    for p, q in zip(whole.model.parameters(), halves.model.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    assert whole.steps == halves.steps == 4
    assert not same(whole.model, small(norm=False))


def test_average_of_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, dataclasses.replace(OPTIM, ema=0.5))
    assert run.ema is not None
    expected = {k: v.clone() for k, v in run.model.state_dict().items()}
    step_of = type(run)._step

    def step(self, batches):
        loss = step_of(self, batches)
        at = step.count
        step.count += 1
        decay = run.ema.get_decay(at)
        assert decay <= 0.5
        for k, v in self.model.state_dict().items():
            expected[k] = decay * expected[k] + (1 - decay) * v if v.is_floating_point() else v.clone()
        return loss

    step.count = 0
    monkeypatch.setattr(type(run), '_step', step)
    run.run()
    assert step.count == 12 and run.trained is run.ema.module
    for k, v in run.trained.state_dict().items():
        torch.testing.assert_close(v, expected[k], msg=k)
    assert not same(run.trained, run.model)


def test_clipping_bounds_the_step(tmp_path: Path) -> None:
    moved = []
    for clip in (1e-3, None):
        optim = dataclasses.replace(OPTIM, epochs=1, warmup=0, clip=clip, momentum=0.5, weight_decay=0.0)
        run = trainer(tmp_path / str(clip), optim)
        before = copy.deepcopy(run.model)
        run.run()
        moved.append(
            sum((p - q).norm().item() ** 2 for p, q in zip(run.model.parameters(), before.parameters())) ** 0.5
        )
    bound = 4 * optim.lr * 1e-3 * (1 + 0.5 / (1 - 0.5))  # 4 steps, the momentum's sum of gradients
    assert 0 < moved[0] <= bound < moved[1]


def test_bf16_computes_in_bf16_and_keeps_float32(tmp_path: Path) -> None:
    run = trainer(tmp_path, dataclasses.replace(OPTIM, amp='bf16'))
    kinds = set()
    run.model[3].register_forward_hook(lambda m, a, y: kinds.add(y.dtype))
    results = run.run()
    assert kinds == {torch.bfloat16} and math.isfinite(results['loss'])
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}


@pytest.mark.parametrize('kind', ['mixup', 'cutmix'])
def test_mixed_images_have_mixed_labels(kind: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, dataclasses.replace(OPTIM, smoothing=0.1), **{kind: 1.0})
    seen = []
    run.model.register_forward_pre_hook(lambda m, a: seen.append(a[0].clone()))
    plain = next(run.data.train_batches(0, 16, 0))
    torch.manual_seed(0)
    loss = run._loss(plain[0].clone(), plain[1])
    changed = (seen[0] != plain[0]).flatten(1).any(1)
    assert changed.sum() > 8 and float(loss) != float(F.cross_entropy(run.model(plain[0]), plain[1]))
    if kind == 'cutmix':  # each pixel is of one image or of its partner in the flipped batch
        assert ((seen[0] == plain[0]) | (seen[0] == plain[0].flip(0))).all()
    assert math.isfinite(run.run()['loss'])


OPTIONS = {
    'plain': {},
    'ema': {'optim': {'ema': 0.9}},
    'accumulate': {'optim': {'batch_size': 8, 'accumulate': 2}},
    'adamw': {'optim': {'name': 'adamw', 'lr': 1e-3}},
    'mixed': {'mixup': 0.5, 'cutmix': 0.5},
    'bf16': {'optim': {'amp': 'bf16', 'clip': 1.0}},
}


@pytest.mark.parametrize('name', OPTIONS)
@pytest.mark.parametrize('stop_at', [1, 6, 11])
def test_a_stopped_run_goes_on_bit_for_bit(
    name: str, stop_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped within a step, of the first, second and third epoch."""
    options = dict(OPTIONS[name])
    optim = dataclasses.replace(OPTIM, **options.pop('optim', {}))

    def make(folder: str) -> Trainer:
        return trainer(tmp_path / folder, optim, small(dropout=0.3), **options)

    whole = make('whole')
    whole.run()
    stopped, count = make('parts'), 0
    step_of = Trainer._step

    def step(self, batches):
        nonlocal count
        count += 1
        if count == stop_at:
            raise KeyboardInterrupt
        return step_of(self, batches)

    monkeypatch.setattr(Trainer, '_step', step)
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    torch.rand(7)
    again = make('parts')
    again.run()
    assert again.epoch == 3 and same(again.model, whole.model) and same(again.trained, whole.trained)
    figures = [[{k: row[k] for k in ('epoch', 'loss', 'lr', 'top1')} for row in rows(tmp_path / f)]
               for f in ('whole', 'parts')]  # fmt: skip
    assert figures[0] == figures[1] and len(figures[0]) == 3
    assert make('parts').run() == whole.results  # a run that is over is not trained again


def test_two_runs_of_one_seed_are_equal_and_of_two_are_not(tmp_path: Path) -> None:
    runs = [trainer(tmp_path / str(k), seed=seed) for k, seed in enumerate((0, 0, 1))]
    for run in runs:
        run.run()
    assert same(runs[0].model, runs[1].model) and not same(runs[0].model, runs[2].model)


def test_it_learns_from_its_teacher_alone(tmp_path: Path) -> None:
    """Without a label (weight 1), the student gets near the trained teacher, which stays as it is."""
    teacher = trainer(tmp_path / 'teacher', dataclasses.replace(OPTIM, epochs=8, lr=0.1))
    assert teacher.run()['top1'] > 60
    before = {k: v.clone() for k, v in teacher.model.state_dict().items()}
    student = small()
    for layer in student:
        if hasattr(layer, 'reset_parameters'):
            layer.reset_parameters()
    start = evaluate(student, teacher.data, CPU)['top1']
    distillation = Distillation(teacher.model, student, DistillConfig(weight=1.0))
    run = trainer(tmp_path / 'student', dataclasses.replace(OPTIM, epochs=12), student, teacher=distillation)
    assert run.run()['top1'] > max(start, 45)
    assert all(torch.equal(v, before[k]) for k, v in teacher.model.state_dict().items())


def test_nan_stops_the_run_and_keeps_the_epoch_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, count = trainer(tmp_path), 0
    loss_of = Trainer._loss

    def loss(self, images, labels):
        nonlocal count
        count += 1
        return loss_of(self, images, labels) * (float('nan') if count == 7 else 1)

    monkeypatch.setattr(Trainer, '_loss', loss)
    with pytest.raises(FloatingPointError, match=r'epoch 2, step 3; .*checkpoint.pt keeps epoch 1'):
        run.run()
    again = trainer(tmp_path)
    again._resume()
    assert again.epoch == 1 and [row['epoch'] for row in rows(tmp_path)] == [1]
    assert all(torch.isfinite(v).all() for v in again.model.state_dict().values())
    assert again.run()['loss'] > 0


def test_nan_in_the_first_epoch_leaves_no_checkpoint(tmp_path: Path) -> None:
    run = trainer(tmp_path, dataclasses.replace(OPTIM, lr=1e30, warmup=0))
    with pytest.raises(FloatingPointError, match='no epoch was complete'):
        run.run()
    assert not (tmp_path / 'checkpoint.pt').exists()


@pytest.mark.parametrize('damage', ['cut', 'text', 'other network', 'other optimiser'])
def test_a_checkpoint_that_is_none(damage: str, tmp_path: Path) -> None:
    trainer(tmp_path).run()
    path, optim, model = tmp_path / 'checkpoint.pt', OPTIM, small()
    if damage == 'cut':
        path.write_bytes(path.read_bytes()[:1000])
    elif damage == 'text':
        path.write_text('nothing')
    elif damage == 'other network':
        model = small(norm=False)
    else:
        optim = dataclasses.replace(OPTIM, ema=0.9)
    with pytest.raises(ValueError, match='is damaged or no checkpoint of this run') as error:
        trainer(tmp_path, optim, model).run()
    assert '\n' not in str(error.value)


def test_too_few_images(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='64 training images do not fill one step'):
        trainer(tmp_path, dataclasses.replace(OPTIM, batch_size=65))
    with pytest.raises(ValueError, match='do not fill one step'):
        trainer(tmp_path, dataclasses.replace(OPTIM, accumulate=5))


@pytest.mark.slow
def test_compiled_network_learns_the_same(tmp_path: Path) -> None:
    """Half a minute and a C++ compiler: pytest tests/test_finetune.py -m slow."""
    runs = [trainer(tmp_path / str(k), compile=k == 1) for k in range(2)]
    for run in runs:
        run.run()
    for p, q in zip(runs[0].model.parameters(), runs[1].model.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)
    assert not any(name.startswith('_orig_mod') for name in torch.load(tmp_path / '1' / 'checkpoint.pt')['model'])
