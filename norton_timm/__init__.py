"""NORTON and CORING: filter-wise compression of convolutional networks, for timm.

``import norton_timm`` registers the compressed networks with timm.
"""

from norton_timm.authors import convert_authors_checkpoint
from norton_timm.budget import find_spec
from norton_timm.checkpoint import load, save, save_folder
from norton_timm.complexity import Complexity, count
from norton_timm.compress import compress, reshape
from norton_timm.cp import CPFactors, cp_decompose
from norton_timm.deploy import deploy, deployment_report
from norton_timm.forms import tune_forms
from norton_timm.hosvd import hosvd
from norton_timm.layers import CPDConv2d, set_form
from norton_timm.report import CompressionReport
from norton_timm.report_html import to_html, write_html
from norton_timm.saliency import filter_distance, select_filters
from norton_timm.spec import CompressionSpec
from norton_timm.tradeoff import TradeOffPoint, trade_off
from norton_timm.tradeoff_plot import plot_trade_off

from norton_timm import models  # isort: skip  (registers with timm; needs all of the above)

__version__ = '0.1.0'

__all__ = [
    'CPDConv2d',
    'CPFactors',
    'Complexity',
    'CompressionReport',
    'CompressionSpec',
    'TradeOffPoint',
    'compress',
    'convert_authors_checkpoint',
    'count',
    'cp_decompose',
    'deploy',
    'deployment_report',
    'filter_distance',
    'find_spec',
    'hosvd',
    'load',
    'models',
    'plot_trade_off',
    'reshape',
    'save',
    'save_folder',
    'select_filters',
    'set_form',
    'to_html',
    'trade_off',
    'tune_forms',
    'write_html',
]
