"""CompressionSpec and the authors' rates grammar."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from norton_timm import CompressionSpec
from norton_timm.compression.spec import format_rates, parse_rates

rates = st.floats(0, 0.99).map(lambda r: round(r, 3))


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ('[0.]+[0.1]*2', [0.0, 0.1, 0.1]),
        ('[0.]*3', [0.0] * 3),
        (' [0.5] * 2 + [0.25] ', [0.5, 0.5, 0.25]),
        ('[0.]+[0.1]*2+[0.4]*5+[0.75]*12', [0.0] + [0.1] * 2 + [0.4] * 5 + [0.75] * 12),
        ('[.3]*0+[0.1]', [0.1]),
    ],
)
def test_grammar(text, expected):
    assert parse_rates(text) == expected


@pytest.mark.parametrize(
    'text',
    ['', '0.1', '[0.1', '[1.0]', '[-0.1]', '[nan]', '[0.1]*-2', '[0.1]*2.5', '[0.1]**2', '[0.1]+', '[__import__("os")]',
     '[0.1]*99999999999', '[0.1]*20000', '[0.1,0.2]'],
)  # fmt: skip
def test_grammar_refuses(text):
    with pytest.raises(ValueError, match='rates: got'):
        parse_rates(text)


@given(st.lists(rates, min_size=1, max_size=40))
def test_format_is_the_inverse(values):
    assert parse_rates(format_rates(values)) == values


@given(st.text(max_size=40))
def test_grammar_never_raises_anything_else(text):
    try:
        assert all(0 <= r < 1 for r in parse_rates(text))
    except ValueError as error:
        assert 'rates' in str(error)


specs = st.builds(
    CompressionSpec,
    method=st.sampled_from(['norton', 'coring']),
    rank=st.integers(0, 9) | st.dictionaries(st.sampled_from(['a.*', 'b', '*']), st.integers(0, 9), min_size=1),
    rates=st.one_of(
        rates,
        st.lists(rates, min_size=1, max_size=5),
        st.lists(rates, min_size=1, max_size=5).map(format_rates),
        st.dictionaries(st.sampled_from(['a.*', 'b', '*']), rates, min_size=1),
    ),
    criterion=st.sampled_from([None, 'pabs', 'cosine', 'l1']),
    protect=st.sampled_from([(), ('first',), ('first', 'last')]),
    exclude=st.sampled_from([(), ('layer4.*',)]),
    shots=st.integers(1, 5),
    low_rank=st.dictionaries(st.sampled_from(['fc', '*']), st.integers(1, 9) | st.sampled_from([0.25, 0.5])),
    scope=st.sampled_from([None, 'backbone', 'detector']),
)


@given(specs)
def test_yaml_round_trip(spec):
    again = CompressionSpec.from_yaml(spec.to_yaml())
    assert again == spec and hash(again) == hash(spec)


def test_hash_tells_specs_apart():
    specs = [CompressionSpec(rank={'a': 1}), CompressionSpec(rank={'a': 2}), CompressionSpec(low_rank={'a': 1})]
    assert len({*specs, *specs}) == 3


def test_a_spec_without_the_newer_fields_is_written_as_before():
    assert CompressionSpec(rank=2).to_yaml() == 'method: norton\nrank: 2\nrates: 0.0\n'


def test_yaml_file(tmp_path):
    spec = CompressionSpec(rank=2, rates='[0.]+[0.1]*2')
    spec.to_yaml(tmp_path / 'spec.yaml')
    assert CompressionSpec.from_yaml(tmp_path / 'spec.yaml') == spec
    assert CompressionSpec.from_yaml(str(tmp_path / 'spec.yaml')) == spec


@pytest.mark.parametrize(
    ('field', 'value', 'told'),
    [
        ('method', 'svd', 'norton, coring'),
        ('rank', -1, 'from 0'),
        ('rank', 1.5, 'integer'),
        ('rank', True, 'integer'),
        ('rank', {'conv1': 'x'}, 'integer'),
        ('rates', 1.0, '0 <= rate < 1'),
        ('rates', '[2]', '0 <= rate < 1'),
        ('rates', [0.1, 'x'], '0 <= rate < 1'),
        ('rates', {'conv1': -1}, '0 <= rate < 1'),
        ('rates', {'': 0.1}, 'pattern'),
        ('criterion', 'nearest', 'pabs'),
        ('strategy', 'best', 'min_sum'),
        ('include', 'conv1', 'list'),
        ('protect', ['middle'], 'first, last'),
        ('round_to', 0, 'from 1'),
        ('order', 'both', 'decompose-prune'),
        ('shots', 0, 'from 1'),
        ('seed', -1, 'from 0'),
        ('low_rank', 4, 'layer-name pattern: rank'),
        ('low_rank', {'fc': 0}, 'from 1'),
        ('low_rank', {'fc': 1.0}, 'between 0 and 1'),
        ('low_rank', {'fc': True}, 'from 1'),
        ('scope', 'head', 'backbone, detector'),
    ],
)
def test_nonsense_names_field_value_and_choices(field, value, told):
    with pytest.raises(ValueError, match=field) as error:
        CompressionSpec(**{field: value})
    assert told in str(error.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('text', 'told'),
    [
        ('rnk: 1', "did you mean 'rank'"),
        ('- 1', 'mapping'),
        ('rank: [', 'not valid YAML'),
        ('rank: !!python/object/apply:os.system [ls]', 'not valid YAML'),
        ('method: svd\nrank: 1', 'norton, coring'),
    ],
)
def test_bad_yaml(text, told):
    with pytest.raises(ValueError, match=told.replace('[', r'\[')):
        CompressionSpec.from_yaml(text + '\n')


def test_missing_file():
    with pytest.raises(ValueError, match=r'nowhere\.yaml: cannot read'):
        CompressionSpec.from_yaml('nowhere.yaml')


def test_touches_and_rank_of():
    spec = CompressionSpec(rank={'layer1.*': 2, '*': 1}, include=('layer*',), exclude=('layer2.*',))
    assert [spec.rank_of(n) for n in ('layer1.0.conv2', 'layer3.conv', 'layer2.conv', 'conv1')] == [2, 1, 0, 0]
    assert CompressionSpec(method='coring', rank=3).rank_of('layer1') == 0
