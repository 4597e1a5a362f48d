"""Files of compressed networks.

The whole sweep: ``pytest tests/test_checkpoint.py -m "slow or not slow"``.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from checkpoint_step import states
from families import FAMILIES, QUICK, SLOW, build, images
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tool_runner import run_python
from torch import nn

from norton_timm import CompressionSpec, CPDConv2d, reshape
from norton_timm.checkpoints.file import load, read_metadata, save, save_folder
from norton_timm.compression import compress

NAMES = [*QUICK, *SLOW]
STEP = Path(__file__).with_name('checkpoint_step.py')


def squeeze(model: nn.Module, x, rank: int = 2, rate: float = 0.3) -> nn.Module:
    """Decomposed with fresh factors, then pruned at random: the shapes of a compression without its cost."""
    reshape(model, CompressionSpec(rank=rank), x)
    for module in model.modules():
        if isinstance(module, CPDConv2d):
            module.reset_parameters()
    spec = CompressionSpec(method='coring', rates=rate, criterion='random')
    return compress(model, spec, x)[0].eval()


@pytest.fixture(scope='module')
def small(tmp_path_factory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model = squeeze(build('resnet20_cifar', num_classes=5), images('resnet20_cifar'))
    return model, save(model, tmp_path_factory.mktemp('small') / 'model.safetensors', note='hello')


def origin(name: str, **kwargs) -> dict:
    """What ``save`` must be told of a torchvision network that ``build`` made; timm's networks know it themselves."""
    if not name.startswith('torchvision/'):
        return {}
    return dict(architecture=name, model_kwargs=dict(aux_logits=False, init_weights=False, **kwargs))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert not different


def check_facts(loaded: nn.Module, model: nn.Module) -> None:
    assert [e['num_chs'] for e in loaded.feature_info] == [e['num_chs'] for e in model.feature_info]
    for key in ('num_features', 'head_hidden_size', 'num_classes'):
        assert getattr(loaded, key, None) == getattr(model, key, None)
    assert str(loaded) == str(model)  # every module with its widths and settings
    assert loaded.pretrained_cfg['architecture'] == model.pretrained_cfg['architecture']


@pytest.mark.parametrize('name', FAMILIES)
def test_every_family_comes_back_bit_for_bit(name, tmp_path):
    x = images(name, 4)
    model = squeeze(build(name, num_classes=6), x[:1])
    path = save(model, tmp_path / 'model.safetensors', **origin(name, num_classes=6))
    loaded = load(path)
    if not origin(name):
        check_facts(loaded, model)
    assert save(loaded, tmp_path / 'again.safetensors').read_bytes() == path.read_bytes()
    assert_same(states(loaded, x), states(model, x))


EVERYWHERE = ('resnet20_cifar', 'mobilenetv2_100')  # in every run; the others take 4 s each to start a process


@pytest.mark.parametrize('name', [n if n in EVERYWHERE else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_every_family_is_the_same_in_another_process(name, tmp_path):
    x = images(name, 4)
    model = squeeze(build(name, num_classes=6), x[:1])
    files = [str(tmp_path / f'{f}.safetensors') for f in ('model', 'x', 'out')]
    save(model, files[0], **origin(name, num_classes=6))
    save_file({'x': x}, files[1])
    done = run_python(STEP, *files, torch.get_num_threads(), cwd=tmp_path)
    assert done.code == 0, done.err
    assert_same(load_file(files[2]), states(model, x))


def test_a_real_compression(tmp_path):
    x = images('resnet20_cifar', 4)
    model, report = compress(build('resnet20_cifar'), CompressionSpec(rank=1, rates=0.3), x)
    path = save(model, tmp_path / 'm.safetensors', spec=CompressionSpec(rank=1, rates=0.3), report=report)
    assert_same(states(load(path), x), states(model, x))
    metadata = read_metadata(path)
    assert CompressionSpec.from_dict(metadata['spec']) == CompressionSpec(rank=1, rates=0.3)
    assert metadata['report']['after']['params'] == report.after.params


@pytest.mark.parametrize(
    ('name', 'kwargs'),
    [
        ('resnet18', dict(features_only=True, out_indices=(1, 2, 4))),
        ('mobilenetv2_100', dict(features_only=True)),
        ('resnet18', dict(num_classes=0)),
        ('resnet18', dict(in_chans=1, global_pool='avgmax', num_classes=3)),
        ('resnet18', dict(drop_rate=0.3, drop_path_rate=0.2)),
        ('resnet18', dict(output_stride=16)),
        ('norton_resnet56_cifar.r071', dict(num_classes=4)),
        ('coring_resnet56_cifar.r072', dict(features_only=True)),
    ],
)
def test_constructor_arguments_are_found(name, kwargs, tmp_path):
    model = build(name, **kwargs)
    x = torch.randn(2, kwargs.get('in_chans', 3), 64, 64)
    if not name.startswith(('norton', 'coring')):
        model = squeeze(model, x)
    loaded = load(save(model, tmp_path / 'm.safetensors'))
    assert_same(states(loaded, x), states(model, x))
    assert type(loaded) is type(model) and str(loaded) == str(model)
    if 'features_only' in kwargs:
        assert loaded.feature_info.channels() == model.feature_info.channels() == [f.shape[1] for f in loaded(x)]


def test_changes_after_construction_are_kept(tmp_path):
    model = squeeze(build('resnet18'), images('resnet18'))
    model.reset_classifier(3)
    model.bn1.eps, model.bn1.momentum = 1e-3, None
    model.conv1.requires_grad_(False)
    first = next(m for m in model.modules() if isinstance(m, CPDConv2d))
    first.form, first.tuned = 'merged', {False: 'factored'}
    model.to(memory_format=torch.channels_last)
    loaded = load(save(model, tmp_path / 'm.safetensors'))
    assert loaded.bn1.eps == 1e-3 and loaded.bn1.momentum is None and loaded.fc.out_features == 3
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]
    assert [p.stride() for p in loaded.parameters()] == [p.stride() for p in model.parameters()]
    again = next(m for m in loaded.modules() if isinstance(m, CPDConv2d))
    assert again.form == 'merged' and again.tuned == {False: 'factored'}
    loaded = load(save(model.bfloat16(), tmp_path / 'm.safetensors'))
    assert next(loaded.parameters()).dtype == torch.bfloat16
    assert_same(loaded.state_dict(), model.state_dict())


def test_torchvision_networks_say_their_name(tmp_path):
    kwargs = dict(num_classes=4, aux_logits=False, init_weights=False)
    model = torchvision.models.googlenet(weights=None, **kwargs).eval()
    x = torch.randn(2, 3, 64, 64)
    model = squeeze(model, x)
    with pytest.raises(ValueError, match='architecture='):
        save(model, tmp_path / 'm.safetensors')
    loaded = load(save(model, tmp_path / 'm.safetensors', architecture='torchvision/googlenet', model_kwargs=kwargs))
    assert_same(states(loaded, x), states(model, x))
    assert load(save(loaded, tmp_path / 'n.safetensors')) is not None  # now it knows


@pytest.mark.slow
def test_whole_detector(tmp_path):
    kwargs = dict(num_classes=5, min_size=96, max_size=128)
    model = torchvision.models.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None, **kwargs).eval()
    image = [torch.rand(3, 96, 128)]
    model = squeeze(model, image)
    name = 'torchvision/maskrcnn_resnet50_fpn'
    loaded = load(save(model, tmp_path / 'm.safetensors', architecture=name, model_kwargs=kwargs))
    with torch.no_grad():
        assert_same(loaded(image)[0], model(image)[0])
    assert_same(loaded.state_dict(), model.state_dict())


def test_folder_for_timm(tmp_path):
    x = images('resnet20_cifar')
    model = squeeze(build('resnet20_cifar', num_classes=5), x)
    folder = save_folder(model, tmp_path / 'folder')
    assert sorted(p.name for p in folder.iterdir()) == ['config.json', 'model.safetensors']
    with torch.no_grad():
        expected = model(x)
        made = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
        assert torch.equal(made(x), expected) and torch.equal(load(folder)(x), expected)
        assert timm.create_model(f'local-dir:{folder}', pretrained=True, num_classes=3).eval()(x).shape == (2, 3)
        features = timm.create_model(f'local-dir:{folder}', pretrained=True, features_only=True).eval()
        found = features(x)
    assert [f.shape[1] for f in found] == features.feature_info.channels()
    assert [f.shape[1] for f in found] == [e['num_chs'] for e in model.feature_info]
    fresh = timm.create_model(f'local-dir:{folder}')  # random weights
    assert all(torch.isfinite(p).all() for p in fresh.parameters())
    assert all(m.vertical.std() > 0 for m in fresh.modules() if isinstance(m, CPDConv2d))
    path = save(made, tmp_path / 'from_timm.safetensors')
    assert_same(load(path).state_dict(), model.state_dict())
    (folder / 'other.txt').write_text('mine')
    with pytest.raises(ValueError, match='new folder'):
        save_folder(model, folder)


def test_random_numbers_of_the_caller_are_not_used(small, tmp_path):
    before = torch.get_rng_state()
    save(small[0], tmp_path / 'm.safetensors')
    load(small[1])
    assert torch.equal(torch.get_rng_state(), before)


# ---- what save refuses


def test_save_refuses_what_load_could_not_build(small, tmp_path):
    path = tmp_path / 'm.safetensors'
    with pytest.raises(ValueError, match='architecture='):
        save(nn.Sequential(nn.Conv2d(3, 4, 3)), path)
    model = timm.create_model('resnet18')
    model.layer1 = nn.Identity()
    with pytest.raises(ValueError, match='layer1 is Identity'):
        save(model, path)
    model = timm.create_model('resnet18')
    model.layer2[0].conv1.stride = (1, 1)
    with pytest.raises(ValueError, match=r'layer2\.0\.conv1\.stride'):
        save(model, path)
    with pytest.raises(ValueError, match='aux_fc'):
        save(timm.create_model('resnet18'), path, model_kwargs={'aux_fc': 1})
    with pytest.raises(ValueError, match='note'):
        save(small[0], path, note=object())
    with pytest.raises(ValueError, match='safetensors'):
        save(small[0], tmp_path / 'm.pt')
    with pytest.raises(ValueError, match='folder that exists'):
        save(small[0], tmp_path / 'missing' / 'm.safetensors')
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(small, tmp_path, monkeypatch):
    path = tmp_path / 'm.safetensors'
    path.write_bytes(b'old')
    monkeypatch.setattr(
        'norton_timm.checkpoints.file.save_file', lambda *a: (_ for _ in ()).throw(OSError('disk full'))
    )
    with pytest.raises(OSError, match='disk full'):
        save(small[0], path)
    assert path.read_bytes() == b'old' and list(tmp_path.iterdir()) == [path]


# ---- what load refuses


def rewritten(path: Path, target: Path, change, tensors=None) -> Path:
    """The file with its recipe changed and a checksum that holds: what somebody who means harm would write."""
    with safe_open(path, framework='pt') as file:
        recipe = json.loads(file.metadata()['norton_timm'])
    tensors = load_file(path) if tensors is None else tensors
    del recipe['sha256']
    recipe = change(recipe) or recipe
    digest = hashlib.sha256(json.dumps(recipe).encode())
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f'\0{name}\0{t.dtype}\0{tuple(t.shape)}\0'.encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().tobytes())
    if isinstance(recipe, dict):
        recipe['sha256'] = digest.hexdigest()
    save_file(tensors, target, {'norton_timm': json.dumps(recipe)})
    return target


def test_the_rewriting_itself_is_accepted(small, tmp_path):
    assert load(rewritten(small[1], tmp_path / 'm.safetensors', lambda r: None)) is not None


def _first_layer(recipe):
    return next(iter(recipe['layers'].values()))


HOSTILE = {
    'version': lambda r: r.update(format=2),
    'version true': lambda r: r.update(format=True),
    'no version': lambda r: r.pop('format') and None,
    'list': lambda r: [1],
    'hub': lambda r: r.update(architecture='hf-hub:timm/resnet18'),
    'local': lambda r: r.update(architecture='local-dir:/tmp'),
    'tag': lambda r: r.update(architecture='resnet18.a1_in1k'),
    'unknown': lambda r: r.update(architecture='os'),
    'no name': lambda r: r.update(architecture=['resnet18']),
    'torchvision': lambda r: r.update(architecture='torchvision/../x'),
    'recursion': lambda r: r.update(architecture='compressed_checkpoint'),
    'argument': lambda r: r['model_kwargs'].update(pretrained=True),
    'path argument': lambda r: r['model_kwargs'].update(pretrained_cfg={'file': '/etc/passwd'}),
    'huge classes': lambda r: r['model_kwargs'].update(num_classes=999_999),
    'huge input': lambda r: r['model_kwargs'].update(in_chans=10**5),
    'huge number': lambda r: r['model_kwargs'].update(in_chans=10**30),
    'text number': lambda r: r['model_kwargs'].update(num_classes='5'),
    'fraction': lambda r: r['model_kwargs'].update(in_chans=3.5),
    'other network': lambda r: r.update(architecture='resnet32_cifar'),
    'unknown field': lambda r: r.update(code='print(1)'),
    'wrong type': lambda r: r.update(layers=[1]),
    'rank': lambda r: _first_layer(r).update(rank=3),
    'rank zero': lambda r: _first_layer(r).update(rank=0),
    'rank text': lambda r: _first_layer(r).update(rank='2'),
    'form': lambda r: _first_layer(r).update(form='eval'),
    'layer nobody has': lambda r: r['layers'].update({'nothing.here': {'rank': 1}}),
    'layer is the root': lambda r: r['layers'].update({'': {'rank': 1}}),
    'layer missing': lambda r: r['layers'].pop(next(iter(r['layers']))) and None,
    'low rank nobody has': lambda r: r.update(low_rank={'layer9.0.conv1': 1}),
    'low rank of the root': lambda r: r.update(low_rank={'': 1}),
    'low rank of a norm': lambda r: r.update(low_rank={'bn1': 1}),
    'low rank too large': lambda r: r.update(low_rank={'layer3.2.conv2': 577}),
    'low rank text': lambda r: r.update(low_rank={'fc': '2'}),
    'low rank in low rank': lambda r: r.update(low_rank={'fc': 2, 'fc.0': 1}),
    'low rank and decomposed': lambda r: r.update(low_rank={next(iter(r['layers'])): 1}),
    'block nobody has': lambda r: r.update(dropped=['layer1.9']),
    'block is the root': lambda r: r.update(dropped=['']),
    'block is a number': lambda r: r.update(dropped=[1]),
    'block in a block': lambda r: r.update(dropped=['layer1.1.conv1', 'layer1.1']),
    'blocks around a block': lambda r: r.update(dropped=['layer1', 'layer1.1']),
    'block with tensors': lambda r: r.update(dropped=['layer1.1']),
    'map': lambda r: r['maps'].update({k: 10**5 for k in r['maps']}),
    'map text': lambda r: r['maps'].update({k: 'x' for k in r['maps']}),
    'buffer': lambda r: r.update(buffers={'bn1.running_mean': [1]}),
    'buffer shape': lambda r: r.update(buffers={'x': 'y'}),
    'features': lambda r: r.update(features=[10**6] * len(r['features'])),
    'features missing': lambda r: r.update(features=[]),
    'number': lambda r: r.update(numbers={'conv1.in_channels': 7}),
    'dunder': lambda r: r.update(numbers={'__class__': 1}),
    'method': lambda r: r.update(numbers={'forward': 1}),
    'nan': lambda r: r.update(numbers={'bn1.eps': float('nan')}),
    'frozen': lambda r: r.update(frozen=[1]),
    'channels last': lambda r: r.update(channels_last=['fc.bias']),
    'cfg': lambda r: r['pretrained_cfg'].update(input_size='big'),
    'cfg file': lambda r: r['pretrained_cfg'].update(file='/etc/passwd'),
    'cfg architecture': lambda r: r['pretrained_cfg'].update(architecture=[1]),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_hostile_recipes(name, small, tmp_path):
    path = rewritten(small[1], tmp_path / 'm.safetensors', HOSTILE[name])
    with pytest.raises(ValueError) as caught:
        load(path)
    text = str(caught.value)
    assert str(path) in text and '\n' not in text and len(text) < 700


def _without(name):
    return lambda t: t.pop(name) is None


TENSORS = {
    'missing': lambda t: t.pop('conv1.bias', t.pop('fc.weight')) is None,
    'extra': lambda t: t.update(extra=torch.zeros(3)),
    'larger': lambda t: t.update({'bn1.weight': torch.ones(4096)}),
    'empty': lambda t: t.update({'bn1.weight': torch.ones(0)}),
    'other shape': lambda t: t.update({'bn1.weight': torch.ones(4, 4)}),
    'narrower': lambda t: t.update({'bn1.weight': t['bn1.weight'][:-1].clone()}),
    'reader narrower': lambda t: t.update({'fc.weight': t['fc.weight'][:, :-1].clone()}),
    'integers': lambda t: t.update({'bn1.weight': t['bn1.weight'].long()}),
    'complex': lambda t: t.update({'bn1.weight': t['bn1.weight'].to(torch.complex64)}),
    'index out of range': lambda t: t.update({k: v + 1000 for k, v in t.items() if k.endswith('.index')}),
    'index below': lambda t: t.update({k: v - 1000 for k, v in t.items() if k.endswith('.index')}),
    'index of fractions': lambda t: t.update({k: v.float() for k, v in t.items() if k.endswith('.index')}),
}


@pytest.mark.parametrize('name', TENSORS)
def test_hostile_tensors(name, small, tmp_path):
    tensors = load_file(small[1])
    TENSORS[name](tensors)
    path = rewritten(small[1], tmp_path / 'm.safetensors', lambda r: None, tensors)
    with pytest.raises(ValueError, match=r'm\.safetensors'):
        load(path)


def test_truncated_files(small, tmp_path):
    data, path = small[1].read_bytes(), tmp_path / 'm.safetensors'
    for n in [0, 1, 2, 7, 8, 9, 100, 1000, len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:n])
        with pytest.raises(ValueError, match='not a whole safetensors file'):
            load(path)
    path.write_bytes(data + b'more')
    with pytest.raises(ValueError):
        load(path)


def test_every_flipped_bit_is_noticed(small, tmp_path):
    data, path = small[1].read_bytes(), tmp_path / 'm.safetensors'
    model, generator = small[0], torch.Generator().manual_seed(0)
    header = 8 + struct.unpack('<Q', data[:8])[0]
    places = [*range(0, 24), *torch.randint(8, header, (60,), generator=generator).tolist()]
    places += [*torch.randint(header, len(data), (60,), generator=generator).tolist(), len(data) - 1]
    for k, place in enumerate(places):
        flipped = bytearray(data)
        flipped[place] ^= 1 << (k % 8)
        path.write_bytes(flipped)
        try:
            loaded = load(path)
        except ValueError:
            continue
        # the header may say the same in other bytes (white space)
        assert place < header
        assert_same(loaded.state_dict(), model.state_dict())


def test_a_huge_header_allocates_nothing(tmp_path):
    path = tmp_path / 'm.safetensors'
    for size in (2**63, 2**40, 2**31):
        path.write_bytes(struct.pack('<Q', size) + b'{}')
        with pytest.raises(ValueError, match='not a whole safetensors file'):
            load(path)
    header = json.dumps({'w': {'dtype': 'F32', 'shape': [2**40], 'data_offsets': [0, 2**42]}}).encode()
    path.write_bytes(struct.pack('<Q', len(header)) + header)
    with pytest.raises(ValueError, match='not a whole safetensors file'):
        load(path)


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ('exploded',))


def test_pickles_are_not_opened(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, write in {
        'a.pt': lambda p: torch.save({'x': Bomb()}, p),
        'b.safetensors': lambda p: torch.save({'x': Bomb()}, p, _use_new_zipfile_serialization=False),
        'c.pkl': lambda p: p.write_bytes(pickle.dumps(Bomb(), protocol=5)),
        'd.safetensors': lambda p: p.write_bytes(pickle.dumps(Bomb(), protocol=0)),
    }.items():
        write(tmp_path / name)
        expected = 'not a whole' if name.startswith('d') else 'import_checkpoint'
        with pytest.raises(ValueError, match=expected):
            load(tmp_path / name)
    assert not (tmp_path / 'exploded').exists()


def test_other_files(tmp_path):
    save_file({'x': torch.zeros(2)}, tmp_path / 'plain.safetensors')
    with pytest.raises(ValueError, match='without a recipe'):
        load(tmp_path / 'plain.safetensors')
    save_file({'x': torch.zeros(2)}, tmp_path / 'deep.safetensors', {'norton_timm': '[' * 100_000})
    with pytest.raises(ValueError, match='not JSON'):
        load(tmp_path / 'deep.safetensors')
    with pytest.raises(ValueError, match='no such file'):
        load(tmp_path / 'missing.safetensors')
    with pytest.raises(ValueError, match='no such file'):
        load(tmp_path)


def test_meta_networks_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match='meta'):
        save(timm.create_model('resnet18', device='meta'), tmp_path / 'm.safetensors')
