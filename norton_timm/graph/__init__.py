"""Which channels of a network belong together, and how they are cut: the tracer follows channels through one forward
pass, groups say what must keep the same indices, surgery slices, and features keeps true what a model says of
itself.
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
