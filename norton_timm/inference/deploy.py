"""Make an inference copy of a network: norms folded, each CPDConv2d fixed in its fastest measured form."""

from __future__ import annotations

import copy
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from norton_timm.graph import align_channels
from norton_timm.inference.fold import FOLDED_NORMS, fold_batch_norm
from norton_timm.inference.forms import FIXED_FORMS, distinct_forms, fixed
from norton_timm.inference.fuse import fuse_network
from norton_timm.inference.onednn import Fused, onednn_available
from norton_timm.layers import CPDConv2d
from norton_timm.profiling import WARM_UP, Turns, synchronise, take_turns
from norton_timm.utils import copy_of, removing, replace_module, tensors_in, to_layout, uncompiled

log = logging.getLogger(__name__)

MEMORY_FORMATS = {'channels_last': torch.channels_last, 'contiguous': torch.contiguous_format}
_SECONDS = 2.5  # least time of each of the first two comparisons; the last one takes twice as long
_QUICK = 0.1  # seconds
_NEAR = 1.15  # times the fastest form's time: a longer comparison may still prefer a form this close


@dataclass
class Deployment:
    """What :func:`deploy` did and measured.

    Attributes:
        device: where the network was measured.
        threads: number of torch's threads in that measurement.
        folded: name of the layer that absorbed a norm, by the norm's name.
        norms_left: batch norms that no convolution could absorb.
        widened: new number of channels of each layer that got channels of zeros.
        forms: chosen form of each CPDConv2d.
        layer_ms: milliseconds of each form by layer, inside the running network.
        form_ms: milliseconds of the whole network by form, channels-last and fused where possible; ``mixed`` has
            each layer's fastest form.
        network_ms: milliseconds of the finalists (``form, layout``), all measured in one comparison.
        chosen: the finalist that was taken.
        error: largest difference from the original's outputs, relative to their largest value; None where the
            outputs cannot be compared (their number or shapes differ).
    """

    device: str
    threads: int
    folded: dict[str, str] = field(default_factory=dict)
    norms_left: list[str] = field(default_factory=list)
    widened: dict[str, int] = field(default_factory=dict)
    forms: dict[str, str] = field(default_factory=dict)
    layer_ms: dict[str, dict[str, float]] = field(default_factory=dict)
    form_ms: dict[str, float] = field(default_factory=dict)
    network_ms: dict[str, float] = field(default_factory=dict)
    chosen: str = ''
    error: float | None = None

    def to_json(self) -> str:
        """The report as JSON text."""
        return json.dumps(asdict(self), indent=2) + '\n'

    def __str__(self) -> str:
        lines = [f'{self.chosen or "not measured"} on {self.device}, {self.threads} threads']
        lines.append(f'{len(self.folded)} batch norms folded, {len(self.norms_left)} left')
        lines += [f'{name}: {ms:.3f} ms' for name, ms in self.network_ms.items()]
        for name, form in self.forms.items():
            told = ', '.join(f'{f} {ms:.3f} ms' for f, ms in self.layer_ms.get(name, {}).items())
            lines.append(f'{name}: {form}' + (f' ({told})' if told else ''))
        return '\n'.join(lines)


def deployment_report(model: nn.Module) -> Deployment:
    """The report of a network that :func:`deploy` made.

    Raises:
        ValueError: a network that it did not make.

    Example:
        >>> fast = deploy(model, torch.rand(1, 3, 224, 224))
        >>> print(deployment_report(fast))
    """
    report = getattr(model, 'deployment', None)
    if not isinstance(report, Deployment):
        raise ValueError(f'got a {type(model).__name__} without a deployment report, expected a result of deploy()')
    return report


@torch.no_grad()
def deploy(
    model: nn.Module,
    example_input: Any,
    autotune: bool = True,
    channel_multiple: int = 1,
    form: str | None = None,
) -> nn.Module:
    """An inference copy of a classifier or a whole detector, with equal outputs and made of plain modules.

    Batch norms go into the convolutions before them. Each CPDConv2d becomes a few plain convolutions or one dense
    one, whichever is fastest here. Where that is faster, weights are laid out channels-last, and on a CPU oneDNN's
    convolutions take over additions and ReLUs. Layers are timed inside the running network, and a mixture of forms is
    taken only if the whole network is faster with it than with every layer dense. The report is the result's
    attribute ``deployment``, see :func:`deployment_report`.

    Args:
        model: dense or compressed network; it is not changed.
        example_input: what its ``forward`` takes, of the size that matters, on the model's device.
        autotune: measure; otherwise each layer gets ``form`` and weights are channels-last.
        channel_multiple: append channels of zeros up to a multiple of this many, for export to runtimes that want it
            (``norton_timm.inference.CHANNEL_MULTIPLES``), see :func:`norton_timm.graph.align_channels`.
        form: one of ``norton_timm.inference.FIXED_FORMS`` for all layers, only without ``autotune``; None leaves each
            layer in its ``active_form``.

    Raises:
        ValueError: no tensor in the input or the output, one on another device than the model, a multiple below 1, or
            a form that is unknown or given beside ``autotune``.

    Example:
        >>> images = torch.rand(1, 3, 224, 224)
        >>> fast = deploy(model, images)
        >>> scores = fast(images)
    """
    _check_input(model, example_input)
    if form is not None and (autotune or form not in FIXED_FORMS):
        raise ValueError(f'form: got {form!r} with autotune={autotune}, expected one of {", ".join(FIXED_FORMS)} '
                         'with autotune=False')  # fmt: skip
    model = uncompiled(model)
    base = copy_of(model).eval().requires_grad_(False)
    base.__dict__.pop('deployment', None)
    report = Deployment(_device(example_input), torch.get_num_threads())
    report.folded = fold_batch_norm(base, example_input)
    report.widened = align_channels(base, example_input, channel_multiple)
    report.norms_left = [n for n, m in base.named_modules() if type(m) in FOLDED_NORMS]
    layers = {n: m for n, m in base.named_modules() if isinstance(m, CPDConv2d)}
    report.forms = {name: form or layer.active_form() for name, layer in layers.items()}
    if autotune:
        best = _autotune(base, example_input, report)
    else:
        best = _candidate(base, report.forms, 'channels_last')
    expected = copy_of(model).eval()(example_input)
    if not tensors_in(expected):
        raise ValueError(f'got outputs of type {type(expected).__name__} without tensors, which cannot be compared')
    report.error = relative_difference(best(example_input), expected)
    if report.error is None:
        log.warning('the deployed network gives outputs of another number or shape than the original')
    elif not report.error <= 1e-3:
        log.warning('the deployed network differs from the original by %.1e of its largest output', report.error)
    best.deployment = report  # type: ignore[assignment]
    return best


def _check_input(model: nn.Module, example_input: Any) -> None:
    found = tensors_in(example_input)
    if not found:
        raise ValueError(f'example_input: got {type(example_input).__name__} without a tensor, expected images')
    parameter = next(model.parameters(), found[0])
    if parameter.device != found[0].device:
        raise ValueError(f'example_input: got a tensor on {found[0].device}, expected the model on the same device '
                         f'(it is on {parameter.device})')  # fmt: skip


def _device(example_input: Any) -> str:
    device = tensors_in(example_input)[0].device
    return torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type


def _candidate(base: nn.Module, forms: Mapping[str, str], layout: str) -> nn.Module:
    model = copy.deepcopy(base)
    for name, form in forms.items():
        replace_module(model, name, fixed(model.get_submodule(name), form).requires_grad_(False))  # type: ignore[arg-type]
    return to_layout(model, MEMORY_FORMATS[layout])


def _compare(models: Mapping[Any, nn.Module], x: Any, least: int = 3, seconds: float = _SECONDS) -> dict[Any, float]:
    """Milliseconds of each model, measured in turns; see :meth:`norton_timm.profiling.Turns.milliseconds`."""
    calls = [partial(m, x) for m in models.values()]
    synchronise(x)
    start = time.perf_counter()
    calls[0]()
    synchronise(x)
    # a quick, small network that runs over and over finds its weights in the cache
    passes = 3 if time.perf_counter() - start < _QUICK else 1
    return dict(zip(models, take_turns(calls, lambda: synchronise(x), seconds, least, passes).milliseconds()))


def _autotune(base: nn.Module, x: Any, report: Deployment) -> nn.Module:
    """The fastest candidate; its figures go into the report. First the forms are chosen, then layout and fusion."""
    forms = {'dense': dict.fromkeys(report.forms, 'dense')}
    if report.forms:
        forms |= {form: dict.fromkeys(report.forms, form) for form in distinct_forms(base)}
    # fused before the choice: fusion helps one form more than another
    models = {name: _fused_candidate(base, chosen, x) for name, chosen in forms.items()}
    best = 'dense'
    if report.forms:
        report.layer_ms, report.form_ms = _layers_in_place(models, list(report.forms), x)
        mixed = report.forms | {n: min(ms, key=lambda f: ms[f]) for n, ms in report.layer_ms.items()}
        contest = ['dense', min(report.form_ms, key=lambda name: report.form_ms[name])]
        if mixed not in forms.values():
            forms['mixed'], models['mixed'] = mixed, _fused_candidate(base, mixed, x)
            contest.append('mixed')
        again = _compare({name: models[name] for name in dict.fromkeys(contest)}, x)
        report.form_ms |= again
        best = min(again, key=lambda name: again[name])
    finalists: dict[tuple[str, str], nn.Module] = {}
    for name in dict.fromkeys(('dense', best)):
        for layout in MEMORY_FORMATS:
            finalists[name, layout] = _candidate(base, forms[name], layout)
    for name in models:
        if name == 'dense' or report.form_ms[name] <= _NEAR * report.form_ms[best]:
            finalists[name, 'channels_last, fused' if _is_fused(models[name]) else 'channels_last'] = models[name]
    times = _compare(finalists, x, seconds=2 * _SECONDS)
    taken = min(times, key=lambda key: times[key])
    report.network_ms = {', '.join(key): ms for key, ms in times.items()}
    report.forms, report.chosen = forms[taken[0]], ', '.join(taken)
    return finalists[taken]


def _fused_candidate(base: nn.Module, forms: Mapping[str, str], x: Any) -> nn.Module:
    """The network in these forms with packed and fused oneDNN layers, where that is possible and outputs stay equal."""
    model, first = _candidate(base, forms, 'channels_last'), tensors_in(x)[0]
    if first.device.type != 'cpu' or first.dtype != torch.float32 or not onednn_available():
        return model
    fused, _ = fuse_network(model)
    if not _is_fused(fused):
        return model
    try:
        difference = relative_difference(fused(x), model(x))
    except Exception as error:  # traced code may take another branch, and oneDNN does not broadcast sums
        log.warning('layers stay apart from additions and activations: %s', str(error).partition('\n')[0])
        return model
    if difference is None or not difference <= 1e-4:
        log.warning('layers stay apart from additions and activations: their outputs differ')
        return model
    return fused


def _is_fused(model: nn.Module) -> bool:
    return any(isinstance(m, Fused) for m in model.modules())


def _layers_in_place(
    models: Mapping[Any, nn.Module], names: list[str], x: Any
) -> tuple[dict[str, dict[str, float]], dict[Any, float]]:
    """Milliseconds of the named layers within each model, as {layer: {form: ms}}, and of each whole model.

    Timed alone, a layer finds its input in the cache and its neighbours' memory free; inside a network it does not.
    """
    spent: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    hooks = []

    def watch(name: str, form: str, layers: list[nn.Module]) -> None:
        times = spent[name].setdefault(form, [])
        began: list[float] = []

        def enter(*_: Any) -> None:
            synchronise(x)
            began.append(time.perf_counter())

        def leave(*_: Any) -> None:
            synchronise(x)
            start = began.pop()
            if not began:  # not within another one
                times.append(1000 * (time.perf_counter() - start))

        for layer in layers:
            hooks.extend([layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)])

    for form, model in models.items():
        for name in names:
            # a fused network calls the convolutions within a layer, but not the layer
            watch(name, form, list(model.get_submodule(name).modules()))
    with removing(hooks):
        calls: list[Callable[[], Any]] = [partial(model, x) for model in models.values()]
        turns = take_turns(calls, lambda: synchronise(x), _SECONDS, least=3)
    total = len(turns.rounds[0]) + WARM_UP
    layers = {}
    for name, by_form in spent.items():
        if all(by_form.values()):  # a layer that the input does not reach keeps no time
            # a layer that is called several times in a pass (a head shared by levels) counts as their sum
            sums = Turns([[_pass(times, k, total) for k in range(WARM_UP, total)] for times in by_form.values()])
            layers[name] = dict(zip(by_form, sums.milliseconds()))
    return layers, dict(zip(models, turns.milliseconds()))


def _pass(times: list[float], k: int, total: int) -> list[float]:
    """The time of pass ``k`` of ``total``, as a turn of one pass; every pass calls the layer equally often."""
    calls = len(times) // total
    return [sum(times[k * calls : (k + 1) * calls])]


def relative_difference(a: Any, b: Any) -> float | None:
    """Largest difference of the tensors in two outputs, relative to the largest value of ``b``'s tensor.

    None where the tensors differ in number or shape, or there are none; infinite where a value is NaN or infinite.
    """
    first, second = tensors_in(a), tensors_in(b)
    if not first or len(first) != len(second) or any(s.shape != t.shape for s, t in zip(first, second)):
        return None
    return max((_difference(s, t) for s, t in zip(first, second) if t.numel()), default=0.0)


def _difference(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    difference = float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))
    return difference if math.isfinite(difference) else math.inf
