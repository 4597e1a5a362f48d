"""Weights of the layers' errors: how much an error in each layer changes the outputs on a few images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from norton_timm.compression import CompressionSpec, removed_classes, without_labels
from norton_timm.graph import ChannelGraph
from norton_timm.search.sensitivity import Sensitivity
from norton_timm.tensors import cp_decompose, cp_reconstruct
from norton_timm.utils import copy_of, evaluating, tensors_in

_PROBED_NMSE = 0.2  # the error that a layer is given: large enough to show, small enough that the loss is still smooth
_LEAST_WEIGHT = 1e-3  # share of the mean: no layer's error is free


def check_calibration(calibration: Iterable[Any]) -> list[Any]:
    """The batches as a list, without labels.

    Raises:
        ValueError: not an iterable of input batches, or an empty one.
    """
    if isinstance(calibration, Tensor):
        raise ValueError('calibration: got one tensor, expected a list of input batches, such as [images]')
    try:
        batches = [without_labels(batch) for batch in calibration]
    except TypeError:
        raise ValueError(
            f'calibration: got {type(calibration).__name__}, expected an iterable of input batches'
        ) from None
    if not batches or not all(tensors_in(b) for b in batches):
        raise ValueError(f'calibration: got {len(batches)} batches, expected at least one, of tensors')
    return batches


def divergence(outputs: Any, reference: Any, temperature: float = 1.0) -> float:
    """Mean Kullback-Leibler divergence of class scores (N, K) from the reference's; otherwise relative error.

    At a temperature T the scores are divided by T, and the divergence is multiplied by T * T.
    """
    pairs = list(zip(tensors_in(outputs), tensors_in(reference)))
    if len(pairs) == 1 and pairs[0][0].dim() == 2 and pairs[0][0].shape[1] > 1:
        logits, wanted = (F.log_softmax(t.double() / temperature, dim=1) for t in pairs[0])
        return temperature**2 * float(F.kl_div(logits, wanted, log_target=True, reduction='batchmean'))
    error = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return error / max(sum(float(b.double().square().sum()) for _, b in pairs), 1e-300)


def loss_weights(
    model: nn.Module, graph: ChannelGraph, table: Sensitivity, calibration: Sequence[Any], method: str = 'norton'
) -> dict[str, float]:
    """Weight of each layer's error: divergence of the outputs from the dense model's per unit of NMSE / (1 - NMSE).

    One layer at a time gets an error like that of compression (its filters at a low rank, or a quarter of them
    removed), and the calibration batches are run. The weights are scaled to a mean of 1.

    Args:
        model: the dense network; it is not changed.
        graph: its channel graph.
        table: which layers can change, and their errors.
        calibration: input batches.
        method: ``norton`` or ``coring``.
    """
    model = copy_of(model)
    with evaluating(model):
        reference = [model(batch) for batch in calibration]
        found: dict[str, float] = {}
        for name, damaged in _damaged_weights(model, graph, table, method):
            weight: Tensor = model.get_submodule(name).weight.data  # type: ignore[union-attr, assignment]
            nmse = float((weight - damaged).square().sum() / weight.square().sum().clamp_min(1e-30))
            if not 0 < nmse < 1:
                continue
            intact = weight.clone()
            weight.copy_(damaged)
            loss = [divergence(model(batch), wanted) for batch, wanted in zip(calibration, reference)]
            weight.copy_(intact)
            found[name] = max(sum(loss) / len(loss), 0.0) * (1 - nmse) / nmse
    mean = sum(found.values()) / max(len(found), 1)
    if mean <= 0:
        return {}
    return {name: max(value / mean, _LEAST_WEIGHT) for name, value in found.items()}


def _damaged_weights(model: nn.Module, graph: ChannelGraph, table: Sensitivity, method: str):
    """(layer name, its weight with a compression error) of every layer of the table, one at a time."""
    for name, row in table.left_at_rank.items():
        rank = min((r for r in row if r), key=lambda r: abs(1 - row[r] - _PROBED_NMSE))
        weight = model.get_submodule(name).weight.detach()  # type: ignore[union-attr]
        yield name, cp_reconstruct(cp_decompose(weight, rank)).to(weight)
    spec = CompressionSpec(method=method)
    for number in table.left_at_keep:
        group = graph.groups[number]
        keep = max(table.least[number], round(0.75 * len(group.classes)))
        gone = torch.zeros(len(group.classes), dtype=torch.bool)
        gone[removed_classes(group, keep, spec, {}, torch.Generator())] = True
        for slot, places in zip(group.members, group.places):
            if slot.name in table.left_at_rank or isinstance(slot.module, nn.modules.conv._ConvTransposeNd):
                continue
            weight = model.get_submodule(slot.name).weight.detach()  # type: ignore[union-attr]
            lost = gone[torch.from_numpy(places)].to(weight.device)
            yield slot.name, weight * ~lost.reshape(-1, *[1] * (weight.dim() - 1))
