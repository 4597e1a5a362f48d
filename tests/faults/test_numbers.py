"""NaN, infinity, classes without examples and images of crowds only: named, or survived as COCO's evaluation does."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from detection.data.coco import CocoDataset, collate
from detection.evaluation.loop import evaluate_detector
from detection.training.checkpoint import load_detector
from norton_timm.training.data import ArrayData, Preprocessing
from norton_timm.training.loop import evaluate as evaluate_classifier
from norton_timm.utils.files import remove_partial
from norton_timm.utils.processes import HeldSignals

from .checkpoints import detector
from .test_inputs import coco

CPU = torch.device('cpu')


@pytest.fixture
def trained(tmp_path: Path) -> nn.Module:
    (tmp_path / 'a.pt').write_bytes(detector())
    return load_detector(tmp_path / 'a.pt')[0]


@pytest.fixture
def dataset(tmp_path: Path) -> CocoDataset:
    return CocoDataset(coco(tmp_path), 'train', 'box')


def test_an_intact_detector_is_read_and_evaluated(trained: nn.Module, dataset: CocoDataset) -> None:
    results = evaluate_detector(trained, dataset, device=CPU, label_to_category={1: 1}, progress=False)
    assert 0 <= results['bbox']['AP'] <= 1


@pytest.mark.parametrize('number', [float('nan'), float('inf')])
def test_weights_that_are_no_numbers_are_named(number: float, trained: nn.Module, dataset: CocoDataset) -> None:
    name, parameter = list(trained.named_parameters())[7]
    parameter.data.view(-1)[0] = number
    with pytest.raises(FloatingPointError, match=name.replace('.', r'\.')):
        evaluate_detector(trained, dataset, device=CPU, label_to_category={1: 1}, progress=False)


def test_activations_that_overflow_are_named(trained: nn.Module, dataset: CocoDataset) -> None:
    for parameter in trained.rpn.head.parameters():
        parameter.data.fill_(1e38)
    with pytest.raises(FloatingPointError, match=r'the output of rpn\.head .* the weights diverged'):
        evaluate_detector(trained, dataset, device=CPU, label_to_category={1: 1}, progress=False)


@pytest.mark.parametrize('number', [float('nan'), float('inf')])
def test_a_classifier_with_weights_that_are_no_numbers(number: float) -> None:
    images, labels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    data = ArrayData((images, labels), (images, labels), ['a', 'b'], Preprocessing((8, 8), (0.5,) * 3, (0.2,) * 3), CPU)
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    assert evaluate_classifier(model, data, CPU)['top1'] >= 0
    model[1].weight.data[0, 0] = number
    with pytest.raises(FloatingPointError, match=r'1\.weight'):
        evaluate_classifier(model, data, CPU)


def test_images_of_crowds_only_and_classes_without_examples(trained: nn.Module, tmp_path: Path) -> None:
    (tmp_path / 'crowds').mkdir()
    folder = coco(tmp_path / 'crowds')
    path = folder / 'annotations' / 'instances_train.json'
    tree = json.loads(path.read_text())
    tree['annotations'] = [{**a, 'iscrowd': 1, 'segmentation': None} for a in tree['annotations']]
    tree['categories'].append({'id': 9, 'name': 'never seen'})
    path.write_text(json.dumps(tree))
    dataset = CocoDataset(folder, 'train', 'box')
    images, targets = collate([dataset[k] for k in range(2)])
    assert [len(t['boxes']) for t in targets] == [0, 0]
    trained.train()
    losses = trained(images, targets)
    assert all(bool(loss.isfinite()) for loss in losses.values())
    assert evaluate_detector(trained, dataset, device=CPU, progress=False)['bbox']['AP'] == -1  # as pycocotools says it


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own handler: a shell starts background jobs, such as this test run may be one, with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures('ctrl_c')
def test_signals_are_held_until_the_loop_has_come_to_a_state_that_can_be_kept() -> None:
    told: list[str] = []
    with pytest.raises(KeyboardInterrupt), HeldSignals() as signals:
        assert not signals.arrived(CPU)
        signal.raise_signal(signal.SIGINT)
        told.append('the step ends')
        assert signals.arrived(CPU)
        signals.deliver()
        told.append('not reached')
    assert told == ['the step ends']
    with pytest.raises(KeyboardInterrupt), HeldSignals() as signals, signals.released():
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), HeldSignals():  # a second one is not waited for
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_a_killed_process_left_of_a_file_is_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in ('checkpoint.pt', '.checkpoint.pt.x1y2', '.checkpoint.ptx', '.other.pt.x1y2', '.hidden'):
        (tmp_path / name).touch()
    remove_partial(tmp_path / 'checkpoint.pt')
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {'checkpoint.pt', '.checkpoint.ptx', '.other.pt.x1y2', '.hidden'}
