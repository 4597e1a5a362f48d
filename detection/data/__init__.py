"""Data sets in COCO's format. This room reads and checks annotations, decodes, augments and samples pictures, draws a
sample set by code, and tells what is wrong with a folder of data.
"""

from detection.data.annotations import class_map, unpaired
from detection.data.coco import CocoDataset, Draw, collate, find_data, to_tensor
from detection.data.decode import decode_rgb, read_picture
from detection.data.doctor import check_data
from detection.data.loader import allow_open_files, eval_loader
from detection.data.masks import check_outline
from detection.data.sample import draw_frames
from detection.data.samplers import CopyPaste, RepeatFactorSampler, aspect_groups, repeat_factors
from detection.data.transforms import build_transforms

__all__ = [
    'CocoDataset', 'CopyPaste', 'Draw', 'RepeatFactorSampler', 'allow_open_files', 'aspect_groups', 'build_transforms',
    'check_data', 'check_outline', 'class_map', 'collate', 'decode_rgb', 'draw_frames', 'eval_loader', 'find_data',
    'read_picture', 'repeat_factors', 'to_tensor', 'unpaired',
]  # fmt: skip
