"""Matplotlib figures without a display or global state, and PNG files that are written whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from norton_timm.utils.files import replacing


def new_figure(width: float, height: float, dpi: int = 120) -> Any:
    """An empty figure of ``width`` x ``height`` inches in constrained layout.

    Matplotlib is imported here because its import is slow.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout='constrained')
    FigureCanvasAgg(figure)
    return figure


def write_png(figure: Any, path: Path) -> Path:
    """Write a figure to a file.

    Raises:
        ValueError: the file cannot be written.
    """
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, format='png')
    except OSError as error:
        raise ValueError(f'{path}: cannot write the picture: {error.strerror}') from None
    return path
