"""The mathematics of the NORTON and CORING papers on plain tensors: the canonical polyadic decomposition of every
filter (CPD), the HOSVD, distances between filters, principal angles between subspaces (PABS), and the selection of
filters by distance. Nothing here knows about networks.
"""

from norton_timm.tensors.cp import CPFactors, cp_decompose, cp_reconstruct
from norton_timm.tensors.distances import (
    CRITERIA,
    SCORES,
    filter_distance,
    filter_scores,
    score_criterion,
    value_criterion,
)
from norton_timm.tensors.hosvd import hosvd, tucker
from norton_timm.tensors.selection import STRATEGIES, select_filters

__all__ = [
    'CRITERIA', 'SCORES', 'STRATEGIES', 'CPFactors', 'cp_decompose', 'cp_reconstruct', 'filter_distance',
    'filter_scores', 'hosvd', 'score_criterion', 'select_filters', 'tucker', 'value_criterion',
]  # fmt: skip
