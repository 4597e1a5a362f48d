"""Surfaces that are text: the rates grammar, recipes in YAML, run configurations, the page's settings."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from .surface import NUMBERS, VALUES, Surface, edits_of, swapped

# YAML that grows when it is read: each line holds the one before ten times
LAUGHS = 'a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n' + ''.join(
    f'a{k}: &a{k} [{", ".join([f"*a{k - 1}"] * 10)}]\n' for k in range(1, 12)
)
TRICKS = st.sampled_from(
    [
        LAUGHS,
        'a: &a [*a]\n',
        'a: &a {b: *a}\n',
        '[' * 2000,
        '{' * 2000,
        '- ' * 3000,
        'rank: !!python/object/apply:os.system [touch canary]',
        'rank: !!python/name:os.system',
        '? [1, 2]\n: 3\n',
        '? {a: 1}\n: 2',
        '\0',
        '\ufeffrank: 1',
        'rank: 1\n---\nrank: 2',
        '%YAML 9.9\n---\na: 1',
        'rank: 2001-99-99',
        'rank: 2001-01-01',
        'rank: 0x',
        'rank: 1_000',
        'rank: ' + '9' * 5000,
        'rank: 1:30:30',
        '<<: [1, 2]',
        '<<: {rank: 3}',
        'rank: !!binary "x"',
        'rank: !!set {a, b}',
        'rank: !!omap [a: 1]',
        'rank: !!float "x"',
        'rank: !!int "x"',
        'base: {}',
        'base: .',
        'base: ' + '../' * 40,
        'base: run.yaml',
        'base: "\\0"',
        'base: ' + 'x' * 5000,
        'base: [a]',
        'base: /dev/zero',
        'base: /dev/stdin',
        '\t- a',
        'a: b: c',
        '*x',
        '&x',
        '!',
        '|',
        '>',
        '"\\ud800"',
        "'",
        '=',
        '~',
        '~: ~',
        'null: 1',
        'true: 1',
        '1: 1',
        '1e400: 1',
    ]
)
_TERM = st.one_of(
    st.builds('[{}]*{}'.format, st.floats(0, 1), st.integers(0, 12)),
    st.builds('[{}]'.format, NUMBERS),
    st.text('[]*+.0123456789e- ,_x٣²', max_size=12),
    st.sampled_from(
        ['[0.]', '[0.1]*2', '[1]', '[.5]*99999999999999', '[0.1]*0', '[' * 4000, '[1_0]', '[٠.٥]', '[0x1]', '[inf]']
    ),
)
RATES = st.one_of(st.lists(_TERM, max_size=8).map('+'.join), st.text(max_size=30))


def _rates(text: str, folder: Path) -> None:
    from norton_timm import CompressionSpec
    from norton_timm.compression.spec import format_rates, parse_rates

    rates = parse_rates(text)
    assert all(0 <= rate < 1 for rate in rates)
    assert not rates or parse_rates(format_rates(rates)) == rates
    spec = CompressionSpec(rates=text)
    assert CompressionSpec.from_yaml(spec.to_yaml()) == spec


_PATTERN = st.sampled_from(['*', 'conv1', 'layer*', '', '[', '**', '[!a]', 'a' * 300, '(', '*[' * 50, '\\'])
# of the small network that specs are tried on
_LAYER = st.sampled_from(
    [
        'stem',
        'first',
        'first.conv',
        'second',
        'second.grouped',
        'head',
        '',
        'first',
        'second',
        'inner',
        'fir*',
        'first.',
    ]
)
_SPEC = st.fixed_dictionaries(
    {},
    optional={
        'method': st.sampled_from(['norton', 'coring', 'NORTON']) | VALUES,
        'rank': st.integers(-1, 9) | st.dictionaries(_PATTERN, st.integers(0, 9), max_size=3) | VALUES,
        'rates': RATES
        | st.floats(0, 1)
        | st.lists(NUMBERS, max_size=4)
        | st.dictionaries(_PATTERN, NUMBERS, max_size=3)
        | VALUES,
        'criterion': st.sampled_from([None, 'pabs', 'vbd', 'cosine', 'l1', 'output_error', 'output_error']) | VALUES,
        'strategy': st.sampled_from(['min_sum', 'x']) | VALUES,
        'include': st.lists(_PATTERN, max_size=3) | VALUES,
        'exclude': st.lists(_PATTERN, max_size=3) | VALUES,
        'protect': st.lists(st.sampled_from(['first', 'last', 'x']), max_size=3) | VALUES,
        'low_rank': st.dictionaries(_PATTERN | _LAYER, NUMBERS | st.sampled_from([1, 2, 0.5]), max_size=3) | VALUES,
        'drop': st.lists(_LAYER, max_size=3) | st.lists(_PATTERN, max_size=3) | VALUES,
        'scope': st.sampled_from([None, 'backbone']) | VALUES,
        'round_to': NUMBERS | VALUES,
        'order': VALUES,
        'shots': NUMBERS | VALUES,
        'seed': NUMBERS | VALUES,
        'rnk': VALUES,
    },
)

# what a user could mean
_PLAIN_SPEC = st.fixed_dictionaries(
    {},
    optional={
        'method': st.sampled_from(['norton', 'coring']),
        'rank': st.integers(0, 4) | st.dictionaries(_LAYER, st.integers(0, 4), max_size=2),
        'rates': st.sampled_from([0, 0.3, 0.5, 0.9, '[0.5]*3', [0.5], [0.0, 0.5]])
        | st.dictionaries(_LAYER, st.sampled_from([0, 0.5, 0.9]), max_size=2),
        'criterion': st.sampled_from([None, 'pabs', 'vbd', 'cosine', 'l1', 'random', 'output_error']),
        'strategy': st.sampled_from(['min_sum', 'min_min', 'sum']),
        'exclude': st.lists(_LAYER, max_size=2),
        'protect': st.lists(st.sampled_from(['first', 'last']), max_size=2),
        'low_rank': st.dictionaries(
            st.sampled_from(['stem', 'first.conv', 'second.same', 'head', '*', 'second.grouped']),
            st.sampled_from([1, 2, 4, 8, 9, 0.01, 0.5, 0.99]),
            max_size=2,
        ),
        'drop': st.lists(st.sampled_from(['first', 'second', 'second', 'stem']), max_size=2),
        'round_to': st.integers(1, 9),
        'order': st.sampled_from(['decompose-prune', 'prune-decompose']),
        'shots': st.integers(1, 3),
        'seed': st.integers(0, 3),
    },
)


def dumped(values: Any) -> str:
    """YAML of plain values; JSON, which YAML reads as well, of what YAML refuses to write."""
    try:
        return yaml.safe_dump(values, allow_unicode=True)
    except (yaml.YAMLError, ValueError, UnicodeError):
        return json.dumps(values, default=str)


_YAML_TEXT = st.one_of(
    TRICKS,
    st.text(max_size=60),
    st.text(string.printable, max_size=60),
    st.text('[]{}:,&*!|>-?#"\' \nabc019', max_size=60),
)


def _tiny() -> Any:
    """Two residual blocks, one with a grouped convolution, another padding and a sum inside."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, **layers: nn.Module) -> None:
            super().__init__()
            self.inner = nn.Sequential()
            for name, layer in layers.items():
                self.add_module(name, layer)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x
            for name, layer in self.named_children():
                y = layer(y) + y if name == 'inner' else layer(y)
            return (x + y).relu()

    torch.manual_seed(0)
    modules = {
        'stem': nn.Conv2d(3, 8, 3, padding=1),
        'norm': nn.BatchNorm2d(8),
        'first': Block(conv=nn.Conv2d(8, 8, 3, padding=1), norm=nn.BatchNorm2d(8)),
        'second': Block(
            grouped=nn.Conv2d(8, 8, 3, padding=1, groups=2),
            same=nn.Conv2d(8, 8, (2, 3), padding='same', padding_mode='circular', bias=False),
        ),
        'pool': nn.AdaptiveAvgPool2d(1),
        'flat': nn.Flatten(),
        'head': nn.Linear(8, 4),
    }
    model = nn.Sequential()
    for name, module in modules.items():
        model.add_module(name, module)
    return model.eval()


def _spec(text: str, folder: Path) -> None:
    import torch

    from norton_timm import CompressionSpec
    from norton_timm.compression import OUTPUT_ERROR, compress

    path = folder / 'spec.yaml'
    path.write_bytes(text.encode('utf-8', 'surrogatepass'))
    spec = CompressionSpec.from_yaml(path)
    assert CompressionSpec.from_yaml(spec.to_yaml()) == spec
    hash(spec)
    if spec.shots <= 3:
        images = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        repaired = spec.distance == OUTPUT_ERROR or spec.seed % 2
        small, report = compress(_tiny(), spec, images[:1], [images] if repaired else None)
        with torch.no_grad():
            assert small(images).isfinite().all(), 'outputs are not finite'
        json.loads(report.to_json())
        assert report.after.params == sum(p.numel() for p in small.parameters()), 'another number of parameters'


def _config(kind: str):
    def use(value: tuple[str, list[str]], folder: Path) -> None:
        if kind == 'detection':
            from detection.training import load_config as read
        else:
            from norton_timm.training import load_train_config as read  # type: ignore[assignment]

        text, overrides = value
        path = folder / 'run.yaml'
        path.write_bytes(text.encode('utf-8', 'surrogatepass'))
        config = read(path, overrides)
        yaml.safe_load(config.to_yaml())

    return use


def _default(kind: str) -> dict[str, Any]:
    if kind == 'detection':
        from detection.training.config import RunConfig

        return RunConfig().to_dict()
    from norton_timm.training.config import TrainConfig

    return TrainConfig().to_dict()


def _key_paths(tree: dict[str, Any], where: str = '') -> list[str]:
    found = []
    for key, value in tree.items():
        found += _key_paths(value, f'{where}{key}.') if isinstance(value, dict) and value else [f'{where}{key}']
    return found


def _configs(kind: str) -> st.SearchStrategy[tuple[str, list[str]]]:
    tree = _default(kind)
    trees = st.builds(lambda edits: dumped(swapped(tree, edits)), edits_of(VALUES | NUMBERS, 3))
    keys = st.sampled_from(
        [*_key_paths(tree), 'model.rcnn.box_score_thresh', 'a', '', '.', 'optim', 'optim.lr.x', 'x.' * 1500]
    )
    values = st.one_of(
        NUMBERS.map(str),
        st.text(max_size=10),
        TRICKS.map(lambda t: t[:100]),
        st.sampled_from(['[', 'null', '.nan', '[1, .inf]', '{}']),
    )
    override = st.one_of(st.builds('{}={}'.format, keys, values), st.text(max_size=20))
    return st.tuples(st.one_of(trees, trees, _YAML_TEXT), st.lists(override, max_size=2))


class _Predictor:
    """What the studio asks of a predictor, without a network."""


def _page(text: str, folder: Path) -> None:
    from detection.demo.server import read_settings
    from detection.demo.studio import ModelChoice, Studio
    from detection.demo.video import DrawnSource

    studio = Studio(lambda: DrawnSource(1), [ModelChoice('box', 'a', _Predictor), ModelChoice('mask', 'b', _Predictor)])  # type: ignore[arg-type]
    try:
        studio.choose(read_settings(text))
        json.dumps(studio.facts(), allow_nan=False)
    finally:
        studio.close()


_PAGE = st.one_of(
    st.dictionaries(
        st.sampled_from(['model', 'score', 'x', '']), VALUES | st.sampled_from(['box: a', 'mask: b']), max_size=3
    ).map(json.dumps),
    VALUES.map(json.dumps),
    st.text(max_size=40),
    st.sampled_from(['[' * 100_000, '{"score": NaN}', '{"score": 1e999}', '{"model": []}', '{"model": {}}']),
)


def _import() -> None:
    import norton_timm.training.config  # noqa: F401


SURFACES = [
    Surface('rates grammar', RATES, _rates, 4000, _import),
    Surface('recipe YAML', _SPEC.map(dumped) | _PLAIN_SPEC.map(dumped) | _YAML_TEXT, _spec, 4000, _import),
    Surface('detection configuration', st.deferred(lambda: _configs('detection')), _config('detection'), 4000, _import),
    Surface(
        'classification configuration',
        st.deferred(lambda: _configs('classification')),
        _config('classification'),
        4000,
        _import,
    ),
    Surface('page settings', _PAGE, _page, 2000, _import),
]
