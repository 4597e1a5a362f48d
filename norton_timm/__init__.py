"""NORTON and CORING: filter-wise compression of convolutional networks, for timm.

``import norton_timm`` registers the compressed networks with timm. What they do not need is imported when it is asked
for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from norton_timm import models
from norton_timm.checkpoints import load, save, save_folder
from norton_timm.compression import CompressionReport, CompressionSpec, compress, reshape, to_html, write_html
from norton_timm.layers import CPDConv2d, set_form
from norton_timm.models import convert_authors_checkpoint, push_to_hub, save_for_hub
from norton_timm.profiling import Complexity, count
from norton_timm.tensors import CPFactors, cp_decompose, filter_distance, hosvd, select_filters

if TYPE_CHECKING:
    from norton_timm.inference import deploy, deployment_report, tune_forms
    from norton_timm.search import TradeOffPoint, find_spec, plot_trade_off, trade_off

__version__ = '0.1.0'

__all__ = [
    'CPDConv2d', 'CPFactors', 'Complexity', 'CompressionReport', 'CompressionSpec', 'TradeOffPoint', 'compress',
    'convert_authors_checkpoint', 'count', 'cp_decompose', 'deploy', 'deployment_report', 'filter_distance',
    'find_spec', 'hosvd', 'load', 'models', 'plot_trade_off', 'push_to_hub', 'reshape', 'save', 'save_folder',
    'save_for_hub', 'select_filters', 'set_form', 'to_html', 'trade_off', 'tune_forms', 'write_html',
]  # fmt: skip

_LAZY = {
    **dict.fromkeys(('deploy', 'deployment_report', 'tune_forms'), 'norton_timm.inference'),
    **dict.fromkeys(('TradeOffPoint', 'find_spec', 'plot_trade_off', 'trade_off'), 'norton_timm.search'),
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return sorted([*__all__, '__version__'])
