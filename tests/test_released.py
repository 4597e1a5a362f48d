"""`pretrained=True` from the authors' releases: a local server answers as GitHub does, with files in their format."""

from __future__ import annotations

import io
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from authors_networks import CifarResNet, CifarVGG
from release_server import ReleaseServer, page_name, serving
from test_authors import NETWORKS, TAGS, assert_same_logits, settle
from torch import nn

import norton_timm
from norton_timm.checkpoints import download, release
from norton_timm.checkpoints import pretrained as weights
from norton_timm.compression.spec import parse_rates
from norton_timm.models import published_accuracy, tags
from norton_timm.models.released import AuthorsReleases, assets_of, expected_asset, released_detector

NAME = 'norton_resnet56_cifar.r027'
RATES = '[0.]+[0.18]*29'
FILE = f'resnet_56_{RATES}_7_94.46.pt'
ARCHITECTURES = {  # as the authors' scripts call them
    'vgg16_bn_cifar': 'vgg_16_bn',
    'resnet56_cifar': 'resnet_56',
    'resnet110_cifar': 'resnet_110',
    'densenet40_cifar': 'densenet_40',
    'googlenet_cifar': 'googlenet',
    'mobilenetv2_cifar': 'mobilenet_v2',
    'resnet50': 'resnet_50_pabs',
}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ReleaseServer]:
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'torch'))
    monkeypatch.delenv(weights.ENV, raising=False)
    monkeypatch.delenv(release.TOKEN_ENV, raising=False)
    with serving() as running:
        monkeypatch.setenv(release.API_ENV, running.url)
        running.files = {'pvti/NORTON': {}, 'pvti/CORING': {}}
        yield running


def network(rates: str = RATES, rank: int = 7) -> nn.Module:
    return settle(CifarResNet(56, parse_rates(rates), rank, 'fc'))


def pickled(model: nn.Module, **more: object) -> bytes:
    stream = io.BytesIO()
    torch.save({'state_dict': model.state_dict(), **more}, stream)
    return stream.getvalue()


def kept(tmp_path: Path) -> list[str]:
    """What lies in the cache, locks and checksums aside."""
    paths = [p for p in (tmp_path / 'torch').rglob('*') if p.is_file()]
    return sorted(p.name for p in paths if not p.name.endswith(('.lock', '.sha256', 'assets.json')))


def refused(kind: type[Exception], *told: str, name: str = NAME) -> str:
    with pytest.raises(kind) as error:
        timm.create_model(name, pretrained=True)
    message = str(error.value)
    assert '\n' not in message and all(part in message for part in told), message
    return message


def test_a_name_is_enough(server: ReleaseServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = network()
    server.put('resnet_56.pt', b'of another network')
    server.put(f'resnet_56_{RATES}_1_91.62.pt', b'of another rank')
    file = server.put(FILE, pickled(theirs, rank=7, compress_rate=RATES))
    assert file == 'resnet_56_.0.+.0.18.29_7_94.46.pt'
    ours = timm.create_model(NAME, pretrained=True).eval()
    assert_same_logits(theirs, ours, 32)
    told = capsys.readouterr().err
    assert (
        file in told
        and 'apache-2.0' in told
        and '100%' in told
        and release.Release('pvti/NORTON', 'v0.1.0').page in told
    )
    assert kept(tmp_path) == [f'{NAME}.safetensors']
    asked = len(server.asked)
    again = timm.create_model(NAME, pretrained=True)
    assert len(server.asked) == asked == 2 and capsys.readouterr().err == ''
    assert all(torch.equal(a, b) for a, b in zip(again.float().parameters(), ours.float().parameters()))
    (path,) = (tmp_path / 'torch').rglob('*.safetensors')
    assert file in norton_timm.checkpoints.read_metadata(path)['source'].replace('%2B', '+')
    other = timm.create_model(NAME, pretrained=True, num_classes=3, in_chans=1)
    assert other.fc.out_features == 3


def test_the_list_is_asked_for_once_a_day(server: ReleaseServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.put('resnet_56.pt', b'')
    place = release.Release('pvti/NORTON', 'v0.1.0')
    now = time.time()
    for hours, requests in ((0, 1), (23, 1), (25, 2), (0, 3)):  # the last: a clock that was set back
        monkeypatch.setattr(time, 'time', lambda hours=hours: now + 3600 * hours)
        assert [a.name for a in place.assets()] == ['resnet_56.pt']
        assert server.count('/repos/') == requests


def test_dense_networks_of_either_release(server: ReleaseServer) -> None:
    theirs = settle(CifarVGG([0.0] * 13, 0))
    server.put('vgg_16_bn.pt', pickled(theirs), 'pvti/CORING')
    assert_same_logits(theirs, timm.create_model('vgg16_bn_cifar', pretrained=True).eval(), 32)


def test_a_renamed_owner_is_followed_and_the_token_goes_to_github_only(
    server: ReleaseServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.files['someone-else/NORTON'] = server.files.pop('pvti/NORTON')
    server.put(FILE, pickled(network()), 'someone-else/NORTON')
    server.renamed = {'pvti': 'someone-else'}
    monkeypatch.setenv(release.TOKEN_ENV, 'secret')
    timm.create_model(NAME, pretrained=True)
    assert [token for path, token, _ in server.asked if path.startswith('/repos/')] == ['Bearer secret'] * 2
    assert [token for path, token, _ in server.asked if not path.startswith('/repos/')] == [None]
    with serving() as elsewhere:
        request = download._WebOnly().redirect_request(
            download.urllib.request.Request(f'{server.url}/a', headers={'Authorization': 'secret'}),
            None, 301, '', {}, f'{elsewhere.url}/a',
        )  # fmt: skip
        assert not request.has_header('Authorization')


def test_limits_tokens_and_answers_that_are_none(server: ReleaseServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.list_status, server.list_headers = 403, {'X_RateLimit_Remaining': '0', 'X_RateLimit_Reset': '1700000000'}
    told = refused(ConnectionError, '60 without a token', 'until 22:13 UTC', release.TOKEN_ENV, weights.ENV)
    assert 'tools/import_checkpoint.py' in told
    server.list_status, server.list_headers = 401, {}
    refused(ConnectionError, 'token', 'refused')
    server.list_status = 500
    refused(ConnectionError, '500')
    server.list_status = 200
    for body in (b'<html>', b'[]', b'{"assets": [{"name": 3}]}', b'[' * 100_000):
        server.list_body = body
        refused(ConnectionError, 'something else')
    server.files = {}
    refused(ConnectionError, 'no such release')


def test_without_a_network_the_message_says_where_the_file_is(
    server: ReleaseServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(release.API_ENV, 'http://127.0.0.1:9')
    page = 'https://github.com/pvti/NORTON/releases/tag/v0.1.0'
    command = f'python tools/import_checkpoint.py FILE --output {NAME}.safetensors'
    refused(ConnectionError, 'cannot be reached', page, page_name(FILE), command, weights.ENV)
    refused(ConnectionError, 'vgg_16_bn.pt', name='vgg16_bn_cifar')


def test_a_broken_transfer_is_resumed(server: ReleaseServer, tmp_path: Path) -> None:
    theirs = network()
    server.put(FILE, pickled(theirs))
    server.break_after = 100_000
    refused(ConnectionError, 'broke off after 100000 of')
    assert all(name.endswith(('.part', '.version')) for name in kept(tmp_path))
    assert_same_logits(theirs, timm.create_model(NAME, pretrained=True).eval(), 32)
    assert server.asked[-1][2] == 'bytes=100000-' and kept(tmp_path) == [f'{NAME}.safetensors']


def test_a_wrong_size_is_refused(server: ReleaseServer, tmp_path: Path) -> None:
    file = server.put(FILE, pickled(network()))
    server.sizes = {file: 5}
    refused(ValueError, 'expected 5')
    assert kept(tmp_path) == []


def test_changed_content_is_refused(server: ReleaseServer, tmp_path: Path) -> None:
    server.put(FILE, pickled(network()))
    timm.create_model(NAME, pretrained=True)
    for path in [*(tmp_path / 'torch').rglob('*.safetensors'), *(tmp_path / 'torch').rglob('assets.json')]:
        path.unlink()
    server.put(FILE, pickled(network()))
    refused(ValueError, 'has changed', '.sha256')
    assert kept(tmp_path) == []
    server.digests = True
    for path in (tmp_path / 'torch').rglob('assets.json'):
        path.unlink()
    refused(ValueError, 'has changed', '.sha256')


def test_a_digest_of_the_list_is_checked(server: ReleaseServer, tmp_path: Path) -> None:
    file = server.put(FILE, pickled(network()))
    server.digests = True
    release.Release('pvti/NORTON', 'v0.1.0').assets()
    content = bytearray(server.files['pvti/NORTON'][file])
    content[-1] ^= 1
    server.files['pvti/NORTON'][file] = bytes(content)
    refused(ValueError, 'SHA-256')
    assert kept(tmp_path) == []


def test_a_converted_file_that_was_changed_is_refused(server: ReleaseServer, tmp_path: Path) -> None:
    server.put(FILE, pickled(network()))
    timm.create_model(NAME, pretrained=True)
    (path,) = (tmp_path / 'torch').rglob('*.safetensors')
    path.write_bytes(path.read_bytes()[:-1] + b'x')
    refused(ValueError, 'recorded was')


def test_no_file_fits(server: ReleaseServer) -> None:
    server.put('resnet_56.pt', b'')
    server.put(f'resnet_56_{RATES}_1_91.62.pt', b'')
    refused(ValueError, 'no file of', 'resnet_56.pt, resnet_56_.0.+.0.18.29_1_91.62.pt')
    server.put('resnet_110.pt', b'')
    told = refused(ValueError, 'the rank and rates', name='norton_densenet40_cifar.r058')
    assert 'it has none' in told


def test_other_rates_with_the_tags_accuracy_are_told(server: ReleaseServer) -> None:
    """The rates of some tags were never published: the released file may be another network than the tag."""
    server.put('resnet_50_pabs_[0.]+[0.06]*3+[0.1]*7+[0.05]*9_1_76.91.pt', b'')
    refused(ValueError, 'has its accuracy with other rates', 'convert_authors_checkpoint', name='norton_resnet50.r043')


def test_of_two_the_published_accuracy_is_taken(server: ReleaseServer) -> None:
    theirs = network()
    server.put(f'resnet_56_{RATES}_7_93.00.pt', pickled(network()))
    server.put(FILE, pickled(theirs))
    server.put(f'resnet_56_{RATES}_7.pt', pickled(network()))
    assert_same_logits(theirs, timm.create_model(NAME, pretrained=True).eval(), 32)


def test_of_two_without_accuracy_the_content_decides(server: ReleaseServer, tmp_path: Path) -> None:
    theirs = network()
    server.put(f'resnet_56_a_{RATES}_7.pt', pickled(network('[0.]+[0.5]*29', 7)))
    server.put(f'resnet_56_b_{RATES}_7.pt', pickled(theirs))
    assert_same_logits(theirs, timm.create_model(NAME, pretrained=True).eval(), 32)
    assert kept(tmp_path) == [f'{NAME}.safetensors']


class Trap:
    """A pickle that would write a file."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("open('trapped', 'w')",)


def test_a_pickle_that_runs_code_is_refused(
    server: ReleaseServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    server.put(FILE, pickled(network(), args=Trap()))
    refused(ValueError, 'weights_only=True')
    assert not (tmp_path / 'trapped').exists() and kept(tmp_path) == []
    monkeypatch.setenv(weights.ENV, str(tmp_path))
    (tmp_path / FILE).write_bytes(pickled(network(), args=Trap()))
    refused(ValueError, 'weights_only=True')
    assert not (tmp_path / 'trapped').exists()


def test_two_processes_download_once(server: ReleaseServer, tmp_path: Path) -> None:
    server.put(FILE, pickled(network()))
    code = f'import timm, norton_timm; timm.create_model({NAME!r}, pretrained=True)'
    running = [subprocess.Popen([sys.executable, '-c', code], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    done = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], done
    assert server.count('/download/') == 1 and server.count('/repos/') == 1
    assert sum('weights of the authors' in text for text in done) == 1
    assert kept(tmp_path) == [f'{NAME}.safetensors']


@pytest.mark.parametrize('name', [FILE, page_name(FILE)])
def test_the_authors_own_names_are_found_in_ones_directory(
    name: str, server: ReleaseServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = network()
    own = tmp_path / 'own'
    own.mkdir()
    (own / 'resnet_56.pt').write_bytes(pickled(settle(CifarResNet(56, [0.0] * 30, 0, 'fc'))))
    (own / name).write_bytes(pickled(theirs, rank=7))
    monkeypatch.setenv(weights.ENV, str(own))
    ours = timm.create_model(NAME, pretrained=True).eval()
    assert_same_logits(theirs, ours, 32)
    assert server.asked == [] and len(list(own.iterdir())) == 2
    timm.create_model('resnet56_cifar', pretrained=True)
    (own / name).write_bytes(pickled(network('[0.]+[0.5]*29', 7)))
    refused(ValueError, 'compress_rate')


def authors_name(name: str) -> str:
    """The authors' name of the file of a tag, as their scripts put it together."""
    method, _, rest = name.partition('_')
    base, _, tag = rest.partition('.')
    row = tags()[method][base][tag]
    rank = f'_{row["rank"]}' if method == 'norton' else ''
    return f'{ARCHITECTURES[base]}_{row["rates"]}{rank}_{published_accuracy(name)["top1"]:.2f}.pt'


@pytest.mark.parametrize('dots', [True, False])
def test_every_tag_gets_its_file_among_all(dots: bool) -> None:
    dense = {base: f'{text.removesuffix("_pabs")}.pt' for base, text in ARCHITECTURES.items() if base != 'resnet50'}
    names = {**{name: authors_name(name) for name in TAGS}, **dense}
    assert len(TAGS) == 39 and len(set(names.values())) == 45
    detectors = {
        (task, name): f'{start}ResNet50FPN_{authors_name(name).rpartition("_")[0]}.pt'
        for task, start in (('box', 'FasterRCNN'), ('mask', 'MaskRCNN'), ('keypoint', 'KeypointRCNN'))
        for name in TAGS
        if '_resnet50.' in name
    }
    files = [page_name(f) if dots else f for f in [*names.values(), *detectors.values(), 'resnet_50.pt', 'notes.txt']]
    random.shuffle(files)
    for name, file in names.items():
        assert assets_of(name, files) == [page_name(file) if dots else file], name
        assert expected_asset(name) == page_name(file).replace('_pabs', '_pabs' if 'norton_resnet50' in name else '')
    for (task, name), file in detectors.items():
        assert assets_of(name, files, task) == [page_name(file) if dots else file], (task, name)


def test_networks_are_the_ones_with_names() -> None:
    assert set(ARCHITECTURES) == set(NETWORKS)


def test_a_detector_is_downloaded_once_and_checked(server: ReleaseServer, tmp_path: Path) -> None:
    backbone = 'norton_resnet50.r078'
    rates = tags()['norton']['resnet50']['r078']['rates']
    file = server.put(f'FasterRCNNResNet50FPN_resnet_50_pabs_{rates}_1.pt', b'weights')
    server.put(f'resnet_50_pabs_{rates}_1_73.65.pt', b'of a classifier')
    path = released_detector('box', backbone)
    assert path.name == file and path.read_bytes() == b'weights'
    assert released_detector('box', backbone) == path and server.count('/download/') == 1
    path.write_bytes(b'changed')
    with pytest.raises(ValueError, match='has changed'):
        released_detector('box', backbone)
    with pytest.raises(ValueError, match=re.escape('MaskRCNNResNet50FPN_resnet_50_pabs_.0.+.0.1.2')):
        released_detector('mask', backbone)
    for bad in ('resnet50', 'norton_resnet18.r050', 'norton_resnet56_cifar.r071'):
        with pytest.raises(ValueError, match='no detector on'):
            released_detector('box', bad)


def test_a_source_that_is_none() -> None:
    with pytest.raises(ValueError, match='owner/repository@tag'):
        AuthorsReleases().obtain(NAME, 'pvti/NORTON')
