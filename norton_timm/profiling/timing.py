"""Latency: milliseconds of networks and of their layers on this device, measured in turns."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from norton_timm.layers import is_counted
from norton_timm.utils import copy_of, tensors_in, to_layout

WARM_UP = 2  # rounds that take_turns leaves out


def ready_to_run(model: nn.Module) -> nn.Module:
    """A copy for inference: evaluation mode, channels-last weights."""
    return to_layout(copy_of(model).eval(), torch.channels_last)


def channels_last(value: Any) -> Any:
    """The input with its 4-d tensors in channels-last layout."""
    if isinstance(value, Tensor):
        return value.contiguous(memory_format=torch.channels_last) if value.dim() == 4 else value
    if isinstance(value, (list, tuple)):
        return type(value)(channels_last(v) for v in value)
    return value


def synchronise(where: Any) -> None:
    """Wait until the accelerator has finished all queued work; a CPU needs no waiting.

    Args:
        where: a device or its name, or an input; the first tensor of an input tells the device.
    """
    named = isinstance(where, (str, torch.device))
    device = torch.device(where) if named else next((t.device for t in tensors_in(where)), torch.device('cpu'))
    if device.type not in ('cpu', 'meta'):
        torch.accelerator.synchronize(device)


@dataclass(frozen=True)
class Turns:
    """Times of calls that took turns.

    Attributes:
        rounds: milliseconds as ``rounds[call][round][pass]``, the same number of rounds for every call.
    """

    rounds: Sequence[Sequence[Sequence[float]]]

    def passes(self, call: int) -> list[float]:
        """Milliseconds of every timed pass of a call."""
        return [ms for turn in self.rounds[call] for ms in turn]

    def relative(self) -> list[float]:
        """Each call's time over the first call's: the median of this ratio over the rounds.

        A shared machine changes its speed during a measurement: two virtual cores share a cache now and do not a second
        later, and one network loses more by that than another. The medians of two calls may then come from two speeds.
        The turns of one round, milliseconds apart, hardly do.
        """
        turns = [[statistics.median(turn) for turn in mine] for mine in self.rounds]
        return [statistics.median(ms / first for ms, first in zip(mine, turns[0])) for mine in turns]

    def milliseconds(self) -> list[float]:
        """Milliseconds of each call: the median of the first call, times the ratios of :meth:`relative`."""
        first = statistics.median(self.passes(0))
        return [first * ratio for ratio in self.relative()]


def take_turns(
    calls: Sequence[Callable[[], Any]], sync: Callable[[], None], seconds: float = 2.0, least: int = 7, passes: int = 1
) -> Turns:
    """Time several calls in rounds; in each round every call has one turn.

    Turns spread a drift of the machine's speed over all calls. The order is drawn again for each round, because the
    time of a call depends on what ran before it.

    Args:
        calls: what to time.
        sync: waits for the device; called before and after each run.
        seconds: about how long to measure in all.
        least: least number of rounds, after those that warm up.
        passes: runs of a call in each of its turns. The first of several does not count: it finds the cache full of
            the other calls' weights, but a network that runs over and over finds its own.

    Example:
        >>> turns = take_turns([partial(dense, x), partial(small, x)], partial(synchronise, x))
        >>> speedup = 1 / turns.relative()[1]
    """
    rounds: list[list[list[float]]] = [[] for _ in calls]
    turns, shuffle = list(zip(calls, rounds)), random.Random(0).shuffle
    start = time.perf_counter()
    number = 0
    while number < least + WARM_UP or time.perf_counter() - start < seconds:
        shuffle(turns)
        for call, mine in turns:
            spent = []
            for _ in range(passes):
                sync()
                began = time.perf_counter()
                call()
                sync()
                spent.append(1000 * (time.perf_counter() - began))
            if number >= WARM_UP:
                mine.append(spent[1:] or spent)
        number += 1
    return Turns(rounds)


@torch.no_grad()
def latencies(models: Sequence[nn.Module], example_input: Any, seconds: float = 2.0, least: int = 7) -> list[float]:
    """Milliseconds of one forward pass of each model, in channels-last evaluation mode; see :meth:`Turns.milliseconds`.

    Args:
        models: networks that take the same input; they are not changed.
        example_input: what their ``forward`` takes.
        seconds: about how long to measure in all.
        least: least number of rounds, after two that warm up.
    """
    runners, x = [ready_to_run(m) for m in models], channels_last(example_input)
    calls = [partial(runner, x) for runner in runners]
    return take_turns(calls, lambda: synchronise(x), seconds, least).milliseconds()


@torch.no_grad()
def layer_latencies(model: nn.Module, example_input: Any, rounds: int = 5) -> dict[str, float]:
    """Median milliseconds that each convolution and linear layer takes within one forward pass."""
    runner, x = ready_to_run(model), channels_last(example_input)
    spent: dict[str, list[float]] = {}
    began: dict[str, float] = {}
    total: dict[str, float] = {}

    def enter(name: str) -> None:
        synchronise(x)
        began[name] = time.perf_counter()

    def leave(name: str) -> None:
        synchronise(x)
        total[name] = total.get(name, 0.0) + 1000 * (time.perf_counter() - began[name])

    for name, module in runner.named_modules():
        if is_counted(module):
            module.register_forward_pre_hook(lambda *_, name=name: enter(name))
            module.register_forward_hook(lambda *_, name=name: leave(name))
    for number in range(rounds + 1):
        total.clear()
        runner(x)
        if number:  # the first pass warms up
            for name, value in total.items():
                spent.setdefault(name, []).append(value)
    return {name: statistics.median(values) for name, values in spent.items()}


def compare_latency(
    models: Mapping[str, nn.Module], example_input: Any, repeats: int = 7, seconds: float = 2.0
) -> dict[str, float]:
    """Median milliseconds of a forward pass of each network, see :func:`norton_timm.profiling.latencies`.

    Args:
        models: networks that take the same input, on the same device; they take turns and are not changed.
        example_input: what their ``forward`` takes.
        repeats: least number of timed passes of each network.
        seconds: about how long to measure in all.

    Raises:
        ValueError: no networks, or fewer than one pass.

    Example:
        >>> times = compare_latency({'dense': model, 'compressed': small}, torch.rand(1, 3, 224, 224))
        >>> speedup = times['dense'] / times['compressed']
    """
    if not models or repeats < 1:
        raise ValueError(f'got {len(models)} networks and repeats={repeats}, expected at least one of each')
    return dict(zip(models, latencies(list(models.values()), example_input, seconds, repeats)))
