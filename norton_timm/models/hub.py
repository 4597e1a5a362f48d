"""Networks for the Hugging Face hub: a folder that timm reads by `hf-hub:` and `local-dir:`, with a model card."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import nn

from norton_timm.checkpoints import write_folder
from norton_timm.layers import CPDConv2d
from norton_timm.models.compressed import PAPERS, published_accuracy, spec_of, tags
from norton_timm.profiling import count

CITATIONS = {
    'norton': """@article{pham2024norton,
  title={Enhanced Network Compression Through Tensor Decompositions and Pruning},
  author={Pham, Van Tien and Zniyed, Yassine and Nguyen, Thanh Phuong},
  journal={IEEE Transactions on Neural Networks and Learning Systems},
  year={2024}
}""",
    'coring': """@article{pham2024coring,
  title={Efficient tensor decomposition-based filter pruning},
  author={Pham, Van Tien and Zniyed, Yassine and Nguyen, Thanh Phuong},
  journal={Neural Networks},
  year={2024}
}""",
}
_CARD = """---
license: {license}
library_name: timm
pipeline_tag: image-classification
tags:
- image-classification
- timm
- norton-timm
---
# {name}

{made}

| figure | value |
|---|--:|
{figures}

## Use

```python
import timm, norton_timm

model = timm.create_model('{address}', pretrained=True).eval()
```

Licence: {license}.
{citation}"""
_REPOSITORY = re.compile(r'[\w.-]{1,96}(/[\w.-]{1,96})?')


def save_for_hub(
    model: nn.Module,
    folder: str | Path,
    *,
    figures: Mapping[str, float | str] | None = None,
    made: str = '',
    license: str | None = None,
    repository: str | None = None,
) -> Path:
    """Write `config.json`, `model.safetensors` and a model card, for `timm.create_model('hf-hub:OWNER/NAME')`.

    A network with the shapes of a tag, or of `rank=` and `rates=`, is built by its timm name; any other by its recipe.
    timm needs `import norton_timm` before it loads either. `norton_timm.load` reads the folder as well.

    Args:
        model: A network of timm or of this package, compressed or not.
        folder: A new folder, or one that holds these three files.
        figures: What was measured, by name, such as `{'top-1 %': 89.5}`; parameters and MACs are counted.
        made: How the network was made: data, epochs, start. The card then says it after the recipe.
        license: Such as `apache-2.0`; by default what `pretrained_cfg` says.
        repository: `owner/name` on the hub, for the example on the card.

    Returns:
        The folder.

    Raises:
        ValueError: A network that cannot be built again, no licence, or a folder with other files.

    Example:
        >>> save_for_hub(model, 'small', figures={'top-1 %': 89.5}, license='apache-2.0')
        >>> model = timm.create_model('local-dir:small', pretrained=True)
    """
    cfg: dict[str, Any] = dict(getattr(model, 'pretrained_cfg', None) or {})
    license = license or cfg.get('license')
    if not license or not re.fullmatch(r'[\w.-]+', license):
        raise ValueError(f'license is {license!r}, expected a name such as apache-2.0')
    config = _by_name(model, cfg)
    tag = config['pretrained_cfg'].get('tag', '') if config else ''
    name = '.'.join(filter(None, (config['architecture'], tag))) if config else 'A compressed network'
    complexity = count(model, tuple(cfg.get('input_size') or (3, 224, 224)))
    told: dict[str, Any] = {'parameters': f'{complexity.params:,}', 'MACs': f'{complexity.macs:,}', **(figures or {})}
    published = published_accuracy(name) if tag else {}
    told.update({f'{key}, published by the authors of the method, %': value for key, value in published.items()})
    method = name.partition('_')[0]
    card = _CARD.format(
        license=license,
        name=name,
        made=' '.join(filter(None, (_recipe(config), made))),
        figures='\n'.join(f'| {key} | {value} |' for key, value in told.items()),
        address=f'hf-hub:{repository}' if repository else 'local-dir:FOLDER',
        citation=f'\n## Citation\n\n```bibtex\n{CITATIONS[method]}\n```\n' if method in CITATIONS else '',
    )
    return write_folder(model, folder, config, {'README.md': card}, metadata={'made': made} if made else None)


def push_to_hub(
    model: nn.Module,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    token: str | None = None,
    message: str = 'Add network',
    **card: Any,
) -> str:
    """Upload a network as `save_for_hub` writes it, to a repository of the Hugging Face hub.

    Args:
        model: The network.
        repository: `owner/name`, or `name` for one's own account; made if it does not exist.
        private: Whether a new repository is private.
        revision: Branch; the default one if None.
        token: Of the hub; by default the one that `huggingface_hub` finds.
        message: Of the commit.
        card: `figures`, `made` and `license` of `save_for_hub`.

    Returns:
        The commit's URL.

    Raises:
        ValueError: As in `save_for_hub`; a repository that is no `owner/name`.
        ConnectionError: The hub cannot be reached, or refuses.

    Example:
        >>> push_to_hub(model, 'me/norton_resnet56_cifar.r071', figures={'top-1 %': 89.5})
    """
    if not _REPOSITORY.fullmatch(repository):
        raise ValueError(f'repository is {repository[:120]!r}, expected owner/name')
    import huggingface_hub

    with tempfile.TemporaryDirectory() as temporary:
        folder = save_for_hub(model, Path(temporary) / 'network', repository=repository, **card)
        try:
            api = huggingface_hub.HfApi(token=token, library_name='norton-timm')
            made = api.create_repo(repository, private=private, exist_ok=True)
            done = api.upload_folder(
                repo_id=made.repo_id, folder_path=folder, revision=revision, commit_message=message
            )
        except Exception as error:  # the hub's client has its own errors, and those of its transport
            raise ConnectionError(f'{repository}: not pushed: {" ".join(str(error).split())[:300]}') from error
    return str(done.commit_url)


def _by_name(model: nn.Module, cfg: Mapping[str, Any]) -> dict[str, Any] | None:
    """Entries of `config.json` by which timm builds the same network from a name; None where it would build another."""
    architecture, tag = str(cfg.get('architecture') or ''), str(cfg.get('tag') or '')
    if not timm.is_model(architecture):
        return None
    args = {
        key: value for key, value in getattr(model, '_model_args', {}).items() if key not in ('form', 'num_classes')
    }
    method, _, base = architecture.partition('_')
    if tag in tags().get(method, {}).get(base, {}):
        spec = spec_of(f'{architecture}.{tag}')
        rank = next(iter(spec.rank.values())) if isinstance(spec.rank, dict) else spec.rank
        args = {'rank': rank, 'rates': spec.rates, **args}
    try:
        json.dumps(args)
        built = timm.create_model(architecture, num_classes=model.num_classes, **args)
    except (ValueError, TypeError, RuntimeError):
        return None
    if _outline(built) != _outline(model):
        return None
    sources = ('url', 'file', 'state_dict', 'hf_hub_id', 'hf_hub_filename', 'source', 'architecture')
    kept = {key: value for key, value in cfg.items() if key not in sources and value is not None}
    return {
        'architecture': architecture,
        'num_classes': model.num_classes,
        'model_args': args,
        'pretrained_cfg': {**kept, 'num_classes': model.num_classes},
    }


def _outline(model: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shapes of all tensors, and type and settings of all modules; the form of a decomposed layer is no part of it."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    modules = {n: (type(m), '' if isinstance(m, CPDConv2d) else m.extra_repr()) for n, m in model.named_modules()}
    return shapes, modules


def _recipe(config: Mapping[str, Any] | None) -> str:
    """What the card says of the compression."""
    if config is None:
        return 'The recipe of the compression is in `config.json`.'
    method, _, base = config['architecture'].partition('_')
    if method not in PAPERS:
        return f'The network `{config["architecture"]}`, not compressed.'
    args = config['model_args']
    rank = f', CPD of rank {args["rank"]}' if args.get('rank') else ''
    return (
        f'The network `{base}`, compressed by {method.upper()} (*{PAPERS[method]}*){rank}, rates `{args.get("rates")}`.'
    )
