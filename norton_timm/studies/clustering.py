"""CORING's study of representations: do rank-1 tensor factors tell filters apart better than matrix factors?

k-means on synthetic filters of known clusters, scored by the adjusted Rand index (ARI), as in the comparative efficacy
study of CORING's authors (Neural Networks 178, 2024).

Which representation does better depends on the rule that picks one of the random starts of k-means, the inertia. Their
README tells the rule `text`, the sum of the filters' distances to their centroids; with it matrices do at least as well
as tensors. Their code has the rule `code`, the sum over clusters of the norm of all differences in the cluster; with it
tensors do better, as they report. A sum of square roots is concave: it is lower where errors gather in few clusters.
So `code` prefers starts that merge two clusters and split another. Matrices end in such starts more often. The more
starts, the more likely one of them is picked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from norton_timm.tensors import tucker

REPRESENTATIONS = ('tensor', 'matrix')
INERTIAS = ('text', 'code')
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


def inertia(differences: Tensor, labels: Tensor, rule: str) -> float:
    """How far filters are from the centroids of their clusters, by one of two rules.

    `text`, of the authors' README: the sum over filters of the norm of the difference, sum_n ||d_n||.
    `code`, of the authors' code: the sum over clusters of the norm of all differences in the cluster,
    sum_k sqrt(sum_{n in k} ||d_n||^2).

    Args:
        differences: filters minus the centroids of their clusters, `(N, I, Kh, Kw)`.
        labels: cluster of each filter, `(N,)`.
        rule: one of `INERTIAS`.

    Raises:
        ValueError: unknown rule.

    Example:
        >>> differences = torch.tensor([3.0, 4.0, 1.0]).reshape(3, 1, 1, 1)
        >>> [inertia(differences, torch.tensor([0, 0, 1]), rule) for rule in INERTIAS]
        [8.0, 6.0]
    """
    if rule not in INERTIAS:
        raise ValueError(f'inertia: got {rule!r}, expected one of {", ".join(INERTIAS)}')
    norms = differences.flatten(1).norm(dim=1)
    if rule == 'text':
        return norms.sum().item()
    squares = norms.new_zeros(int(labels.max()) + 1).index_add(0, labels, norms**2)
    return squares.sqrt().sum().item()


def kmeans(
    filters: Tensor,
    method: str,
    clusters: int,
    generator: torch.Generator,
    *,
    starts: int = 10,
    inertias: Sequence[str] = INERTIAS,
) -> dict[str, Tensor]:
    """Labels `(N,)` of the start with the least inertia, for each rule of `inertias`; all rules see the same starts.

    Filters are compared by the sum of Euclidean distances of their factors. The SVD leaves signs open; those with the
    smallest distance count. Centroids are means of whole filters, and inertia is of whole filters too.
    """
    factors = representation(filters, method)
    best = {rule: (math.inf, torch.zeros(len(filters), dtype=torch.long)) for rule in inertias}
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
        for rule in inertias:
            found = inertia(filters - centroids[labels], labels, rule)
            if found < best[rule][0]:
                best[rule] = found, labels
    return {rule: labels for rule, (_, labels) in best.items()}


def _sign_free(x: Tensor, y: Tensor) -> Tensor:
    """Euclidean distances of unit vectors up to sign, `(N, d)` and `(K, d)` -> `(N, K)`."""
    return (2 - 2 * (x @ y.T).abs()).clamp_min(0).sqrt()


def compare_clusterings(
    level: str,
    datasets: int,
    seed: int,
    *,
    starts: int = 10,
    satellites: int = 100,
    inertias: Sequence[str] = INERTIAS,
) -> dict[str, dict[str, float]]:
    """Mean ARI over data sets of a level, by rule of inertia, then by representation.

    Both representations see the same data and the same starts.

    Example:
        >>> scores = compare_clusterings('normal', datasets=10, seed=0)
        >>> scores['text']['matrix'], scores['code']['tensor']  # each at most 1
    """
    from sklearn.metrics import adjusted_rand_score

    scores: dict[str, dict[str, list[float]]] = {rule: {method: [] for method in REPRESENTATIONS} for rule in inertias}
    for number in range(datasets):
        data = draw_filters(level, torch.Generator().manual_seed(seed + number), satellites=satellites)
        for method in REPRESENTATIONS:
            generator = torch.Generator().manual_seed(seed + number)
            clusters = int(data.labels.max()) + 1
            found = kmeans(data.filters, method, clusters, generator, starts=starts, inertias=inertias)
            for rule, labels in found.items():
                scores[rule][method].append(adjusted_rand_score(data.labels.numpy(), labels.numpy()))
    return {
        rule: {method: sum(values) / len(values) for method, values in by_method.items()}
        for rule, by_method in scores.items()
    }
