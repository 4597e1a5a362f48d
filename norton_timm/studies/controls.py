"""Controls for a budget of MACs: pruning at one rate for all layers by some criterion, and Torch-Pruning's default."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec as find_package
from typing import Any

import torch
from torch import Tensor, nn

from norton_timm.compression import OUTPUT_ERROR, CompressionSpec, channel_graph, make_plan, reshape
from norton_timm.graph import Metadata
from norton_timm.layers import ChannelMap, handler_of
from norton_timm.profiling import count
from norton_timm.utils import copy_of, replace_module

UNIFORM = {  # method -> criterion
    'l1': 'l1', 'random': 'random', 'geometric_median': 'geometric_median', 'uniform': OUTPUT_ERROR,
}  # fmt: skip
TORCH_PRUNING = 'torch_pruning'
_ABOVE = 1.01  # MACs may be 1 % above what was asked, as in find_spec
_HIGHEST = 0.99  # pruning rate
_HIGHEST_RATIO = 0.9  # Torch-Pruning keeps all channels of a group of which it would leave none
_HALVINGS = 12  # the rate is found to 1 / 4096: the widest layers have some 2000 channels


class LeftOut(ValueError):
    """A network that a control cannot make; the message says why."""


def uniform_spec(
    model: nn.Module, macs: float, criterion: str, example_input: Tensor, seed: int = 0
) -> CompressionSpec:
    """One pruning rate for all layers that meets a share of the MACs; the convolutions stay dense.

    Channels are whole, so that a rate misses the share by some percent: the first layers keep one channel more than the
    rate says, as many layers as fit. Stem and last convolution keep all, as everywhere with one rate.

    Args:
        model: the dense network; it is not changed.
        macs: share of its MACs to keep; the network has at most 1 % more.
        criterion: which filters stay, see :class:`CompressionSpec`.
        example_input: one image, (1, C, H, W).
        seed: of the criterion ``random``.

    Raises:
        LeftOut: so few MACs cannot be had.

    Example:
        >>> spec = uniform_spec(model, 0.5, 'l1', images[:1])
        >>> small, report = compress(model, spec, calibration=[images])
    """
    graph = channel_graph(model, example_input)
    budget = _ABOVE * macs * count(model, example_input).macs

    def at(rates: Any) -> CompressionSpec:
        return CompressionSpec(method='coring', rates=rates, criterion=criterion, seed=seed)

    def macs_of(rates: Any) -> int:
        return count(reshape(copy_of(model), at(rates), example_input), example_input).macs

    low, high = _bisect(macs_of, budget, _HIGHEST, f'{criterion} at one rate')
    more, less = (make_plan(model, graph, at(rate)).keep for rate in (low, high))

    def mixed(layers: int) -> dict[str, float]:
        """Rates by name where so many groups of layers keep one channel more."""
        keeps = more[:layers] + less[layers:]
        pairs = [(group, len(group.classes), keep) for group, keep in zip(graph.groups, keeps)]
        return {group.names[0]: 1 - (keep + 0.5) / n for group, n, keep in pairs if keep < n}

    fits, beyond = 0, len(graph.groups)
    while beyond - fits > 1:
        middle = (fits + beyond) // 2
        fits, beyond = (middle, beyond) if macs_of(mixed(middle) or 0.0) <= budget else (fits, middle)
    return at(mixed(fits))


def _bisect(macs_at: Callable[[float], int], budget: float, high: float, told: str) -> tuple[float, float]:
    """Two pruning rates next to each other: the network is above the budget at the first, and within it at the second.

    Raises:
        LeftOut: it is above the budget even at the rate ``high``.
    """
    low, least = 0.0, macs_at(high)
    if least > budget:
        raise LeftOut(f'{told}: got {budget / 1e6:.1f} million MACs, expected at least {least / 1e6:.1f}')
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if macs_at(middle) <= budget else (middle, high)
    return low, high


def has_torch_pruning() -> bool:
    """Whether the package torch-pruning, of the extra ``controls``, is installed."""
    return find_package(TORCH_PRUNING) is not None


def prune_by_torch_pruning(
    model: nn.Module, ratio: float, example_input: Tensor
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Prune a copy of a timm network as Torch-Pruning does by default.

    That is the magnitude of coupled groups, the same ratio in each; only the classifier's outputs are kept
    (Fang et al., "DepGraph", 2023).

    Args:
        model: the dense network; it is not changed.
        ratio: of the channels that leave.
        example_input: one image, (1, C, H, W).

    Returns:
        The network without any repair, and for each pruned layer the filters that it kept, as
        :func:`norton_timm.compression.refit` takes them.

    Raises:
        LeftOut: the package is missing, or fails on this network.

    Example:
        >>> small, kept = prune_by_torch_pruning(model, 0.3, images[:1])
        >>> names = refit(small, model, kept, [images])
    """
    if not has_torch_pruning():
        raise LeftOut('torch_pruning: torch-pruning is not installed: pip install -e ".[controls]"')
    small = copy_of(model)
    facts = Metadata(small, example_input)
    try:
        gone = _prune(small, ratio, example_input)
        facts.refresh(small, example_input)
    except Exception as error:  # its surgery, or the first pass after it, fails in many ways
        told = ' '.join(str(error).split())[:200]
        raise LeftOut(f'torch_pruning: fails on {type(model).__name__}: {type(error).__name__}: {told}') from error
    kept = {}
    for name, removed in gone.items():
        filters = len(model.get_submodule(name).weight)  # type: ignore[arg-type]
        kept[name] = torch.tensor([k for k in range(filters) if k not in removed])
        assert len(kept[name]) == len(small.get_submodule(name).weight), name  # type: ignore[arg-type]
    return small, kept


def torch_pruning_ratio(model: nn.Module, macs: float, example_input: Tensor) -> float:
    """The ratio at which Torch-Pruning meets a share of the MACs, see :func:`uniform_spec`.

    Raises:
        LeftOut: so few MACs cannot be had, or the package is missing or fails.
    """

    def macs_at(ratio: float) -> int:
        return count(prune_by_torch_pruning(model, ratio, example_input)[0], example_input).macs

    budget = _ABOVE * macs * count(model, example_input).macs
    return _bisect(macs_at, budget, _HIGHEST_RATIO, TORCH_PRUNING)[1]


def _prune(model: Any, ratio: float, example_input: Tensor) -> dict[str, set[int]]:
    """Prune a network in place; the filters that each convolution and linear layer lost."""
    import torch_pruning

    class Shortcut(torch_pruning.BasePruningFunc):
        """A shortcut that moves channels: what Torch-Pruning has to know of it."""

        TARGET_MODULES = ChannelMap

        def prune_out_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
            return _without(layer, 'out', idxs, self.get_out_channels(layer))

        def prune_in_channels(self, layer: nn.Module, idxs: Sequence[int]) -> nn.Module:
            return _without(layer, 'in', idxs, self.get_in_channels(layer))

        def get_out_channels(self, layer: Any) -> int:
            return layer.out_channels

        def get_in_channels(self, layer: Any) -> int:
            return layer.in_channels

    # it takes a module that returns its input for the operation before, and prunes other channels than it computes with
    for name, module in list(model.named_modules()):
        if isinstance(module, ChannelMap) and module.identity and module.stride == 1:
            replace_module(model, name, nn.Identity())
    names = {module: name for name, module in model.named_modules()}
    gone: dict[str, set[int]] = {}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        pruner = torch_pruning.pruner.BasePruner(
            model, example_input, torch_pruning.importance.GroupMagnitudeImportance(), pruning_ratio=ratio,
            ignored_layers=[model.get_classifier()], customized_pruners={ChannelMap: Shortcut()},
            in_channel_groups={}, out_channel_groups={},  # its defaults are shared between all pruners
        )  # fmt: skip
        for group in pruner.step(interactive=True):
            for dependency, channels in group:
                layer = dependency.target.module
                makes = pruner.DG.is_out_channel_pruning_fn(dependency.handler)
                if makes and isinstance(layer, (nn.Conv2d, nn.Linear)):
                    gone.setdefault(names[layer], set()).update(map(int, channels))
            group.prune()
    return gone


def _without(layer: nn.Module, kind: str, channels: Sequence[int], width: int) -> nn.Module:
    left = torch.tensor([k for k in range(width) if k not in set(channels)], dtype=torch.long)
    handler: Any = handler_of(layer)
    handler.put(layer, kind, left)
    return layer
