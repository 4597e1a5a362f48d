"""From a network and a recipe (`CompressionSpec`) to a compressed network and a report. This room has the recipe, the
plan that is made from it, the choice of channels, the pipeline, and the repair with unlabelled images.
"""

from norton_timm.compression.choose import layer_distance, merge_layers, removed_classes
from norton_timm.compression.compress import channel_graph, compress, reshape, run_plan
from norton_timm.compression.fitting import refit
from norton_timm.compression.gradients import TEMPERATURE, each_gradient
from norton_timm.compression.observe import observe
from norton_timm.compression.output_error import Activations, readers_of
from norton_timm.compression.plan import make_plan
from norton_timm.compression.rates import exact_rates, layout_of, widths_of
from norton_timm.compression.reconstruct import OutputAxes, WhiteFilters
from norton_timm.compression.repair import images_of, reestimate_batch_norm, without_labels
from norton_timm.compression.report import CompressionReport
from norton_timm.compression.report_html import to_html, write_html
from norton_timm.compression.spec import METHODS, OUTPUT_ERROR, CompressionSpec, format_rates, parse_rates

__all__ = [
    'METHODS',
    'OUTPUT_ERROR',
    'TEMPERATURE',
    'Activations',
    'CompressionReport',
    'CompressionSpec',
    'OutputAxes',
    'WhiteFilters',
    'channel_graph',
    'compress',
    'each_gradient',
    'exact_rates',
    'format_rates',
    'images_of',
    'layer_distance',
    'layout_of',
    'make_plan',
    'merge_layers',
    'observe',
    'parse_rates',
    'readers_of',
    'reestimate_batch_norm',
    'refit',
    'removed_classes',
    'reshape',
    'run_plan',
    'to_html',
    'widths_of',
    'without_labels',
    'write_html',
]  # fmt: skip
