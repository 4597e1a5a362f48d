"""Dense against compressed classifiers in several runtimes, measured side by side in one process."""

from __future__ import annotations

import os
import platform
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torchvision
from torch import Tensor, nn

from norton_timm.checkpoints import TORCHVISION, base_name, load
from norton_timm.inference import (
    CHANNEL_MULTIPLES,
    compiled,
    compiled_ahead,
    deploy,
    deployment_report,
    export_variants,
    openvino_runner,
    packed_bytes,
    read_exported,
    write_exported,
)
from norton_timm.profiling import (
    MEGABYTE,
    Turns,
    channels_last,
    count,
    default_input,
    peak_memory,
    ready_to_run,
    synchronise,
    take_turns,
)
from norton_timm.studies.steps import Row
from norton_timm.studies.zoo import control_side
from norton_timm.utils import new_figure, write_png

RUNTIMES = ('eager', 'deployed', 'compile', 'aot', 'onnxruntime', 'openvino')
EXPORTED = ('onnxruntime', 'openvino')
RUNTIMES_OF_DETECTORS = ('eager', 'deployed', 'compile', *EXPORTED)
_PASSES = 5  # in each turn


def cpu_name() -> str:
    """The processor and its vector instructions, as far as the system tells.

    Cloud machines call processors of several generations ``AMD EPYC``; family and model tell them apart.
    """
    info = Path('/proc/cpuinfo')
    text = info.read_text() if info.is_file() else ''
    found = dict(re.findall(r'^(model name|cpu family|model)\s*: (.*)$', text, re.M))
    name = found.get('model name') or platform.processor()
    if {'cpu family', 'model'} <= found.keys():
        name += f' (family {found["cpu family"]}, model {found["model"]})'
    return f'{name}, {torch.backends.cpu.get_cpu_capability()}'


def allocator() -> str:
    """The library that hands out memory in this process: a preloaded one, or the system's own."""
    maps = Path('/proc/self/maps')
    found = re.search(r'lib(?:tcmalloc|jemalloc|mimalloc)[^/\s]*', maps.read_text() if maps.is_file() else '')
    return found.group() if found else ' '.join(platform.libc_ver()).strip() or platform.system()


def summaries(turns: Turns, images: int = 1) -> list[Row]:
    """Figures of each network's timed runs: median, 10th and 95th percentile in ms, images per second at the median.

    ``speedup`` over the first network is that of the median round, see :meth:`norton_timm.profiling.Turns.relative`.
    ``speedup_p10`` is the ratio of the 10th percentiles. A busy machine changes it least: other processes only ever add
    time, and relatively more to a fast network.
    """
    rows: list[Row] = []
    for call, ratio in enumerate(turns.relative()):
        p10, median, p95 = map(float, np.percentile(turns.passes(call), [10, 50, 95]))
        first = rows[0]['p10_ms'] if rows else p10
        rows.append({
            'ms': median, 'p10_ms': p10, 'p95_ms': p95, 'images_per_s': 1000 * images / median,
            'speedup': 1 / ratio, 'speedup_p10': first / p10,
        })  # fmt: skip
    return rows


def peak_mb(model: nn.Module, example_input: Any) -> float:
    """Megabytes that inference needs, packed weights included; see :func:`norton_timm.profiling.peak_memory`."""
    return (peak_memory(model, example_input) + packed_bytes(model)) / MEGABYTE


def prepare(model: nn.Module, images: Tensor, runtime: str, folder: Path) -> Callable[[], Any]:
    """One inference in a runtime, as a call without arguments.

    Args:
        model: in evaluation mode; it is not changed.
        images: (N, C, H, W).
        runtime: ``eager`` is the network as it is, channels-last; ``deployed`` the result of :func:`deploy`; the others
            run the deployed network: compiled by torch.compile or ahead of time, or exported.
        folder: for exported files; an existing one is used again.

    Raises:
        ValueError: an unknown runtime, or a package that is missing.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f'runtime: got {runtime!r}, expected one of {", ".join(RUNTIMES)}')
    if runtime == 'eager':
        return partial(ready_to_run(model), channels_last(images))
    multiple = multiple_for(runtime in EXPORTED)
    deployed = model if hasattr(model, 'deployment') else deploy(model, images, channel_multiple=multiple)
    if runtime == 'deployed':
        return partial(deployed, images)
    if runtime == 'compile':
        return partial(compiled(deployed, images), images)
    if runtime == 'aot':
        return partial(compiled_ahead(deployed, images, folder), images)
    path = folder / 'model.onnx'
    if not path.is_file():
        write_exported(deployed, images, path)
    if runtime == 'openvino':
        return partial(openvino_runner(path, torch.get_num_threads(), images.shape), images)
    return partial(read_exported(path), images.contiguous())


@torch.no_grad()
def benchmark_classifier(
    name: str,
    batches: Sequence[int] = (1, 8),
    runtimes: Sequence[str] = RUNTIMES,
    seconds: float = 4.0,
    cache: dict[Any, list[nn.Module]] | None = None,
) -> list[Row]:
    """Time a compressed network, the dense one, and the dense one at the largest resolution with no more MACs.

    The three take turns of several passes in each runtime. Weights are random, because time does not depend on them.
    Images are channels-last in memory, as cameras and decoders deliver them.

    Args:
        name: a tag such as ``norton_resnet50.r078``, or a .safetensors file of :func:`norton_timm.save`.
        batches: images at a time.
        runtimes: some of ``RUNTIMES``.
        seconds: about how long to measure each runtime and batch.
        cache: deployed dense networks of earlier calls; many tags share one.

    Returns:
        One row for each batch, runtime and network, with the dense network's time over its own as ``speedup``, see
        :func:`summaries`.

    Raises:
        ValueError: a file that is damaged or holds a dense network, an unknown runtime, or a package that is missing.
    """
    dense, small, base = _pair(name)
    size = tuple(default_input(small).shape[1:])
    cache = {} if cache is None else cache
    side = control_side(dense, count(small, size).macs, size)
    networks = {'dense': (dense, size), 'compressed': (small, size)}
    if side is not None:
        networks[f'dense at {side} px'] = dense, (size[0], side, side)
    rows: list[Row] = []
    for batch in batches:
        inputs = {label: channels_last(torch.randn(batch, *shape)) for label, (_, shape) in networks.items()}
        deployed: dict[bool, dict[str, list[nn.Module]]] = {}
        for exported in sorted({runtime in EXPORTED for runtime in runtimes if runtime != 'eager'}):
            for label, (model, _) in networks.items():
                key = base if model is dense else name, inputs[label].shape, exported
                variants = export_variants if exported else _deployed
                made = cache.get(key) or list(variants(model, inputs[label]))
                deployed.setdefault(exported, {})[label] = made
                if model is dense:
                    cache[key] = made
        with tempfile.TemporaryDirectory() as folder:
            for runtime in runtimes:
                found = deployed.get(runtime in EXPORTED, {})
                rows += _measure(name, networks, found, inputs, runtime, Path(folder), seconds)
    return rows


def _pair(name: str) -> tuple[nn.Module, nn.Module, str]:
    """The dense network, the compressed one, and a text that tells dense networks apart."""
    if not is_file_name(name):
        base = base_name(name)
        dense, small = (timm.create_model(n).eval().requires_grad_(False) for n in (base, name))
        return dense, small, base
    small = load(name).requires_grad_(False)
    made: Any = small.norton_base
    architecture, kwargs = made['architecture'], made['model_kwargs']
    settings: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in kwargs.items()
    }
    if architecture.startswith(TORCHVISION):
        dense = torchvision.models.get_model(architecture.removeprefix(TORCHVISION), weights=None, **settings)
    else:
        dense = timm.create_model(architecture, **settings)
    if {n: t.shape for n, t in dense.state_dict().items()} == {n: t.shape for n, t in small.state_dict().items()}:
        raise ValueError(f'{name} holds {architecture} as it is, expected a compressed network')
    return dense.eval().requires_grad_(False), small, f'{architecture} {settings}'


def is_file_name(name: str) -> bool:
    """Whether a network is named by a file rather than a tag."""
    return name.endswith('.safetensors')


def _deployed(model: nn.Module, images: Tensor) -> list[nn.Module]:
    return [deploy(model, images)]


def multiple_for(exported: bool) -> int:
    """The multiple to which channel counts are rounded up, for a runtime of exported files or for PyTorch."""
    return CHANNEL_MULTIPLES['onnx' if exported else 'pt2']


def forms_of(model: nn.Module) -> str:
    """The forms in a deployed network: the finalist that was chosen, or what was given."""
    report = deployment_report(model)
    return report.chosen or ', '.join(sorted(set(report.forms.values()))) or 'dense'


def _measure(
    name: str,
    networks: Mapping[str, tuple[nn.Module, Sequence[int]]],
    deployed: Mapping[str, Sequence[nn.Module]],
    inputs: Mapping[str, Tensor],
    runtime: str,
    folder: Path,
    seconds: float,
) -> list[Row]:
    """Rows of one runtime and batch, one for each network, in the variant that is fastest in the runtime."""
    load, sources = os.getloadavg()[0], {}
    calls: list[Callable[[], Any]] = []
    sync = partial(synchronise, inputs['dense'])
    if runtime == 'compile':
        torch.compiler.reset()  # networks of one class share a bounded number of compilations
    for label, (model, _) in networks.items():
        variants, prepared = [model] if runtime == 'eager' else deployed[label], []
        for number, variant in enumerate(variants):
            (place := folder / f'{len(calls)}-{number}').mkdir(exist_ok=True)
            prepared.append(prepare(variant, inputs[label], runtime, place))
        times = take_turns(prepared, sync, 1.0, passes=_PASSES).milliseconds() if len(prepared) > 1 else [0.0]
        best = min(range(len(prepared)), key=lambda k: times[k])
        calls.append(prepared[best])
        sources[label] = variants[best]
    batch = len(inputs['dense'])
    turns = take_turns(calls, sync, seconds, passes=_PASSES)
    in_eager = runtime in ('eager', 'deployed')
    return [
        {
            'model': name, 'network': label, 'runtime': runtime, 'batch': batch,
            'gmacs': count(networks[label][0], networks[label][1]).macs / 1e9, **figure,
            'peak_mb': peak_mb(source, inputs[label]) if in_eager else None,
            'forms': '' if runtime == 'eager' else forms_of(source),
            'widened': runtime != 'eager' and bool(deployment_report(source).widened), 'load': load,
        }
        for (label, source), figure in zip(sources.items(), summaries(turns, batch))
    ]  # fmt: skip


def plot_speedup(rows: Sequence[Row], path: Path) -> None:
    """Draw each network's time over the dense one's, by runtime and batch, as a PNG."""
    groups = list(dict.fromkeys((r['model'], r['runtime'], r['batch']) for r in rows))
    labels = list(dict.fromkeys(r['network'] for r in rows))
    found = {((r['model'], r['runtime'], r['batch']), r['network']): r['speedup'] for r in rows}
    several = len({r['model'] for r in rows}) > 1
    figure = new_figure(7, 1.5 + 0.4 * len(groups))
    axes = figure.add_subplot()
    for k, label in enumerate(labels):
        places = [(n + 0.8 * k / len(labels), found[g, label]) for n, g in enumerate(groups) if (g, label) in found]
        bars = axes.barh([p for p, _ in places], [v for _, v in places], 0.8 / len(labels), align='edge', label=label)
        axes.bar_label(bars, fmt='%.2f', fontsize=7, padding=2)
    ticks = [f'{runtime}, batch {batch}' for _, runtime, batch in groups]
    if several:
        ticks = [f'{model}, {tick}' for (model, _, _), tick in zip(groups, ticks)]
    axes.set_yticks([n + 0.4 for n in range(len(groups))], ticks)
    axes.invert_yaxis()
    axes.axvline(1, color='black', linewidth=0.8)
    axes.set_xlabel('times as fast as the dense network')
    axes.legend(fontsize=8)
    write_png(figure, path)
