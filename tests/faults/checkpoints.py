"""Surfaces that are files of weights: our safetensors with their recipes, pickles of others, checkpoints of runs."""

from __future__ import annotations

import io
import json
import struct
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from .gadgets import opcodes, pickles, zipped
from .surface import NUMBERS, VALUES, Surface, edits_of, first_of, mutations, swapped

# of two networks: decomposed and pruned, with layers of low rank and a block left out; the second has grouped layers
_NETWORKS: dict[str, dict[str, Any]] = {
    'resnet20_cifar': {
        'rank': {'layer1.*': 1, 'layer2.*': 1},
        'rates': {'layer2.*.conv1': 0.8, 'layer3.*.conv1': 0.8},
        'low_rank': {'layer3.?.conv1': 0.3, 'fc': 2},
        'drop': ('layer1.1',),
    },
    'lcnet_035': {'rank': 0, 'rates': 0.8, 'low_rank': {'blocks.2.*.conv_pw': 2, 'conv_head': 4}},
}


@lru_cache
def saved(network: str = 'resnet20_cifar') -> bytes:
    """A small compressed network as `norton_timm.save` writes it."""
    import timm
    import torch

    from norton_timm import CompressionSpec, save
    from norton_timm.compression import compress

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        dense = timm.create_model(network, num_classes=3).eval()
        model, _ = compress(dense, CompressionSpec(**_NETWORKS[network]), torch.zeros(1, 3, 32, 32))
        return save(model, Path(folder) / 'a.safetensors').read_bytes()


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The JSON at the start of a safetensors file, and the bytes after it."""
    length = struct.unpack('<Q', data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: Any, rest: bytes) -> bytes:
    """Inverse of `header_of`."""
    text = json.dumps(header, default=str).encode('utf-8', 'surrogatepass')
    return struct.pack('<Q', len(text)) + text + rest


def with_recipe(change: Any, network: str = 'resnet20_cifar', tensors_of: Any = None) -> bytes:
    """The small network with another recipe, whose checksum holds: its author can compute it as well.

    Args:
        change: takes the recipe, gives another.
        network: which.
        tensors_of: takes that recipe, and gives the tensors; None: those of the network as it is.
    """
    from safetensors.torch import save

    from norton_timm.checkpoints.file import _digest

    values = change(_recipe(network))
    tensors = _tensors(network) if tensors_of is None else tensors_of(values)
    if isinstance(values, dict):
        values.pop('sha256', None)
        values = {'sha256': _digest(values, tensors), **values}
    return save(tensors, {'norton_timm': json.dumps(values)})


def _recipe(network: str) -> dict[str, Any]:
    recipe = json.loads(header_of(saved(network))[0]['__metadata__']['norton_timm'])
    recipe.pop('sha256')
    return recipe


@lru_cache
def _tensors(network: str) -> dict[str, Any]:
    from safetensors.torch import load

    return load(saved(network))


def _built_tensors(network: str, recipe: dict[str, Any]) -> dict[str, Any]:
    """Tensors of the network that a recipe builds, at its full widths; those of the file where it builds none."""
    import torch

    from norton_timm.checkpoints.rebuild import _decomposed_base
    from norton_timm.checkpoints.recipe import Recipe
    from norton_timm.checkpoints.shapes import owned_tensors

    try:
        model = _decomposed_base(Recipe.from_dict(dict(recipe)))
    except Exception:  # what `load` makes of it is what is judged
        return _tensors(network)
    owned = {name: owned.tensor for name, owned in owned_tensors(model).items() if owned.persistent}
    return {n: torch.zeros(t.shape, dtype=t.dtype) if t.is_meta else t.detach().clone() for n, t in owned.items()}


_PARTS = {
    'resnet20_cifar': (
        'layer1.0', 'layer1.1', 'layer1.2', 'layer2.0', 'layer2.1', 'layer3.2', 'layer1', 'layer1.1.conv1', 'fc', '',
        'layer1.1.conv2', 'layer2.1.conv1', 'layer2.1.conv2', 'layer3.1.conv1', 'layer3.1.conv1.0', 'layer3.0.shortcut',
        'layer1.1.bn1', 'layer1.1.', '.', 'layer9.0', 'conv1', 'fc.0', 'global_pool', 'training', 'layer2.1.conv1.1',
    ),
    'lcnet_035': (
        'blocks.2.0', 'blocks.2.0.conv_dw', 'blocks.2.0.conv_pw', 'blocks.2.1.conv_pw', 'blocks.2.1', 'blocks', 'bn1',
        'conv_stem', 'conv_head', 'classifier', '', 'blocks.5.0.se', 'blocks.5.0.se.conv_reduce', 'blocks.5.1.conv_dw',
        'blocks.2.0.conv_pw.0', 'blocks.2.0.conv_pw.1', 'blocks.2.0.conv_pw.2',
    ),
}  # fmt: skip


@st.composite
def _surgeries(draw: st.DrawFn) -> bytes:
    """Other layers of low rank, blocks left out and decomposed layers, where tensors fit them and where not."""
    network = draw(st.sampled_from(sorted(_PARTS)))
    names = st.sampled_from(_PARTS[network])
    ranks = st.sampled_from([1, 1, 2, 3, 8, 16, 64, 4096, 65536, 10**6, 10**7, 0, -1, True, 1.5, '2'])
    changes = draw(
        st.fixed_dictionaries(
            {},
            optional={
                'dropped': st.lists(names | st.sampled_from([0, None, 'layer1.1\0', '*']), max_size=4),
                'low_rank': st.dictionaries(names, ranks, max_size=4),
                'layers': st.dictionaries(names, st.builds(lambda rank: {'rank': rank}, ranks), max_size=3),
                'maps': st.dictionaries(names, ranks, max_size=2),
                'numbers': st.just({}),
                'buffers': st.just({}),
                'features': st.just([]) | st.lists(st.integers(1, 64), max_size=5),
            },
        )
    )
    fits = draw(st.sampled_from([None, lambda values: _built_tensors(network, values)]))
    whole = {} if fits is None else {'frozen': [], 'channels_last': [], 'numbers': {}, 'buffers': {}}
    added = draw(st.booleans())

    def change(recipe: dict[str, Any]) -> dict[str, Any]:
        for key, value in changes.items():
            more = added and isinstance(value, dict)
            recipe[key] = {**recipe.get(key, {}), **value} if more else value
        if fits is not None and 'features' not in changes:
            recipe['features'] = _full_features(network)
        return {**recipe, **whole}

    return with_recipe(change, network, fits)


@lru_cache
def _full_features(network: str) -> list[int]:
    import timm

    return [entry['num_chs'] for entry in timm.create_model(network).feature_info]


def _recipes() -> st.SearchStrategy[bytes]:
    names = st.sampled_from(
        [
            'resnet20_cifar',
            'resnet110_cifar',
            'torchvision/googlenet',
            'hf-hub:x/y',
            'local-dir:/tmp',
            '../x',
            '',
            'vit_giant_patch14_224',
        ]
    )
    values = st.one_of(VALUES, NUMBERS, names, st.integers(0, 2**20))
    edited = st.builds(
        lambda edits, network: with_recipe(lambda recipe: swapped(recipe, edits), network),
        edits_of(values, 3),
        st.sampled_from(sorted(_NETWORKS)),
    )
    return st.one_of(edited, edited, _surgeries())


def _headers() -> st.SearchStrategy[bytes]:
    def change(edits: list[tuple[int, str, Any]]) -> bytes:
        header, rest = header_of(saved())
        return with_header(swapped(header, edits), rest)

    return st.builds(change, edits_of(VALUES | NUMBERS, 3))


_LYING = (
    struct.pack('<Q', 2**63) + b'{}',
    struct.pack('<Q', 99_999_999) + b'{}',
    struct.pack('<Q', 2) + b'{}',
    b'\x80\x04.',
    b'PK\x03\x04',
    struct.pack('<Q', 60_000) + b'[' * 60_000,
    struct.pack('<Q', 60_000) + b'{"a":' * 12_000,
)


def _safetensors(data: bytes, folder: Path) -> None:
    from norton_timm.checkpoints.file import is_saved, load, read_metadata
    from norton_timm.checkpoints.pretrained import preprocessing_in

    path = folder / 'a.safetensors'
    path.write_bytes(data)
    is_saved(path)
    first_of(load, read_metadata, preprocessing_in, path=path)


def _recipes_in(data: bytes, folder: Path) -> None:
    """What is read is a network that runs, and that is saved and read again as the same."""
    import torch

    from norton_timm.checkpoints.file import load, save

    _safetensors(data, folder)
    try:
        model = load(folder / 'a.safetensors')
    except ValueError:  # one of the other readers took it
        return
    with torch.no_grad():
        out = model(torch.zeros(1, model.norton_base['model_kwargs'].get('in_chans') or 3, 32, 32))
    again = load(save(model, folder / 'b.safetensors'))
    ours, theirs = model.state_dict(), again.state_dict()
    assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours), 'another network'
    with torch.no_grad():
        assert torch.equal(again(torch.zeros(1, model.norton_base['model_kwargs'].get('in_chans') or 3, 32, 32)), out)


def _pickle(data: bytes, folder: Path) -> None:
    from detection.rcnn.restore import detector_content
    from detection.training.checkpoint import load_checkpoint
    from norton_timm.checkpoints.file import is_saved
    from norton_timm.checkpoints.keys import network_tensors, read_checkpoint
    from norton_timm.models.authors import convert_authors_checkpoint

    path = folder / 'a.pt'
    path.write_bytes(data)
    detector_content(path)
    is_saved(path)
    first_of(lambda p: network_tensors(read_checkpoint(p)), load_checkpoint, convert_authors_checkpoint, path=path)


@lru_cache
def detector() -> bytes:
    """A checkpoint of `train_det.py`, of the smallest detector there is."""
    import torch

    from detection.training.checkpoint import detector_from_config
    from detection.training.config import config_from_dict
    from norton_timm.checkpoints.rebuild import surgery_of

    torch.manual_seed(0)
    model = {'backbone': 'resnet10t', 'fpn_channels': 8, 'box_head': 8, 'min_size': [32], 'max_size': 48}
    config = config_from_dict({'model': model})
    meta = {
        'task': 'box',
        'num_classes': 3,
        'class_names': ['__background__', 'a', 'b'],
        'label_to_category': {1: 1, 2: 2},
        'num_keypoints': 0,
        'keypoint_names': [],
        'skeleton': [],
    }
    network = detector_from_config(config, meta)
    stream = io.BytesIO()
    torch.save(
        {
            'model': network.state_dict(),
            'ema': None,
            'optimizer': {},
            'scaler': {},
            'iteration': 3,
            'step_images': 2,
            'best': 0.5,
            'results': {},
            'config': config.to_dict(),
            'meta': meta,
            'surgery': surgery_of(network),
        },
        stream,
    )
    return stream.getvalue()


def _detector(edits: list[tuple[int, str, Any]], folder: Path) -> None:
    import torch

    from detection.training.checkpoint import load_detector

    content = torch.load(io.BytesIO(detector()), weights_only=True)
    tensors = content.pop('model')
    changed = swapped(content, edits)
    if isinstance(changed, dict):
        changed['model'] = tensors
    torch.save(changed, folder / 'a.pt')
    load_detector(folder / 'a.pt')


def _import() -> None:
    import norton_timm.models.authors  # noqa: F401

    saved(), saved('lcnet_035'), pickles(), detector()


SURFACES = [
    Surface(
        'safetensors files',
        st.one_of(st.deferred(lambda: mutations(saved(), most=4)), st.deferred(_headers), st.sampled_from(_LYING)),
        _safetensors,
        2000,
        _import,
    ),
    Surface('recipes in safetensors', st.deferred(_recipes), _recipes_in, 1500, _import),
    Surface(
        'pickled checkpoints',
        st.one_of(
            st.deferred(lambda: st.sampled_from(pickles())),
            st.deferred(lambda: mutations(*pickles(), most=3)),
            opcodes(),
            opcodes().map(zipped),
        ),
        _pickle,
        2000,
        _import,
    ),
    Surface('detector checkpoints', edits_of(VALUES | NUMBERS, 3), _detector, 600, _import),
]
