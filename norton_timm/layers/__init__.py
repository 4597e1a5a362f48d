"""Layer types of ours, which take the place of PyTorch's in a compressed network: the decomposed convolution, the
linear layer of low rank, the shortcut that maps channels, the decompositions of whole layers.
"""

from norton_timm.layers.channel_map import ChannelMap, padding_index
from norton_timm.layers.cpd_conv import FORMS, CPDConv2d, conv_padding, set_form, use_form
from norton_timm.layers.low_rank import LowRankLinear, factor_linears, factor_shapes

__all__ = [
    'FORMS',
    'CPDConv2d',
    'ChannelMap',
    'LowRankLinear',
    'conv_padding',
    'factor_linears',
    'factor_shapes',
    'padding_index',
    'set_form',
    'use_form',
]
