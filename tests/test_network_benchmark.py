"""The benchmarks of whole networks: figures by hand, rows that say what ran, the tool's table, JSON and picture."""

from __future__ import annotations

import json
import shutil
import sys
from functools import partial

import pytest
import timm
import torch
import torchvision
from fake_clock import FakeClock
from PIL import Image
from tool_runner import TOOLS, run_process
from torch import nn

import norton_timm
from detection.studies import networks as benchmark
from detection.training.checkpoint import detector_from_config, save_checkpoint
from detection.training.config import load_config
from norton_timm.checkpoints.rebuild import surgery_of
from norton_timm.profiling.complexity import count
from norton_timm.profiling.timing import Turns, take_turns
from norton_timm.studies.forms import benchmark_forms
from norton_timm.studies.networks import benchmark_classifier, plot_speedup, prepare, summaries
from norton_timm.studies.zoo import control_side

TIMING = 'norton_timm.profiling.timing'


def test_summaries_by_hand():
    first, second = summaries(Turns([[[ms] for ms in (*range(1, 101), 1000)], [[5.5]] * 101]), images=8)
    assert (first['p10_ms'], first['ms'], first['p95_ms']) == (11, 51, 96)
    assert first['images_per_s'] == pytest.approx(8000 / 51) and first['speedup'] == first['speedup_p10'] == 1
    assert second['speedup'] == pytest.approx(51 / 5.5) and second['speedup_p10'] == 2


def test_ratios_are_those_of_the_median_round():
    # the machine slows down during the third round, between the two turns of it
    turns = Turns([[[10], [10], [20], [20], [20]], [[5, 5, 90], [5, 6, 4], [5, 5, 5], [15, 15, 15], [15, 2, 16]]])
    assert turns.passes(1) == [5, 5, 90, 5, 6, 4, 5, 5, 5, 15, 15, 15, 15, 2, 16]
    assert turns.relative() == [1, 0.5] and turns.milliseconds() == [20, 10]


def test_turns_are_taken_and_the_warm_up_is_left_out(monkeypatch):
    clock, order = FakeClock().install(monkeypatch, TIMING), []

    def call(name: str, milliseconds: float) -> None:
        order.append(name)
        # the first two calls are slow, as first calls are
        clock.sleep((100 if order.count(name) <= 2 else milliseconds) / 1000)

    times = take_turns([partial(call, 'a', 2), partial(call, 'b', 6)], lambda: order.append('sync'), 0, least=4)
    ran = [n for n in order if n != 'sync']
    rounds = [tuple(ran[k : k + 2]) for k in range(0, 12, 2)]
    assert len(ran) == 12 and set(rounds) == {('a', 'b'), ('b', 'a')}, 'each has a turn in each round, in either order'
    assert all(order[k] == 'sync' for k in range(len(order)) if k % 3 != 1)
    assert times.passes(0) == pytest.approx([2] * 4) and times.passes(1) == pytest.approx([6] * 4)


def test_the_first_pass_of_a_turn_does_not_count(monkeypatch):
    clock, order = FakeClock().install(monkeypatch, TIMING), []

    def slow() -> None:
        clock.sleep(50 if order.count('slow') % 3 == 0 else 1)
        order.append('slow')

    times = take_turns([slow, lambda: order.append('quick')], lambda: None, 0, least=2, passes=3)
    assert all(len(set(order[k : k + 3])) == 1 for k in range(0, 24, 3)) and order.count('slow') == 12
    assert times.rounds == [[[1000, 1000]] * 2, [[0, 0]] * 2]


def test_a_classifier_against_dense_and_control():
    rows = benchmark_classifier('norton_resnet56_cifar.r089', [2], ['eager', 'deployed'], seconds=0.1)
    assert [(r['runtime'], r['network'][:5]) for r in rows] == [
        (runtime, network) for runtime in ('eager', 'deployed') for network in ('dense', 'compr', 'dense')
    ]
    dense, small, control = rows[3:]
    assert dense['speedup'] == 1 and small['speedup'] > 0
    assert small['speedup_p10'] == pytest.approx(dense['p10_ms'] / small['p10_ms'])
    assert small['gmacs'] == pytest.approx(13145472 / 1e9) and dense['gmacs'] == pytest.approx(125485696 / 1e9)
    assert control['gmacs'] <= small['gmacs']
    assert small['images_per_s'] == pytest.approx(2000 / small['ms']) and small['p95_ms'] >= small['ms']
    assert 0 < small['peak_mb'] < dense['peak_mb']
    assert small['forms'] and not rows[0]['forms']


@pytest.mark.parametrize('runtime, package', [('onnxruntime', 'onnxruntime'), ('openvino', 'openvino')])
@torch.no_grad()
def test_runtimes_run_the_network(runtime, package, tmp_path):
    pytest.importorskip(package)
    model, x = (
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval(),
        torch.randn(2, 3, 8, 8),
    )
    torch.testing.assert_close(prepare(model, x, runtime, tmp_path)()[0], model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not shutil.which('g++'), reason='torch.compile needs a C++ compiler')
@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning', 'ignore::UserWarning')
@pytest.mark.parametrize('runtime', ['compile', 'aot'])
@torch.no_grad()
def test_compiled_runtimes_run_the_network(runtime, tmp_path):
    model, x = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1, 2)).eval(), torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(prepare(model, x, runtime, tmp_path)(), model(x), rtol=1e-4, atol=1e-5)


def test_deploy_against_fixed_forms():
    row = benchmark_forms('resnet20_cifar', batch=2, seconds=0.1)
    fixed = [row[f'{form}_ms'] for form in ('factored', 'merged', 'dense')]
    assert 'separable_ms' not in row and benchmark_forms('resnet20_cifar', 2, seconds=0.1)['separable_ms'] > 0
    assert row['over_slowest'] == pytest.approx(row['deployed_ms'] / max(fixed))
    assert row['over_fastest'] == pytest.approx(row['deployed_ms'] / min(fixed))
    assert sum(row['layers'].values()) == 18 and row['chosen'] and row['batch'] == 2
    with pytest.raises(ValueError, match='mobilenetv2_cifar: got no layer that can be decomposed'):
        benchmark_forms('mobilenetv2_cifar')


def test_a_network_that_no_small_image_fits_has_no_control():
    dense = timm.create_model('vgg16_bn_cifar').eval()
    macs = count(dense, (3, 32, 32)).macs
    assert control_side(dense, macs - 1, (3, 32, 32)) == 28
    assert control_side(dense, macs // 100, (3, 32, 32)) is None


def test_an_unknown_runtime_is_said(tmp_path):
    with pytest.raises(ValueError, match='eager, deployed, compile, aot, onnxruntime, openvino'):
        prepare(nn.Conv2d(3, 4, 3), torch.zeros(1, 3, 8, 8), 'tensorrt', tmp_path)
    with pytest.raises(ValueError, match='tensorrt'):
        benchmark.benchmark_detector('box', size=(96, 128), runtimes=['tensorrt'])


def test_a_detector_stage_by_stage():
    rows = benchmark.benchmark_detector('box', 'norton_resnet18.r050', size=(96, 128), seconds=0.1)
    assert [(r['runtime'], r['network'][:5]) for r in rows] == [
        (runtime, network) for runtime in ('eager', 'deployed') for network in ('dense', 'compr', 'dense')
    ]
    for row in rows:
        assert list(row['stages']) == list(benchmark.DETECTOR_STAGES)
        assert min(row['stages'][s] for s in benchmark.DETECTOR_STAGES[:-1]) > 0
        assert row['peak_mb'] > 0
    # which of them has most depends on the random proposals, whose head outweighs a backbone at this size
    assert min(row['gmacs'] for row in rows) > 0


def test_heads_behind_the_boxes_get_work():
    model = benchmark._build('keypoint', 'resnet18', 'backbone', (64, 96))
    with torch.no_grad():
        assert len(model([torch.rand(3, 64, 96)])[0]['keypoints']) == 10


def test_a_slow_stage_is_found(monkeypatch):
    clock = FakeClock().install(monkeypatch, 'detection.studies.networks')
    model = benchmark._build('box', 'resnet18', 'backbone', (96, 128))
    rpn, post = model.rpn.forward, model.transform.postprocess
    model.rpn.forward = lambda *a, **k: (clock.sleep(0.05), rpn(*a, **k))[1]
    model.transform.postprocess = lambda *a, **k: (clock.sleep(0.03), post(*a, **k))[1]
    with torch.no_grad(), benchmark.timed_stages(model) as spent:
        model([torch.rand(3, 96, 128)])
    nothing = dict.fromkeys(benchmark.DETECTOR_STAGES, 0)
    assert {name: ms for name, (ms,) in spent.items()} | {'postprocess': 0} == pytest.approx(nothing | {'rpn': 50})
    with torch.no_grad():
        stages = benchmark._stages(model, [torch.rand(3, 96, 128)])
    assert stages == pytest.approx(nothing | {'rpn': 50, 'postprocess': 30}, abs=1e-6)


def test_the_control_has_no_more_macs_than_asked():
    model = benchmark._build('box', 'resnet18', 'backbone', (192, 256))
    whole = count(model, [torch.rand(3, 192, 256)]).macs
    height, width = benchmark.control_size(model, whole - 1, (192, 256))
    assert height == 160 and width == round(160 * 256 / 192)
    assert benchmark.control_size(model, 10, (192, 256)) is None


def test_the_picture(tmp_path):
    rows = [{'model': 'm', 'network': n, 'runtime': r, 'batch': 1, 'speedup': s}
            for r in ('eager', 'deployed') for n, s in (('dense', 1.0), ('compressed', 2.5))]  # fmt: skip
    plot_speedup(rows, tmp_path / 'a.png')
    assert Image.open(tmp_path / 'a.png').size[0] > 500


@pytest.mark.parametrize(
    'arguments, message',
    [
        (['resnet56_cifar'], 'got no compressed network'),
        (['nowhere.safetensors'], 'nowhere.safetensors'),
        (['--output', 'nowhere/a.json'], 'a folder that exists'),
        (['--output', 'a.png'], 'expected a .json file'),
    ],
)
def test_the_tool_says_what_is_wrong_in_one_line(arguments, message, tool):
    code, _, err = tool('benchmark.py', 'classification', *arguments)
    assert code == 2 and message in err
    assert len(err.strip().splitlines()) == 1


def test_the_tool(tool, tmp_path):
    code, out, err = tool('benchmark.py', 'classification', 'norton_resnet56_cifar.r089', '--batches', 1,
                          '--runtimes', 'deployed', '--seconds', 0.1, '--output', tmp_path / 'a.json')  # fmt: skip
    assert code == 0, err
    assert 'compressed' in out and 'speedup' in out
    content = json.loads((tmp_path / 'a.json').read_text())
    assert content['command'] == 'classification' and len(content['rows']) == 3
    assert content['arguments'] == ['classification', 'norton_resnet56_cifar.r089', '--batches', '1',
                                    '--runtimes', 'deployed', '--seconds', '0.1']  # fmt: skip
    assert (tmp_path / 'a.png').is_file()


def test_the_tool_in_two_processes(tmp_path):
    code, out, err = run_process('benchmark.py', 'classification', 'norton_resnet56_cifar.r089', '--batches', 1,
                                 '--runtimes', 'eager', '--seconds', 0.1, '--processes', 2,
                                 '--output', tmp_path / 'a.json')  # fmt: skip
    assert code == 0, err
    assert 'process 2 of 2' in out and 'medians of 2 processes' in out
    rows = json.loads((tmp_path / 'a.json').read_text())['rows']
    assert [row['network'][:5] for row in rows] == ['dense', 'compr', 'dense']
    for row in rows:
        assert len(row['speedup_runs']) == 2 and row['speedup'] == pytest.approx(sum(row['speedup_runs']) / 2)
    assert rows[1]['speedup_runs'][0] != rows[1]['speedup_runs'][1], 'two measurements'
    assert (tmp_path / 'a.png').is_file()


def test_a_process_that_fails_ends_the_repetition(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    from _processes import rows_of_processes

    monkeypatch.setattr(sys, 'argv', ['-c', 'raise SystemExit(3)'])
    with pytest.raises(ValueError, match='process 1 of 2 ended with exit code 3'):
        rows_of_processes(2, ['speedup'])


@pytest.mark.parametrize('architecture', ['resnet20_cifar', 'torchvision/resnet18'])
def test_a_file_of_ones_own(architecture: str, tool, tmp_path) -> None:
    name, classes = architecture.removeprefix('torchvision/'), 7
    if name == architecture:
        dense = timm.create_model(name, num_classes=classes)
    else:
        dense = torchvision.models.get_model(name, weights=None, num_classes=classes)
    image = torch.zeros(1, 3, 64, 64)
    small, _ = norton_timm.compress(dense, norton_timm.CompressionSpec(method='coring', rates=0.5), image)
    kwargs = {'num_classes': classes}
    norton_timm.save(small, tmp_path / 'small.safetensors', architecture=architecture, model_kwargs=kwargs)
    norton_timm.save(dense, tmp_path / 'dense.safetensors', architecture=architecture, model_kwargs=kwargs)
    common = ['--batches', 1, '--runtimes', 'eager', '--seconds', 0.1]
    done = tool('benchmark.py', 'classification', 'small.safetensors', *common, '--output', 'a.json')
    assert done.code == 0, done.err
    rows = json.loads((tmp_path / 'a.json').read_text())['rows']
    size = (3, 32, 32) if name == architecture else (3, 224, 224)
    for row, model in zip(rows, (dense, small)):
        assert row['gmacs'] == pytest.approx(norton_timm.count(model, size).macs / 1e9)
    assert rows[0]['model'] == 'small.safetensors'
    done = tool('benchmark.py', 'classification', 'dense.safetensors', *common)
    assert done.code == 2 and f'holds {architecture} as it is, expected a compressed network' in done.err


@pytest.mark.parametrize('recipe', ['backbone', 'full'])
def test_a_detector_of_ones_own(recipe: str, tool, tmp_path) -> None:
    small = {'model.fpn_channels': 32, 'model.box_head': 32, 'model.keypoint_layers': [8]}
    meta = {'task': 'keypoint', 'num_classes': 2, 'class_names': ['__background__', 'hand'], 'skeleton': [],
            'label_to_category': {1: 1}, 'num_keypoints': 2, 'keypoint_names': ['a', 'b']}  # fmt: skip
    for name, backbone, how in (('small', 'norton_resnet18.r050', recipe), ('dense', 'resnet18', 'backbone')):
        config = load_config(None, [], {'task': 'keypoint', 'model.backbone': backbone, 'model.recipe': how, **small})
        model = detector_from_config(config, meta)
        save_checkpoint(f'{name}.pt', {'model': model.state_dict(), 'ema': None, 'config': config.to_dict(),
                                       'meta': meta, 'surgery': surgery_of(model)})  # fmt: skip
    common = ['--runtimes', 'eager', '--seconds', 0.1, '--size', 96, 128]
    done = tool('benchmark.py', 'detection', '--checkpoint', 'small.pt', *common, '--output', 'a.json')
    assert done.code == 0, done.err
    dense, mine = json.loads((tmp_path / 'a.json').read_text())['rows'][:2]
    assert mine['model'] == 'small.pt' and 0 < mine['gmacs'] < dense['gmacs'] and mine['stages']['heads'] > 0
    for arguments, told in (
        (['dense.pt'], 'holds a dense detector on resnet18'),
        (['small.pt', '--task', 'box'], 'give --task keypoint'),
        (['small.pt', '--backbone', 'resnet50'], '--checkpoint excludes --backbone'),
        (['nowhere.pt'], 'no checkpoint file nowhere.pt'),
    ):
        done = tool('benchmark.py', 'detection', '--checkpoint', *arguments, *common)
        assert done.code == 2 and len(done.err.splitlines()) == 1 and told in done.err, done.err
