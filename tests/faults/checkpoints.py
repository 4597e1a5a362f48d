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


@lru_cache
def saved() -> bytes:
    """A small compressed network as `norton_timm.save` writes it."""
    import timm
    import torch

    from norton_timm import CompressionSpec, save
    from norton_timm.compression import compress

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        model, _ = compress(
            timm.create_model('resnet20_cifar', num_classes=3).eval(), CompressionSpec(rank=1, rates=0.8)
        )
        return save(model, Path(folder) / 'a.safetensors').read_bytes()


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The JSON at the start of a safetensors file, and the bytes after it."""
    length = struct.unpack('<Q', data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: Any, rest: bytes) -> bytes:
    """Inverse of `header_of`."""
    text = json.dumps(header, default=str).encode('utf-8', 'surrogatepass')
    return struct.pack('<Q', len(text)) + text + rest


def with_recipe(change: Any) -> bytes:
    """The small network with another recipe, whose checksum holds: its author can compute it as well."""
    from safetensors.torch import save

    from norton_timm.checkpoints.file import _digest

    tensors = _tensors()
    recipe = json.loads(header_of(saved())[0]['__metadata__']['norton_timm'])
    recipe.pop('sha256')
    values = change(recipe)
    if isinstance(values, dict):
        values.pop('sha256', None)
        values = {'sha256': _digest(values, tensors), **values}
    return save(tensors, {'norton_timm': json.dumps(values)})


@lru_cache
def _tensors() -> dict[str, Any]:
    from safetensors.torch import load

    return load(saved())


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
    return st.builds(lambda edits: with_recipe(lambda recipe: swapped(recipe, edits)), edits_of(values, 3))


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

    saved(), pickles(), detector()


SURFACES = [
    Surface(
        'safetensors files',
        st.one_of(st.deferred(lambda: mutations(saved(), most=4)), st.deferred(_headers), st.sampled_from(_LYING)),
        _safetensors,
        2000,
        _import,
    ),
    Surface('recipes in safetensors', st.deferred(_recipes), _safetensors, 1500, _import),
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
