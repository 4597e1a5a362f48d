"""The published sizes, exactly: this file's own copy of the integers, against networks built by tag."""

from __future__ import annotations

import csv
import re
import time
from pathlib import Path

import pytest
import timm
import torch

import norton_timm.models
from norton_timm.layers.cpd_conv import CPDConv2d
from norton_timm.models import published_accuracy, spec_of, tags
from norton_timm.profiling.complexity import count
from norton_timm.studies.zoo import to_markdown, zoo_names, zoo_rows

# conv + linear MACs, parameters
DENSE = {
    'vgg16_bn_cifar': (313463808, 14991946),
    'resnet56_cifar': (125485696, 853018),
    'resnet110_cifar': (252887680, 1727962),
    'densenet40_cifar': (282917328, 1059298),
    'googlenet_cifar': (1521756160, 6166250),
    'mobilenetv2_cifar': (87976448, 2236682),
    'resnet50': (4089184256, 25557032),
}
COMPRESSED = {
    'norton_vgg16_bn_cifar.r060': (125790208, 2588582),
    'norton_vgg16_bn_cifar.r068': (101294592, 2351731),
    'norton_vgg16_bn_cifar.r077': (73184256, 3601162),
    'norton_vgg16_bn_cifar.r088': (36725760, 1941322),
    'norton_vgg16_bn_cifar.r096': (13414784, 238188),
    'norton_vgg16_bn_cifar.r099': (4237632, 150667),
    'norton_resnet56_cifar.r027': (92014464, 588387),
    'norton_resnet56_cifar.r042': (72032768, 447830),
    'norton_resnet56_cifar.r071': (35922560, 217610),
    'norton_resnet56_cifar.r089': (13145472, 87633),
    'norton_resnet110_cifar.r035': (163690624, 1080742),
    'norton_resnet110_cifar.r064': (91285120, 599614),
    'norton_resnet110_cifar.r082': (45642880, 302542),
    'norton_densenet40_cifar.r026': (207213272, 745468),
    'norton_densenet40_cifar.r042': (162509208, 580750),
    'norton_densenet40_cifar.r058': (119847984, 421522),
    'norton_resnet50.r043': (2297566974, 14510393),
    'norton_resnet50.r050': (2007218748, 13512960),
    'norton_resnet50.r064': (1489071531, 10517413),
    'norton_resnet50.r077': (936071692, 7957227),
    'norton_resnet50.r078': (899619808, 5885736),
    'coring_vgg16_bn_cifar.r058': (130566528, 2766541),
    'coring_vgg16_bn_cifar.r067': (104242752, 2505793),
    'coring_vgg16_bn_cifar.r079': (66521088, 1901836),
    'coring_resnet56_cifar.r027': (89460352, 660157),
    'coring_resnet56_cifar.r047': (65168128, 485413),
    'coring_resnet56_cifar.r072': (34197184, 240793),
    'coring_densenet40_cifar.r021': (217746776, 802891),
    'coring_densenet40_cifar.r039': (169583640, 622924),
    'coring_densenet40_cifar.r053': (129828582, 451882),
    'coring_googlenet_cifar.r020': (1206526016, 4719756),
    'coring_googlenet_cifar.r057': (643804480, 2857760),
    'coring_googlenet_cifar.r074': (390804480, 2099266),
    'coring_mobilenetv2_cifar.r042': (51448576, 1257106),
    'coring_mobilenetv2_cifar.r060': (35543776, 771540),
    'coring_resnet50.r045': (2240373880, 15091575),
    'coring_resnet50.r049': (2090549079, 14278243),
    'coring_resnet50.r063': (1507328000, 11047336),
    'coring_resnet50.r077': (943231376, 8017755),
}
FAMILY = ('resnet18', 'resnet34', 'resnet101', 'resnet152', 'resnet50d', 'vgg19_bn_cifar', 'mobilenetv2_100')
PUBLISHED_RATES = {  # a second copy of some recipes, from the papers' scripts
    'norton_resnet50.r078': (1, '[0.]+[0.1]*2+[0.4]*5+[0.75]*12'),
    'norton_vgg16_bn_cifar.r060': (8, '[0.21]*7+[0.75]*5'),
    'coring_resnet50.r077': (0, '[0.]+[0.5]*3+[0.6]*16'),
}


def test_every_published_system_is_there() -> None:
    assert len(COMPRESSED) == 39 and len(DENSE) == 7
    names = [f'{m}_{b}.{t}' for m, bases in tags().items() for b, rows in bases.items() for t in rows]
    assert set(COMPRESSED) == {n for n in names if not any(f'_{b}.' in n for b in FAMILY)}
    registered = timm.list_models(['norton_*', 'coring_*'], include_tags=True)
    assert set(registered) == set(names)


@pytest.mark.parametrize('name', [*DENSE, *COMPRESSED])
def test_size_is_the_published_integer(name: str) -> None:
    model = timm.create_model(name)
    macs, params = count(model, model.pretrained_cfg['input_size'])
    assert (macs, params) == {**DENSE, **COMPRESSED}[name]
    assert params == sum(p.numel() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.parametrize('base', FAMILY)
def test_tags_of_the_rest_of_the_family_are_their_cut_of_macs(base: str) -> None:
    size = 32 if base.endswith('_cifar') else 224 if base == 'mobilenetv2_100' else 64
    dense = count(timm.create_model(base), size).macs
    for method in ('norton', 'coring'):
        for tag in tags()[method].get(base, ()):
            cut = 100 * (1 - count(timm.create_model(f'{method}_{base}.{tag}'), size).macs / dense)
            assert abs(cut - int(tag[1:])) < 0.5, f'{method}_{base}.{tag} cuts {cut:.2f} %'


@pytest.mark.parametrize(
    ('tag', 'rates'),  # by stage, from the authors' scripts for ImageNet
    [
        ('r030', (0.05, 0.15, 0.15, 0.2, 0.2, 0.25, 0.25)),
        ('r040', (0.1, 0.25, 0.25, 0.25, 0.25, 0.33, 0.33)),
        ('r047', (0.12, 0.25, 0.25, 0.36, 0.36, 0.4, 0.4)),
    ],
)
def test_mobilenetv2_of_imagenet_against_a_count_by_hand(tag: str, rates: tuple[float, ...]) -> None:
    stages = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    width, side = 32, 112
    macs, params = 3 * 9 * 32 * side**2, 3 * 9 * 32 + 2 * 32
    for (expansion, full, blocks, stride), rate in zip(stages, rates):
        for block in range(blocks):
            hidden, out = width * expansion, int(full * (1 - rate))
            if expansion > 1:
                macs, params = macs + width * hidden * side**2, params + width * hidden + 2 * hidden
            side //= stride if block == 0 else 1
            macs, params = macs + (9 * hidden + hidden * out) * side**2, params + 11 * hidden + hidden * out + 2 * out
            width = out
    macs, params = macs + width * 1280 * side**2 + 1280 * 1000, params + width * 1280 + 2 * 1280 + 1280 * 1000 + 1000
    assert count(timm.create_model(f'coring_mobilenetv2_100.{tag}'), 224) == (macs, params)


@pytest.mark.parametrize('name', PUBLISHED_RATES)
def test_recipe_of_a_tag(name: str) -> None:
    rank, rates = PUBLISHED_RATES[name]
    spec = spec_of(name)
    assert spec.rates == rates and spec.method == name.split('_')[0]
    decomposed = [m for m in timm.create_model(name).modules() if isinstance(m, CPDConv2d)]
    assert {m.rank for m in decomposed} == ({rank} if rank else set())
    if name == 'norton_resnet50.r078':
        assert len(decomposed) == 16


def test_accuracy_table_covers_every_published_row() -> None:
    for name in [*DENSE, *COMPRESSED]:
        figures = published_accuracy(name)
        assert 70 < figures['top1'] < 97
        assert ('top5' in figures) == ('resnet50' in name)
    assert published_accuracy('norton_resnet50.r078') == {'top1': 73.65, 'top5': 91.64}
    assert published_accuracy('norton_resnet18.r050') == {}


def test_the_page_of_disagreements_tells_what_the_tags_are() -> None:
    """docs/reference/tools.md: figure and setting of the authors' README are those of the tag."""
    page = (Path(__file__).resolve().parents[1] / 'docs/reference/tools.md').read_text()
    letters = {'cosine': 'C', 'euclidean': 'E', 'vbd': 'V'}
    rows = re.findall(r'\| `coring_(vgg16_bn_cifar)\.(r\d+)` \| top-1 % \| (\S+) with (\S+) \| (\S+) with (\S+);', page)
    assert [tag for _, tag, *_ in rows] == ['r058', 'r067', 'r079']
    for base, tag, top1, setting, other_top1, other_setting in rows:
        row = tags()['coring'][base][tag]
        assert setting == f'{letters[row["criterion"]]}-{row["shots"]}' != other_setting
        assert float(top1) == float(other_top1) == published_accuracy(f'coring_{base}.{tag}')['top1']


def test_other_settings_of_the_same_wrapper() -> None:
    tag = timm.create_model('norton_resnet56_cifar.r071')
    other = timm.create_model('norton_resnet56_cifar.r071', rank=3)
    assert {m.rank for m in other.modules() if isinstance(m, CPDConv2d)} == {3}
    assert count(other, (3, 32, 32)).params > count(tag, (3, 32, 32)).params
    same = timm.create_model('norton_resnet56_cifar', rank=2, rates=[0.0] * 30)
    assert count(same, (3, 32, 32)) == count(tag, (3, 32, 32))
    by_name = timm.create_model('norton_resnet56_cifar', rank={'layer3.*': 1}, rates={'layer3.*.conv1': 0.5})
    assert by_name.layer3[0].conv1.out_channels == 32 and by_name.layer3[0].conv1.rank == 1
    assert type(by_name.layer1[0].conv1) is torch.nn.Conv2d
    uniform = timm.create_model('coring_resnet18', rates=0.5)
    assert uniform.layer2[0].conv1.out_channels == 64


def test_form_of_every_decomposed_layer() -> None:
    models = {f: timm.create_model('norton_resnet56_cifar.r089', form=f).eval() for f in ('factored', 'dense')}
    models['dense'].load_state_dict(models['factored'].state_dict())
    assert all(m.form == 'dense' for m in models['dense'].modules() if isinstance(m, CPDConv2d))
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(models['dense'](x), models['factored'](x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    'name, kwargs, told',
    [
        ('norton_resnet50.r999', {}, 'r999.*r043, r050'),
        ('resnet56_cifar.best', {}, "unknown tag 'best'"),
        ('norton_resnet50', {'rank': 0.5}, 'rank'),
        ('norton_resnet50', {'rank': -1}, 'rank'),
        ('coring_resnet50', {'rank': 2}, 'never decomposed'),
        ('norton_resnet50', {'rates': '[0.1]*'}, r'\[0\.1\]\*'),
        ('norton_resnet50', {'rates': '[0.1]*21'}, '21'),
        ('norton_resnet50', {'rates': 1.5}, '1.5'),
        ('norton_resnet50', {'rates': {'nolayer': 0.5}}, 'nolayer'),
        ('norton_resnet50', {'form': 'fast'}, 'fast'),
        ('resnet56_cifar', {'depth': 57}, '6n'),
    ],
)
def test_bad_settings_are_told_in_one_line(name: str, kwargs: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        timm.create_model(name, **kwargs)
    assert '\n' not in str(error.value)


def test_table_tool(tool, tmp_path: Path) -> None:
    done = tool('model_zoo.py', '*resnet56_cifar*', '--markdown', tmp_path / 'zoo.md', '--csv', tmp_path / 'zoo.csv')
    assert done.code == 0, done.err
    rows = list(csv.DictReader((tmp_path / 'zoo.csv').open()))
    assert len(rows) == 8
    for row in rows:
        name = row['name']
        assert (int(row['macs']), int(row['params'])) == {**DENSE, **COMPRESSED}[name]
        assert float(row['dense_ms']) > 0 and float(row['ms']) > 0
        assert row['weights'] in ('authors', 'shipped') or Path(row['weights']).is_file()
        if name != 'resnet56_cifar':  # the control needs no more MACs than the compressed network
            assert int(row['control_px']) % 4 == 0 and float(row['control_ms']) > 0
            side = int(row['control_px'])
            assert count(timm.create_model('resnet56_cifar'), (3, side, side)).macs <= int(row['macs'])
    text = (tmp_path / 'zoo.md').read_text()
    assert '`norton_resnet56_cifar.r089`' in text and 'Latency: median' in text and text in done.out
    for bad in (['nothing*'], ['resnet50', '--columns', 'size'], ['resnet50', '--csv', tmp_path / 'no' / 'zoo.csv']):
        done = tool('model_zoo.py', '--no-latency', *bad)
        assert done.code == 2 and len(done.err.splitlines()) == 1, done.err


def test_table_of_everything_published() -> None:
    assert set(zoo_names()) == {*DENSE, *COMPRESSED}
    assert len(zoo_names(['*'])) == 46 + 5 + 20 + 2 + 10
    (row,) = zoo_rows(['norton_resnet50.r078'], measure=False)
    assert to_markdown([row], ['name', 'params', 'macs', 'top1']).splitlines()[-1] == (
        '| `norton_resnet50.r078` | 5.89 M | 899.62 M | 73.65 |'
    )


def test_a_tag_is_built_without_a_decomposition() -> None:
    """In no more than several times the dense network's time: its layers are made small, not cut."""

    def seconds(name: str) -> float:
        timm.create_model(name)
        start = time.perf_counter()
        timm.create_model(name)
        return time.perf_counter() - start

    assert min(seconds('norton_resnet50.r078') / seconds('resnet50') for _ in range(3)) < 6
    assert norton_timm.models.entrypoints.default_cfgs['norton_resnet50'].tags
