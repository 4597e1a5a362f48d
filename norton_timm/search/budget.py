"""Find ranks and pruning rates that meet a budget: MACs, parameters, milliseconds or megabytes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from norton_timm.compression import (
    METHODS,
    OUTPUT_ERROR,
    Activations,
    CompressionSpec,
    channel_graph,
    images_of,
    reshape,
)
from norton_timm.profiling import (
    MEGABYTE,
    Complexity,
    count_params,
    latencies,
    layer_latencies,
    layer_macs,
    make_input,
    peak_memory,
)
from norton_timm.search.allocate import Allocator, Choice
from norton_timm.search.choices import KINDS, Choices, measure_choices
from norton_timm.search.cost import CostModel
from norton_timm.search.loss_weights import check_calibration, loss_weights
from norton_timm.search.mixture import Mixture
from norton_timm.search.sensitivity import Sensitivity, measure_sensitivity, refresh_selection, weighted_nmse
from norton_timm.utils import as_number, copy_of, uncompiled

logger = logging.getLogger(__name__)

TOLERANCE = {'macs': 0.01, 'params': 0.01, 'memory_mb': 0.01, 'latency_ms': 0.05}
_TRIALS = 12
_REFINED = 3  # best choices by the table that are solved again with the selection at their own ranks


def find_spec(
    model: nn.Module,
    *,
    macs: float | None = None,
    params: float | None = None,
    latency_ms: float | None = None,
    memory_mb: float | None = None,
    method: str = 'norton',
    calibration: Iterable[Any] | None = None,
    example_input: Any = None,
    kinds: Sequence[str] | None = None,
    activations: Activations | None = None,
    progress: bool = False,
) -> CompressionSpec:
    """A spec with which ``compress`` meets one target, at the least total error that was found.

    Every layer gets its own rank and every coupled group its own rate (named by one of its layers). Without images the
    search minimises :func:`norton_timm.search.weighted_nmse`, which looks at weights. With images it measures what each
    choice does to the network's outputs (:mod:`norton_timm.search.choices`) and mixes more kinds of choices; give
    ``compress`` the same images then, a few hundred of those that the network will see. The stem is not decomposed, and
    the channels of the stem and of the last convolution are kept.

    Args:
        model: any convolutional network; it is not changed.
        macs: fraction of the multiply-accumulates to keep, in (0, 1]; met within 1 %, with images at most 1 % above.
        params: fraction of the parameters to keep, in (0, 1]; met in the same way.
        latency_ms: milliseconds of one forward pass on this device, in channels-last evaluation mode with each layer
            in the form that ``auto`` picks; met within 5 %.
        memory_mb: megabytes (10^6 bytes) of weights and of activations alive at once in inference, see
            :func:`norton_timm.profiling.peak_memory`; met within 1 %.
        method: ``norton`` (ranks and rates) or ``coring`` (rates only).
        calibration: batches of images (N, C, H, W) of one size, labels ignored. For inputs of another form each layer's
            error is weighted by its effect on the outputs.
        example_input: what the model's ``forward`` takes; by default one random image of the model's own size.
        kinds: with images, which of ``KINDS`` to choose from: ``channels`` that leave, layers of ``low_rank``, ``cpd``
            of each filter, residual ``blocks`` that leave. By default all, and for ``coring`` channels and blocks.
        activations: measured before on the same images, to save time.
        progress: show bars.

    Raises:
        ValueError: not exactly one target, or a target that cannot be met; the message says what can.

    Example:
        >>> spec = find_spec(model, macs=0.5)
        >>> small, report = compress(model, spec)
    """
    targets = {'macs': macs, 'params': params, 'latency_ms': latency_ms, 'memory_mb': memory_mb}
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(f'got {", ".join(given) or "no target"}, expected exactly one of {", ".join(targets)}')
    kind, target = next(iter(given.items()))
    check_target(kind, target)
    return Budget(model, method, calibration, example_input, kinds, activations, progress).find(kind, float(target))


def check_target(kind: str, value: Any) -> None:
    """Check a target.

    Raises:
        ValueError: it is no positive number, or a fraction above 1.
    """
    number = as_number(value)
    if number is None or not 0 < number < math.inf or (kind in ('macs', 'params') and number > 1):
        wanted = 'the fraction to keep, above 0 and at most 1' if kind in ('macs', 'params') else 'a positive number'
        raise ValueError(f'{kind}: got {str(value)[:60]!r}, expected {wanted}')


def kinds_of(kinds: Sequence[str] | None, method: str) -> tuple[str, ...]:
    """The kinds of choices to consider.

    Raises:
        ValueError: an unknown kind, or one that the method does not have.
    """
    allowed = ('channels', 'blocks') if method == 'coring' else KINDS
    if isinstance(kinds, str) or any(kind not in allowed for kind in kinds or ()):
        raise ValueError(f'kinds: got {kinds!r}, expected some of {", ".join(allowed)} with the method {method}')
    return tuple(allowed if kinds is None else kinds)


class Budget:
    """What several searches on one model share: its channel graph, costs and sensitivity table.

    Args:
        model, method, calibration, example_input, kinds, activations, progress: as for :func:`find_spec`.

    Attributes:
        table: the sensitivity table.
        measure_seconds: seconds for which a latency is measured.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str = 'norton',
        calibration: Iterable[Any] | None = None,
        example_input: Any = None,
        kinds: Sequence[str] | None = None,
        activations: Activations | None = None,
        progress: bool = False,
    ) -> None:
        if method not in METHODS:
            raise ValueError(f'method: got {str(method)[:60]!r}, expected one of {", ".join(METHODS)}')
        batches = None if calibration is None else check_calibration(calibration)
        self.model, self.method = (model := uncompiled(model)), method
        self.example_input = make_input(model, example_input)
        self.graph = channel_graph(model, self.example_input)
        self.costs = CostModel(model, self.graph, self.example_input)
        self.table = Sensitivity()
        self.choices: Choices | None = None
        if batches is not None and all(isinstance(b, Tensor) and b.dim() == 4 for b in batches):
            images = list(images_of(batches, model))
            activations = activations or Activations(model, images[0][:1], images)
            kinds = kinds_of(kinds, method)
            self.choices = measure_choices(model, self.graph, activations, images, kinds, progress)
        else:
            self.table = measure_sensitivity(model, self.graph, method)
            if batches is not None:
                self.table.weights = loss_weights(model, self.graph, self.table, batches, method)
        self.measure_seconds = 2.0
        self._allocators: dict[str, Any] = {}
        self._errors: dict[tuple[str, bytes, bytes], float] = {}

    def allocator(self, kind: str) -> Any:
        """The solver for a cost kind: ``macs``, ``params`` or ``ms``."""
        if kind not in self._allocators:
            if self.choices is not None:
                self._allocators[kind] = Mixture(self.costs, self.choices, kind)
            else:
                self._allocators[kind] = Allocator(self.costs, self.table, kind)
        return self._allocators[kind]

    def spec(self, choice: Any, allocator: Any) -> CompressionSpec:
        """The recipe of a choice: exact layer names, one per coupled group."""
        rates = {}
        if isinstance(allocator, Mixture):
            for number in allocator.keeps:
                group, keep = self.graph.groups[number], int(choice.keep[number])
                names = [n for n in group.names if not any(n.startswith(f'{b}.') for b in choice.dropped)]
                if keep < len(group.classes) and names:
                    rates[names[0]] = rate_for(len(group.classes), keep)
            return CompressionSpec(
                method=self.method,
                rank=allocator.chosen(choice, 'cpd') or 0,
                rates=rates or 0.0,
                criterion=OUTPUT_ERROR if rates else None,
                low_rank=allocator.chosen(choice, 'low_rank'),
                drop=tuple(sorted(choice.dropped)),
            )
        for number in self.table.left_at_keep:
            group, keep = self.graph.groups[number], int(choice.keep[number])
            if keep < len(group.classes):
                rates[group.names[0]] = rate_for(len(group.classes), keep)
        return CompressionSpec(method=self.method, rank=allocator.ranks(choice), rates=rates)

    def build(self, spec: CompressionSpec) -> nn.Module:
        """A network of the spec's shapes; its weights mean nothing."""
        return reshape(copy_of(self.model), spec, self.example_input)

    def complexity(self, model: nn.Module) -> Complexity:
        """MACs and parameters of a network, counted by running it."""
        return Complexity(layer_macs(model, self.example_input)[''], count_params(model))

    def solve(self, allocator: Any, budget: float, settle: bool = True) -> Any:
        """The choice of least error at a cost budget, with the filters selected at its own ranks.

        Args:
            allocator: the solver, which says what the budget limits.
            budget: in the unit of the cost.
            settle: also compute the exact errors of uniform settings that come close.
        """
        if isinstance(allocator, Mixture):
            return allocator.solve(budget)
        refresh_selection(self.table, self.graph, self.method, {})
        allocator.read_selection()
        found = allocator.solve(budget)
        if not found:
            return allocator.least()
        dense = [choice for choice in found[_REFINED:] if not choice.option.any()]
        refined = []
        for choice in found[:_REFINED] + dense:
            self._select_at(choice, allocator)
            refined.append(allocator.solve_channels(choice, budget) or choice)
        refined.sort(key=lambda choice: self._order(choice, allocator, budget))
        return self._settle(refined, allocator, budget) if settle else refined[0]

    def _select_at(self, choice: Choice, allocator: Allocator) -> None:
        refresh_selection(self.table, self.graph, self.method, allocator.ranks(choice))
        allocator.read_selection()

    def _order(self, choice: Choice, allocator: Allocator, budget: float) -> tuple[bool, float]:
        return allocator.order(choice, budget)[0], self.error(choice, allocator)

    def _settle(self, found: list[Choice], allocator: Allocator, budget: float) -> Choice:
        """The best of ``found``; if a uniform setting comes close by the table, the exact errors of close ones decide.

        Random starts of the decomposition make the selection of a group vary by more than the table resolves. In
        networks of few channels this averages out less.
        """
        share = min(0.1, 2 / math.sqrt(1 + sum(allocator.costs.widths[g] for g in allocator.members)))
        close: list[Choice] = []
        limit = self._order(found[0], allocator, budget)
        limit = (limit[0], limit[1] * (1 + share))
        for rank in [0, *sorted({r for k in allocator.ranked for r in allocator.options[k]} - {0})]:
            pair = allocator.one_rate(rank, budget) or ()
            # a rough bound: the table still holds the selection at other ranks
            likely = [c for c in pair if allocator.error(c) <= (1 + share) * limit[1]]
            close += [c for c in likely if self._order(c, allocator, budget) <= limit]
        if not close:
            return found[0]
        close += [c for c in found if self._order(c, allocator, budget) <= limit]
        logger.info('%d choices are close to the best: working out their errors', len(close))
        errors = [
            weighted_nmse(self.model, self.spec(c, allocator), self.example_input, self.table.weights) for c in close
        ]
        best = close[min(range(len(close)), key=lambda k: errors[k])]
        self._errors[allocator.key(best)] = min(errors)
        return best

    def error(self, choice: Any, allocator: Any) -> float:
        """Total error of a choice: weighted NMSE by the table at its ranks, or the measured errors."""
        if isinstance(allocator, Mixture):
            return allocator.error(choice)
        key = allocator.key(choice)
        if key not in self._errors:
            self._select_at(choice, allocator)
            self._errors[key] = allocator.error(choice)
        return self._errors[key]

    def find(self, kind: str, target: float) -> CompressionSpec:
        """See :func:`find_spec`.

        Args:
            kind: ``macs``, ``params``, ``latency_ms`` or ``memory_mb``.
            target: in the unit of :func:`find_spec`.
        """
        if kind in ('macs', 'params'):
            if target == 1:
                return self.spec(self.allocator(kind).dense(), self.allocator(kind))
            whole = getattr(self.complexity(self.model), kind)
            if self.choices is not None:
                return self._below(kind, target, whole)
            return self._hit(kind, kind, target, lambda m: getattr(self.complexity(m), kind) / whole)
        if kind == 'memory_mb':
            return self._memory(target)

        (whole,) = latencies([self.model], self.example_input, self.measure_seconds)

        def measure(model: nn.Module) -> float:
            # beside the dense network: the machine's speed drifts by more than the tolerance
            dense, ours = latencies([self.model, model], self.example_input, self.measure_seconds)
            return whole * ours / dense

        self.costs.set_latency(layer_latencies(self.model, self.example_input), whole)
        self._allocators.pop('ms', None)
        return self._hit('ms', kind, target, measure)

    def _below(self, kind: str, target: float, whole: int) -> CompressionSpec:
        """The best mix that needs at most ``target``, and less where no further choice fits."""
        allocator: Mixture = self.allocator(kind)
        fraction = target
        for _ in range(_TRIALS):
            choice = allocator.solve(fraction * allocator.unit)
            spec = self.spec(choice, allocator)
            got = getattr(self.complexity(self.build(spec)), kind) / whole
            if got <= target * (1 + TOLERANCE[kind]):
                self._last_error = allocator.error(choice)
                return spec
            fraction *= target / got  # the cost model is not exact
        least = allocator.cost(allocator.least()) / allocator.unit
        raise ValueError(f'{kind}: got {target:g}, but the least that can be attained is {least:.4g}')

    def _memory(self, target: float) -> CompressionSpec:
        """Fewer parameters and fewer MACs both save memory: search by each, and take the spec of smaller error."""

        def measure(model: nn.Module) -> float:
            return peak_memory(model, self.example_input) / MEGABYTE

        found, reasons = [], []
        for kind in ('params', 'macs'):
            try:
                spec = self._hit(kind, 'memory_mb', target, measure)
            except ValueError as error:
                reasons.append(error)
            else:
                found.append((self._last_error, spec))
        if not found:
            raise reasons[0]
        return min(found, key=lambda pair: pair[0])[1]

    def _hit(self, kind: str, name: str, target: float, measure: Callable[[nn.Module], float]) -> CompressionSpec:
        """Search for the budget, in the cost model's unit, at which the network measures ``target``.

        Where the cost model is exact, the first trial is the answer.
        """
        allocator = self.allocator(kind)
        whole = measure(self.model)
        if target > whole * (1 + TOLERANCE[name]):
            raise ValueError(f'{name}: got {target:g}, but the dense model already needs only {whole:.4g}')
        dense = allocator.cost(allocator.dense())
        least = allocator.least()
        floor = allocator.cost(least) / dense
        # (fraction of the modelled cost, measured): a bracket around the target
        low: tuple[float, float] | None = None
        high = (1.0, whole)
        fraction = target / whole
        nearest: tuple[float, Choice] | None = None
        aim = TOLERANCE[name] / (2 if name == 'latency_ms' else 5)
        for _ in range(_TRIALS):
            choice = self.solve(allocator, fraction * dense, kind == name) if fraction > floor else least
            got = measure(self.build(self.spec(choice, allocator)))
            gap = abs(got / target - 1)
            logger.info('%s: budget %.4f of %s gives %.5g, wanted %.5g', name, fraction, kind, got, target)
            if nearest is None or gap < nearest[0]:
                nearest = gap, choice
            if gap <= aim:
                break
            at = allocator.cost(choice) / dense
            if at <= floor * (1 + 1e-9) and got > target:
                if nearest[0] > TOLERANCE[name]:
                    raise ValueError(f'{name}: got {target:g}, but the least that can be attained is {got:.4g}')
                break
            if got > target:
                high = (min(fraction, high[0]), got)
            else:
                low = (max(fraction, low[0]), got) if low else (fraction, got)
            fraction = self._next(fraction, at, got, target, low, high, floor)
        assert nearest is not None
        gap, choice = nearest
        if gap > TOLERANCE[name]:
            raise ValueError(
                f'{name}: got {target:g}, but the nearest that was reached is {target * (1 + gap):.4g} or '
                f'{target * (1 - gap):.4g} ({100 * gap:.1f} % off)'
            )
        self._last_error = self.error(choice, allocator)
        return self.spec(choice, allocator)

    @staticmethod
    def _next(
        fraction: float, at: float, got: float, target: float,
        low: tuple[float, float] | None, high: tuple[float, float], floor: float,
    ) -> float:  # fmt: skip
        """The next budget to try: in proportion first, then between the nearest trials on either side."""
        if low is None:
            return max(min(fraction, at) * min(target / got, 0.9), 0.999 * floor)
        span = high[1] - low[1]
        share = (target - low[1]) / span if span > 0 else 0.5
        return low[0] + min(max(share, 0.1), 0.9) * (high[0] - low[0])


def rate_for(filters: int, keep: int) -> float:
    """The shortest decimal rate with ``int(filters * (1 - rate)) == keep``."""
    for digits in range(2, 17):
        rate = round(1 - (keep + 0.5) / filters, digits)
        if 0 <= rate < 1 and int(filters * (1 - rate)) == keep:
            return rate
    raise ValueError(f'got {keep} of {filters} filters, expected 1 <= keep <= filters')
