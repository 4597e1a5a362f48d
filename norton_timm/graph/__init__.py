"""Which channels of a network depend on each other, and how they are removed. The tracer follows channels through one
forward pass, groups collect the layers that must keep the same indices, and surgery slices those layers. The class
`Metadata` updates what a timm model says about its own widths.
"""

from norton_timm.graph.channels import Slot
from norton_timm.graph.features import Metadata, feature_entries, is_feature_extractor
from norton_timm.graph.groups import ChannelGraph, ChannelGroup
from norton_timm.graph.surgery import remove_channels
from norton_timm.graph.widen import align_channels

__all__ = [
    'ChannelGraph', 'ChannelGroup', 'Metadata', 'Slot', 'align_channels', 'feature_entries',
    'is_feature_extractor', 'remove_channels',
]  # fmt: skip
