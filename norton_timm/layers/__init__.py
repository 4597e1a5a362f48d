"""Our layer types, and what the toolkit knows of every layer type. The decomposed convolution and the low-rank linear
layer replace PyTorch's layers in a compressed network; the channel map is the shortcut of CIFAR ResNets. One handler
per layer type says how the layer is sliced and what it costs.
"""

from norton_timm.layers.channel_map import ChannelMap, padding_index
from norton_timm.layers.cpd_conv import FORMS, CPDConv2d, conv_padding, prefers_merged, set_form, use_form
from norton_timm.layers.handler_base import (
    MAKES,
    MIXES,
    PASSES,
    LayerHandler,
    Positions,
    filters_of,
    first_conv,
    handler_of,
    has_computed_weight,
    is_counted,
    nearest_handler,
    register,
    take,
)
from norton_timm.layers.handlers import ConvHandler
from norton_timm.layers.low_rank import LowRankLinear, factor_linears, factor_shapes

__all__ = [
    'FORMS', 'MAKES', 'MIXES', 'PASSES', 'CPDConv2d', 'ChannelMap', 'ConvHandler', 'LayerHandler',
    'LowRankLinear', 'Positions', 'conv_padding', 'factor_linears', 'factor_shapes', 'filters_of', 'first_conv',
    'handler_of', 'has_computed_weight', 'is_counted', 'nearest_handler', 'padding_index', 'prefers_merged',
    'register', 'set_form', 'take', 'use_form',
]  # fmt: skip
