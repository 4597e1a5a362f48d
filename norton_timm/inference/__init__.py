"""Networks made fast for inference: batch norms are folded, the decomposed layers get the forms in which the whole
network is fastest, and the network is fused for oneDNN, compiled, exported or quantised. The result is compared with
the original network, and reports say how well both agree.
"""

from norton_timm.inference.compiled import compiled, compiled_ahead, frozen_weights
from norton_timm.inference.deploy import deploy, deployment_report
from norton_timm.inference.export import (
    CHANNEL_MULTIPLES,
    FORMATS,
    TracedNetwork,
    format_of,
    openvino_runner,
    read_exported,
    write_exported,
)
from norton_timm.inference.export_check import Agreement, export_checked, find_pictures, larger, read_images, size_mb
from norton_timm.inference.export_tune import export_variants, fastest_variant
from norton_timm.inference.fold import fold_batch_norm
from norton_timm.inference.forms import FIXED_FORMS, distinct_forms, tune_forms
from norton_timm.inference.fuse import fuse_network
from norton_timm.inference.onednn import onednn_available, packed_bytes

__all__ = [
    'CHANNEL_MULTIPLES', 'FIXED_FORMS', 'FORMATS', 'Agreement', 'TracedNetwork', 'compiled', 'compiled_ahead',
    'deploy', 'deployment_report', 'distinct_forms', 'export_checked', 'export_variants', 'fastest_variant',
    'find_pictures', 'fold_batch_norm', 'format_of', 'frozen_weights', 'fuse_network', 'larger', 'onednn_available',
    'openvino_runner', 'packed_bytes', 'read_exported', 'read_images', 'size_mb', 'tune_forms', 'write_exported',
]  # fmt: skip
