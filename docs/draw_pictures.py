"""Draw the pictures of the explanations, each for a light and a dark page: python docs/draw_pictures.py

What they show is computed by norton_timm, not sketched.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from norton_timm import cp_decompose, filter_distance, select_filters
from norton_timm.tensors import hosvd

IMAGES = Path(__file__).parent / 'images'
BLUE, ORANGE, GREEN = '#4c78d8', '#e8743b', '#2fa37c'
INKS = {'light': '#24292f', 'dark': '#dbe1ea'}


def new_figure(width: float, height: float, columns: int = 1, **ratios: object) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width, height), layout='constrained')
    FigureCanvasAgg(figure)
    figure.patch.set_alpha(0)
    return figure, figure.subplots(1, columns, squeeze=False, **ratios)[0]


def show(axes: object, values: np.ndarray, title: str, limit: float) -> None:
    axes.imshow(values, cmap='PuOr', vmin=-limit, vmax=limit)
    axes.set_title(title, fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])


def smooth_filters(count: int, inputs: int, noise: float) -> torch.Tensor:
    """Products of smooth curves in each mode, with noise: filters of low rank, nearly."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.zeros(count, inputs, 3, 3)
    for _ in range(2):
        a, b = (torch.randn(count, 1, generator=generator) + torch.tensor([[-1.0, 0, 1]]) for _ in range(2))
        c = torch.randn(count, inputs, generator=generator)
        weight += torch.einsum('oi,om,on->oimn', c, a, b)
    return weight / weight.std() + noise * torch.randn(weight.shape, generator=generator)


def cpd() -> Figure:
    """One filter, its rank-2 terms, and what they add up to."""
    weight = smooth_filters(1, 6, 0.15)
    found = cp_decompose(weight, 2)
    terms = torch.einsum('oir,omr,onr->roimn', found.C, found.A, found.B)[:, 0]
    pictures = [weight[0], terms[0], terms[1], terms.sum(0)]
    titles = ['filter $W$', r'$C_1 \otimes A_1 \otimes B_1$', r'$C_2 \otimes A_2 \otimes B_2$',
              f'rank 2, NMSE {float(found.nmse):.3f}']  # fmt: skip
    figure, axes = new_figure(7, 3.4, 4)
    for ax, picture, title, sign in zip(axes, pictures, titles, ('≈', '+', '=', '')):
        gap = torch.full((6, 1, 3), float('nan'))
        tall = torch.cat([picture, gap], 1).reshape(-1, 3)[:-1].numpy()  # one 3x3 slice for each of the six inputs
        show(ax, tall, title, float(weight.abs().max()))
        ax.text(1.12, 0.5, sign, transform=ax.transAxes, fontsize=15, va='center')
        for side in ax.spines.values():
            side.set_visible(False)
    axes[0].set_ylabel('six inputs, 3x3 each', fontsize=9)
    return figure


def cpd_error() -> Figure:
    """NMSE against the rank, of random and of nearly smooth filters."""
    figure, (ax,) = new_figure(6, 3)
    random = torch.randn(32, 64, 3, 3, generator=torch.Generator().manual_seed(0))
    for name, weight, color in (('random', random, BLUE), ('smooth, with noise', smooth_filters(32, 64, 0.4), ORANGE)):
        errors = [float(cp_decompose(weight, rank).nmse.mean()) for rank in range(1, 10)]
        ax.plot(range(1, 10), errors, 'o-', color=color, label=name)
    ax.set_xlabel('rank R')
    ax.set_ylabel('NMSE')
    ax.set_ylim(0)
    ax.grid(alpha=0.25)
    ax.legend(frameon=False)
    return figure


def pabs() -> Figure:
    """Two planes in space and the largest principal angle between them."""
    angle = np.deg2rad(40)
    figure = Figure(figsize=(5, 3.6))
    FigureCanvasAgg(figure)
    figure.patch.set_alpha(0)
    ax = figure.add_subplot(projection='3d')
    figure.subplots_adjust(0, -0.1, 1, 1.1)
    u, v = np.meshgrid([-1, 1], [-1, 1])
    directions = [np.array([0.0, 1, 0]), np.array([0.0, np.cos(angle), np.sin(angle)])]
    for direction, color in zip(directions, (BLUE, ORANGE)):
        ax.plot_surface(u, direction[1] * v, direction[2] * v, color=color, alpha=0.35, shade=False)
        ax.quiver(0, 0, 0, *direction, color=color, linewidth=2, arrow_length_ratio=0.12)
    ax.plot([-1, 1], [0, 0], [0, 0], color=GREEN, linewidth=2)
    arc = np.linspace(0, angle, 20)
    ax.plot(np.zeros(20), 0.6 * np.cos(arc), 0.6 * np.sin(arc), color='grey')
    bases = torch.tensor(np.stack([np.stack([[1.0, 0, 0], d], 1) for d in directions]))
    measured = float(filter_distance(Planes(bases), 'pabs')[0, 1])
    ax.text(0, 0.66 * np.cos(angle / 2) + 0.05, 0.66 * np.sin(angle / 2), f'{np.rad2deg(measured):.0f}°', fontsize=12)
    ax.text(1.05, 0, 0, '0°', fontsize=12, color=GREEN)
    ax.set_axis_off()
    ax.set_box_aspect((1, 1, 0.75), zoom=1.25)
    ax.view_init(18, -28)
    return figure


class Planes:
    """Factors whose three modes span the same planes."""

    def __init__(self, bases: torch.Tensor) -> None:
        self.A = self.B = self.C = bases


def selection() -> Figure:
    """PABS of sixteen filters, four of them near copies of others, and the eight that Algorithm 1 keeps."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(16, 16, 3, 3, generator=generator)
    weight[1:8:2] = weight[0:8:2] + 0.15 * torch.randn(4, 16, 3, 3, generator=generator)
    distance = filter_distance(cp_decompose(weight, 1), 'pabs')
    kept = select_filters(distance, 8)
    figure, axes = new_figure(7, 3.3, 2)
    for ax, shown, names in ((axes[0], distance, torch.arange(16)), (axes[1], distance[kept][:, kept], kept)):
        picture = ax.imshow(shown.numpy(), cmap='viridis', vmin=0, vmax=np.pi / 2)
        ax.set_xticks(range(len(names)), names.tolist(), fontsize=7)
        ax.set_yticks(range(len(names)), names.tolist(), fontsize=7)
    axes[0].set_title('all sixteen', fontsize=9)
    axes[1].set_title('the eight that stay', fontsize=9)
    figure.colorbar(picture, ax=axes, label='PABS in radians', shrink=0.85)
    return figure


def hosvd_picture() -> Figure:
    """The unfoldings of one filter along its three modes, each beside its leading singular vector."""
    weight = smooth_filters(1, 6, 0.3)
    found = hosvd(weight, 1)
    along = [weight[0].movedim(mode, 0).flatten(1) for mode in range(3)]
    rows = zip(('inputs', 'rows', 'columns'), along, (found.C[0], found.A[0], found.B[0]))
    figure, axes = new_figure(7.5, 2.1, 6, width_ratios=[9, 1.6, 18, 1.6, 18, 1.6])
    limit = float(weight.abs().max())
    for k, (name, unfolded, vector) in enumerate(rows):
        show(axes[2 * k], unfolded.numpy(), f'by {name}', limit)
        show(axes[2 * k + 1], vector.numpy(), '', 1)
    return figure


PICTURES = {'cpd': cpd, 'cpd_error': cpd_error, 'pabs': pabs, 'selection': selection, 'hosvd': hosvd_picture}


def main(folder: Path = IMAGES) -> list[Path]:
    """Draw every picture in both colours; returns the files."""
    written = []
    for scheme, ink in INKS.items():
        names = ('text.color', 'axes.labelcolor', 'axes.edgecolor', 'xtick.color', 'ytick.color')
        style = {**dict.fromkeys(names, ink), 'axes.facecolor': 'none', 'svg.hashsalt': 'norton-timm', 'font.size': 10}
        with matplotlib.rc_context(style):
            for name, draw in PICTURES.items():
                written.append(folder / f'{name}.{scheme}.svg')
                draw().savefig(written[-1], metadata={'Date': None}, transparent=True)
    return written


if __name__ == '__main__':
    print(*main(), sep='\n')
