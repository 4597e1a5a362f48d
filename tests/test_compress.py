"""The pipeline: what is removed, what is kept, what the model says of itself afterwards.

The whole sweep, which also writes the table of tested models:
``pytest tests/test_groups.py tests/test_compress.py -m "slow or not slow" --tested-models docs/tested_models.md``.
"""

from __future__ import annotations

import copy
import json

import pytest
import timm
import torch
from families import FAMILIES, build, images, relative_error
from torch import nn
from torchvision.models import detection

import norton_timm
from norton_timm import CompressionSpec, CPDConv2d, count, reshape
from norton_timm.compression import compress
from norton_timm.graph.groups import ChannelGraph

R078 = CompressionSpec(rank=1, rates='[0.]+[0.1]*2+[0.4]*5+[0.75]*12')
SIZES = (5_885_736, 899_619_808)  # parameters and MACs at 224 pixels


@pytest.fixture(scope='module')
def resnet50() -> nn.Module:
    return build('resnet50')


def test_published_size_from_any_door(resnet50):
    compressed, report = compress(resnet50, R078)
    named = timm.create_model('norton_resnet50.r078')
    shaped = reshape(copy.deepcopy(resnet50), R078)
    for model in (compressed, named, shaped):
        complexity = count(model, 224)
        assert (complexity.params, complexity.macs) == SIZES
    assert (report.after.params, report.after.macs) == SIZES
    assert report.before == count(resnet50, 224) == (4_089_184_256, 25_557_032)
    widths = {n: tuple(p.shape) for n, p in compressed.named_parameters()}
    assert widths == {n: tuple(p.shape) for n, p in named.named_parameters()}


def test_the_input_model_is_untouched(resnet50):
    before = copy.deepcopy(resnet50.state_dict())
    compress(resnet50, R078)
    after = resnet50.state_dict()
    assert list(before) == list(after) and all(torch.equal(before[k], after[k]) for k in before)


def test_carries_every_kept_parameter_and_statistic_over(resnet50):
    """Kept channels of a pruned network hold the dense network's own values."""
    compressed, _ = compress(resnet50, CompressionSpec(method='coring', rates=R078.rates))
    dense, pruned = resnet50.layer2[1], compressed.layer2[1]
    kept = [
        next(k for k, row in enumerate(dense.bn1.running_mean) if torch.equal(row, value))
        for value in pruned.bn1.running_mean
    ]
    assert kept == sorted(set(kept)) and len(kept) == 32
    for name in ('weight', 'bias', 'running_mean', 'running_var'):
        assert torch.equal(getattr(pruned.bn1, name), getattr(dense.bn1, name)[kept])
    inputs = [
        next(k for k, row in enumerate(resnet50.layer2[0].bn3.running_mean) if torch.equal(row, value))
        for value in compressed.layer2[0].bn3.running_mean
    ]
    assert torch.equal(pruned.conv1.weight, dense.conv1.weight[kept][:, inputs])
    # residual sums stay coupled: every block of the stage keeps the same channels
    for block in ('0', '2', '3'):
        want = resnet50.layer2.get_submodule(block).bn3.running_mean[inputs]
        assert torch.equal(compressed.layer2.get_submodule(block).bn3.running_mean, want)
    shortcut = resnet50.layer2[0].downsample[1].running_mean[inputs]
    assert torch.equal(compressed.layer2[0].downsample[1].running_mean, shortcut)


@pytest.mark.parametrize('method', ['norton', 'coring'])
def test_planted_duplicates_are_what_leaves(method):
    model = build('resnet18')
    twins = {5: 1, 20: 8, 33: 2, 40: 9, 63: 0}  # filter: what it duplicates
    conv, bn = model.layer1[0].conv1, model.layer1[0].bn1
    with torch.no_grad():
        for twin, original in twins.items():
            conv.weight[twin] = conv.weight[original]
    bn.running_mean.copy_(torch.arange(64.0))  # names the channels
    for rank in (1, 3):
        spec = CompressionSpec(method=method, rank=rank, rates={'layer1.0.conv1': 5 / 64})
        if method == 'coring':
            spec = CompressionSpec(method=method, rates=spec.rates)
        compressed, _ = compress(model, spec, images('resnet18'))
        kept = [int(k) for k in compressed.layer1[0].bn1.running_mean]
        assert len(kept) == 59
        for twin, original in twins.items():
            assert (twin in kept) != (original in kept), f'one of {twin} and {original} stays'


def test_first_layers_of_one_seed_are_equal_and_rank_lowers_the_error():
    model, x = build('resnet18'), images('resnet18')
    (a, ra), (b, _) = (compress(model, CompressionSpec(rank=2, rates=0.2, seed=3), x) for _ in range(2))
    assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    errors = [compress(model, CompressionSpec(rank=r), x)[1].nmse for r in (1, 2, 3)]
    assert errors == sorted(errors, reverse=True) and 0 < errors[-1] < errors[0] < 1
    assert ra.nmse is not None


def test_full_rank_without_pruning_is_the_same_network():
    model, x = build('resnet18').double(), images('resnet18').double()
    spec = CompressionSpec(rank={'layer*': 9})
    compressed, report = compress(model, spec, x)
    assert isinstance(compressed.layer1[0].conv1, CPDConv2d)
    with torch.no_grad():
        assert relative_error(compressed(x), model(x)) < 1e-3
    assert {r.rank for r in report.layers if r.name.startswith('layer1')} == {9}


def test_prune_first_decomposes_what_is_left():
    model, x = build('resnet18'), images('resnet18')
    spec = CompressionSpec(rank=2, rates=0.5)
    later = CompressionSpec(rank=2, rates=0.5, order='prune-decompose')
    (a, ra), (b, rb) = compress(model, spec, x), compress(model, later, x)
    assert ra.after == rb.after
    assert rb.nmse < ra.nmse  # fewer input channels are easier to fit
    assert all(p.shape == q.shape for p, q in zip(a.parameters(), b.parameters()))


def test_shots_reach_the_same_widths_with_a_call_between():
    model, x = build('resnet18'), images('resnet18')
    seen = []

    def between(pruned, shot):
        seen.append((shot, pruned.layer1[0].conv1.out_channels))

    one, _ = compress(model, CompressionSpec(method='coring', rates=0.5), x)
    many, _ = compress(model, CompressionSpec(method='coring', rates=0.5, shots=4), x, between_shots=between)
    assert seen == [(1, 56), (2, 48), (3, 40)]
    assert count(one, 64) == count(many, 64)


@pytest.mark.parametrize('criterion', ['l1', 'random', 'geometric_median', 'euclidean', 'csa'])
def test_controls(criterion):
    model, x = build('resnet20_cifar'), images('resnet20_cifar')
    compressed, report = compress(model, CompressionSpec(method='coring', rates=0.3, criterion=criterion), x)
    assert report.after.params < 0.75 * report.before.params
    assert compressed(x).shape == (2, 10)


def test_l1_keeps_the_largest_filters():
    model, x = build('resnet18'), images('resnet18')
    compressed, _ = compress(model, CompressionSpec(method='coring', rates={'layer1.0.conv1': 0.5}, criterion='l1'), x)
    weight = model.layer1[0].conv1.weight
    keep = weight.abs().flatten(1).sum(1).topk(32).indices.sort().values
    assert torch.equal(compressed.layer1[0].conv1.weight, weight[keep])


def test_round_to_protect_include_exclude():
    model, x = build('resnet18'), images('resnet18')
    spec = CompressionSpec(rates=0.3, round_to=16, exclude=('layer4.*',))
    _, report = compress(model, spec, x)
    by_name = {layer.name: layer for layer in report.layers}
    assert by_name['layer1.0.conv1'].kept == 48  # 64 * 0.7 = 44.8, rounded down to 44, up to 48
    assert by_name['conv1'].kept == 64 and by_name['conv1'].unpruned_because.startswith('protected: first')
    assert by_name['layer4.0.conv1'].kept == 512 and 'excluded' in by_name['layer4.0.conv1'].unpruned_because
    assert by_name['layer4.0.conv1'].rank == 0 and by_name['layer1.0.conv1'].rank == 1
    everything, _ = compress(model, CompressionSpec(rates=0.3, protect=()), x)
    assert everything.conv1.out_channels == 44 and isinstance(everything.conv1, CPDConv2d)
    only, _ = compress(model, CompressionSpec(rates=0.3, include=('layer1.0.conv1',)), x)
    assert only.layer1[0].conv1.out_channels == 44 and only.layer1[1].conv1.out_channels == 64


@pytest.mark.parametrize(
    ('spec', 'told'),
    [
        (dict(rates='[0.1]*3'), 'got 3 entries, expected 20'),
        (dict(rates='[0.1]*30'), 'got 30 entries, expected 20'),
        (dict(rates={'layer9.*': 0.1}), "'layer9.*' matches no layer"),
        (dict(rank={'stage*': 1}), "'stage*' matches no layer"),
        (dict(rates='[0.1]*20', drop=('layer1.1',)), 'got 20 entries for a network whose blocks were left out in part'),
        (dict(rates=[0.1] * 19, drop=('layer3.2', 'layer2.1')), 'expected one rate, or rates by layer name'),
        (dict(drop=('layer1.0',)), "drop: got 'layer1.0', expected blocks with an identity shortcut, such as layer1.1"),
        (dict(drop=('layer1.1.conv1',)), 'expected blocks with an identity shortcut'),
        (dict(rates={'layer1.0.conv3': 0.1, 'layer1.1.conv3': 0.2}), 'share channels'),
    ],
)
def test_specs_that_do_not_fit(resnet50, spec, told):
    with pytest.raises(ValueError) as error:
        compress(resnet50, CompressionSpec(**spec), torch.randn(1, 3, 64, 64))
    assert told in str(error.value) and '\n' not in str(error.value)


def test_bad_models():
    model = build('resnet18')
    with torch.no_grad():
        model.layer1[0].conv1.weight[3, 0, 0, 0] = float('nan')
    with pytest.raises(ValueError, match=r'NaN or infinity in layer1\.0\.conv1\.weight'):
        compress(model, CompressionSpec())
    with pytest.raises(ValueError, match='without a 2-d convolution'):
        compress(nn.Sequential(nn.Linear(3, 3)), CompressionSpec())
    with pytest.raises(ValueError, match='CompressionSpec'):
        compress(build('resnet18'), {'rank': 1})


@pytest.mark.parametrize('name', FAMILIES)
def test_every_family_tells_the_truth_after_compression(name, record_property):
    """Forward, backward, and all that timm reads from a model."""
    model, x = build(name), images(name)
    spec = CompressionSpec(rank=1, rates=0.3)
    compressed, report = compress(model, spec, x)
    assert report.after.macs <= report.before.macs and report.after.params <= report.before.params
    for layer in report.layers:
        if layer.rank == 0 and layer.kept == layer.channels:
            assert layer.dense_because or layer.unpruned_because, f'{layer.name} was left alone without a reason'
    assert {n for n, m in compressed.named_modules() if isinstance(m, CPDConv2d)} == {
        layer.name for layer in report.layers if layer.rank
    }
    # what the model says of itself
    if not name.startswith('torchvision/'):
        with torch.no_grad():
            features = compressed.forward_features(x)
            assert compressed.num_features in (features.shape[1], features.shape[-1])
            assert compressed.forward_head(features, pre_logits=True).shape[1] == compressed.head_hidden_size
            if hasattr(compressed, 'forward_intermediates'):
                compressed.forward_intermediates(x)
        compressed.reset_classifier(7)
    graph = ChannelGraph(compressed, x)
    assert graph.unknown == report.unknown_operations
    # training goes on, with another head
    compressed.train()
    y = compressed(x)
    assert y.shape == (2, 1000 if name.startswith('torchvision/') else 7)
    y.square().sum().backward()
    without = [n for n, p in compressed.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, f'no gradient for {without}'
    groups = [g for g in graph.groups if any(not isinstance(s.module, nn.Linear) for s in g.members)]
    convs = [r for r in report.layers if r.kind != 'Linear']
    record_property(
        'tested model',
        {
            'model': name,
            'parameters': f'{report.before.params / 1e6:.1f} M, {report.after.params / 1e6:.1f} M left',
            'decomposed': f'{sum(bool(r.rank) for r in report.layers)} of {len(convs)}',
            'groups that can be pruned': f'{sum(not g.why_frozen for g in groups)} of {len(groups)}',
            'operations without a rule': ', '.join(sorted(graph.unknown)) or 'none',
        },
    )


@pytest.mark.parametrize('name', FAMILIES)
def test_feature_info_after_compression(name):
    """A features_only model, compressed, tells the channels that it gives."""
    try:
        model = build(name, features_only=True)
    except (RuntimeError, AttributeError, AssertionError, TypeError) as error:
        pytest.skip(f'timm offers no features of {name}: {error}')
    x = images(name)
    reductions = model.feature_info.reduction()
    compressed, report = compress(model, CompressionSpec(rank=1, rates=0.3), x)
    with torch.no_grad():
        outputs = compressed(x)
    assert [f.shape[1] for f in outputs] == compressed.feature_info.channels()
    assert compressed.feature_info.reduction() == reductions
    # these two couple all channels by normalisation, and a uniform rate touches no linear layers
    assert report.after.params < report.before.params or name in ('nf_resnet50', 'convnext_tiny')


def test_feature_info_of_a_classifier_is_refreshed():
    compressed, _ = compress(build('resnet50'), R078)
    assert [f['num_chs'] for f in compressed.feature_info] == [64, 230, 460, 614, 2048]
    pruned, _ = compress(build('resnet18'), CompressionSpec(rates=0.5, protect=()), images('resnet18'))
    assert pruned.num_features == pruned.fc.in_features == 256
    assert [f['num_chs'] for f in pruned.feature_info] == [32, 32, 64, 128, 256]


@pytest.mark.parametrize('kind', ['fasterrcnn', pytest.param('maskrcnn', marks=pytest.mark.slow)])
def test_whole_detector(kind):
    model = getattr(detection, f'{kind}_resnet50_fpn')(
        weights=None, weights_backbone=None, num_classes=5, min_size=96, max_size=128
    ).eval()
    image = [torch.rand(3, 96, 128)]
    rates = {'backbone.fpn.*': 0.5, 'rpn.head.conv.*': 0.5, 'backbone.body.layer*.conv2': 0.5}
    compressed, report = compress(model, CompressionSpec(rank={'backbone.body.layer*': 1}, rates=rates), image)
    assert compressed.roi_heads.box_head.fc6.in_features == 128 * 49
    with torch.no_grad():
        assert compressed(image)[0].keys() == model(image)[0].keys()
    if kind == 'fasterrcnn':  # the mask head's MACs depend on how many objects are found
        assert report.after.macs < 0.6 * report.before.macs
    targets = [dict(boxes=torch.tensor([[5.0, 5, 60, 60]]), labels=torch.tensor([1]))]
    if kind == 'maskrcnn':
        targets[0]['masks'] = torch.ones(1, 96, 128, dtype=torch.uint8)
    sum(compressed.train()(image, targets).values()).backward()


def test_report_text_and_json(resnet50):
    _, report = compress(resnet50, R078)
    values = json.loads(report.to_json())
    assert values['after'] == {'macs': SIZES[1], 'params': SIZES[0]}
    assert values['spec']['rates'] == R078.rates
    assert len(values['layers']) == 54
    text = str(report)
    assert '5,885,736 parameters (-77.0 %)' in text and '899,619,808 MACs (-78.0 %)' in text
    assert 'layer2.0.conv2' in text and '1x1 kernel' in text
    assert report.untouched['conv1'] == 'protected: first layer' or 'rate 0' in report.untouched['conv1']


def test_a_compressed_model_can_be_compressed_again():
    once, _ = compress(build('resnet18'), CompressionSpec(rank=3, rates=0.2), images('resnet18'))
    twice, report = compress(once, CompressionSpec(rank=3, rates=0.2), images('resnet18'))
    layer = next(r for r in report.layers if r.name == 'layer1.0.conv1')
    assert (layer.channels, layer.kept, layer.dense_because) == (51, 40, 'decomposed already')
    assert twice.layer1[0].conv1.rank == 3


def test_names_of_the_contract():
    for name in norton_timm.__all__:
        assert getattr(norton_timm, name) is not None
