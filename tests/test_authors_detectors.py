"""Detectors that the authors released, in `build_detector` and the tools; a local server answers as GitHub does."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from release_server import ReleaseServer, serving
from test_detection_weights import authors_body, of_the_reference_training
from tool_runner import ROOT

from detection.data.sample import write_sample
from detection.rcnn import build_detector
from detection.training import load_authors_detector, load_config
from norton_timm.checkpoints import release
from norton_timm.models import tags

BACKBONE = 'coring_resnet50.r077'
FILE = f'FasterRCNNResNet50FPN_resnet_50_{tags()["coring"]["resnet50"]["r077"]["rates"]}.pt'


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ReleaseServer]:
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    with serving() as running:
        monkeypatch.setenv(release.API_ENV, running.url)
        running.files = {'pvti/NORTON': {}, 'pvti/CORING': {}}
        yield running


def upload(server: ReleaseServer, backbone: str = BACKBONE) -> dict[str, torch.Tensor]:
    """A detector as torchvision's reference training writes it, on the authors' backbone; returns its other tensors."""
    rest = {k: t for k, t in build_detector('box', backbone).state_dict().items() if 'backbone.body' not in k}
    stream = io.BytesIO()
    content = of_the_reference_training({**authors_body(backbone), **rest})
    rates = tags()['coring']['resnet50'][backbone.partition('.')[2]]['rates']
    torch.save({**content, 'compress_rate': rates}, stream)
    server.put(FILE, stream.getvalue(), 'pvti/CORING')
    return rest


def test_build_and_load_by_name(server: ReleaseServer) -> None:
    rest = upload(server)
    model = build_detector('box', BACKBONE, pretrained='authors')
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in rest.items())
    loaded, meta = load_authors_detector('box', BACKBONE)
    assert all(torch.equal(state[name], tensor) for name, tensor in loaded.state_dict().items() if name in state)
    assert meta['task'] == 'box' and meta['class_names'][18] == 'dog'
    assert server.count('/download/') == 1
    few = build_detector('box', BACKBONE, num_classes=4, pretrained='authors')
    assert few.roi_heads.box_predictor.cls_score.out_features == 4
    name = 'rpn.head.conv.0.0.weight'
    assert torch.equal(few.state_dict()[name], rest[name])


def test_a_file_on_another_backbone_is_refused(server: ReleaseServer) -> None:
    upload(server, 'coring_resnet50.r063')
    with pytest.raises(ValueError, match='another backbone'):
        build_detector('box', BACKBONE, pretrained='authors')
    with pytest.raises(ValueError, match=r'on coring_resnet50\.r063, expected one on coring_resnet50\.r077'):
        load_authors_detector('box', BACKBONE)


def test_wrong_arguments_and_no_network(server: ReleaseServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for kwargs, told in (
        ({'pretrained': 'yes'}, "True, False or 'authors'"),
        ({'pretrained': 'authors', 'weights': 'a.pt'}, 'no weights'),
        ({'pretrained': 'authors', 'backbone': 'resnet50'}, 'no detector on'),
        ({'pretrained': 'authors', 'task': 'mask'}, 'no file of'),
    ):
        with pytest.raises(ValueError, match=told):
            build_detector(**{'task': 'box', 'backbone': BACKBONE, **kwargs})
    server.put(FILE, b'no checkpoint', 'pvti/CORING')
    release.Release('pvti/CORING', 'v0.1.0').folder().joinpath('assets.json').unlink()
    with pytest.raises(ValueError, match='read safely'):
        build_detector('box', BACKBONE, pretrained='authors')
    monkeypatch.setenv(release.API_ENV, 'http://127.0.0.1:9')
    with pytest.raises(ConnectionError, match='FasterRCNNResNet50FPN_resnet_50_') as error:
        build_detector('box', 'norton_resnet50.r043', pretrained='authors')
    assert '\n' not in str(error.value) and '--weights' in str(error.value)
    config = load_config(None, [], {'task': 'box', 'model.weights': 'authors', 'model.norm': 'frozen'})
    assert config.model.weights == 'authors'


def test_the_tools(server: ReleaseServer, tool, tmp_path: Path) -> None:
    upload(server)
    data = write_sample(tmp_path / 'sample', train=2, val=1, size=(96, 96))
    for file in (data / 'annotations').glob('instances_*.json'):  # COCO's names
        file.write_text(file.read_text().replace('"ball"', '"sports ball"').replace('"box"', '"suitcase"'))
    chosen = ('--weights', 'authors', '--backbone', BACKBONE, '--task', 'box')
    done = tool('eval_det.py', *chosen, '--data', data, '--workers', 0, '--device', 'cpu')
    assert done.code == 0 and 'AP' in json.loads((tmp_path / 'eval_val.json').read_text())['bbox'], done.err
    done = tool('demo_video.py', *chosen, '--headless', '--frames', 2, '--warmup', 0, '--imgsz', 64)
    assert done.code == 0 and BACKBONE in done.out, done.err
    train = ('train_det.py', *chosen, '--data', data, '--config', ROOT / 'configs' / 'detection' / 'box.yaml')
    done = tool(*train, '--output', tmp_path / 'run', '--iterations', 1, '--workers', 0, '--device', 'cpu',
                '--set', 'model.min_size=[64]', '--set', 'data.batch_size=1')  # fmt: skip
    assert done.code == 0 and 'weights from authors' in done.out, done.err
    assert server.count('/download/') == 1
    for arguments in (['--weights', 'authors', '--backbone', BACKBONE], ['a.pt', '--weights', 'b.pt'], []):
        done = tool('eval_det.py', *arguments, '--data', data)
        assert done.code == 2 and len(done.error_lines()) == 1, done.err
    server.files = {}
    for name in ('train_det.py', 'eval_det.py', 'demo_video.py'):
        headless = ['--headless'] if name == 'demo_video.py' else ['--data', data]
        done = tool(name, '--weights', 'authors', '--task', 'box', '--backbone', 'norton_resnet50.r043', *headless)
        assert done.code == 1 and len(done.error_lines()) == 1 and 'no such release' in done.err, done.err
