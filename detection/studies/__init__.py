"""Benchmarks of detectors and of the training loop, each against its baseline."""

from detection.studies.networks import DETECTOR_STAGES, benchmark_detector
from detection.studies.training import benchmark_loop

__all__ = [
    'DETECTOR_STAGES', 'benchmark_detector', 'benchmark_loop',
]  # fmt: skip
