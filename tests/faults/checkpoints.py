"""Surfaces that are files of weights: our safetensors with their recipes, and pickles of others."""

from __future__ import annotations

import io
import json
import pickle
import struct
import tempfile
import zipfile
from functools import lru_cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from .surface import NUMBERS, VALUES, Surface, edits_of, first_of, mutations, swapped


@lru_cache
def saved() -> bytes:
    """A small compressed network as `norton_timm.save` writes it."""
    import timm
    import torch

    from norton_timm import CompressionSpec, compress, save

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

    from norton_timm.checkpoint import _digest

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
    from norton_timm.checkpoint import is_saved, load, read_metadata
    from norton_timm.weights import preprocessing_in

    path = folder / 'a.safetensors'
    path.write_bytes(data)
    is_saved(path)
    first_of(load, read_metadata, preprocessing_in, path=path)


class Gadget:
    """Unpickled, it calls a function; the canary tells whether one was called."""

    def __init__(self, call: Any, *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call, self.arguments


def gadgets() -> list[Any]:
    """Objects that run code when they are unpickled, one by each way that is known to have worked somewhere."""
    import builtins
    import operator
    import os
    import runpy
    import subprocess
    import types

    import numpy as np
    import torch
    import torch.hub

    source = "open('canary', 'w').close()"
    return [
        Gadget(os.system, 'touch canary'),
        Gadget(subprocess.Popen, ['touch', 'canary']),
        Gadget(builtins.exec, source),
        Gadget(builtins.eval, source),
        Gadget(builtins.open, 'canary', 'w'),
        Gadget(builtins.getattr, os, 'system'),
        Gadget(runpy.run_path, 'canary.py'),
        Gadget(operator.methodcaller, 'system', 'touch canary'),
        Gadget(builtins.__import__, 'os'),
        Gadget(torch.load, 'canary.pt'),
        Gadget(np.load, 'canary.npy', None, True),
        Gadget(os.open, 'canary', os.O_CREAT | os.O_WRONLY),
        Gadget(os.mkdir, 'canary'),
        Gadget(torch.hub.load, 'a/b', 'c'),
        Gadget(types.CodeType),
        Gadget(torch.save, {}, 'canary'),
        Gadget(builtins.compile, source, 'x', 'exec'),
        Gadget(np.fromfile, '/etc/passwd'),
        Gadget(torch.storage.UntypedStorage.from_file, 'canary', True, 8),
        Gadget(torch.ops.load_library, 'canary'),
    ]


@lru_cache
def pickles() -> tuple[bytes, ...]:
    """Checkpoints that are fine, in torch's three formats, and ones that run code or unpack to more than they hold."""
    import argparse

    import timm
    import torch

    torch.manual_seed(0)
    state = timm.create_model('resnet20_cifar', num_classes=3).state_dict()
    good = {'state_dict': state, 'rank': 1, 'compress_rate': '[0.]*10', 'args': argparse.Namespace(a=1), 'epoch': 3}
    found = []
    for content, new in (
        (good, True),
        (good, False),
        ({'model': {'backbone.body.a': torch.zeros(2)}, 'config': {}, 'meta': {}}, True),
    ):
        stream = io.BytesIO()
        torch.save(content, stream, _use_new_zipfile_serialization=new)
        found.append(stream.getvalue())
    for gadget in gadgets():
        for new in (True, False):
            stream = io.BytesIO()
            try:
                torch.save({'state_dict': state, 'extra': gadget}, stream, _use_new_zipfile_serialization=new)
                found.append(stream.getvalue())
            except (TypeError, pickle.PicklingError):
                continue
        try:
            found.append(pickle.dumps({'state_dict': gadget}, 2))
        except (TypeError, pickle.PicklingError):
            continue
    wide = io.BytesIO()
    torch.save({'state_dict': {'conv1.weight': torch.zeros(1).expand(2**20, 2**20)}}, wide)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, 'w', zipfile.ZIP_DEFLATED) as archive:
        stream = io.BytesIO()
        torch.save({'state_dict': {'a': torch.zeros(8 * 2**20)}}, stream)
        with zipfile.ZipFile(stream) as plain:
            for part in plain.infolist():
                archive.writestr(part.filename, plain.read(part))
    return (
        *found,
        wide.getvalue(),
        packed.getvalue(),
        b'',
        b'PK\x05\x06' + bytes(18),
        b'\x80\x02}q\x00.',
        b'\x80\x02]q\x00h\x00a.',
    )


def _opcodes() -> st.SearchStrategy[bytes]:
    """Pickle programs of random opcodes, with names of functions that run code among their arguments."""
    names = st.sampled_from(
        [
            b'cos\nsystem\n',
            b'cbuiltins\neval\n',
            b'ctorch._utils\n_rebuild_tensor_v2\n',
            b'ccollections\nOrderedDict\n',
            b'ctorch\nload\n',
            b'cnumpy._core.multiarray\nscalar\n',
            b'cargparse\nNamespace\n',
            b'cnumpy\ndtype\n',
            b'ctorch\nFloatStorage\n',
        ]
    )
    step = st.one_of(
        names,
        st.sampled_from(
            [
                b'(',
                b't',
                b'R',
                b'}',
                b']',
                b's',
                b'u',
                b'a',
                b'e',
                b'0',
                b'2',
                b'N',
                b'K\x01',
                b'\x85',
                b'\x86',
                b'\x87',
                b'b',
                b'Q',
                b'\x81',
                b'\x92',
                b'q\x00',
                b'h\x00',
                b'h\x07',
                b'X\x0c\x00\x00\x00touch canary',
                b'J\xff\xff\xff\x7f',
                b'\x8a\x01\x01',
                b'G' + bytes(8),
            ]
        ),
    )
    return st.lists(step, max_size=24).map(lambda steps: b'\x80\x02' + b''.join(steps) + b'.')


def _zipped(program: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, 'w', zipfile.ZIP_STORED) as archive:
        for name, content in (
            ('a/data.pkl', program),
            ('a/byteorder', b'little'),
            ('a/version', b'3\n'),
            ('a/data/0', bytes(64)),
        ):
            archive.writestr(name, content)
    return stream.getvalue()


def _pickle(data: bytes, folder: Path) -> None:
    from detection.checkpoint import load_checkpoint
    from detection.weights import detector_content
    from norton_timm.authors import convert_authors_checkpoint, network_tensors, read_checkpoint
    from norton_timm.checkpoint import is_saved

    path = folder / 'a.pt'
    path.write_bytes(data)
    detector_content(path)
    is_saved(path)
    first_of(lambda p: network_tensors(read_checkpoint(p)), load_checkpoint, convert_authors_checkpoint, path=path)


@lru_cache
def detector() -> bytes:
    """A checkpoint of `train_det.py`, of the smallest detector there is."""
    import torch

    from detection.checkpoint import detector_from_config
    from detection.config import config_from_dict
    from norton_timm.rebuild import surgery_of

    torch.manual_seed(0)
    model = {'backbone': 'resnet18', 'fpn_channels': 8, 'box_head': 8, 'min_size': [32], 'max_size': 48}
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
    # half precision and one shared storage: what is changed is what stands around the tensors
    torch.save(
        {
            'model': {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()},
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

    from detection.checkpoint import load_detector

    content = torch.load(io.BytesIO(detector()), weights_only=True)
    tensors = content.pop('model')
    changed = swapped(content, edits)
    if isinstance(changed, dict):
        changed['model'] = tensors
    torch.save(changed, folder / 'a.pt')
    load_detector(folder / 'a.pt')


def _import() -> None:
    import norton_timm.authors  # noqa: F401

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
            _opcodes(),
            _opcodes().map(_zipped),
        ),
        _pickle,
        2000,
        _import,
    ),
    Surface('detector checkpoints', edits_of(VALUES | NUMBERS, 3), _detector, 600, _import),
]
