"""R-CNN detectors on compressed backbones: data, training, evaluation, video."""

from detection.rcnn import build_detector

__all__ = ['build_detector']
