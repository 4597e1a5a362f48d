"""Torchvision's R-CNNs on timm backbones, dense or compressed. This room builds them, compresses them, restores them
from our files and those of torchvision's reference training, and prepares them for export.
"""

from detection.rcnn.backbone import NORMS, create_features
from detection.rcnn.build import RCNN_OPTIONS, VERSIONS, build_detector
from detection.rcnn.compression import RECIPES, compress_detector
from detection.rcnn.export import DetectionAgreement, OneImage, exportable
from detection.rcnn.mobilenet import MOBILENET
from detection.rcnn.released import RELEASED, differences, is_released
from detection.rcnn.restore import BODY, convert_detector_state_dict, is_detector, restore, task_of, version_of
from detection.rcnn.transform import take_thin_pictures

__all__ = [
    'BODY', 'MOBILENET', 'NORMS', 'RCNN_OPTIONS', 'RECIPES', 'RELEASED', 'VERSIONS', 'DetectionAgreement', 'OneImage',
    'build_detector', 'compress_detector', 'convert_detector_state_dict', 'create_features', 'differences',
    'exportable', 'is_detector', 'is_released', 'restore', 'take_thin_pictures', 'task_of', 'version_of',
]  # fmt: skip
