"""The picture of what a dense and a compressed network look at: class-activation maps and feature maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from norton_timm.studies.activation_maps import Comparison, Look
from norton_timm.utils import new_figure, write_png


def plot_comparison(found: Comparison, path: Path, classes: Sequence[str] = (), count: int = 6) -> None:
    """Draw the class-activation maps side by side, and below them pairs of feature maps.

    Args:
        found: the comparison.
        path: picture to write, .png; it appears whole or not at all.
        classes: names of the classes, for the headings.
        count: how many feature maps of the compressed network, the ones of largest variance.
    """

    def named(label: int) -> str:
        return classes[label] if label < len(classes) else f'class {label}'

    def says(look: Look) -> str:
        return f'{look.name}\nsays {named(look.label)}, {100 * look.confidence:.0f} %'

    figure = new_figure(7.5, 6.2, dpi=110)
    parts: Any = figure.subfigures(2, 1, height_ratios=[1.35, 1])
    above, below = parts
    titles = ['picture', says(found.dense), says(found.compressed)]
    for axes, look, title in zip(above.subplots(1, 3), (None, found.dense, found.compressed), titles):
        axes.imshow(found.picture)
        if look is not None:
            axes.imshow(look.activation, cmap='jet', alpha=0.45, vmin=0, vmax=1)
        axes.set_title(title, fontsize=9)
        axes.axis('off')
    above.suptitle(f'what speaks for {named(found.target)}: correlation of the maps {found.agreement:.2f}', fontsize=10)
    maps = found.compressed.features.flatten(1)
    shown = maps.double().var(1).argsort(descending=True)[:count].tolist()
    grid = below.subplots(2, len(shown), squeeze=False)
    for column, k in enumerate(shown):
        partner = int(found.nearest[k])
        for axes, look, channel in ((grid[0, column], found.dense, partner), (grid[1, column], found.compressed, k)):
            axes.imshow(np.asarray(look.features[channel]), cmap='gray')
            axes.set_xticks([])
            axes.set_yticks([])
        grid[0, column].set_title(f'{float(found.correlation[k]):.2f}', fontsize=8)
    grid[0, 0].set_ylabel('dense', fontsize=8)
    grid[1, 0].set_ylabel('compressed', fontsize=8)
    below.suptitle('feature maps: each beside the nearest one of the dense network, and their correlation', fontsize=8)
    write_png(figure, path)
