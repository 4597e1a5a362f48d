"""fuse.py: what a convolution may take over, when it may overwrite its summand, and that nothing changes in value."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from families import build, images, relative_error
from torch import nn

from norton_timm.inference import fuse
from norton_timm.inference.fold import fold_batch_norm
from norton_timm.inference.onednn import FusedConv2d, FusedLinear, GlobalAverage, onednn_available
from norton_timm.profiling.complexity import count

pytestmark = pytest.mark.skipif(not onednn_available(), reason='this PyTorch has no oneDNN')


def fused_convs(model: nn.Module) -> dict[str, FusedConv2d]:
    return {n: m for n, m in model.named_modules() if isinstance(m, FusedConv2d)}


class Block(nn.Module):
    """Two convolutions; the way they are joined is the test's."""

    def __init__(self, join) -> None:
        super().__init__()
        self.a, self.b, self.act, self.join = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), nn.ReLU(), join

    def forward(self, x):
        return self.join(self, x)


def residual(m, x):
    y = m.a(x)
    return (m.b(y) + y).relu()


def residual_of_two(m, x):
    y = m.b(m.act(m.a(x)))
    y += x
    return m.act(y)


def two_branches(m, x):
    return m.act(m.a(x) + m.b(x))


def summand_is_read_later(m, x):
    y = m.a(x)
    z = torch.relu(m.b(x) + y)
    return z * y


def summand_is_returned(m, x):
    y = m.a(x)
    return m.act(m.b(x) + y), y


def scaled_sum(m, x):
    return m.act(torch.add(m.a(x), m.b(x), alpha=2.0))


def read_twice(m, x):
    y = m.a(x)
    return m.act(y) + y


def added_to_itself(m, x):
    y = m.a(x)
    return y + y


# what convolutions a and b take over: '+' a sum, '!' a sum in place of the summand, 'r' a ReLU
@pytest.mark.parametrize(
    'join, a, b',
    [(residual, '', '+r'), (residual_of_two, 'r', '+r'), (two_branches, '', '!r'), (summand_is_read_later, '', '+r'),
     (summand_is_returned, '', '+r'), (scaled_sum, '', ''), (read_twice, '', None), (added_to_itself, '', None)],
)  # fmt: skip
@torch.no_grad()
def test_what_is_taken_over(join, a, b):
    model, x = Block(join).eval(), torch.randn(2, 8, 9, 7)
    kept = x.clone()
    expected = model(x)
    result, count = fuse.fuse_network(model)
    assert count == sum(bool(taken) for taken in (a, b))
    assert not fused_convs(model), 'the original is not touched'
    nodes = {str(n.target): n for n in result.graph.nodes if n.op == 'call_module'}
    for name, taken in (('a', a), ('b', b)):
        if taken is None:
            continue
        conv = result.get_submodule(name)
        assert conv.relu == ('r' in taken) and conv.in_place == ('!' in taken)
        assert (len(nodes[name].args) == 2) == (taken[:1] in ('+', '!'))
    for layout in (torch.contiguous_format, torch.channels_last):
        found = result.to(memory_format=layout)(x)
        for f, e in zip(*(v if isinstance(v, tuple) else (v,) for v in (found, expected))):
            torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-5)
    assert torch.equal(x, kept), 'the input is not overwritten'


@torch.no_grad()
@pytest.mark.parametrize('name', ['resnet18', 'resnet20_cifar', 'mobilenetv2_100', 'densenet121', 'seresnet50'])
def test_families_keep_their_outputs(name):
    model, x = build(name), images(name)
    fold_batch_norm(model, x)
    result, count = fuse.fuse_network(model)
    assert relative_error(result(x), model(x)) < 1e-5
    assert count >= {'resnet18': 17, 'resnet20_cifar': 16, 'densenet121': 50, 'seresnet50': 16}.get(name, 1)
    again = pickle.loads(pickle.dumps(result))
    assert torch.equal(again(x), result(x)) and len(fused_convs(again)) == len(fused_convs(result))
    assert result.pretrained_cfg == model.pretrained_cfg


@torch.no_grad()
def test_parts_that_cannot_be_traced_stay():
    class Choosy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
            self.lonely = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            y = self.body(x)
            return self.lonely(y) if y.sum() > 0 else y

    model, x = Choosy().eval(), torch.randn(1, 3, 9, 9)
    result, count = fuse.fuse_network(model)
    assert count == 1 and type(result) is Choosy and type(result.lonely) is nn.Conv2d
    torch.testing.assert_close(result(x), model(x))


@torch.no_grad()
def test_it_exports_as_plain_operations():
    model, x = build('resnet20_cifar'), images('resnet20_cifar')
    fold_batch_norm(model, x)
    result, _ = fuse.fuse_network(model)
    program = torch.export.export(result, (x,), dynamic_shapes=({0: torch.export.Dim('batch')},))
    assert not any('mkldnn' in str(n.target) for n in program.graph.nodes)
    more = torch.cat([x, x, x])
    torch.testing.assert_close(program.module()(more), model(more), rtol=1e-4, atol=1e-4)


def straight() -> tuple[fuse.FusedNetwork, torch.Tensor]:
    """A fused network that has run twice, the second time without its modules, and its input."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    )  # fmt: skip
    network, _ = fuse.fuse_network(model.eval())
    x = torch.randn(2, 3, 9, 9).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        network(x)
        assert calls(network, x) == 0
    return network, x


def calls(network: nn.Module, x: torch.Tensor) -> int:
    """How many fused convolutions are called as modules."""
    seen = 0
    original = FusedConv2d.forward

    def forward(self, *args):
        nonlocal seen
        seen += 1
        return original(self, *args)

    FusedConv2d.forward = forward
    try:
        network(x)
    finally:
        FusedConv2d.forward = original
    return seen


@torch.no_grad()
def test_a_network_runs_without_its_modules_until_something_changes():
    network, x = straight()
    assert calls(network, x) == 0
    expected = network(x)
    with torch.inference_mode():
        assert torch.equal(network(x), expected)
    network.get_submodule('0').weight.mul_(2)  # in place
    assert calls(network, x) == 2 and calls(network, x) == 0
    network.get_submodule('2').weight = nn.Parameter(torch.zeros(6, 8, 1, 1))  # another parameter
    network.get_submodule('2').bias.zero_()
    torch.testing.assert_close(network(x), network.get_submodule('6').bias.expand(2, 4))
    network.get_submodule('0').weight.data = torch.zeros(8, 3, 3, 3)  # another storage
    assert calls(network, x) == 2
    network.add_module('6', nn.Linear(6, 3))  # another module
    assert network(x).shape == (2, 3)
    network.load_state_dict({k: torch.full_like(v, 0.5) for k, v in network.state_dict().items()})
    maps = (0.5 + 0.5 * nn.functional.conv2d(x, torch.ones(1, 3, 3, 3))).relu()
    torch.testing.assert_close(network(x)[:, :1], 0.5 + 3 * (0.5 + 4 * maps.mean((2, 3))))


@torch.no_grad()
def test_a_part_that_is_replaced_is_noticed():
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), nn.Conv2d(4, 2, 1)).eval()
    network, _ = fuse.fuse_network(model)
    x = torch.randn(1, 3, 5, 5)
    network(x)
    network.set_submodule('0', nn.ModuleDict({'0': nn.Conv2d(3, 4, 1)}))
    torch.testing.assert_close(network(x), by_modules(network, x))


def test_copies_say_what_the_network_says_of_itself():
    model = straight()[0]
    model.deployment = {'chosen': ['fused']}
    again = copy.deepcopy(model)
    assert again.deployment == model.deployment and again.deployment is not model.deployment
    assert pickle.loads(pickle.dumps(model)).deployment == model.deployment


def test_operations_are_counted_like_those_of_the_original():
    network, x = straight()
    expected = 2 * (49 * 3 * 8 * 9 + 49 * 8 * 6 + 6 * 4)
    assert count(network, x).macs == expected


@torch.no_grad()
def test_code_that_depends_on_an_argument_left_out_is_not_traced():
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())

        def forward(self, x, mask=None):
            y = self.body(x)
            return y if mask is None else y * mask

    model, x = Masked().eval(), torch.randn(1, 3, 5, 5)
    result, count = fuse.fuse_network(model)
    assert count == 1
    torch.testing.assert_close(result(x), model(x))
    torch.testing.assert_close(result(x, 2), model(x, 2))


def by_modules(network: fuse.FusedNetwork, x: torch.Tensor) -> torch.Tensor:
    return torch.fx.Interpreter(network).run(x)


@torch.no_grad()
def test_hooks_are_called_and_other_inputs_taken():
    network, x = straight()
    met = []
    hook = network.get_submodule('2').register_forward_hook(lambda *_: met.append(1))
    network(x)
    network(x)
    assert len(met) == 2
    hook.remove()
    assert calls(network, x) == 0
    assert network(torch.zeros(0, 3, 9, 9)).shape == (0, 4)
    assert network(x[:, :, :7, :8].repeat(3, 1, 1, 1)).shape == (6, 4)
    torch.testing.assert_close(network(x.contiguous()), network(x))
    torch.testing.assert_close(network.double()(x.double()).float(), by_modules(network.float(), x))


def test_gradients_flow_through_a_network_that_ran_without_modules():
    network, x = straight()
    y = network(x.clone().requires_grad_())
    y.sum().backward()
    assert network.get_submodule('0').weight.grad.abs().sum() > 0
    with torch.no_grad():
        torch.testing.assert_close(network(x), y)


@torch.no_grad()
def test_copies_and_pickles_run_alike_and_pack_for_themselves():
    network, x = straight()
    for again in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):
        assert type(again).__mro__[1] is fuse.FusedNetwork
        assert torch.equal(again(x), network(x)) and calls(again, x) == 0
        again.get_submodule('0').weight.zero_()
        assert not torch.equal(again(x), network(x))


class Chain(nn.Module):
    """Convolutions that add up."""

    def __init__(self, join) -> None:
        super().__init__()
        self.first, self.join = nn.Conv2d(3, 8, 1), join
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))

    def forward(self, x):
        return self.join(self.first(x), *self.convs)


def shortcut_of_a_sum(x, a, b, c):
    return (a(x) + b(x) + c(x) + x).relu()


def shortcut_of_a_sum_read_before(x, a, b, c):
    return (a(x) + b(x) + c(x) + x).relu() + x


def relu_within(x, a, b, c):
    return (a(x).relu() + b(x) + x).relu() + c(x)


def two_shortcuts(x, a, b, c):
    return a(x) + b(x) + c(x) + x + x


@pytest.mark.parametrize(
    'join, plain, overwrites',
    [(shortcut_of_a_sum, 0, 2), (shortcut_of_a_sum_read_before, 1, 2), (relu_within, 1, 1), (two_shortcuts, 1, 2)],
)
@torch.no_grad()
def test_chains_of_convolutions_take_shortcuts_in(join, plain, overwrites):
    torch.manual_seed(0)
    model, x = Chain(join).eval(), torch.randn(2, 3, 9, 9)
    network, _ = fuse.fuse_network(model)
    for _ in range(2):
        torch.testing.assert_close(network(x), model(x), rtol=1e-4, atol=1e-5)
    additions = [n for n in network.graph.nodes if n.op == 'call_function']
    assert len(additions) == plain
    assert sum(conv.in_place for conv in fused_convs(network).values()) == overwrites


@torch.no_grad()
def test_channels_stay_last_between_matrix_products():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.Conv2d(4, 4, 3))
    network, _ = fuse.fuse_network(model.eval())
    x = torch.randn(2, 3, 9, 9)
    network(x)
    code = fuse._programs[network].run.__self__.code
    assert code.count('.permute(') == 2
    torch.testing.assert_close(network(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_linear_layers_take_over_activations_once():
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.act = nn.Linear(8, 8), nn.Linear(8, 3), nn.ReLU()

        def forward(self, x):
            x = self.act(self.a(x))
            return self.b(self.act(self.a(x)) + x)  # the layer that is called twice stays as it is

    model, x = Head().eval(), torch.randn(4, 8)
    result, count = fuse.fuse_network(model)
    assert count == 0 and type(result.a) is nn.Linear and type(result.b) is FusedLinear
    torch.testing.assert_close(result(x), model(x))
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    result, count = fuse.fuse_network(model)
    assert count == 1 and len(list(result.graph.nodes)) == 4
    torch.testing.assert_close(result(x), model(x))


@torch.no_grad()
def test_a_linear_layer_of_what_cannot_be_traced_is_packed():
    class Choosy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score = nn.Linear(8, 3)

        def forward(self, x):
            return self.score(x.flatten(1) if x.sum() > 0 else x)

    model, x = Choosy().eval(), torch.randn(4, 8)
    result, _ = fuse.fuse_network(model)
    assert type(result.score) is FusedLinear
    torch.testing.assert_close(result(x), model(x))


@pytest.mark.parametrize('size, replaced', [(1, True), ((1, 1), True), (2, False), ((1, None), False)])
@torch.no_grad()
def test_a_global_mean_stays_one(size, replaced):
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(size)).eval(), torch.randn(2, 3, 9, 7)
    network, _ = fuse.fuse_network(model)
    assert isinstance(network.get_submodule('1'), GlobalAverage) == replaced
    for each in (x, x, x[0], x[0], x.repeat(1, 1, 2, 3)):
        torch.testing.assert_close(network(each), model(each), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_steps_of_a_batch_are_not_taken_for_one_image():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 3)).eval()
    network, _ = fuse.fuse_network(model)
    x = torch.randn(2, 3, 9, 7)
    network(input=x)  # packs the weights
    for each in (x[0], x[0], x, x[0]):
        torch.testing.assert_close(network(each), model(each), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_calls_by_keyword_and_weights_that_hooks_compute_stay_as_they_are():
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.pool, self.mean = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1)
            self.a, self.b = nn.Linear(4, 4), nn.utils.spectral_norm(nn.Linear(4, 3))

        def forward(self, x):
            x = self.mean(input=self.pool(input=self.conv(x))).flatten(1)
            return self.b(self.a(input=x))

    model, x = Odd().eval(), torch.randn(2, 3, 9, 9)
    result, _ = fuse.fuse_network(model)
    assert type(result.a) is type(result.b) is nn.Linear and isinstance(result.conv, FusedConv2d)
    for _ in range(3):
        torch.testing.assert_close(result(x), model(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_network_without_a_layer_to_pack_stays_as_it_is():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return nn.functional.linear(x, self.fc.weight)

    model, x = Functional().eval(), torch.randn(2, 4)
    result, count = fuse.fuse_network(model)
    assert count == 0 and type(result) is Functional
    torch.testing.assert_close(result(x), model(x))
