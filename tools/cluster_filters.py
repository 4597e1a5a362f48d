"""CORING's comparison of tensor and matrix representations: k-means on synthetic filters, adjusted Rand index.

Prints the mean index per level of difficulty and per rule of inertia, which picks one of the random starts.
The rule decides the order. Measured here on 50 data sets with 100 starts (results/cluster_filters.json), normal /
moderate / hard:

  text, as the authors' README tells: tensors 0.989 / 0.995 / 0.922, matrices 1.000 / 1.000 / 0.999
  code, as the authors' code does:    tensors 0.781 / 0.781 / 0.765, matrices 0.605 / 0.686 / 0.587
  published (1000 data sets):         tensors 0.91 / 0.82 / 0.73, matrices 0.83 / 0.61 / 0.54

With `code` the published order is reproduced, not the published values. With `text` it is the opposite order.
"""

from __future__ import annotations

import json
from pathlib import Path

from _cli import Parser, run

from tqdm import tqdm

from norton_timm.studies import INERTIAS, LEVELS, REPRESENTATIONS, compare_clusterings
from norton_timm.utils import write_text


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument(
        '--levels', nargs='+', choices=list(LEVELS), default=list(LEVELS), help='difficulty of the data'
    )
    parser.add_argument('--datasets', type=int, default=20, help='data sets per level')
    parser.add_argument('--starts', type=int, default=100, help='random starts of k-means')
    parser.add_argument(
        '--inertia',
        nargs='+',
        choices=list(INERTIAS),
        default=list(INERTIAS),
        help="what the best start has least of: text, of the authors' README; code, of their code",
    )
    parser.add_argument('--seed', type=int, default=0, help='of data and starts')
    parser.add_argument('--output', type=Path, help='JSON file to write')
    args = parser.parse_args()
    for name in ('datasets', 'starts'):
        if getattr(args, name) < 1:
            parser.error(f'--{name}: expected an integer of at least 1, got {getattr(args, name)}')
    if args.output is not None and not args.output.parent.is_dir():
        parser.error(f'--output: the folder {args.output.parent} does not exist')

    inertias = [rule for rule in INERTIAS if rule in args.inertia]
    results = {}
    for level in tqdm(list(dict.fromkeys(args.levels)), unit='level'):
        results[level] = compare_clusterings(level, args.datasets, args.seed, starts=args.starts, inertias=inertias)
    print(f'{"level":10}{"inertia":>8}' + ''.join(f'{method:>8}' for method in REPRESENTATIONS))
    for level, by_rule in results.items():
        for rule, scores in by_rule.items():
            print(f'{level:10}{rule:>8}' + ''.join(f'{scores[method]:8.3f}' for method in REPRESENTATIONS))
    if args.output is not None:
        settings = {'datasets': args.datasets, 'starts': args.starts, 'seed': args.seed}
        write_text(args.output, json.dumps({'ari': results, **settings}, indent=2) + '\n')


if __name__ == '__main__':
    run(main)
