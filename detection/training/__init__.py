"""Training of detectors: configuration, optimiser, training loop, checkpoints, and the report of a run."""

from detection.training.checkpoint import (
    describe_data,
    detector_from_config,
    import_detector,
    load_authors_detector,
    load_detector,
    same_run,
    save_checkpoint,
)
from detection.training.config import (
    AUTHORS,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    load_config,
    values_of_weights,
)
from detection.training.engine import DetectorTrainer
from detection.training.loader import train_loader, training_sets
from detection.training.optim import build_optimizer
from detection.training.report import describe_run, format_table, save_predictions

__all__ = [
    'AUTHORS', 'DataConfig', 'DetectorTrainer', 'ModelConfig', 'OptimConfig', 'RunConfig', 'build_optimizer',
    'describe_data', 'describe_run', 'detector_from_config', 'format_table', 'import_detector',
    'load_authors_detector', 'load_config', 'load_detector', 'same_run', 'save_checkpoint', 'save_predictions',
    'train_loader', 'training_sets', 'values_of_weights',
]  # fmt: skip
