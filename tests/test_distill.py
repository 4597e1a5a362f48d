"""The distillation loss against formulas written out by hand; the teacher stays as it is."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from torch import Tensor, nn

import norton_timm.models  # noqa: F401
from norton_timm.training.config import DistillConfig
from norton_timm.training.distill import Distillation, recorded, shared_features


class Fixed(nn.Module):
    """Gives the same logits whatever it sees."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, images: Tensor) -> Tensor:
        return self.logits


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(v) for v in row)
    return [math.exp(v) / total for v in row]


@pytest.mark.parametrize('smoothing', [0.0, 0.1])
@pytest.mark.parametrize(('weight', 'temperature'), [(0.9, 4.0), (0.3, 1.0), (1.0, 2.0), (0.0, 4.0)])
def test_loss_is_the_formula(weight: float, temperature: float, smoothing: float) -> None:
    student, teacher = torch.randn(3, 4) * 2, torch.randn(3, 4) * 2
    labels = [2, 0, 3]
    expected = 0.0
    for s, t, label in zip(student.tolist(), teacher.tolist(), labels):
        hard = 0.0
        for k, p in enumerate(softmax(s)):
            hard -= ((1 - smoothing) * (k == label) + smoothing / 4) * math.log(p)
        q, p = softmax([v / temperature for v in t]), softmax([v / temperature for v in s])
        soft = sum(b * math.log(b / a) for a, b in zip(p, q))
        expected += ((1 - weight) * hard + weight * temperature**2 * soft) / 3
    config = DistillConfig(weight=weight, temperature=temperature)
    network = Fixed(student)
    loss = Distillation(Fixed(teacher), network, config).loss(network, torch.zeros(3), torch.tensor(labels), smoothing)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_labels_may_be_probabilities() -> None:
    student, teacher = Fixed(torch.randn(2, 3)), Fixed(torch.randn(2, 3))
    mixed = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.5, 0.5]])
    loss = Distillation(teacher, student, DistillConfig(weight=0.0)).loss(student, torch.zeros(2), mixed)
    assert loss.item() == pytest.approx(float(-(mixed * student.logits.log_softmax(1)).sum(1).mean()), rel=1e-5)


def test_teacher_never_changes() -> None:
    teacher, student = (timm.create_model('resnet20_cifar').train() for _ in range(2))
    before = copy.deepcopy(teacher.state_dict())
    distillation = Distillation(teacher, student, DistillConfig(weight=0.5, features=0.1))
    optimizer = torch.optim.SGD([*student.parameters(), *teacher.parameters()], lr=0.1)
    images, labels = torch.randn(8, 3, 32, 32), torch.randint(10, (8,))
    start = copy.deepcopy(student.state_dict())
    for _ in range(3):
        optimizer.zero_grad()
        distillation.loss(student, images, labels).backward()
        optimizer.step()
    assert not any(module.training for module in teacher.modules())
    assert all(p.grad is None for p in teacher.parameters())
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    changed = student.state_dict()
    assert not torch.equal(changed['fc.weight'], start['fc.weight'])
    assert not torch.equal(changed['bn1.running_mean'], start['bn1.running_mean'])


def test_features_of_equal_width_only() -> None:
    teacher = timm.create_model('resnet20_cifar')
    same, narrow = timm.create_model('resnet20_cifar'), timm.create_model('resnet20_cifar')
    assert shared_features(teacher, same) == [row['module'] for row in teacher.feature_info]
    narrow.feature_info = [{**row, 'num_chs': row['num_chs'] - (k == 0)} for k, row in enumerate(narrow.feature_info)]
    names = shared_features(teacher, narrow)
    assert names == [row['module'] for row in teacher.feature_info][1:]
    images, labels = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3])
    plain, more = (Distillation(teacher, narrow.eval(), DistillConfig(features=f)) for f in (0.0, 0.25))
    with recorded(teacher, names) as wanted, recorded(narrow, names) as found, torch.no_grad():
        teacher(images), narrow(images)
    errors = [float(((found[n] - wanted[n]) ** 2).sum() / (wanted[n] ** 2).sum()) for n in names]
    difference = float(more.loss(narrow, images, labels) - plain.loss(narrow, images, labels))
    assert difference == pytest.approx(0.25 * sum(errors) / len(errors), rel=1e-3)
    narrow.feature_info = [{**row, 'num_chs': 1} for row in narrow.feature_info]
    with pytest.raises(ValueError, match='equal width'):
        Distillation(teacher, narrow, DistillConfig(features=0.1))


def test_hooks_are_taken_away() -> None:
    student = timm.create_model('resnet20_cifar')
    distillation = Distillation(timm.create_model('resnet20_cifar'), student, DistillConfig(features=0.1))
    for _ in range(2):
        distillation.loss(student, torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))
    for network in (student, distillation.teacher):
        assert not any(module._forward_hooks for module in network.modules())
