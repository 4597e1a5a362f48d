"""R-CNN detectors on compressed backbones: data, training, evaluation, video."""
