"""Evaluation of detectors: COCO's metrics, the evaluation loop, and an analysis of the errors."""

from detection.evaluation.analysis import write_report
from detection.evaluation.coco_metrics import IOU_TYPES, CocoEvaluator, Metrics
from detection.evaluation.loop import FlipDetector, evaluate_detector

__all__ = [
    'IOU_TYPES', 'CocoEvaluator', 'FlipDetector', 'Metrics', 'evaluate_detector', 'write_report',
]  # fmt: skip
