"""Timings of the tensor mathematics (CPD, distances, selection), each next to its baseline in one run, and the
project's goals for them and for training steps.
"""

from __future__ import annotations

import multiprocessing
import re
import resource
import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from norton_timm.compression import CompressionSpec, make_plan, removed_classes
from norton_timm.graph import ChannelGraph
from norton_timm.studies.steps import Row, clock
from norton_timm.tensors import cp_decompose, filter_distance

SECTIONS = ('cpd', 'r078', 'pabs', 'training')
R078 = CompressionSpec(method='norton', rank=1, rates='[0.]+[0.1]*2+[0.4]*5+[0.75]*12')  # ResNet-50, 78 % fewer MACs


def resnet50_weights(seed: int) -> list[Tensor]:
    """Weights `(O, I, 3, 3)` of ResNet-50's sixteen 3x3 convolutions at their random start."""
    torch.manual_seed(seed)
    model = timm.create_model('resnet50', pretrained=False)
    return [m.weight.detach() for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]


def benchmark_cpd(
    ranks: Sequence[int], sample: int | None, seed: int, weights: list[Tensor] | None = None
) -> list[Row]:
    """CPD of the sixteen 3x3 layers: TensorLy's `parafac` filter by filter against `cp_decompose`.

    Args:
        ranks: CPD ranks.
        sample: filters per layer, evenly spaced, that the loop really decomposes; its time is extrapolated linearly to
            the whole layer. None decomposes all.
        seed: of the weights and of `parafac`.
        weights: other layers than ResNet-50's.

    Returns:
        A row per rank: seconds for all layers (ours: the fastest and slowest of three), mean NMSE over the filters that
        both decomposed, and ours over all filters.
    """
    weights = resnet50_weights(seed) if weights is None else weights
    rows = []
    for rank in ranks:
        cp_decompose(weights[0], rank)  # warm-up
        seconds = []
        for _ in range(3):
            with clock() as elapsed:
                nmse = [cp_decompose(weight, rank).nmse.double() for weight in weights]
            seconds.append(elapsed())
        loop_s, loop_nmse = _time_parafac(weights, rank, sample, seed)
        rows.append(
            {
                'rank': rank,
                'parafac_s': loop_s,
                'ours_s': min(seconds),
                'ours_slowest_s': max(seconds),
                'speedup': loop_s / min(seconds),
                'parafac_nmse': loop_nmse,
                'ours_nmse': torch.cat([n[_sampled(len(n), sample)] for n in nmse]).mean().item(),
                'ours_nmse_all': torch.cat(nmse).mean().item(),
            }
        )
    return rows


def _sampled(filters: int, sample: int | None) -> list[int]:
    count = filters if sample is None else min(sample, filters)
    return [k * filters // count for k in range(count)]


def _time_parafac(weights: list[Tensor], rank: int, sample: int | None, seed: int) -> tuple[float, float]:
    """Seconds for all filters, extrapolated from the sampled ones, and the mean NMSE of those."""
    import tensorly
    from tensorly.decomposition import parafac

    tensorly.set_backend('numpy')  # its fastest on filters of this size
    seconds, errors = 0.0, []
    for weight in weights:
        chosen = _sampled(len(weight), sample)
        filters = [weight[k].numpy() for k in chosen]
        with clock() as elapsed:
            found = [parafac(f, rank, n_iter_max=300, init='random', random_state=seed) for f in filters]
        seconds += elapsed() * len(weight) / len(chosen)
        errors += [((f - tensorly.cp_to_tensor(cp)) ** 2).sum() / (f**2).sum() for f, cp in zip(filters, found)]
    return seconds, float(statistics.fmean(errors))


def benchmark_r078(sample: int | None, seed: int) -> list[Row]:
    """All that the compression of ResNet-50 to r078 computes on tensors: decomposition, distances, selection.

    The baseline is the authors' way on the sixteen 3x3 layers alone: `parafac` for each filter, and SciPy's
    `subspace_angles` for each pair of filters and mode, extrapolated from 50 pairs a layer. Ours includes the 1x1
    layers that share channels.
    """
    torch.manual_seed(seed)
    model = timm.create_model('resnet50', pretrained=False).eval()
    graph = ChannelGraph(model, torch.randn(1, 3, 64, 64))
    plan = make_plan(model, graph, R078)
    weights = [model.get_submodule(name).weight.detach() for name in plan.ranks]
    cp_decompose(weights[0], 1)  # warm-up
    with clock() as decompose:
        factors = [cp_decompose(weight, 1) for weight in weights]
    with clock() as select:
        for group, keep in zip(graph.groups, plan.keep):
            removed_classes(group, keep, R078, plan.ranks, torch.Generator().manual_seed(seed))
    loop_s, _ = _time_parafac(weights, 1, sample, seed)
    row = {'parafac_s': loop_s, 'angles_s': sum(_time_scipy_angles([f.A, f.B, f.C]) for f in factors)}
    row |= {'decompose_s': decompose(), 'distance_and_select_s': select(), 'ours_s': decompose() + select()}
    return [row | {'speedup': (row['parafac_s'] + row['angles_s']) / row['ours_s']}]


def _time_scipy_angles(modes: list[Tensor], pairs: int = 50) -> float:
    """Seconds that SciPy needs for all pairs of filters, extrapolated from some."""
    from scipy.linalg import subspace_angles

    arrays = [m.double().numpy() for m in modes]
    filters = len(arrays[0])
    with clock() as elapsed:
        for k in range(pairs):
            for mode in arrays:
                subspace_angles(mode[0], mode[1 + k % (filters - 1)])
    return elapsed() / pairs * filters * (filters - 1) / 2


def benchmark_pabs(sizes: Sequence[int] = (64, 128, 256, 512, 1024, 2048), in_channels: int = 512) -> list[Row]:
    """Distance matrices of rank-1 3x3 filters: seconds, ns per pair, and the process's peak memory in MB.

    Each size runs in a fresh process, so that the peak, which includes Python and torch themselves, is its own.
    """
    rows = []
    for size in sizes:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context('spawn')) as pool:
            seconds, before, after = pool.submit(_pabs, size, in_channels, torch.get_num_threads()).result()
        row = {'filters': size, 'ours_s': seconds, 'ns_per_pair': seconds / (size * (size - 1) / 2) * 1e9}
        rows.append(row | {'peak_mb': after, 'added_mb': after - before})
    return rows


def _pabs(filters: int, in_channels: int, threads: int) -> tuple[float, float, float]:
    torch.set_num_threads(threads)
    factors = cp_decompose(torch.randn(filters, in_channels, 3, 3, generator=torch.Generator().manual_seed(0)), 1)
    filter_distance(type(factors)(*(f[:64] for f in factors)), 'pabs')  # warm-up
    before, seconds = _peak_mb(), []
    for _ in range(3):
        with clock() as elapsed:
            filter_distance(factors, 'pabs')
        seconds.append(elapsed())
    return min(seconds), before, _peak_mb()


def _peak_mb() -> float:
    status = Path('/proc/self/status')
    if status.is_file():  # Linux counts the parent's peak in ru_maxrss of a process that it started
        return int(re.findall(r'VmHWM:\s+(\d+) kB', status.read_text())[0]) / 2**10
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == 'darwin' else 2**10)


def goals(results: dict[str, list[Row]]) -> list[tuple[str, float, str, bool]]:
    """The project's goals for these figures, as (what, measured, limit, met)."""
    found: list[tuple[str, float, str, bool]] = []

    def check(what: str, value: float, limit: float, at_least: bool = False) -> None:
        met = value >= limit if at_least else value <= limit
        found.append((what, value, f'{">=" if at_least else "<="} {limit:g}', met))

    for row in results.get('cpd', []):
        check(f'CPD rank {row["rank"]}: times faster than parafac', row['speedup'], 100, at_least=True)
        check(f"CPD rank {row['rank']}: mean NMSE over parafac's", row['ours_nmse'] / row['parafac_nmse'], 1)
    for row in results.get('r078', []):
        check('ResNet-50 r078: decomposition, PABS, selection (s)', row['ours_s'], 2)
    if rows := results.get('pabs'):
        check(f'PABS of {rows[-1]["filters"]} filters (s)', rows[-1]['ours_s'], 3)
        check(f'PABS of {rows[-1]["filters"]} filters: peak memory (MB)', rows[-1]['peak_mb'], 2000)
        check('PABS: time per pair, largest over smallest size', rows[-1]['ns_per_pair'] / rows[0]['ns_per_pair'], 1)
    limits = {'norton_resnet56_cifar.r071': 1.05, 'norton_resnet50.r078': 0.5}
    for row in results.get('training', []):
        name = f'{row["model"]}, {row["precision"]}'
        check(f'{name}: step over uncompressed', row['dense_over_uncompressed'], limits[row['model']])
        if 'resnet56' in row['model']:
            check(f"{name}: authors' block over dense form", row['authors_block_over_dense'], 3, at_least=True)
            check(f'{name}: own factored over dense form', row['factored_over_dense'], 3, at_least=True)
    return found


def format_rows(rows: Sequence[Row]) -> str:
    """Rows with the same keys as aligned text."""
    cells = [list(rows[0])] + [[f'{v:.4g}' if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(line[k]) for line in cells) for k in range(len(cells[0]))]
    return '\n'.join('  '.join(cell.rjust(width) for cell, width in zip(line, widths)) for line in cells)
