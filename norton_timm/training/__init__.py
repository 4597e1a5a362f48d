"""Training and evaluation of classifiers: data, the training loop, distillation, metrics, and the run that compresses,
repairs and trains a network.
"""

from norton_timm.training.config import DistillConfig, OptimConfig, TrainConfig, load_train_config
from norton_timm.training.data import Preprocessing
from norton_timm.training.distill import Distillation
from norton_timm.training.label_free import LabelFreeConfig, agreement, resized, scores, tune_without_labels
from norton_timm.training.labelled import LabelledAccuracy
from norton_timm.training.loop import Trainer, evaluate
from norton_timm.training.metrics import MetricsWriter
from norton_timm.training.resolution import lower_resolution, sizes_for
from norton_timm.training.run import MODEL, Recovery, evaluate_file, is_compressed_tag, portable, preprocessing_of
from norton_timm.training.shrink import NetworkRow, Shrunk, shrink
from norton_timm.training.shrink_page import shrink_html
from norton_timm.training.sources import calibration_images, open_data, open_test_split

__all__ = [
    'MODEL', 'DistillConfig', 'Distillation', 'LabelFreeConfig', 'LabelledAccuracy', 'MetricsWriter', 'NetworkRow',
    'OptimConfig', 'Preprocessing', 'Recovery', 'Shrunk', 'TrainConfig', 'Trainer', 'agreement',
    'calibration_images', 'evaluate', 'evaluate_file', 'is_compressed_tag', 'load_train_config', 'lower_resolution',
    'open_data', 'open_test_split', 'portable', 'preprocessing_of', 'resized', 'scores', 'shrink', 'shrink_html',
    'sizes_for', 'tune_without_labels',
]  # fmt: skip
