"""Choose ranks and kept channels for a cost target with the least total error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from norton_timm.search.cost import CostModel
from norton_timm.search.sensitivity import Sensitivity

_SWEEPS = 60
_SLACK = 0.005  # share of the target that a choice may leave unused


@dataclass
class Choice:
    """A candidate: kept classes per group (groups,), and the index of the rank option per cost term (terms,)."""

    keep: np.ndarray
    option: np.ndarray

    def copy(self) -> Choice:
        """A copy that can be changed."""
        return Choice(self.keep.copy(), self.option.copy())


class Allocator:
    """Minimises total weighted NMSE at a given cost by the Lagrangian ``error + price * cost``.

    With the ranks fixed, the error is a sum of terms like 1 / kept and the cost a sum of products of kept
    channels. This is a geometric program, convex in the logarithms, and coordinate descent solves it. Ranks are
    chosen from a few options per layer in the same descent, from several starts.

    Args:
        costs: the cost model of the dense network.
        table: its sensitivity.
        kind: what is limited: ``macs``, ``params`` or ``ms``.
    """

    def __init__(self, costs: CostModel, table: Sensitivity, kind: str = 'macs') -> None:
        self.costs, self.table, self.kind = costs, table, kind
        names = [row.name for row in costs.rows]
        self.options: list[list[int]] = []
        self.left: list[np.ndarray] = []  # per term: energy left at each of its options
        self.weight = np.zeros(len(names))
        layers = set(table.left_at_rank) | {n for names_, _ in table.left_at_keep.values() for n in names_}
        self.coefficients: list[np.ndarray] = []
        for k, name in enumerate(names):
            is_layer = costs.index.get(name) == k
            row = table.left_at_rank.get(name, {}) if is_layer else {}
            pairs = [(0, 1.0), *((r, left) for r, left in row.items() if r)]
            terms = np.array([costs.coefficients(k, kind, r) for r, _ in pairs])
            useful = [o for o in range(len(pairs)) if o == 0 or (terms[o] < terms[0]).any()]
            self.options.append([pairs[o][0] for o in useful])
            self.left.append(np.array([pairs[o][1] for o in useful]))
            self.coefficients.append(terms[useful])
            if is_layer and name in layers:
                self.weight[k] = table.weights.get(name, 1.0)
        self.read_selection()
        self.ranked = [k for k, o in enumerate(self.options) if len(o) > 1]
        self.touched = {g: np.flatnonzero(costs.makes[:, g] + costs.reads[:, g]) for g in self.members}
        self.unit = max(self.cost(self.dense()), 1e-12)

    def read_selection(self) -> None:
        """Read the curves of the energy that selection leaves in each layer from the table."""
        index = self.costs.index
        self.members = {
            g: ([index[n] for n in who if n in index], curves[[n in index for n in who]])
            for g, (who, curves) in self.table.left_at_keep.items()
        }

    def dense(self) -> Choice:
        """Everything kept, nothing decomposed."""
        return Choice(self.costs.widths.astype(int), np.zeros(len(self.options), dtype=int))

    def uniform(self, rank: int) -> Choice:
        """Everything kept, every layer at the option nearest to one rank (0: dense)."""
        choice = self.dense()
        for k in self.ranked:
            fits = [o for o, r in enumerate(self.options[k]) if r == rank]
            choice.option[k] = fits[0] if fits else 0
        return choice

    def _terms(self, choice: Choice) -> tuple[np.ndarray, np.ndarray]:
        return np.array([c[o] for c, o in zip(self.coefficients, choice.option)]).T  # type: ignore[return-value]

    def cost(self, choice: Choice) -> float:
        """Cost of the whole model in the kind's own unit."""
        alpha, beta = self._terms(choice)
        n_in, n_out = self.costs.channels(choice.keep.astype(float))
        return float((n_out * (alpha * n_in + beta)).sum() + self.costs.constant[self.kind])

    def _kept_energy(self, choice: Choice) -> np.ndarray:
        kept = np.ones(len(self.options))
        for g, (rows, curves) in self.members.items():
            kept[rows] = curves[:, choice.keep[g]]
        return kept

    def error(self, choice: Choice) -> float:
        """Total weighted NMSE by the table."""
        left = self._kept_energy(choice) * np.array([v[o] for v, o in zip(self.left, choice.option)])
        return float((self.weight * (1 / left - 1)).sum())

    def descend(self, price: float, choice: Choice, fixed_ranks: bool = False) -> Choice:
        """Coordinate descent on ``error + price * cost / dense cost`` from ``choice``."""
        choice = choice.copy()
        price /= self.unit
        alpha, beta = self._terms(choice)
        left = np.array([v[o] for v, o in zip(self.left, choice.option)])
        n_in, n_out = self.costs.channels(choice.keep.astype(float))
        kept = self._kept_energy(choice)
        for _ in range(_SWEEPS):
            moved = 0
            for g, (rows, curves) in self.members.items():
                best = self._best_keep(g, rows, curves, price, choice, alpha, beta, left, n_in, n_out)
                step = best - choice.keep[g]
                if step:
                    choice.keep[g] = best
                    near = self.touched[g]
                    n_in[near] += step * self.costs.reads[near, g]
                    n_out[near] += step * self.costs.makes[near, g]
                    kept[rows] = curves[:, best]
                    moved += 1
            for k in [] if fixed_ranks else self.ranked:
                costs = n_out[k] * (self.coefficients[k] @ np.array([n_in[k], 1.0]))
                best = int(np.argmin(self.weight[k] / (kept[k] * self.left[k]) + price * costs))
                if best != choice.option[k]:
                    choice.option[k] = best
                    left[k] = self.left[k][best]
                    alpha[k], beta[k] = self.coefficients[k][best]
                    moved += 1
            if not moved:
                break
        return choice

    def _best_keep(
        self, g: int, rows: list[int], curves: np.ndarray, price: float, choice: Choice,
        alpha: np.ndarray, beta: np.ndarray, left: np.ndarray, n_in: np.ndarray, n_out: np.ndarray,
    ) -> int:  # fmt: skip
        """The group's best number of classes with everything else as it is."""
        low = self.table.least[g]
        steps = np.arange(low, curves.shape[1]) - choice.keep[g]
        slope, bend = self._slopes(g, alpha, beta, n_in, n_out)
        error = (self.weight[rows] / left[rows]) @ (1 / curves[:, low:])
        return low + int(np.argmin(error + price * steps * (slope + bend * steps)))

    def _slopes(
        self, g: int, alpha: np.ndarray, beta: np.ndarray, n_in: np.ndarray, n_out: np.ndarray
    ) -> tuple[float, float]:
        """First and second coefficient of the cost as a polynomial in the group's number of classes."""
        near = self.touched[g]
        makes, reads, a = self.costs.makes[near, g], self.costs.reads[near, g], alpha[near]
        slope = makes @ (a * n_in[near] + beta[near]) + n_out[near] @ (a * reads)
        return float(slope), float((a * makes) @ reads)

    def least(self) -> Choice:
        """The cheapest choice."""
        return self.descend(1e12, self.descend(1e6, self.dense()))

    def solve(self, target: float) -> list[Choice]:
        """Good choices that cost at most ``target`` and, if possible, little less; the best by the table first."""
        starts = [*self._bracket(target, self.dense(), False)]
        starts += [self.uniform(r) for r in sorted({r for k in self.ranked for r in self.options[k]})]
        found: dict[bytes, Choice] = {}
        for start in [*starts, self.dense()]:
            choice = self.solve_channels(start, target)
            if choice is not None:
                choice = self._swap_ranks(choice, target)
                found.setdefault(choice.option.tobytes(), choice)
        return sorted(found.values(), key=lambda choice: self.order(choice, target))

    def solve_channels(self, start: Choice, target: float) -> Choice | None:
        """The best kept channels at the ranks of ``start``; None where they cannot meet the target."""
        _, below = self._bracket(target, start, True)
        return self.fill(below, target) if self.cost(below) <= target else None

    def one_rate(self, rank: int, target: float) -> tuple[Choice, Choice] | None:
        """The choice with one rank and one rate that meets the target, and the same with the whole budget spent."""
        widths = self.costs.widths.astype(int)

        def at(rate: float) -> Choice:
            choice = self.uniform(rank)
            for g in self.members:
                choice.keep[g] = max(self.table.least[g], int(widths[g] * (1 - rate)))
            return choice

        low, high = 0.0, 1.0
        for _ in range(16):
            middle = (low + high) / 2
            low, high = (middle, high) if self.cost(at(middle)) > target else (low, middle)
        choice = at(high)
        return (choice, self.fill(choice, target)) if self.cost(choice) <= target else None

    def order(self, choice: Choice, target: float) -> tuple[bool, float]:
        """Sort key: smaller errors first, but choices that leave much of the budget unused last."""
        return self.cost(choice) < (1 - _SLACK) * target, self.error(choice)

    def _bracket(self, target: float, start: Choice, fixed_ranks: bool) -> tuple[Choice, Choice]:
        """Choices just above and just below the target cost, by bisection on the price."""
        low, high = -4.0, 6.0  # logarithms of the price
        above, below = start, self.descend(10**high, start, fixed_ranks)
        for _ in range(28 if fixed_ranks else 20):
            middle = (low + high) / 2
            candidate = self.descend(10**middle, above if low > -4 else start, fixed_ranks)
            if self.cost(candidate) > target:
                low, above = middle, candidate
            else:
                high, below = middle, candidate
        return above, below

    def fill(self, choice: Choice, target: float) -> Choice:
        """Spend what is left of the budget on the channels that lower the error most per cost."""
        choice = choice.copy()
        alpha, beta = self._terms(choice)
        left = np.array([v[o] for v, o in zip(self.left, choice.option)])
        spare = target - self.cost(choice)
        while True:
            n_in, n_out = self.costs.channels(choice.keep.astype(float))
            best, best_gain, best_price = None, 0.0, 0.0
            for g, (rows, curves) in self.members.items():
                keep = choice.keep[g]
                if keep + 1 >= curves.shape[1]:
                    continue
                slope, bend = self._slopes(g, alpha, beta, n_in, n_out)
                price = slope + bend
                if price > spare:
                    continue
                gain = (self.weight[rows] / left[rows]) @ (1 / curves[:, keep] - 1 / curves[:, keep + 1])
                if gain / max(price, 1e-12) > best_gain:
                    best, best_gain, best_price = g, gain / max(price, 1e-12), price
            if best is None:
                return choice
            choice.keep[best] += 1
            spare -= best_price

    def _swap_ranks(self, choice: Choice, target: float) -> Choice:
        """Try each layer at its next rank up and down, with the channels solved again; keep what lowers the error."""
        price = self._price_of(choice)
        for _ in range(3):
            better = self.descend(price, choice)
            if (better.option == choice.option).all():
                return choice
            below = self.solve_channels(better, target)
            if below is None or self.order(below, target) >= self.order(choice, target):
                return choice
            choice, price = below, self._price_of(below)
        return choice

    def _price_of(self, choice: Choice) -> float:
        """Marginal error per cost at this choice: the median over groups of what one more channel gains."""
        alpha, beta = self._terms(choice)
        left = np.array([v[o] for v, o in zip(self.left, choice.option)])
        n_in, n_out = self.costs.channels(choice.keep.astype(float))
        prices = []
        for g, (rows, curves) in self.members.items():
            keep = choice.keep[g]
            if self.table.least[g] <= keep and keep + 1 < curves.shape[1]:
                slope, bend = self._slopes(g, alpha, beta, n_in, n_out)
                gain = (self.weight[rows] / left[rows]) @ (1 / curves[:, keep] - 1 / curves[:, keep + 1])
                if slope + bend > 0 and gain > 0:
                    prices.append(gain / (slope + bend) * self.unit)
        return float(np.median(prices)) if prices else 1.0

    def key(self, choice: Choice) -> tuple[str, bytes, bytes]:
        """A key that identifies a choice."""
        return self.kind, choice.keep.tobytes(), choice.option.tobytes()

    def ranks(self, choice: Choice) -> dict[str, int]:
        """Rank by layer name of the layers that the choice decomposes."""
        return {self.costs.rows[k].name: self.options[k][choice.option[k]] for k in self.ranked if choice.option[k]}
