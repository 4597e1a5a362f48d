"""The reference loop by hand, and the comparison on a few drawn images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from detection.data.sample import write_sample
from detection.studies.training import benchmark_loop, train_one_epoch
from detection.training import DetectorTrainer
from detection.training.config import config_from_dict

CPU = torch.device('cpu')


class Line(nn.Module):
    """One number w; losses w * x and (w - y) ** 2."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(1.0))

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {'slope': self.w * images[0].sum(), 'square': (self.w - targets[0]['y']) ** 2}


def test_reference_loop_is_gradient_descent_with_a_warm_up() -> None:
    data = [
        ([torch.tensor([x])], [{'y': torch.tensor(y), 'image_id': 1}]) for x, y in ((0.5, 2.0), (1.0, 0.0), (0.0, 3.0))
    ]
    model = Line()
    meters = train_one_epoch(model, torch.optim.SGD(model.parameters(), 0.1), data, CPU, 0)
    w, losses = 1.0, []
    for step, (x, y) in enumerate(((0.5, 2.0), (1.0, 0.0), (0.0, 3.0))):
        losses.append(w * x + (w - y) ** 2)
        w -= 0.1 * (1e-3 + (1 - 1e-3) * min(step / 2, 1)) * (x + 2 * (w - y))
    assert model.w.item() == pytest.approx(w, rel=1e-5)
    assert list(meters['loss'].values) == pytest.approx(losses, rel=1e-5)
    assert meters['slope'].count == 3
    with pytest.raises(FloatingPointError, match='loss is nan'):
        train_one_epoch(
            model, torch.optim.SGD(model.parameters(), 0.1), [([torch.tensor([float('nan')])], data[0][1])], CPU, 1
        )


def test_both_loops_are_timed_on_the_same_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_sample(tmp_path, train=6, val=1, size=(64, 64))
    model = {'backbone': 'resnet10t', 'min_size': 64, 'max_size': 64, 'fpn_channels': 8, 'box_head': 8}
    config = config_from_dict({'data': {'batch_size': 2, 'workers': 0}, 'model': model, 'optim': {'ema': 0.9}})
    seen: dict[str, list] = {'ours': [], 'reference': []}

    def record(images: list[Tensor], name: str) -> None:
        seen[name] += [image.sum().item() for image in images]

    from detection.studies import training as module

    monkeypatch.setattr(DetectorTrainer, '_losses', spy(DetectorTrainer._losses, lambda a: record(a[1], 'ours')))
    original = module.train_one_epoch

    def reference(net, optimizer, loader, *rest):
        hook = net.register_forward_pre_hook(lambda _, inputs: record(inputs[0], 'reference'))
        original(net, optimizer, loader, *rest)
        hook.remove()

    monkeypatch.setattr(module, 'train_one_epoch', reference)
    result = benchmark_loop(config, root, device=CPU, rounds=2)
    assert len(result['rounds']) == 2
    assert all(row['ratio'] == pytest.approx(row['ours'] / row['reference']) for row in result['rounds'])
    assert min(result['ours'], result['reference'], result['ratio']) > 0
    assert len(seen['ours']) == 18  # three epochs of six images
    assert seen['ours'] == seen['reference']


def spy(method, note):
    def call(*arguments):
        note(arguments)
        return method(*arguments)

    return call
