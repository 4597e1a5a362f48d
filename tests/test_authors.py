"""Checkpoints written in the authors' layouts by small networks of the tests' own give the same logits through ours."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import timm
import torch
from authors_networks import (
    CifarDenseNet,
    CifarGoogLeNet,
    CifarMobileNet,
    CifarResNet,
    CifarVGG,
    ImageNetResNet50,
)
from torch import Tensor, nn

import norton_timm.models  # noqa: F401
from detection.rcnn.restore import convert_detector_state_dict
from norton_timm.checkpoints.asset_names import rates_from_name
from norton_timm.checkpoints.keys import read_checkpoint
from norton_timm.compression.spec import parse_rates
from norton_timm.layers.cpd_conv import CPDConv2d
from norton_timm.models.authors import convert_authors_checkpoint
from norton_timm.models.compressed import tags

R078 = '[0.]+[0.1]*2+[0.4]*5+[0.75]*12'


def settle(model: nn.Module) -> nn.Module:
    """Every parameter a random number of its own, and statistics that fit, so that signals stay in range."""
    size = 64 if isinstance(model, ImageNetResNet50) else 32
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm1d))]
    with torch.no_grad():
        for norm in norms:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.1)
            norm.momentum = 1.0
        model.train()(torch.randn(8, 3, size, size))
    return model.eval()


@torch.no_grad()
def assert_same_logits(theirs: nn.Module, ours: nn.Module, size: int) -> None:
    """In double precision, where the order of summation does not show."""
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    expected = theirs.double()(x)
    assert expected.std() > 0.01, 'the reference says the same whatever its weights'
    torch.testing.assert_close(ours.double()(x), expected, rtol=0, atol=1e-8)


CASES = {
    'norton resnet56': (lambda r, k: CifarResNet(56, r, k, 'fc'), '[0.]+[0.12]*2+[0.4]*27', 7, 'norton_resnet56_cifar'),
    'norton resnet56, stem pruned': (
        lambda r, k: CifarResNet(56, r, k, 'fc'),
        '[0.25]+[0.5]+[0.3]+[0.4]*27',
        2,
        'norton_resnet56_cifar',
    ),
    'norton resnet110': (
        lambda r, k: CifarResNet(110, r, k, 'linear'),
        '[0.]+[0.4]*2+[0.5]*18+[0.65]*36',
        4,
        'norton_resnet110_cifar',
    ),
    'norton vgg16': (CifarVGG, '[0.6]*6+[0.8]*6', 2, 'norton_vgg16_bn_cifar'),
    'norton densenet40': (
        CifarDenseNet,
        '[0.]+[0.3]*12+[0.1]+[0.3]*12+[0.]+[0.3]*12',
        3,
        'norton_densenet40_cifar',
    ),
    'norton resnet50': (ImageNetResNet50, R078, 1, 'norton_resnet50'),
    'coring resnet56': (
        lambda r, k: CifarResNet(56, r, k, 'fc'),
        '[0.]+[0.4]*2+[0.5]*9+[0.6]*9+[0.7]*9',
        0,
        'coring_resnet56_cifar',
    ),
    'coring vgg16': (CifarVGG, '[0.45]*7+[0.78]*5', 0, 'coring_vgg16_bn_cifar'),
    'coring densenet40': (CifarDenseNet, '[0.]+[0.08]*6+[0.09]*6+[0.08]*26', 0, 'coring_densenet40_cifar'),
    'coring googlenet': (CifarGoogLeNet, '[0.3]+[0.6]*2+[0.7]*5+[0.8]*2', 0, 'coring_googlenet_cifar'),
    'coring mobilenetv2': (CifarMobileNet, '[0.]+[0.2]+[0.3]*2+[0.4]*2+[0.5]*2', 0, 'coring_mobilenetv2_cifar'),
    'coring resnet50': (ImageNetResNet50, '[0.]+[0.5]*3+[0.6]*16', 0, 'coring_resnet50'),
}


@pytest.mark.parametrize('case', CASES)
def test_same_logits_as_the_authors_network(case: str, tmp_path: Path) -> None:
    make, rates, rank, architecture = CASES[case]
    theirs = settle(make(parse_rates(rates), rank))
    path = tmp_path / 'checkpoint.pt'
    if rank:
        torch.save({'state_dict': theirs.state_dict(), 'rank': rank, 'compress_rate': rates}, path)
    else:  # CORING says nothing of its rates: they are found from the shapes
        best = torch.tensor(93.0)
        torch.save({'epoch': 3, 'state_dict': theirs.state_dict(), 'best_top1_acc': best, 'optimizer': {}}, path)
    ours = convert_authors_checkpoint(path)
    assert ours.pretrained_cfg['architecture'] == architecture
    assert bool(rank) == any(isinstance(m, CPDConv2d) for m in ours.modules())
    assert_same_logits(theirs, ours, 64 if 'resnet50' in case else 32)


def test_a_published_network_that_is_not_pruned_gets_its_tag(tmp_path: Path) -> None:
    theirs = settle(CifarResNet(56, [0.0] * 30, 2, 'fc'))
    torch.save({'state_dict': theirs.state_dict(), 'rank': 2, 'compress_rate': '[0.]*100'}, tmp_path / 'a.pt')
    assert convert_authors_checkpoint(tmp_path / 'a.pt').pretrained_cfg['tag'] == 'r071'


NETWORKS = {
    'vgg16_bn_cifar': CifarVGG,
    'resnet56_cifar': lambda r, k: CifarResNet(56, r, k, 'fc'),
    'resnet110_cifar': lambda r, k: CifarResNet(110, r, k, 'linear'),
    'densenet40_cifar': CifarDenseNet,
    'googlenet_cifar': CifarGoogLeNet,
    'mobilenetv2_cifar': CifarMobileNet,
    'resnet50': ImageNetResNet50,
}
TAGS = [f'{m}_{b}.{tag}' for m, bases in tags().items() for b in bases if b in NETWORKS for tag in bases[b]]


def authors_state(name: str) -> dict[str, Tensor]:
    """Tensors as the authors' network of a tag has them."""
    method, _, rest = name.partition('_')
    base, _, tag = rest.partition('.')
    row = tags()[method][base][tag]
    return NETWORKS[base](parse_rates(row['rates']), row.get('rank', 0)).state_dict()


def tag_in(path: Path) -> str:
    cfg = convert_authors_checkpoint(path).pretrained_cfg
    return f'{cfg["architecture"]}.{cfg["tag"]}'


@pytest.mark.parametrize('name', TAGS)
def test_every_published_network_gets_its_tag_from_its_widths(name: str, tmp_path: Path) -> None:
    assert len(TAGS) == 39
    torch.save({'epoch': 3, 'state_dict': authors_state(name), 'optimizer': {}}, tmp_path / 'model_best.pth.tar')
    assert tag_in(tmp_path / 'model_best.pth.tar') == name


def test_rates_that_give_the_widths_of_a_tag_give_the_tag(tmp_path: Path) -> None:
    """0.18 and 0.181 leave 13 of 16 filters, 26 of 32 and 52 of 64."""
    state = CifarResNet(56, parse_rates('[0.]+[0.181]*29'), 1, 'fc').state_dict()
    torch.save({'state_dict': state, 'rank': 1, 'compress_rate': '[0.]+[0.181]*29'}, tmp_path / 'a.pt')
    assert tag_in(tmp_path / 'a.pt') == 'norton_resnet56_cifar.r089'
    state = CifarResNet(56, parse_rates('[0.]+[0.25]*29'), 1, 'fc').state_dict()
    torch.save({'state_dict': state, 'rank': 1}, tmp_path / 'b.pt')
    assert tag_in(tmp_path / 'b.pt') == 'norton_resnet56_cifar.'  # of no tag


@pytest.mark.parametrize('kind', [dict, argparse.Namespace])
@pytest.mark.parametrize('rates', ['[0.]+[0.12]*2+[0.4]*27', [0.0, 0.12, 0.12] + [0.4] * 27, '[0.]*100', 'none', None])
def test_the_options_of_the_authors_script_are_read(kind: type, rates: object, tmp_path: Path, caplog) -> None:
    """`args.rank` is the number of a process there. What disagrees with the tensors is told, and they decide."""
    args = kind(compress_rate=rates, rank=0, lr=0.01, gpu=None, data_dir='data/cifar10')
    torch.save({'state_dict': authors_state('norton_resnet56_cifar.r042'), 'args': args}, tmp_path / 'a.pt')
    assert tag_in(tmp_path / 'a.pt') == 'norton_resnet56_cifar.r042'
    assert ('which decide' in caplog.text) == (rates in ('[0.]*100', 'none'))


def test_two_tags_of_equal_widths_are_told_apart_by_what_the_file_says(tmp_path: Path, monkeypatch, caplog) -> None:
    known = {m: {b: dict(rows) for b, rows in bases.items()} for m, bases in tags().items()}
    known['norton']['resnet56_cifar'] = {
        'r089': {'rank': 1, 'rates': '[0.]+[0.18]*29'},
        'r042': {'rank': 1, 'rates': '[0.]+[0.181]*29'},
    }
    monkeypatch.setattr('norton_timm.models.compressed.tags', lambda: known)
    monkeypatch.setattr('norton_timm.models.authors.tags', lambda: known)
    state = CifarResNet(56, parse_rates('[0.]+[0.18]*29'), 1, 'fc').state_dict()
    for said, expected in (('[0.]+[0.181]*29', 'r042'), ('[0.]+[0.18]*29', 'r089')):
        torch.save({'state_dict': state, 'args': {'compress_rate': said}}, tmp_path / 'a.pt')
        caplog.clear()
        assert tag_in(tmp_path / 'a.pt') == f'norton_resnet56_cifar.{expected}'
        assert f'have the same widths; taken for {expected}' in caplog.text


def test_data_parallel_prefix_and_a_list_of_rates(tmp_path: Path) -> None:
    rates = parse_rates('[0.]+[0.18]*29')
    theirs = settle(CifarResNet(56, rates, 1, 'fc'))
    state = {f'module.{k}': v for k, v in theirs.state_dict().items()}
    torch.save({'state_dict': state, 'rank': 1, 'compress_rate': rates}, tmp_path / 'a.pt')
    assert_same_logits(theirs, convert_authors_checkpoint(tmp_path / 'a.pt'), 32)


@pytest.mark.parametrize('rates', ['[0.]+[0.1]*2+[0.4]*5+[0.75]*12', '.0.+.0.1.2+.0.4.5+.0.75.12'])
def test_rates_from_the_file_name_alone(rates: str, tmp_path: Path) -> None:
    theirs = settle(ImageNetResNet50(parse_rates(R078), 1))
    path = tmp_path / f'resnet_50_pabs_{rates}_1_73.65.pt'
    torch.save({'state_dict': theirs.state_dict()}, path)
    assert_same_logits(theirs, convert_authors_checkpoint(path), 64)


@pytest.mark.parametrize(
    'name, rates, rank',
    [
        ('resnet_50_pabs_[0.]+[0.1]*2+[0.4]*5+[0.75]*12_1_73.65.pt', R078, 1),
        ('resnet_50_pabs_.0.+.0.1.2+.0.4.5+.0.75.12_1_73.65.pt', R078, 1),
        ('vgg_16_bn_pabs_.0.21.7+.0.75.5_8_94.45.pt', '[0.21]*7+[0.75]*5', 8),
        ('vgg_16_bn_pabs_.0.13_1.pt', '[0.]*13', 1),
        ('densenet_40_.0.+.0.12.+.0.3.2.pt', '[0.]+[0.12]+[0.3]*2', None),
        ('resnet_56_.0.+.0.18.29_94.76.pt', '[0.]+[0.18]*29', None),  # an accuracy is no rank
        ('model_best.pth.tar', None, None),
        ('resnet_56.pt', None, None),
    ],
)
def test_reading_a_file_name(name: str, rates: str | None, rank: int | None) -> None:
    assert rates_from_name(name) == (rates, rank)


def test_detector_of_the_reference_training(tmp_path: Path) -> None:
    theirs = settle(ImageNetResNet50(parse_rates(R078), 1))
    body = {f'backbone.body.{k}': v for k, v in theirs.state_dict().items() if not k.startswith('fc.')}
    rest = {'backbone.fpn.inner_blocks.0.0.weight': torch.randn(4, 4), 'rpn.head.conv.0.0.bias': torch.randn(4)}
    torch.save({'model': {**body, **rest}, 'optimizer': {}, 'epoch': 25}, tmp_path / 'model_25.pth')
    backbone = convert_authors_checkpoint(tmp_path / 'model_25.pth')
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        features = backbone.double().forward_intermediates(x, indices=[1, 2, 3, 4], intermediates_only=True)
        for mine, expected in zip(features, theirs.double().body(x)):
            torch.testing.assert_close(mine, expected, rtol=0, atol=1e-8)
    state, _ = convert_detector_state_dict(tmp_path / 'model_25.pth')
    assert 'backbone.body.layer1.0.conv2.pointwise' in state
    assert torch.equal(state['rpn.head.conv.0.0.bias'], rest['rpn.head.conv.0.0.bias'])


def test_everything_that_does_not_fit_is_told_together(tmp_path: Path) -> None:
    state = settle(CifarResNet(56, parse_rates('[0.]+[0.18]*29'), 1, 'fc')).state_dict()
    del state['layer2.3.bn1.running_mean']
    state['layer3.0.conv1.feature.vertical.weight'] = torch.zeros(5, 1, 3, 1)
    state['surprise.weight'] = torch.zeros(1)
    torch.save({'state_dict': state, 'rank': 2, 'compress_rate': '[0.]+[0.4]*29'}, tmp_path / 'a.pt')
    with pytest.raises(ValueError, match='does not fit') as error:
        convert_authors_checkpoint(tmp_path / 'a.pt')
    for part in ('running_mean', 'surprise.weight', 'vertical', 'rank is stated as 2', 'compress_rate'):
        assert part in str(error.value)
    assert '\n' not in str(error.value)


def test_wrong_architecture_is_refused(tmp_path: Path) -> None:
    torch.save({'state_dict': CifarVGG([0.0] * 13, 0).state_dict()}, tmp_path / 'a.pt')
    with pytest.raises(ValueError, match='does not fit resnet50'):
        convert_authors_checkpoint(tmp_path / 'a.pt', architecture='resnet50')
    torch.save({'state_dict': {'blocks.0.weight': torch.zeros(3)}}, tmp_path / 'b.pt')
    with pytest.raises(ValueError, match='unknown architecture'):
        convert_authors_checkpoint(tmp_path / 'b.pt')


class Trap:
    """Runs code when unpickled the unsafe way."""

    def __reduce__(self):
        return print, ('unpickled!',)


def test_never_runs_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({'state_dict': {}, 'x': Trap()}, tmp_path / 'a.pt')
    with pytest.raises(ValueError, match='weights_only'):
        read_checkpoint(tmp_path / 'a.pt')
    assert 'unpickled' not in capsys.readouterr().out


@pytest.mark.parametrize('content', [b'', b'not a checkpoint', None])
def test_unreadable_files(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / 'a.pt').write_bytes(content)
    with pytest.raises(ValueError, match=r'a\.pt'):
        convert_authors_checkpoint(tmp_path / 'a.pt')


def test_import_tool(tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = 'norton_resnet56_cifar.r089'
    theirs = settle(CifarResNet(56, parse_rates('[0.]+[0.18]*29'), 1, 'fc'))
    file = tmp_path / 'resnet_56_pabs_.0.+.0.18.29_1_91.62.pt'
    torch.save({'state_dict': theirs.state_dict()}, file)
    done = tool('import_checkpoint.py', file, '--output', tmp_path / f'{name}.safetensors')
    assert done.code == 0, done.err
    assert name in done.out and '87,633' in done.out
    monkeypatch.setenv('NORTON_TIMM_WEIGHTS', str(tmp_path))
    assert_same_logits(theirs, timm.create_model(name, pretrained=True).eval(), 32)
    (tmp_path / 'bad.pt').write_bytes(b'x')
    for arguments in ([tmp_path / 'bad.pt'], [tmp_path / 'nowhere.pt']):
        done = tool('import_checkpoint.py', *arguments, '--output', tmp_path / 'out.safetensors')
        assert done.code == 2 and len(done.err.splitlines()) == 1, done.err
        assert arguments[0].name in done.err and not (tmp_path / 'out.safetensors').exists()


def test_import_tool_on_a_detector(tool, tmp_path: Path) -> None:
    from detection.rcnn.build import build_detector
    from detection.training.checkpoint import load_detector

    theirs = settle(ImageNetResNet50(parse_rates(R078), 1))
    state = {k: v for k, v in build_detector('box').state_dict().items() if not k.startswith('backbone.body.')}
    state |= {f'backbone.body.{k}': v for k, v in theirs.state_dict().items() if not k.startswith('fc.')}
    torch.save({'model': state, 'epoch': 25}, tmp_path / 'model_25.pth')
    done = tool('import_checkpoint.py', tmp_path / 'model_25.pth', '--output', tmp_path / 'faster.pt')
    assert done.code == 0, done.err
    assert 'box detector on norton_resnet50.r078' in done.out
    model, meta = load_detector(tmp_path / 'faster.pt')
    assert meta['task'] == 'box' and meta['num_classes'] == len(meta['class_names']) == 91
    assert [meta['class_names'][i] for i in (0, 1, 18, 90)] == ['__background__', 'person', 'dog', 'toothbrush']
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        features = model.double().backbone.body(x)
        for mine, expected in zip(features[-4:], theirs.double().body(x)):
            torch.testing.assert_close(mine, expected, rtol=0, atol=1e-8)


def cifar_test_images(data_dir: Path, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """The JPEG test set as (N, 3, 32, 32) in 0..1, straight from the archive."""
    import io
    import tarfile

    import numpy as np
    from PIL import Image

    archive = data_dir / 'cifar10-jpeg.tar.xz'
    if not archive.is_file():
        pytest.skip(f'{archive} is missing')
    images, labels = [], []
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts
            if member.isfile() and 'test' in parts:
                data = tar.extractfile(member)
                assert data is not None
                images.append(np.asarray(Image.open(io.BytesIO(data.read())).convert('RGB')))
                labels.append(parts[-2])
    names = sorted(set(labels))
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    return pixels, torch.tensor([names.index(label) for label in labels])


def trained(data_dir: Path, name: str) -> nn.Module:
    if not (data_dir / name).is_file():
        pytest.skip(f'{data_dir / name} is missing')
    return convert_authors_checkpoint(data_dir / name)


def test_networks_trained_elsewhere_load_by_either_way(data_dir: Path) -> None:
    ours = trained(data_dir, 'resnet56_cifar10.th')
    assert ours.pretrained_cfg['architecture'] == 'resnet56_cifar'
    overlay = dict(file=str(data_dir / 'resnet56_cifar10.th'))
    same = timm.create_model('resnet56_cifar', pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(ours(x), same(x))
    assert trained(data_dir, 'resnet20_cifar10.th').pretrained_cfg['architecture'] == 'resnet20_cifar'


@pytest.mark.slow
def test_accuracy_of_a_network_trained_elsewhere(data_dir: Path) -> None:
    model = trained(data_dir, 'resnet56_cifar10.th')
    images, labels = cifar_test_images(data_dir)
    assert len(images) == 10_000
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    correct = 0
    with torch.no_grad():
        for part, target in zip(((images - mean) / std).split(250), labels.split(250)):
            correct += int((model(part).argmax(1) == target).sum())
    assert abs(correct / 100 - 83.2) <= 0.3
