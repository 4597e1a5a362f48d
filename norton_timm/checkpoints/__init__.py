"""Networks in files: a file has the recipe beside the tensors, and a network is rebuilt from both. This room also finds
pretrained weights and knows the key names of other people's checkpoints.
"""

from norton_timm.checkpoints.asset_names import AUTHORS_NAMES, AssetName, dotted, rates_from_name, read_asset_name
from norton_timm.checkpoints.download import cache_folder, digest_of
from norton_timm.checkpoints.file import is_saved, load, read_metadata, save, save_folder, write_folder
from norton_timm.checkpoints.keys import (
    FACTOR_KEY,
    compress_rate_option,
    convert_state_dict,
    filters_in,
    guess_architecture,
    head_name,
    network_prefix,
    network_tensors,
    read_checkpoint,
    width_in,
)
from norton_timm.checkpoints.pretrained import (
    EXTENSIONS,
    SHIPPED,
    find_file,
    locate,
    no_weights_message,
    preprocessing_in,
    register_source,
)
from norton_timm.checkpoints.rebuild import repeat_surgery, surgery_of
from norton_timm.checkpoints.release import Asset, Release
from norton_timm.checkpoints.shapes import TORCHVISION, base_name, dense_name

__all__ = [
    'AUTHORS_NAMES', 'EXTENSIONS', 'FACTOR_KEY', 'SHIPPED', 'TORCHVISION', 'Asset', 'AssetName', 'Release',
    'base_name', 'cache_folder', 'compress_rate_option', 'convert_state_dict', 'dense_name', 'digest_of', 'dotted',
    'filters_in', 'find_file', 'guess_architecture', 'head_name', 'is_saved', 'load', 'locate', 'network_prefix',
    'network_tensors', 'no_weights_message', 'preprocessing_in', 'rates_from_name', 'read_asset_name',
    'read_checkpoint', 'read_metadata', 'register_source', 'repeat_surgery', 'save', 'save_folder', 'surgery_of',
    'width_in', 'write_folder',
]  # fmt: skip
