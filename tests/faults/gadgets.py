"""Pickles that run code when they are read carelessly, and ones that unpack to more than they hold."""

from __future__ import annotations

import io
import pickle
import zipfile
from functools import lru_cache
from typing import Any

from hypothesis import strategies as st


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
    every = [
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
    return [gadget for gadget in every if _can_be_pickled(gadget)]


def _can_be_pickled(value: Any) -> bool:
    try:
        pickle.dumps(value, 2)
    except (TypeError, AttributeError, pickle.PicklingError):
        return False
    return True


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
            torch.save({'state_dict': state, 'extra': gadget}, stream, _use_new_zipfile_serialization=new)
            found.append(stream.getvalue())
        found.append(pickle.dumps({'state_dict': gadget}, 2))
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


def opcodes() -> st.SearchStrategy[bytes]:
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


def zipped(program: bytes) -> bytes:
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
