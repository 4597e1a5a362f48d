"""What has nothing to do with compression: files written whole or not at all and pickles read without running code,
processes of torchrun and held signals, configurations from YAML, pictures from anywhere, and walks over modules and
tensors. It imports nothing of ours.
"""

from norton_timm.utils.config import (
    Settings,
    brief,
    checked,
    outside,
    read_plain,
    read_plain_file,
    read_tree,
    settings_from,
)
from norton_timm.utils.files import check_output, load_plain, remove_partial, replacing, write_plain, write_text
from norton_timm.utils.images import DAMAGE, MOST_PIXELS, picture_size, read_rgb, refuse_postscript
from norton_timm.utils.modules import (
    check_weights,
    evaluating,
    not_finite,
    plain_layer,
    removing,
    replace_module,
    tensors_in,
    tied_modules,
    watched,
)
from norton_timm.utils.plots import new_figure, write_png
from norton_timm.utils.processes import (
    AMP,
    HeldSignals,
    autocast,
    choose_device,
    is_main,
    make_deterministic,
    process_group,
    rank,
    undisturbed,
    wait_for_all,
    world_size,
)

__all__ = [
    'AMP', 'DAMAGE', 'MOST_PIXELS', 'HeldSignals', 'Settings', 'autocast', 'brief', 'check_output',
    'check_weights', 'checked', 'choose_device', 'evaluating', 'is_main', 'load_plain', 'make_deterministic',
    'new_figure', 'not_finite', 'outside', 'picture_size', 'plain_layer', 'process_group', 'rank', 'read_plain',
    'read_plain_file', 'read_rgb', 'read_tree', 'refuse_postscript', 'remove_partial', 'removing', 'replace_module',
    'replacing', 'settings_from', 'tensors_in', 'tied_modules', 'undisturbed', 'wait_for_all', 'watched',
    'world_size', 'write_plain', 'write_png', 'write_text',
]  # fmt: skip
