"""R-CNN detectors on compressed backbones: data, training, evaluation, video."""

import os

# albumentations asks a server for its newest version when it is imported; a user's own setting wins
os.environ.setdefault('NO_ALBUMENTATIONS_UPDATE', '1')

from detection.rcnn import build_detector

__all__ = ['build_detector']
