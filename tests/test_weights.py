"""Where `pretrained=True` finds weights: files, a directory, a server that breaks off; and what it says if nowhere."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from tool_runner import ROOT
from torch import nn

import norton_timm.models  # noqa: F401
from norton_timm.checkpoints import pretrained as weights
from norton_timm.checkpoints.file import save

NAME = 'norton_resnet56_cifar.r027'


@pytest.fixture(autouse=True)
def _no_directory(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.delenv(weights.ENV, raising=False)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path_factory.mktemp('torch')))


def assert_same(a: nn.Module, b: nn.Module) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Server(ThreadingHTTPServer):
    """Serves one file; may break off after some bytes, and keeps the ranges that were asked for."""

    content = b''
    etag = '"v1"'
    break_after: int | None = None

    def __init__(self) -> None:
        super().__init__(('127.0.0.1', 0), Handler)
        self.ranges: list[str | None] = []

    def url(self, name: str) -> str:
        return f'http://127.0.0.1:{self.server_address[1]}/{name}'


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get('Range')
        self.server.ranges.append(wanted)
        body, status = self.server.content, 200
        if self.path.startswith('/missing'):
            self.send_error(404)
            return
        if wanted and self.headers.get('If-Range') == self.server.etag:
            body, status = body[int(wanted.removeprefix('bytes=').rstrip('-')) :], 206
        self.send_response(status)
        self.send_header('Content-Length', str(len(body)))
        self.send_header('ETag', self.server.etag)
        self.end_headers()
        cut, self.server.break_after = self.server.break_after, None
        self.wfile.write(body if cut is None else body[:cut])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def test_without_weights_it_says_how_to_get_them() -> None:
    timm.create_model(NAME)
    for name in (NAME, 'norton_resnet50.r078', 'vgg16_bn_cifar', 'norton_resnet18.r050'):
        # released networks are asked for, and no server answers in tests
        with pytest.raises(
            (ValueError, ConnectionError)[name != 'norton_resnet18.r050'], match='no pretrained weights'
        ) as error:
            timm.create_model(name, pretrained=True)
        message = str(error.value)
        assert '\n' not in message and name in message
        for way in ('tools/import_checkpoint.py', f'tools/train_cls.py {name}', 'file of your own'):
            assert way in message
        assert weights.ENV in message


@pytest.mark.parametrize('extension', ['.safetensors', '.pth', '.pt', '.pth.tar'])
def test_directory_of_ones_own(extension: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model(NAME)
    path = tmp_path / f'{NAME}{extension}'
    if extension == '.safetensors':
        save_file(model.state_dict(), path)
    else:
        torch.save({'state_dict': model.state_dict()}, path)
    monkeypatch.setenv(weights.ENV, str(tmp_path))
    assert_same(timm.create_model(NAME, pretrained=True), model)
    with pytest.raises(ConnectionError, match='r042'):
        timm.create_model('norton_resnet56_cifar.r042', pretrained=True)


def test_a_directory_of_ones_own_comes_before_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = 'norton_resnet56_cifar.r071'
    assert weights.find_file(name) == weights.SHIPPED / f'{name}.safetensors'
    own = timm.create_model(name)
    save_file(own.state_dict(), tmp_path / f'{name}.safetensors')
    monkeypatch.setenv(weights.ENV, str(tmp_path))
    assert_same(timm.create_model(name, pretrained=True), own)


@pytest.mark.parametrize('place', ['shipped', 'directory', 'overlay'])
def test_a_saved_network_says_how_its_images_are_prepared(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = timm.create_model(NAME)
    own = {'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225), 'crop_pct': 0.9}
    assert model.pretrained_cfg['mean'] != own['mean']
    model.pretrained_cfg = {**model.pretrained_cfg, **own}
    path = save(model, tmp_path / f'{NAME}.safetensors')
    kwargs = {}
    if place == 'shipped':
        monkeypatch.setattr(weights, 'SHIPPED', tmp_path)
    elif place == 'directory':
        monkeypatch.setenv(weights.ENV, str(tmp_path))
    else:
        kwargs['pretrained_cfg_overlay'] = {'file': str(path), 'crop_pct': 0.8}
    found = timm.create_model(NAME, pretrained=True, **kwargs)
    assert_same(found, model)
    expected = {**own, 'crop_pct': 0.8} if place == 'overlay' else own
    assert {key: found.pretrained_cfg[key] for key in own} == expected
    assert found.pretrained_cfg['num_classes'] == 10
    again = timm.create_model(NAME, pretrained=False)
    assert again.pretrained_cfg['mean'] != own['mean']


def test_a_file_with_a_recipe_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(weights.ENV, str(tmp_path))
    path = tmp_path / f'{NAME}.safetensors'
    for recipe in ('[]', '{', '{"format": 1}', '{"format": 99, "architecture": "resnet56_cifar"}'):
        save_file(timm.create_model(NAME).state_dict(), path, {'norton_timm': recipe})
        with pytest.raises(ValueError, match=path.name):
            timm.create_model(NAME, pretrained=True)
    path.write_bytes(b'nothing')
    with pytest.raises(ValueError, match='not a safetensors file'):
        timm.create_model(NAME, pretrained=True)


def test_directory_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(weights.ENV, str(tmp_path / 'nowhere'))
    with pytest.raises(ValueError, match='nowhere'):
        timm.create_model(NAME, pretrained=True)


def test_file_overlay_with_another_head_channels_and_features(tmp_path: Path) -> None:
    model = timm.create_model(NAME)
    save_file(model.state_dict(), tmp_path / 'w.safetensors')
    overlay = dict(file=str(tmp_path / 'w.safetensors'))
    assert_same(timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay), model)
    other = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3)
    assert other.fc.out_features == 3 and torch.equal(other.layer1[0].bn1.weight, model.layer1[0].bn1.weight)
    grey = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1)
    x = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(grey.eval()(x), model.eval()(x.expand(-1, 3, -1, -1)), rtol=1e-3, atol=1e-4)
    body = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay, features_only=True)
    assert torch.equal(body['layer3'][0].bn1.weight, model.layer3[0].bn1.weight)
    with pytest.raises(ValueError, match='does not exist'):
        timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=dict(file='nowhere.pth'))


def test_file_url(tmp_path: Path) -> None:
    model = timm.create_model(NAME)
    path = tmp_path / 'my weights.safetensors'
    save_file(model.state_dict(), path)
    for overlay in (dict(file=path.as_uri()), dict(url=path.as_uri())):
        assert_same(timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay), model)


def test_other_rates_than_the_tags_need_a_file_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='its own rank'):
        timm.create_model(NAME, pretrained=True, rank=2)
    model = timm.create_model(NAME, rank=2)
    save_file(model.state_dict(), tmp_path / 'w.safetensors')
    overlay = dict(file=str(tmp_path / 'w.safetensors'))
    assert_same(timm.create_model(NAME, pretrained=True, rank=2, pretrained_cfg_overlay=overlay), model)


def test_weights_from_a_server(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = timm.create_model(NAME)
    save_file(model.state_dict(), tmp_path / 'w.safetensors')
    server.content = (tmp_path / 'w.safetensors').read_bytes()
    digest = hashlib.sha256(server.content).hexdigest()
    url = f'{server.url("w.safetensors")}#sha256={digest}'
    build = dict(pretrained=True, pretrained_cfg_overlay=dict(url=url), cache_dir=tmp_path / 'cache')
    assert_same(timm.create_model(NAME, **build), model)
    assert '100%' in capsys.readouterr().err
    assert_same(timm.create_model(NAME, **build), model)
    assert len(server.ranges) == 1, 'the second call reads the copy'
    assert [p.name for p in (tmp_path / 'cache').iterdir() if not p.name.endswith('.lock')] == ['w.safetensors']


def test_interrupted_download_is_resumed(server: Server, tmp_path: Path) -> None:
    server.content = bytes(range(256)) * 4000
    server.break_after = 300_000
    with pytest.raises(ConnectionError, match='broke off'):
        weights.fetch(server.url('a.pth'), tmp_path, progress=False)
    assert not (tmp_path / 'a.pth').exists()
    assert weights.fetch(server.url('a.pth'), tmp_path, progress=False).read_bytes() == server.content
    assert server.ranges == [None, 'bytes=300000-']


def test_changed_file_is_not_glued_to_the_old_part(server: Server, tmp_path: Path) -> None:
    server.content, server.break_after = b'a' * 400_000, 300_000
    with pytest.raises(ConnectionError):
        weights.fetch(server.url('a.pth'), tmp_path, progress=False)
    server.content, server.etag = b'b' * 400_000, '"v2"'
    assert weights.fetch(server.url('a.pth'), tmp_path, progress=False).read_bytes() == server.content


@pytest.mark.parametrize('name', ['a.pth#sha256=' + '0' * 64, 'a-0123abcd.pth'])
def test_wrong_checksum(name: str, server: Server, tmp_path: Path) -> None:
    server.content = b'weights'
    with pytest.raises(ValueError, match='SHA-256'):
        weights.fetch(server.url(name), tmp_path, progress=False)
    assert all(p.name.endswith('.lock') for p in tmp_path.iterdir())


def test_right_checksum_in_the_name(server: Server, tmp_path: Path) -> None:
    server.content = b'weights'
    name = f'a-{hashlib.sha256(b"weights").hexdigest()[:8]}.pth'
    assert weights.fetch(server.url(name), tmp_path, progress=False).read_bytes() == b'weights'


def test_unreachable_server_and_bad_urls(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match='404'):
        weights.fetch(server.url('missing.pth'), tmp_path, progress=False)
    with pytest.raises(ConnectionError, match=weights.ENV):
        weights.fetch('http://127.0.0.1:9/a.pth', tmp_path, progress=False)
    for url in ('ftp://host/a.pth', 'http://host/', 'a.pth', 'http://host/a.pth#md5=00'):
        with pytest.raises(ValueError):
            weights.fetch(url, tmp_path, progress=False)


def test_local_dir_as_everywhere_in_timm(tmp_path: Path) -> None:
    from timm.models import save_for_hf

    model = timm.create_model(NAME, num_classes=4)
    save_for_hf(model, tmp_path / 'net', safe_serialization=True)
    assert_same(timm.create_model(f'local-dir:{tmp_path / "net"}', pretrained=True), model)
    other = timm.create_model('norton_resnet56_cifar', rank=3, rates=0.25)
    save_for_hf(other, tmp_path / 'other', safe_serialization=True)
    assert_same(timm.create_model(f'local-dir:{tmp_path / "other"}', pretrained=True), other)


@pytest.mark.parametrize('name', ['norton_resnet50.r064', 'coring_vgg16_bn_cifar.r067', 'densenet40_cifar'])
def test_the_commands_of_the_message_lack_no_option(name: str, tool) -> None:
    """Each gets as far as the file or data that do not exist here."""
    told = weights.no_weights_message(name).replace('configs/', f'{ROOT}/configs/')
    commands = re.findall(r'python tools/(\S+) ([^;]+);', told)
    assert [script for script, _ in commands] == ['import_checkpoint.py', 'train_cls.py']
    for script, rest in commands:
        done = tool(script, *rest.split())
        assert done.code == 2 and '(see --help)' not in done.err, done.err
        assert re.search(r"checkpoint 'FILE' does not exist|weights: no file FILE|no data set 'DATA'", done.err), (
            done.err
        )
