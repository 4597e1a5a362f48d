"""General helpers that know nothing about compression: safe files and pickles, torchrun's processes and held signals,
settings from YAML, untrusted pictures, figures, and walks over modules and tensors. This room imports no other room.
"""

from norton_timm.utils.config import (
    Settings,
    as_number,
    as_whole,
    brief,
    checked,
    merge,
    outside,
    read_plain,
    read_plain_file,
    read_tree,
    settings_from,
)
from norton_timm.utils.files import (
    check_not_written,
    check_output,
    load_plain,
    remove_partial,
    replacing,
    write_plain,
    write_text,
)
from norton_timm.utils.images import DAMAGE, MOST_PIXELS, picture_size, read_rgb, refuse_postscript
from norton_timm.utils.modules import (
    after_call,
    at_least_float32,
    before_call,
    check_weights,
    copy_of,
    evaluating,
    first_input,
    not_finite,
    plain_layer,
    removing,
    replace_module,
    tensors_in,
    tied_modules,
    to_layout,
    uncompiled,
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
    'AMP', 'DAMAGE', 'MOST_PIXELS', 'HeldSignals', 'Settings', 'after_call', 'as_number', 'as_whole',
    'at_least_float32', 'autocast', 'before_call', 'brief', 'check_not_written', 'check_output', 'check_weights',
    'checked', 'choose_device', 'copy_of', 'evaluating', 'first_input', 'is_main', 'load_plain', 'make_deterministic',
    'merge', 'new_figure', 'not_finite', 'outside', 'picture_size', 'plain_layer', 'process_group', 'rank',
    'read_plain', 'read_plain_file', 'read_rgb', 'read_tree',
    'refuse_postscript', 'remove_partial', 'removing', 'replace_module', 'replacing', 'settings_from', 'tensors_in',
    'tied_modules', 'to_layout', 'uncompiled', 'undisturbed', 'wait_for_all', 'watched', 'world_size', 'write_plain',
    'write_png', 'write_text',
]  # fmt: skip
