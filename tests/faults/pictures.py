"""Surfaces that are pictures: single ones, and archives of them."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from functools import lru_cache
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from PIL import Image

from .surface import Surface, first_of, mutations


def png_of(width: int, height: int, depth: int = 8, colour: int = 2, data: bytes = b'') -> bytes:
    """A PNG whose header announces any size, whatever its data are."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))

    header = struct.pack('>IIBBBBB', width & 0xFFFFFFFF, height & 0xFFFFFFFF, depth, colour, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(data)) + chunk(b'IEND', b'')


@lru_cache
def pictures() -> tuple[bytes, ...]:
    """Small pictures of every kind that is met: colour, grey, palette, CMYK, 16 bit, alpha, turned by EXIF, GIF."""
    pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
    plain = Image.fromarray(pixels)
    turned = Image.Exif()
    turned[0x0112] = 6
    found = []
    for picture, form, options in (
        (plain, 'JPEG', {}),
        (plain, 'PNG', {}),
        (plain, 'WEBP', {}),
        (plain, 'BMP', {}),
        (plain, 'TIFF', {}),
        (plain, 'JPEG', {'exif': turned}),
        (plain, 'JPEG', {'progressive': True}),
        (plain.convert('CMYK'), 'JPEG', {}),
        (plain.convert('L'), 'JPEG', {}),
        (plain.convert('P'), 'PNG', {}),
        (plain.convert('P'), 'GIF', {}),
        (plain.convert('RGBA'), 'PNG', {}),
        (plain.convert('LA'), 'PNG', {}),
        (plain.convert('1'), 'PNG', {}),
        (Image.fromarray(pixels[..., 0].astype(np.uint16) * 256), 'PNG', {}),
        (Image.fromarray(pixels[..., 0].astype(np.float32)), 'TIFF', {}),
        (plain.convert('CMYK'), 'TIFF', {'compression': 'tiff_lzw'}),
    ):
        stream = io.BytesIO()
        picture.save(stream, form, **options)
        found.append(stream.getvalue())
    return tuple(found)


BOMBS = (
    b'',
    b'\0',
    png_of(60_000, 60_000),
    png_of(2**31 - 1, 2**31 - 1),
    png_of(30_000, 30_000, data=bytes(2**20)),
    png_of(0, 0),
    png_of(1, 2**31 - 1, 1, 0),
    png_of(32, 24, 16, 6),
    png_of(9000, 9000),
    b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(canary) (w) file closefile showpage\n%%EOF\n',
    b'GIF89a' + struct.pack('<HH', 65535, 65535) + bytes(8),
    b'BM' + bytes(12) + struct.pack('<Iii', 40, 60_000, 60_000) + bytes(28),
    b'P6\n99999999 99999999\n255\n',
    b'P6 1 1 255',
    b'II*\0' + b'\xff' * 64,
    b'RIFF\xff\xff\xff\xffWEBPVP8X' + b'\xff' * 32,
    b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    b'\x76\x2f\x31\x01' + bytes(200),
)
_PICTURE = st.one_of(
    st.deferred(lambda: mutations(*pictures())),
    st.deferred(lambda: mutations(*pictures())),
    st.sampled_from(BOMBS),
    st.binary(max_size=64),
)


def _picture(data: bytes, folder: Path) -> None:
    """Every reader of pictures; each may refuse, none may do anything else."""
    from detection.data.decode import decode_rgb, read_picture
    from detection.data.doctor import _image
    from detection.data.layouts import match_pictures
    from detection.demo.video import ImageSource
    from norton_timm.inference.export_check import read_images
    from norton_timm.training.sources import _decode

    path = folder / 'a.jpg'
    path.write_bytes(data)
    _image(match_pictures(['a.jpg'], [folder]), set(), {'file_name': 'a.jpg', 'width': 32, 'height': 24})
    readers = (
        lambda p: read_picture(p, oriented=False).shape,
        lambda p: decode_rgb(data, 'x', oriented=True, most_pixels=10**6),
        lambda p: [f.image for f in ImageSource([p], 'x')],
        lambda p: read_images([p], (8, 8)),
        lambda p: _decode(data, 'x'),
    )
    first_of(*readers, path=path)


def png_file(seed: int) -> bytes:
    """A picture of 32 pixels a side, the same for the same seed."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3), np.uint8)).save(stream, 'PNG')
    return stream.getvalue()


@lru_cache
def archives() -> tuple[bytes, ...]:
    """Small archives of small images, plain and compressed, and some that lie."""
    found = []
    for mode in ('w', 'w:xz', 'w:gz', 'w:bz2'):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode=mode) as tar:  # type: ignore[call-overload]
            for split in ('train', 'test'):
                for k in range(2):
                    add(tar, f'd/{split}/c{k}/{k}.jpg', pictures()[0])
        found.append(stream.getvalue())
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode='w') as tar:
        for name, kind, target in (
            ('d/train/a/../../../../../escape.jpg', tarfile.REGTYPE, ''),
            ('/tmp/train/a/escape.jpg', tarfile.REGTYPE, ''),
            ('d/train/a/l.jpg', tarfile.SYMTYPE, '/etc/passwd'),
            ('d/train/a/h.jpg', tarfile.LNKTYPE, '/etc/passwd'),
            ('d/train/a/f.jpg', tarfile.FIFOTYPE, ''),
            ('d/train/a/c.jpg', tarfile.CHRTYPE, ''),
            ('d/test/a/b.jpg', tarfile.REGTYPE, ''),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            info.size = len(pictures()[0]) if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(pictures()[0]))
    found.append(stream.getvalue())
    bomb = io.BytesIO()
    with tarfile.open(fileobj=bomb, mode='w:xz') as tar:
        add(tar, 'd/train/a/a.jpg', bytes(200 * 2**20))
    found.append(bomb.getvalue())
    return tuple(found)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """A file into an archive."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _archive(data: bytes, folder: Path) -> None:
    from norton_timm.training.sources import read_archive

    path = folder / 'cifar10.tar'
    path.write_bytes(data)
    train, test, classes = read_archive(path)
    assert len(train[0]) and len(test[0]) and classes


def _import() -> None:
    import norton_timm.inference.export_check  # noqa: F401

    pictures(), archives()


SURFACES = [
    Surface('pictures', _PICTURE, _picture, 4000, _import),
    Surface('archives of images', st.deferred(lambda: mutations(*archives(), most=4)), _archive, 1000, _import),
]
