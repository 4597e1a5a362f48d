"""The mix of choices with the least total error at a given cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from norton_timm.search.choices import Choices
from norton_timm.search.cost import CostModel

_SWEEPS = 40
_BISECTIONS = 48
_ENOUGH = 0.998  # share of the budget that may be left as spent


def _every_keep(table: Mapping[int, float], full: int) -> tuple[np.ndarray, np.ndarray]:
    """Every number of classes from the least one measured on, and its error, interpolated between those measured."""
    known = {**table, full: 0.0}
    keeps = np.arange(min(known), full + 1)
    at = sorted(known)
    return keeps, np.interp(keeps, at, [known[k] for k in at])


@dataclass
class Mix:
    """A candidate.

    Attributes:
        keep: (groups,) channel classes kept.
        option: (rows,) index of the option of each cost term.
        dropped: blocks that are left out.
    """

    keep: np.ndarray
    option: np.ndarray
    dropped: frozenset[str] = frozenset()

    def copy(self) -> Mix:
        """A copy that can be changed."""
        return Mix(self.keep.copy(), self.option.copy(), self.dropped)


class Mixture:
    """Minimises the sum of the choices' errors at a given cost, by the Lagrangian ``error + price * cost``.

    Each layer is dense, of low rank or decomposed; each group keeps some of its channels; a residual block stays or is
    left out. The cost of a layer is bilinear in the channels that it reads and makes. For a price, coordinate descent
    goes over all layers, groups and blocks; the price is bisected until the cost fits, and what is left of the budget
    is spent on the steps that lower the error most per cost.

    Args:
        costs: the cost model of the dense network.
        choices: measured on it.
        kind: what is limited: ``macs``, ``params`` or ``ms``.
    """

    def __init__(self, costs: CostModel, choices: Choices, kind: str = 'macs') -> None:
        self.costs, self.choices, self.kind = costs, choices, kind
        widths = costs.widths.astype(int)
        self.options: list[list[tuple[str, int]]] = []
        self.errors: list[np.ndarray] = []
        self.terms: list[np.ndarray] = []  # per row: (options, 3) coefficients of in * out, out, and in
        for k, row in enumerate(costs.rows):
            alpha, beta = costs.coefficients(k, kind, 0)
            options, errors, terms = [('dense', 0)], [0.0], [(alpha, beta, 0.0)]
            if costs.index.get(row.name) == k:
                for rank, error in choices.low_rank.get(row.name, {}).items():
                    options.append(('low_rank', rank))
                    terms.append((0.0, *costs.low_rank_coefficients(k, kind, rank)))
                    errors.append(error)
                for rank, error in choices.cpd.get(row.name, {}).items():
                    options.append(('cpd', rank))
                    terms.append((*costs.coefficients(k, kind, rank), 0.0))
                    errors.append(error)
            self.options.append(options)
            self.errors.append(np.array(errors))
            self.terms.append(np.array(terms))
        self.keeps = {g: _every_keep(table, int(widths[g])) for g, table in choices.channels.items()}
        self.ranked = [k for k, options in enumerate(self.options) if len(options) > 1]
        self.touched = {g: np.flatnonzero(costs.makes[:, g] + costs.reads[:, g]) for g in self.keeps}
        inside = {b: set(names) for b, names in choices.inside.items()}
        self.rows_in = {b: np.array([k for k, r in enumerate(costs.rows) if r.name in inside[b]]) for b in inside}
        made_by = {g: {r.name for r, m in zip(costs.rows, costs.makes[:, g]) if m} for g in self.keeps}
        self.groups_in = {b: [g for g in self.keeps if made_by[g] <= inside[b]] for b in inside}
        self.unit = max(self.cost(self.dense()), 1e-12)

    def dense(self) -> Mix:
        """Everything as it is."""
        return Mix(self.costs.widths.astype(int), np.zeros(len(self.options), dtype=int))

    def _present(self, mix: Mix) -> np.ndarray:
        """1 for each row that is there, 0 for those of blocks that are left out."""
        present = np.ones(len(self.options))
        for block in mix.dropped:
            present[self.rows_in[block]] = 0
        return present

    def _row_costs(self, mix: Mix) -> np.ndarray:
        terms = np.array([t[o] for t, o in zip(self.terms, mix.option)])
        n_in, n_out = self.costs.channels(mix.keep.astype(float))
        return (terms[:, 0] * n_in * n_out + terms[:, 1] * n_out + terms[:, 2] * n_in) * self._present(mix)

    def cost(self, mix: Mix) -> float:
        """Cost of the whole model in the kind's own unit."""
        return float(self._row_costs(mix).sum() + self.costs.constant[self.kind])

    def error(self, mix: Mix) -> float:
        """Sum of the errors of all that was chosen."""
        present = self._present(mix)
        gone = {g for b in mix.dropped for g in self.groups_in[b]}
        total = sum(self.choices.blocks[b] for b in mix.dropped)
        total += sum(e[o] for e, o, p in zip(self.errors, mix.option, present) if p)
        return float(total + sum(self._keep_error(g, mix.keep[g]) for g in self.keeps if g not in gone))

    def _keep_error(self, group: int, keep: int) -> float:
        keeps, errors = self.keeps[group]
        return float(errors[int(np.flatnonzero(keeps == keep)[0])])

    def descend(self, price: float, start: Mix) -> Mix:
        """Coordinate descent on ``error + price * cost / dense cost``."""
        mix, price = start.copy(), price / self.unit
        for _ in range(_SWEEPS):
            before = mix.copy()
            present = self._present(mix)
            for g in self.keeps:
                mix.keep[g] = self._best_keep(g, price, mix, present)
            n_in, n_out = self.costs.channels(mix.keep.astype(float))
            for k in self.ranked:
                terms = self.terms[k]
                costs = terms[:, 0] * n_in[k] * n_out[k] + terms[:, 1] * n_out[k] + terms[:, 2] * n_in[k]
                mix.option[k] = int(np.argmin(self.errors[k] + price * present[k] * costs))
            for block in self.choices.blocks:
                mix.dropped = self._with_or_without(block, price, mix)
            if (
                (mix.keep == before.keep).all()
                and (mix.option == before.option).all()
                and mix.dropped == before.dropped
            ):
                break
        return mix

    def _best_keep(self, group: int, price: float, mix: Mix, present: np.ndarray) -> int:
        keeps, errors = self.keeps[group]
        near = self.touched[group]
        terms = np.array([self.terms[k][mix.option[k]] for k in near]) * present[near, None]
        base = mix.keep.astype(float)
        base[group] = 0
        rest_in = self.costs.fixed_in[near] + self.costs.reads[near] @ base
        rest_out = self.costs.fixed_out[near] + self.costs.makes[near] @ base
        n_in = rest_in + np.outer(keeps, self.costs.reads[near, group])  # (options, rows)
        n_out = rest_out + np.outer(keeps, self.costs.makes[near, group])
        costs = (terms[:, 0] * n_in * n_out + terms[:, 1] * n_out + terms[:, 2] * n_in).sum(1)
        return int(keeps[np.argmin(errors + price * costs)])

    def _with_or_without(self, block: str, price: float, mix: Mix) -> frozenset[str]:
        sets = mix.dropped - {block}, mix.dropped | {block}
        values = []
        for dropped in sets:
            trial = Mix(mix.keep, mix.option, dropped)
            values.append(self.error(trial) + price * self.cost(trial))
        return sets[int(np.argmin(values))]

    def least(self) -> Mix:
        """The cheapest mix."""
        return self.descend(1e12, self.dense())

    def solve(self, target: float) -> Mix:
        """The best mix that costs at most ``target``; the cheapest one if none does."""
        low, high = -8.0, 8.0  # logarithms of the price
        below = self.descend(10**high, self.dense())
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            mix = min(
                (self.descend(10**middle, start) for start in (self.dense(), below)),
                key=lambda m: self.error(m) + 10**middle * self.cost(m) / self.unit,
            )
            if self.cost(mix) > target:
                low = middle
            else:
                high, below = middle, mix
            if high - low < 1e-4:
                break
        return self._fill(below, target)

    def _fill(self, mix: Mix, target: float) -> Mix:
        """Spend what is left of the budget on the steps that lower the error most per cost."""
        mix = mix.copy()
        while True:
            spent, error = self.cost(mix), self.error(mix)
            best, best_gain = None, 0.0
            if spent >= _ENOUGH * target:
                return mix
            for trial in self._steps(mix):
                more = self.cost(trial) - spent
                gain = error - self.error(trial)
                if gain > 0 and spent + more <= target and gain / max(more, 1e-9 * self.unit) > best_gain:
                    best, best_gain = trial, gain / max(more, 1e-9 * self.unit)
            if best is None:
                return mix
            mix = best

    def _steps(self, mix: Mix) -> list[Mix]:
        """Mixes that differ by one choice."""
        found = []
        for g, (keeps, _) in self.keeps.items():
            for keep in sorted(int(n) for n in keeps if n > mix.keep[g])[:2]:
                trial = mix.copy()
                trial.keep[g] = keep
                found.append(trial)
        for k in self.ranked:
            better = np.flatnonzero(self.errors[k] < self.errors[k][mix.option[k]])
            for option in better:
                trial = mix.copy()
                trial.option[k] = option
                found.append(trial)
        return found

    def chosen(self, mix: Mix, kind: str) -> dict[str, int]:
        """Rank by layer name of the layers that are of low rank (``low_rank``) or decomposed (``cpd``)."""
        present = self._present(mix)
        found = {}
        for k in self.ranked:
            what, rank = self.options[k][mix.option[k]]
            if what == kind and present[k]:
                found[self.costs.rows[k].name] = rank
        return found
