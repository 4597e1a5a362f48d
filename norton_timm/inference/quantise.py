"""Post-training quantisation of exported networks to 8-bit integers, by the runtimes' own tools."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from norton_timm.inference.export import TracedNetwork, format_of, need


def quantise(path: Path, images: Sequence[Tensor], model: nn.Module) -> Path:
    """Quantise an exported classifier; the ranges of its activations come from the images.

    Args:
        path: .onnx (ONNX Runtime's static quantisation, QDQ, one scale per channel) or .xml (NNCF).
        images: batches (N, C, H, W).
        model: the network in the file.

    Returns:
        The quantised file, in a folder beside the given one.

    Raises:
        ValueError: no classifier, another format, or a missing package.
    """
    kind = format_of(path)
    traced = isinstance(model, TracedNetwork)
    if kind == 'pt2' or traced:
        raise ValueError(f'int8: got {f"a {model.kind}" if traced else kind}, expected a classifier as .onnx or .xml')
    folder = path.parent / 'int8'
    folder.mkdir()
    result = folder / path.name
    if kind == 'onnx':
        need('onnxruntime')
        _quantise_onnx(path, result, images)
    else:
        ov, nncf = need('openvino'), need('nncf')
        nncf.set_log_level(logging.ERROR)
        batches = [b.numpy() for b in images]
        model = nncf.quantize(ov.Core().read_model(path), nncf.Dataset(batches), subset_size=len(batches))
        ov.save_model(model, result)
    return result


def _quantise_onnx(path: Path, result: Path, images: Sequence[Tensor]) -> None:
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(images)

        def get_next(self) -> dict | None:
            batch = next(self.batches, None)
            return None if batch is None else {name: batch.numpy()}

    name = onnx.load(path).graph.input[0].name
    prepared = result.with_name('prepared.onnx')
    quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
    quantization.quantize_static(str(prepared), str(result), Reader(), per_channel=True)
    prepared.unlink()
