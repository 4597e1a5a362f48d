"""CORING's study of representations: do rank-1 tensor factors tell filters apart better than matrix factors?

k-means on synthetic filters of known clusters, scored by the adjusted Rand index (ARI), as in the comparative efficacy
study of CORING's authors (Neural Networks 178, 2024).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from norton_timm.tensors import tucker

REPRESENTATIONS = ('tensor', 'matrix')
# ranges of the variances that scale the centroids and the noise around them
LEVELS = {
    'normal': ((1.7, 1.8), (0.2, 0.3)),
    'moderate': ((1.5, 2.0), (0.1, 0.3)),
    'hard': ((1.0, 2.0), (0.1, 0.5)),
}


class FilterSet(NamedTuple):
    """Filters `(N, I, Kh, Kw)` and the cluster `(N,)` that each was drawn from."""

    filters: Tensor
    labels: Tensor


def draw_filters(
    level: str,
    generator: torch.Generator,
    *,
    clusters: int = 5,
    satellites: int = 100,
    shape: tuple[int, int, int] = (64, 3, 3),
) -> FilterSet:
    """Centroids sqrt(v_c) U[0, 1) and their satellites, each with noise sqrt(v_s) N(0, 1); v_c, v_s by `level`."""
    if level not in LEVELS:
        raise ValueError(f'level: got {level!r}, expected one of {", ".join(LEVELS)}')
    spread, noise = (low + (high - low) * torch.rand((), generator=generator).item() for low, high in LEVELS[level])
    centroids = math.sqrt(spread) * torch.rand(clusters, *shape, generator=generator, dtype=torch.float64)
    jitter = torch.randn(clusters, satellites, *shape, generator=generator, dtype=torch.float64)
    members = centroids[:, None] + math.sqrt(noise) * jitter
    own = torch.arange(clusters)
    return FilterSet(torch.cat([centroids, members.flatten(0, 1)]), torch.cat([own, own.repeat_interleave(satellites)]))


def representation(filters: Tensor, method: str) -> list[Tensor]:
    """Unit factors of each filter.

    `tensor`: the three of the rank-1 Tucker; `matrix`: the two of the rank-1 SVD of the unfolding along the height.
    """
    if method not in REPRESENTATIONS:
        raise ValueError(f'method: got {method!r}, expected one of {", ".join(REPRESENTATIONS)}')
    if method == 'tensor':
        found = tucker(filters, 1)
        return [f[:, :, 0] for f in (found.A, found.B, found.C)]
    u, _, vh = torch.linalg.svd(filters.movedim(2, 1).flatten(2), full_matrices=False)
    return [u[:, :, 0], vh[:, 0]]


def kmeans(filters: Tensor, method: str, clusters: int, generator: torch.Generator, *, starts: int = 10) -> Tensor:
    """Labels `(N,)` of the start with the least inertia.

    Filters are compared by the sum of Euclidean distances of their factors. The SVD leaves signs open; those with the
    smallest distance count. Centroids are means of whole filters; inertia sums the distances of whole filters to them.
    """
    factors = representation(filters, method)
    best, least = torch.zeros(len(filters), dtype=torch.long), math.inf
    for _ in range(starts):
        centroids = filters[torch.randperm(len(filters), generator=generator)[:clusters]]
        for _ in range(100):
            distance = sum(_sign_free(x, y) for x, y in zip(factors, representation(centroids, method)))
            assert isinstance(distance, Tensor)
            labels = distance.argmin(1)
            members = torch.nn.functional.one_hot(labels, clusters).to(filters.dtype)
            count = members.sum(0)[:, None]
            means = (members.T @ filters.flatten(1)) / count.clamp_min(1)
            moved = torch.where(count > 0, means, centroids.flatten(1)).reshape(centroids.shape)
            still = torch.equal(moved, centroids)
            centroids = moved
            if still:
                break
        inertia = (filters - centroids[labels]).flatten(1).norm(dim=1).sum().item()
        if inertia < least:
            best, least = labels, inertia
    return best


def _sign_free(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances of unit vectors up to sign, `(N, d)` and `(K, d)` -> `(N, K)`."""
    return (2 - 2 * (x @ y.T).abs()).clamp_min(0).sqrt()


def compare_clusterings(
    level: str, datasets: int, seed: int, *, starts: int = 10, satellites: int = 100
) -> dict[str, float]:
    """Mean ARI of both representations over data sets of a level; both see the same data and the same starts."""
    from sklearn.metrics import adjusted_rand_score

    scores: dict[str, list[float]] = {method: [] for method in REPRESENTATIONS}
    for number in range(datasets):
        data = draw_filters(level, torch.Generator().manual_seed(seed + number), satellites=satellites)
        for method in REPRESENTATIONS:
            generator = torch.Generator().manual_seed(seed + number)
            labels = kmeans(data.filters, method, int(data.labels.max()) + 1, generator, starts=starts)
            scores[method].append(adjusted_rand_score(data.labels.numpy(), labels.numpy()))
    return {method: sum(values) / len(values) for method, values in scores.items()}
