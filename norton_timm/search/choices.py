"""What could be done to each part of a network, and what each choice does to its outputs.

A choice is a change D of one or more layers' weights, made with the moments of what the layers read. Its error is the
divergence of the outputs that it causes, to second order: ``0.5 * mean((D . gradient) ** 2)`` over random errors at the
outputs of calibration images (the generalised Gauss-Newton form; for class scores this is the Kullback-Leibler
divergence). Errors of several choices are taken to add up. Leaving out a block is too large a change for that: it is
tried out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from norton_timm.compression import (
    TEMPERATURE,
    Activations,
    CompressionSpec,
    OutputAxes,
    WhiteFilters,
    each_gradient,
    make_plan,
    readers_of,
)
from norton_timm.graph import ChannelGraph
from norton_timm.layers import full_rank, low_rank_parts
from norton_timm.search.loss_weights import divergence
from norton_timm.tensors import cp_reconstruct
from norton_timm.utils import at_least_float32, evaluating

KINDS = ('channels', 'low_rank', 'cpd', 'blocks')
_SHARES = (
    0.06,
    0.1,
    0.15,
    0.2,
    0.27,
    0.35,
    0.44,
    0.53,
    0.62,
    0.71,
    0.8,
    0.9,
)  # of the rank that costs as much as dense
_KEEPS = (0.97, 0.94, 0.9, 0.85, 0.8, 0.72, 0.65, 0.57, 0.5, 0.42, 0.34, 0.26, 0.18, 0.1)
_CPD_RANKS = (1, 2, 3, 4, 6, 8)
_GRADIENTS = 96  # images whose gradients are taken
_TOGETHER = 8  # images whose gradients are multiplied with the changes at once
_TRIED = 64  # images on which blocks are left out


@dataclass
class Choices:
    """Every choice and its error.

    Attributes:
        low_rank, cpd: layer -> rank -> error.
        channels: group number -> channel classes kept -> error.
        blocks: residual block -> error when it is left out.
        inside: residual block -> the layers in it.
        reasons: layer or group member -> why it has no choice.
    """

    low_rank: dict[str, dict[int, float]] = field(default_factory=dict)
    cpd: dict[str, dict[int, float]] = field(default_factory=dict)
    channels: dict[int, dict[int, float]] = field(default_factory=dict)
    blocks: dict[str, float] = field(default_factory=dict)
    inside: dict[str, list[str]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass
class _Change:
    """One choice: where its error goes, and the change (O, P) of each layer's weight."""

    table: dict[int, float]
    key: int
    parts: dict[str, Tensor]


def measure_choices(
    model: nn.Module,
    graph: ChannelGraph,
    activations: Activations,
    images: Sequence[Tensor],
    kinds: Sequence[str] = KINDS,
    progress: bool = False,
) -> Choices:
    """Make every choice and measure its error.

    The stem, the channels of the stem and of the last convolution, and linear layers are left alone.

    Args:
        model: the dense network; it is not changed.
        graph: its channel graph.
        activations: measured on ``images``.
        images: batches of one size.
        kinds: which of ``KINDS`` to consider.
        progress: show a bar.
    """
    choices = Choices()
    changes: list[_Change] = []
    with tqdm(total=3, desc='sensitivity', disable=not progress, leave=False) as bar:
        bar.set_postfix_str('what each choice changes')
        if 'low_rank' in kinds or 'cpd' in kinds:
            changes += _factorisations(model, graph, activations, choices, kinds)
        if 'channels' in kinds:
            changes += _removals(model, graph, activations, choices)
        bar.update()
        bar.set_postfix_str('what that does to the outputs')
        _measure(model, activations, changes, torch.cat(list(images))[:_GRADIENTS])
        bar.update()
        if 'blocks' in kinds:
            bar.set_postfix_str('blocks left out')
            _try_blocks(model, activations, choices, torch.cat(list(images))[:_TRIED])
        bar.update()
    return choices


def _factorisations(
    model: nn.Module, graph: ChannelGraph, activations: Activations, choices: Choices, kinds: Sequence[str]
) -> list[_Change]:
    """Low-rank and CPD forms of every convolution but the stem that lower its MACs."""
    plan = make_plan(model, graph, CompressionSpec(rank={'*': 1}))
    stem, factored = next(iter(activations.order.layers)), low_rank_parts(model)
    found = []
    for name, layer in activations.layers.items():
        if name == stem or isinstance(layer, nn.Linear) or name in graph.outside or layer in factored:
            choices.reasons[name] = 'the stem' if name == stem else 'left alone by budgets'
            continue
        kernel = at_least_float32(layer.weight.detach())
        weight = kernel.flatten(1)
        outputs, inputs = weight.shape
        gram, importance = activations.gram(name), activations.importance[name]
        if 'low_rank' in kinds:
            table = choices.low_rank.setdefault(name, {})
            axes = OutputAxes(weight, gram, importance)
            for rank in sorted({max(1, round(s * outputs * inputs / (outputs + inputs))) for s in _SHARES}):
                if rank <= full_rank(layer):
                    second, first = axes.factors(rank)
                    found.append(_Change(table, rank, {name: second @ first - weight}))
        if 'cpd' in kinds and name in plan.ranks:
            (kh, kw), fan_in = layer.kernel_size, layer.in_channels
            table = choices.cpd.setdefault(name, {})
            white = WhiteFilters(kernel, gram)
            for rank in _CPD_RANKS:
                if rank * (fan_in + kh + kw) < fan_in * kh * kw:
                    rebuilt = cp_reconstruct(white.factors(rank, n_iter=30, restarts=1)).flatten(1)
                    found.append(_Change(table, rank, {name: rebuilt - weight}))
    return found


def _removals(model: nn.Module, graph: ChannelGraph, activations: Activations, choices: Choices) -> list[_Change]:
    """Numbers of channels that each group could keep."""
    uniform = make_plan(model, graph, CompressionSpec(method='coring', rates=0.5))
    found = []
    for number, (group, half) in enumerate(zip(graph.groups, uniform.keep)):
        n = len(group.classes)
        if half == n or readers_of(graph, group) is None:
            choices.reasons.update(dict.fromkeys(group.names, 'its channels stay'))
            continue
        keeps = sorted({max(1, len(group.frozen), round(s * n)) for s in _KEEPS} - {n})
        removed = activations.removals(graph, group, keeps)
        if removed is None:
            continue
        table = choices.channels.setdefault(number, {})
        found += [_Change(table, keep, parts) for keep, (_, parts) in removed.items()]
    return found


def _measure(model: nn.Module, activations: Activations, changes: list[_Change], images: Tensor) -> None:
    """Fill the tables of the changes with their errors."""
    rows: dict[str, list[tuple[int, Tensor, Tensor]]] = {}
    for k, change in enumerate(changes):
        for name, part in change.parts.items():
            rows.setdefault(name, []).append((k, part.flatten().bfloat16(), activations.mean_shift(name, part)))
        change.parts = {}  # held once, in half precision
    stacked: dict[str, Any] = {}
    for name in list(rows):
        index, weights, biases = zip(*rows.pop(name))
        stacked[name] = torch.tensor(index), torch.stack(weights), torch.stack(biases)
        del weights
    total = torch.zeros(len(changes))
    waiting: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in stacked}

    def flush() -> None:
        """Products of all changes with the gradients of some images, which are faster together."""
        count = max(map(len, waiting.values()))
        dots = torch.zeros(len(changes), count)
        for name, gradients in waiting.items():
            if gradients:
                index, changes_of, shifts = stacked[name]
                weight, bias = (torch.stack(g, 1) for g in zip(*gradients))
                dots[index] += ((changes_of @ weight).float() + shifts @ bias.to(shifts)).to(dots)
                gradients.clear()
        total.add_(dots.square().sum(1))

    def see(gradients: dict[str, tuple[Tensor, Tensor]]) -> None:
        for name, (weight, bias) in gradients.items():
            waiting[name].append((weight.flatten().bfloat16(), bias))
        if max(map(len, waiting.values())) == _TOGETHER:
            flush()

    each_gradient(model, {n: activations.layers[n] for n in stacked}, images, see)
    if any(waiting.values()):
        flush()
    for change, error in zip(changes, (0.5 * total / len(images)).tolist()):
        change.table[change.key] = error


def _try_blocks(model: nn.Module, activations: Activations, choices: Choices, images: Tensor) -> None:
    """The divergence that leaving out each residual block causes."""
    with evaluating(model):
        batches = images.split(16)
        reference = [model(batch) for batch in batches]
        for name in activations.order.blocks:
            block = model.get_submodule(name)
            hook = block.register_forward_hook(lambda m, args, out: args[0])
            try:
                losses = [divergence(model(batch), wanted, TEMPERATURE) for batch, wanted in zip(batches, reference)]
            finally:
                hook.remove()
            choices.blocks[name] = sum(losses) / len(losses)
            choices.inside[name] = [n for n, m in model.named_modules() if n.startswith(f'{name}.')]
