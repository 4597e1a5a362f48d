"""Write a network for other runtimes (ONNX, OpenVINO IR, torch.export), and read such files back as functions."""

from __future__ import annotations

import copy
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from norton_timm.inference.onednn import GlobalAverage
from norton_timm.utils import replace_module, tensors_in

FORMATS = {'onnx': '.onnx', 'openvino': '.xml', 'pt2': '.pt2'}
# channels that these runtimes' fast kernels take, see deploy()
CHANNEL_MULTIPLES = {'onnx': 8, 'openvino': 8, 'pt2': 1}
OPSET = 18

Runner = Callable[[Tensor], list[Tensor]]


def format_of(path: Path) -> str:
    """The format that a file's ending names.

    Raises:
        ValueError: another ending.
    """
    for name, ending in FORMATS.items():
        if path.suffix == ending:
            return name
    raise ValueError(f'{path}: got the ending {path.suffix!r}, expected one of {", ".join(FORMATS.values())}')


def need(module: str) -> Any:
    """Import one of the optional packages.

    Raises:
        ValueError: it is not installed; the message says how to get it.
    """
    try:
        return __import__(module)
    except ImportError as error:
        raise ValueError(f'{module} is not installed ({error}): pip install -e ".[export]"') from None


class TracedNetwork(nn.Module):
    """A network that must be exported by tracing, because :mod:`torch.export` stops at parts that depend on the data.

    Subclasses name their outputs. Their method ``agreement()`` returns an empty
    :class:`norton_timm.inference.Agreement` that compares two such networks. The file takes images of the example's
    size only.

    Attributes:
        kind: what the network is, for messages.
        names: names of the tensors that ``forward`` returns.
    """

    kind = 'network'
    names: Sequence[str] = ()

    def tracing(self) -> AbstractContextManager[Any]:
        """A context in which the network is traced."""
        return nullcontext()


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporters, which print and warn about their own internals."""
    level = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        warnings.simplefilter('ignore')
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)


@torch.no_grad()
def write_exported(model: nn.Module, example: Tensor, path: Path) -> None:
    """Export to the format that the path's ending names.

    Args:
        model: a network, exported for any batch size; a :class:`TracedNetwork` is exported for the example's size.
        example: images (N, C, H, W).
        path: .onnx, .xml (OpenVINO, with a .bin beside it) or .pt2.

    Raises:
        ValueError: another ending, a missing package, or a network that the exporter cannot take.
    """
    kind = format_of(path)
    try:
        with _quiet():
            if kind == 'pt2':
                torch.export.save(_captured(model, example), path)
            elif kind == 'onnx':
                _write_onnx(model, example, path)
            else:
                ov = need('openvino')
                with tempfile.TemporaryDirectory() as folder:
                    _write_onnx(model, example, Path(folder) / 'model.onnx')
                    converted = ov.convert_model(Path(folder) / 'model.onnx')
                ov.save_model(converted, path, compress_to_fp16=False)
    except ValueError:
        raise
    except Exception as error:  # each exporter has exceptions of its own
        told = ' '.join(str(error).split())[:300]
        raise ValueError(f'{path.name}: {kind} cannot take this network: {type(error).__name__}: {told}') from error


def with_plain_averages(model: nn.Module) -> nn.Module:
    """A copy that exports each global average as one pooling operation.

    PyTorch exports ``nn.AdaptiveAvgPool2d(1)`` as a mean and, with channels last, eleven operations that compute the
    places of its values in memory.
    """
    names = [n for n, m in model.named_modules() if type(m) is nn.AdaptiveAvgPool2d and m.output_size in (1, (1, 1))]
    if names:
        model = copy.deepcopy(model)
    for name in names:
        replace_module(model, name, GlobalAverage())
    return model


def _captured(model: nn.Module, example: Tensor) -> Any:
    model = with_plain_averages(model)
    if isinstance(model, TracedNetwork):
        return torch.export.export(model, (example,), strict=False)
    # torch.export would take a batch of one for a constant size
    images = example if len(example) > 1 else torch.cat([example, example])
    return torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim('batch')},))


def _write_onnx(model: nn.Module, example: Tensor, path: Path) -> None:
    need('onnx')
    if isinstance(model, TracedNetwork):
        with model.tracing():
            torch.onnx.export(model, (example,), path, dynamo=False, opset_version=OPSET, input_names=['images'],
                              output_names=list(model.names))  # fmt: skip
        return
    need('onnxscript')
    torch.onnx.export(_captured(model, example), (), path, dynamo=True, opset_version=OPSET, external_data=False,
                      input_names=['images'])  # fmt: skip


def read_exported(path: Path, threads: int | None = None) -> Runner:
    """An exported file as a function from images (N, C, H, W) to a list of tensors.

    Args:
        path: a file of :func:`write_exported`.
        threads: number of threads of ONNX Runtime and OpenVINO; None means torch's number.

    Raises:
        ValueError: another ending, or a missing package.
    """
    kind, threads = format_of(path), threads or torch.get_num_threads()
    if kind == 'pt2':
        program = torch.export.load(path).module()
        return lambda images: tensors_in(program(images))
    if kind == 'onnx':
        ort = need('onnxruntime')
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        # threads that wait for work by spinning take the processor from whatever runs next
        options.add_session_config_entry('session.force_spinning_stop', '1')
        session = ort.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])
        name = session.get_inputs()[0].name
        return lambda images: [torch.from_numpy(v) for v in session.run(None, {name: images.numpy()})]
    return openvino_runner(path, threads)


def openvino_runner(path: Path, threads: int, static: Sequence[int] | None = None) -> Runner:
    """An .xml or .onnx file in OpenVINO, in float32 on the CPU.

    Args:
        path: the file.
        threads: number of threads.
        static: fix the input to this shape, with channels last; OpenVINO can then plan its memory.

    Raises:
        ValueError: OpenVINO is not installed.
    """
    ov = need('openvino')
    core = ov.Core()
    network = core.read_model(path)
    if static is not None:
        network.reshape(list(static))
        steps = ov.preprocess.PrePostProcessor(network)
        steps.input().tensor().set_layout(ov.Layout('NHWC'))
        steps.input().model().set_layout(ov.Layout('NCHW'))
        network = steps.build()
    hints: Mapping[str, Any] = {
        'PERFORMANCE_HINT': 'LATENCY', 'INFERENCE_NUM_THREADS': threads, 'INFERENCE_PRECISION_HINT': 'f32',
        'ENABLE_CPU_PINNING': True,
    }  # fmt: skip
    request = core.compile_model(network, 'CPU', hints).create_infer_request()

    def run(images: Tensor) -> list[Tensor]:
        pixels = (images if static is None else images.permute(0, 2, 3, 1)).contiguous().numpy()
        request.infer([pixels], share_inputs=True)
        return [torch.from_numpy(found.data.copy()) for found in request.output_tensors]

    return run
