"""Studies behind the figures of the README and the papers: benchmarks of networks and kernels, the table of the zoo,
the papers' experiments, compression without labels beside its controls, clustering of filters, and activation maps.
"""

from norton_timm.studies.activation_maps import compare_looks
from norton_timm.studies.activation_plot import plot_comparison
from norton_timm.studies.beside import beside_rows
from norton_timm.studies.clustering import INERTIAS, LEVELS, REPRESENTATIONS, compare_clusterings
from norton_timm.studies.equal_macs import ENTRANTS, FIXED, FREE, Limit, run_cells, study_cells
from norton_timm.studies.equal_macs_plot import plot_equal_macs
from norton_timm.studies.kernels import format_rows
from norton_timm.studies.networks import (
    EXPORTED,
    RUNTIMES_OF_DETECTORS,
    allocator,
    cpu_name,
    multiple_for,
    peak_mb,
    summaries,
)
from norton_timm.studies.reproduce import read_rows, reproduce_tag, run_study, write_row
from norton_timm.studies.reproduce_plot import plot_studies
from norton_timm.studies.steps import Row, benchmark_training
from norton_timm.studies.trained import CIFAR, IMAGENET, TrainedNetworks
from norton_timm.studies.zoo import COLUMNS, to_csv, to_markdown, zoo_names, zoo_rows

__all__ = [
    'CIFAR', 'COLUMNS', 'ENTRANTS', 'EXPORTED', 'FIXED', 'FREE', 'IMAGENET', 'INERTIAS', 'LEVELS', 'REPRESENTATIONS',
    'RUNTIMES_OF_DETECTORS', 'Limit', 'Row', 'TrainedNetworks', 'allocator', 'benchmark_training', 'beside_rows',
    'compare_clusterings', 'compare_looks', 'cpu_name', 'format_rows', 'multiple_for', 'peak_mb', 'plot_comparison',
    'plot_equal_macs', 'plot_studies', 'read_rows', 'reproduce_tag', 'run_cells', 'run_study', 'study_cells',
    'summaries', 'to_csv', 'to_markdown', 'write_row', 'zoo_names', 'zoo_rows',
]  # fmt: skip
