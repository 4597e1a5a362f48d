"""Print the table of the zoo: sizes, published accuracy, where weights are, and latency measured on this machine.

Each compressed network is compared with the dense one, and with the dense one at a lower resolution with equal MACs.
The latter is a control that needs no compression. With --beside the table has ready timm networks instead.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path
from typing import Any

from _cli import Parser, run

import torch


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument('names', nargs='*', help="networks, such as 'norton_*' (quoted); default: all published ones")
    parser.add_argument('--beside', action='store_true', help='ready timm networks of equal MACs or top-1')
    parser.add_argument('--no-latency', action='store_true', help='measure nothing')
    parser.add_argument('--batch-size', type=int, default=1, help='images at a time')
    parser.add_argument('--threads', type=int, help="torch's threads; default: torch's own choice")
    parser.add_argument('--columns', nargs='+', help='columns of the Markdown table; default: all')
    parser.add_argument('--markdown', type=Path, help='file to write the table to, .md')
    parser.add_argument('--csv', type=Path, help='file to write all columns to, .csv')
    args = parser.parse_args()

    from tqdm import tqdm

    from norton_timm.studies import COLUMNS, beside_rows, to_csv, to_markdown, zoo_names, zoo_rows
    from norton_timm.utils import check_output, write_text

    for option in ('batch_size', 'threads'):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            raise ValueError(f'--{option.replace("_", "-")} is {getattr(args, option)}, expected 1 or more')
    unknown = [name for name in args.columns or () if name not in COLUMNS]
    if unknown:
        raise ValueError(f'--columns: unknown {", ".join(unknown)}, expected some of {", ".join(COLUMNS)}')
    for path, ending in ((args.markdown, '.md'), (args.csv, '.csv')):
        if path is not None:
            check_output(path, ending)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.beside and (args.columns or not args.names):
        raise ValueError('--beside takes names such as norton_resnet50.r078, and no --columns')
    names = zoo_names(args.names)
    made = (beside_rows if args.beside else zoo_rows)(names, not args.no_latency, args.batch_size)
    rows: Any = list(tqdm(made, total=None if args.beside else len(names), file=sys.stderr))
    table = to_markdown(rows, args.columns or ())
    if not args.no_latency:
        table += (
            f'\nLatency: median, batch {args.batch_size}, {torch.get_num_threads()} threads, '
            f'{platform.processor() or platform.machine()}, torch {torch.__version__}.\n'
        )
    print(table, end='')
    if args.markdown is not None:
        write_text(args.markdown, table)
    if args.csv is not None:
        write_text(args.csv, to_csv(rows))


if __name__ == '__main__':
    run(main)
