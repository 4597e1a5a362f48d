"""Save and load a compressed network: one safetensors file that carries the recipe, or a folder that timm can read.

Nothing here unpickles. A file counts as hostile until it is checked: names and numbers in it must agree with its
tensors, and nothing is allocated that the file does not hold.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.models import build_model_with_cfg, register_model
from torch import Tensor, nn

from norton_timm.checkpoints.rebuild import rebuild, recipe_of
from norton_timm.checkpoints.recipe import FORMAT, Recipe
from norton_timm.checkpoints.shapes import owned_tensors
from norton_timm.utils import check_output, replacing, undisturbed

ENTRYPOINT = 'compressed_checkpoint'
_RECIPE, _DIGEST = 'norton_timm', 'sha256'


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    architecture: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **metadata: Any,
) -> Path:
    """Write a compressed (or dense) network to one file; :func:`load` needs nothing else.

    Before anything is written, the network is rebuilt on shapes as a trial. The file appears whole or not at all.

    Args:
        model: a network made from a timm or torchvision model.
        path: a name that ends in ``.safetensors``.
        architecture: the dense model's name, ``resnet50`` or ``torchvision/googlenet``; timm models know theirs.
        model_kwargs: arguments of the dense model's constructor; by default derived from the model.
        metadata: anything that JSON can hold; :func:`read_metadata` returns it.

    Raises:
        ValueError: the network could not be built again from what is known, or a bad path.

    Example:
        >>> small, report = compress(model, CompressionSpec(rank=1, rates=0.3))
        >>> save(small, 'small.safetensors', note='rank 1')
    """
    path = check_output(path, '.safetensors')
    recipe, tensors = _pack(model, architecture, model_kwargs, metadata)
    with replacing(path) as temporary:
        _write(temporary, recipe, tensors)
    return path


def load(path: str | os.PathLike[str]) -> nn.Module:
    """The network that :func:`save` or :func:`save_folder` wrote, on the CPU and in evaluation mode, bit for bit.

    Raises:
        ValueError: a file that is missing, damaged, of another version, not ours, or hostile.

    Example:
        >>> model = load('small.safetensors')
    """
    path = _weights_file(path)
    recipe, tensors = _read(path)
    try:
        return rebuild(recipe, tensors)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None


def is_saved(path: str | os.PathLike[str]) -> bool:
    """Whether a file says that :func:`save` wrote it; nothing else of it is checked."""
    try:
        with safe_open(path, framework='pt') as file:
            return _RECIPE in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata that the caller of :func:`save` added.

    Raises:
        ValueError: a file that is missing, damaged, of another version, or not ours.

    Example:
        >>> read_metadata('small.safetensors')['note']
    """
    return _read(_weights_file(path))[0].metadata


def save_folder(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    architecture: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **metadata: Any,
) -> Path:
    """Write ``config.json`` and ``model.safetensors``, for ``timm.create_model('local-dir:FOLDER', pretrained=True)``.

    timm needs ``import norton_timm`` before; :func:`load` reads the folder as well. Arguments as in :func:`save`.

    Raises:
        ValueError: as in :func:`save`; a folder that exists and holds anything but these two files.

    Example:
        >>> save_folder(small, 'small')
        >>> model = timm.create_model('local-dir:small', pretrained=True)
    """
    return write_folder(model, folder, architecture=architecture, model_kwargs=model_kwargs, metadata=metadata)


def write_folder(
    model: nn.Module,
    folder: str | os.PathLike[str],
    config: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
    *,
    architecture: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """Write a folder as :func:`save_folder` does, with other entries of ``config.json`` and more files.

    Args:
        model: as in :func:`save_folder`.
        folder: as there.
        config: entries of ``config.json`` for a network that timm builds by name; by default it is built by the recipe.
        texts: more files: name and content.
        architecture: as in :func:`save`.
        model_kwargs: as there.
        metadata: as there.

    Raises:
        ValueError: as in :func:`save_folder`.
    """
    folder, texts = Path(folder), dict(texts or {})
    names = ('config.json', 'model.safetensors', *texts)
    if folder.exists() and (not folder.is_dir() or any(p.name not in names for p in folder.iterdir())):
        raise ValueError(f'got {str(folder)!r}, expected a new folder, or one with only {" and ".join(names)}')
    recipe, tensors = _pack(model, architecture, model_kwargs, dict(metadata or {}))
    if recipe.model_kwargs.get('features_only'):
        raise ValueError('got a features_only network, expected the whole one: timm cuts features when it loads')
    shapes = {name: list(t.shape) for name, t in tensors.items()}
    indices = {f'{name}.index': tensors[f'{name}.index'].tolist() for name in recipe.maps}
    told = {
        'architecture': ENTRYPOINT,
        'num_classes': recipe.model_kwargs.get('num_classes', recipe.pretrained_cfg.get('num_classes', 1000)),
        'num_features': getattr(model, 'num_features', None),
        'model_args': {'recipe': {**recipe.to_dict(), 'shapes': shapes, 'indices': indices}},
        'pretrained_cfg': {k: v for k, v in recipe.pretrained_cfg.items() if k not in ('architecture', 'tag')},
    }
    texts['config.json'] = json.dumps({**told, **(config or {})}, indent=2)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f'.{folder.name}.', dir=folder.parent))
    try:
        for name, text in texts.items():
            (temporary / name).write_text(text, encoding='utf-8')
        _write(temporary / 'model.safetensors', recipe, tensors)
        folder.mkdir(exist_ok=True)
        for name in names:
            os.replace(temporary / name, folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


@register_model
def compressed_checkpoint(pretrained: bool = False, recipe: Any = None, **kwargs: Any) -> nn.Module:
    """A network that :func:`save_folder` wrote; timm calls this for ``local-dir:``."""
    if not isinstance(recipe, dict):
        raise ValueError(f"{ENTRYPOINT} is built from a folder: timm.create_model('local-dir:FOLDER', pretrained=True)")

    def make(num_classes: int | None = None, in_chans: int | None = None, global_pool: str | None = None) -> nn.Module:
        model = _unweighted(recipe)
        saved = recipe.get('model_kwargs', {})
        if in_chans not in (None, saved.get('in_chans', 3)):
            raise ValueError(f'got in_chans={in_chans}, expected {saved.get("in_chans", 3)} as saved')
        if num_classes not in (None, model.num_classes):
            head: Any = model
            head.reset_classifier(num_classes, *([] if global_pool is None else [global_pool]))  # type: ignore[operator]
        return model

    features = {'feature_cls': 'getter', 'out_indices': tuple(range(len(recipe.get('features', ()))))}
    return build_model_with_cfg(make, ENTRYPOINT, pretrained, feature_cfg=features, **kwargs)


def _unweighted(values: dict[str, Any]) -> nn.Module:
    """The network of a ``config.json``, with fresh weights."""
    values = dict(values)
    shapes, indices = values.pop('shapes', {}), values.pop('indices', {})
    recipe = Recipe.from_dict(values)
    skeleton = rebuild(recipe, {**_empty(shapes, 'meta'), **{k: torch.tensor(v) for k, v in indices.items()}})
    state = {n: o.tensor for n, o in owned_tensors(skeleton).items() if o.persistent}
    model = rebuild(recipe, {n: torch.zeros(t.shape, dtype=t.dtype) if t.is_meta else t for n, t in state.items()})
    for module in model.modules():
        reset: Any = getattr(module, 'reset_parameters', None)
        if callable(reset) and not any(True for _ in module.children()):
            reset()
    return model.train()


def _empty(shapes: Any, device: str) -> dict[str, Tensor]:
    try:
        return {
            name: torch.empty(
                shape, dtype=torch.long if name.endswith('num_batches_tracked') else torch.float, device=device
            )
            for name, shape in shapes.items()
        }
    except (AttributeError, TypeError, RuntimeError):
        raise ValueError('got a config.json whose shapes are not lists of whole numbers') from None


def _pack(
    model: nn.Module, architecture: str | None, kwargs: Mapping[str, Any] | None, metadata: dict[str, Any]
) -> tuple[Recipe, dict[str, Tensor]]:
    model = getattr(model, '_orig_mod', model)  # of torch.compile
    for key, value in metadata.items():
        metadata[key] = value = value.to_dict() if hasattr(value, 'to_dict') else value
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError(f'metadata: got {key} of type {type(value).__name__}, expected what JSON holds') from None
    owned = owned_tensors(model)
    bare = [name for name, o in owned.items() if o.tensor.is_meta]
    if bare:
        raise ValueError(f'got a network without weights ({bare[0]} is on the meta device)')
    recipe = recipe_of(model, architecture, kwargs, metadata)
    tensors = {}
    for name, o in owned.items():
        if o.persistent:
            tensor = o.tensor.detach().cpu().contiguous()
            # a view into a larger buffer (of an optimiser, say) is stored on its own
            tensors[name] = tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor
    return recipe, tensors


def _digest(recipe: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the recipe and of every tensor's name, type, shape and bytes."""
    digest = hashlib.sha256(json.dumps(recipe).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f'\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0'.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write(path: Path, recipe: Recipe, tensors: dict[str, Tensor]) -> None:
    values = recipe.to_dict()
    values = {_DIGEST: _digest(values, tensors), **values}
    # one entry only: safetensors writes several in random order, and equal networks should give equal files
    try:
        save_file(tensors, path, {_RECIPE: json.dumps(values, allow_nan=False)})
    except SafetensorError as error:
        raise OSError(errno.EIO, f'could not be written: {error}', str(path)) from None


def _weights_file(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    path = path / 'model.safetensors' if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f'{path}: no such file')
    return path


def _read(path: Path) -> tuple[Recipe, dict[str, Tensor]]:
    """Read a file's recipe and tensors, and verify its checksum."""
    with path.open('rb') as file:
        start = file.read(2)
    if start in (b'PK', b'\x80\x02', b'\x80\x03', b'\x80\x04', b'\x80\x05', b'\x1f\x8b'):
        raise ValueError(
            f"{path}: a pickle, which is not read because it can run code; for the authors' checkpoints use "
            'tools/import_checkpoint.py, for weights of a dense model tools/compress.py --checkpoint'
        )
    try:
        with undisturbed(), safe_open(path, framework='pt') as file:
            metadata = file.metadata() or {}
            # copies: the file may be overwritten while the network lives, and copies are aligned as PyTorch's own
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f'{path}: not a whole safetensors file: {" ".join(str(error).split())[:200]}') from None
    if _RECIPE not in metadata:
        raise ValueError(f'{path}: weights without a recipe, expected a file that norton_timm.save wrote')
    try:
        values = json.loads(metadata[_RECIPE])
    except (ValueError, RecursionError):
        raise ValueError(f'{path}: the recipe is not JSON') from None
    if isinstance(values, dict) and values.get('format') == FORMAT:  # another format may have another checksum
        expected = values.pop(_DIGEST, None)
        if expected != _digest(values, tensors):
            raise ValueError(f'{path}: the checksum does not hold, the file is damaged')
    try:
        return Recipe.from_dict(values), tensors
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None
