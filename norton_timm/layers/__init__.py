"""Our layer types, and what the toolkit knows of every layer type. The decomposed convolution and the low-rank linear
layer replace PyTorch's layers in a compressed network; the channel map is the shortcut of CIFAR ResNets. One handler
per layer type says how the layer is sliced and what it costs.
"""

from norton_timm.layers.channel_map import ChannelMap, padding_index
from norton_timm.layers.cpd_conv import FORMS, CPDConv2d, conv_padding, prefers_merged, set_form, use_form
from norton_timm.layers.dropped import DroppedBlock, drop_blocks, present_at
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
from norton_timm.layers.low_rank import (
    LOW_RANK,
    LowRankConv2d,
    LowRankLinear,
    can_factor,
    factor_layers,
    factor_shapes,
    full_rank,
    low_rank_parts,
)

__all__ = [
    'FORMS', 'LOW_RANK', 'MAKES', 'MIXES', 'PASSES', 'CPDConv2d', 'ChannelMap', 'ConvHandler', 'DroppedBlock',
    'LayerHandler', 'LowRankConv2d', 'LowRankLinear', 'Positions', 'can_factor', 'conv_padding', 'drop_blocks',
    'factor_layers', 'factor_shapes', 'filters_of', 'first_conv', 'full_rank', 'handler_of', 'has_computed_weight',
    'is_counted', 'low_rank_parts', 'nearest_handler', 'padding_index', 'prefers_merged', 'present_at', 'register',
    'set_form', 'take', 'use_form',
]  # fmt: skip
