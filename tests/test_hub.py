"""timm's own ways to networks: its listings, `local-dir:` and `hf-hub:` folders, the hub's client, torch.hub."""

from __future__ import annotations

import json
import runpy
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from release_server import serving
from test_authors import TAGS
from timm.models._hub import load_model_config_from_path
from tool_runner import ROOT
from torch import nn

import norton_timm
from norton_timm.compression import CompressionSpec, compress
from norton_timm.models import push_to_hub, save_for_hub

NAME = 'norton_resnet56_cifar.r089'


@torch.no_grad()
def assert_same(a: nn.Module, b: nn.Module, size: int = 32) -> None:
    x = torch.randn(2, 3, size, size)
    assert torch.equal(a.eval()(x), b.eval()(x))


def test_timm_lists_what_has_weights() -> None:
    published = {name for name in TAGS if name.startswith('norton')}
    assert set(timm.list_pretrained('norton*')) == published and len(published) == 21
    assert set(timm.list_pretrained('coring*')) == set(TAGS) - published
    for name in (*TAGS, 'norton_resnet50', 'vgg16_bn_cifar', 'densenet40_cifar', 'mobilenetv2_cifar'):
        assert timm.is_model_pretrained(name), name
        assert timm.get_pretrained_cfg(name).url.startswith('authors:pvti/')
    for name in ('norton_resnet18.r050', 'coring_resnet101', 'resnet20_cifar', 'vgg19_bn_cifar'):
        assert not timm.is_model_pretrained(name), name


def test_a_folder_of_a_tag(tmp_path: Path) -> None:
    model = timm.create_model(NAME, pretrained=True)
    folder = save_for_hub(model, tmp_path / 'net', figures={'top-1 %, CIFAR-10 test': 86.54}, made='15 epochs.')
    assert sorted(p.name for p in folder.iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    config = json.loads((folder / 'config.json').read_text())
    assert config['architecture'] == 'norton_resnet56_cifar' and config['num_classes'] == 10
    assert config['model_args'] == {'rank': 1, 'rates': '[0.]+[0.18]*29'}
    assert config['pretrained_cfg']['tag'] == 'r089' and 'url' not in config['pretrained_cfg']
    again = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert_same(again, model)
    for key in ('mean', 'std', 'tag', 'license', 'input_size'):
        assert tuple(again.pretrained_cfg[key]) == tuple(model.pretrained_cfg[key]), key  # JSON has lists
    assert_same(norton_timm.load(folder), model)
    three = timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=3, features_only=False)
    assert three.fc.out_features == 3 and torch.equal(three.layer1[0].bn1.weight, model.layer1[0].bn1.weight)
    card = (folder / 'README.md').read_text()
    for part in ('license: apache-2.0', 'library_name: timm', f'# {NAME}', '| parameters | 87,633 |', '13,145,472',
                 '| top-1 %, CIFAR-10 test | 86.54 |', 'top1, published by the authors of the method, % | 91.62',
                 'CPD of rank 1', '15 epochs.', 'pham2024norton'):  # fmt: skip
        assert part in card, part
    assert 'pham2024coring' not in card


def test_other_settings_other_heads_and_other_shapes(tmp_path: Path) -> None:
    cases = {
        'settings': (timm.create_model('norton_resnet56_cifar', rank=3, rates=0.25), 'norton_resnet56_cifar'),
        'head': (timm.create_model('coring_resnet56_cifar.r072', num_classes=4, in_chans=3), 'coring_resnet56_cifar'),
        'dense': (timm.create_model('resnet20_cifar', num_classes=7), 'resnet20_cifar'),
    }
    small, _ = compress(timm.create_model('resnet20_cifar'), CompressionSpec(method='norton', rank=2, rates=0.3))
    cases['recipe'] = (small, 'compressed_checkpoint')
    changed = timm.create_model('norton_resnet56_cifar.r089')
    changed.bn1.eps = 0.1
    cases['a setting that no name has'] = (changed, 'compressed_checkpoint')
    for case, (model, architecture) in cases.items():
        folder = save_for_hub(model, tmp_path / case)
        assert json.loads((folder / 'config.json').read_text())['architecture'] == architecture, case
        assert_same(timm.create_model(f'local-dir:{folder}', pretrained=True), model)
        _, name, _ = load_model_config_from_path(folder)
        assert name == architecture


def test_what_cannot_be_saved_is_told(tmp_path: Path) -> None:
    model = timm.create_model('resnet20_cifar')
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full' / 'thesis.txt').touch()
    with pytest.raises(ValueError, match='expected a new folder'):
        save_for_hub(model, tmp_path / 'full')
    for license in ('', 'my own\nlicense: mit'):
        model.pretrained_cfg = {**model.pretrained_cfg, 'license': license}
        with pytest.raises(ValueError, match='license is'):
            save_for_hub(model, tmp_path / 'net')
    with pytest.raises(ValueError, match='owner/name'):
        push_to_hub(model, 'a/b/c')
    assert [p.name for p in tmp_path.iterdir()] == ['full']


def test_a_network_is_pushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client's calls, with an upload that copies: its server is not at hand."""
    calls: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def __init__(self, **kwargs: Any) -> None:
            calls.append(('init', kwargs))

        def create_repo(self, repo_id: str, **kwargs: Any) -> SimpleNamespace:
            calls.append(('create', kwargs))
            return SimpleNamespace(repo_id=f'me/{repo_id}')

        def upload_folder(self, repo_id: str, folder_path: Path, **kwargs: Any) -> SimpleNamespace:
            shutil.copytree(folder_path, tmp_path / repo_id)
            calls.append(('upload', kwargs))
            return SimpleNamespace(commit_url=f'https://hub/{repo_id}/commit/1')

    monkeypatch.setattr('huggingface_hub.HfApi', Api)
    model = timm.create_model(NAME, pretrained=True)
    url = push_to_hub(model, NAME, private=True, revision='dev', token='secret', figures={'top-1 %': 86.54})
    assert url == f'https://hub/me/{NAME}/commit/1'
    assert calls[0][1]['token'] == 'secret' and calls[1][1] == {'private': True, 'exist_ok': True}
    assert calls[2][1]['revision'] == 'dev'
    assert_same(timm.create_model(f'local-dir:{tmp_path / "me" / NAME}', pretrained=True), model)
    assert f'hf-hub:{NAME}' in (tmp_path / 'me' / NAME / 'README.md').read_text()


def test_a_hub_that_refuses_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server:  # knows no such call: 501
        real = __import__('huggingface_hub').HfApi
        monkeypatch.setattr('huggingface_hub.HfApi', lambda **kw: real(endpoint=server.url, **kw))
        with pytest.raises(ConnectionError, match='me/net: not pushed') as error:
            push_to_hub(timm.create_model('resnet20_cifar'), 'me/net', token='hf_x')
    assert '\n' not in str(error.value)


def test_torch_hub() -> None:
    names = runpy.run_path(str(ROOT / 'hubconf.py'))
    assert {'norton_resnet50', NAME, 'resnet56_cifar', 'coring_mobilenetv2_cifar.r060'} <= set(names)
    model = torch.hub.load(str(ROOT), NAME, source='local', pretrained=True)
    assert_same(model, timm.create_model(NAME, pretrained=True))
    assert torch.hub.load(str(ROOT), 'resnet20_cifar', source='local', num_classes=3).fc.out_features == 3
