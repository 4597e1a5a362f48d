"""export_tune.py: variants that compute the same, and the choice among them made in the runtime itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from fake_clock import FakeClock
from families import build, images
from torch import nn

import norton_timm
from norton_timm.inference import export, export_tune
from norton_timm.inference.deploy import deploy, deployment_report
from norton_timm.inference.export_tune import export_variants, fastest_variant
from norton_timm.layers.cpd_conv import CPDConv2d


@pytest.fixture(scope='module')
def small() -> nn.Module:
    model, x = build('resnet20_cifar'), images('resnet20_cifar')
    return norton_timm.compress(model, norton_timm.CompressionSpec(rank=2, rates=0.4), x)[0].eval()


@torch.no_grad()
def test_variants_differ_in_form_and_width_and_compute_the_same(small):
    x = images('resnet20_cifar')
    found = set()
    for variant in export_variants(small, x):
        torch.testing.assert_close(variant(x), small(x), rtol=1e-3, atol=1e-4)
        report = deployment_report(variant)
        if not report.chosen:
            found.add((*set(report.forms.values()), max(report.widened.values(), default=0)))
    # 9, 19 and 38 channels are left
    widths = (0, 40, 48)
    assert found == {(form, width) for form in ('merged', 'separable', 'dense') for width in widths}


@torch.no_grad()
def test_a_network_with_round_widths_and_nothing_to_decompose_has_one_variant():
    assert len(list(export_variants(build('resnet20_cifar'), images('resnet20_cifar')))) == 1


@torch.no_grad()
def test_what_is_fast_in_the_runtime_is_taken(small, monkeypatch):
    x, ran = images('resnet20_cifar'), []
    variants = [deploy(small, x, autotune=False, form=form) for form in ('merged', 'dense', 'separable')]
    monkeypatch.setattr(export_tune, 'export_variants', lambda *_: iter(variants))
    clock = FakeClock().install(monkeypatch, 'norton_timm.profiling.timing')

    def read(path: Path) -> export.Runner:
        assert path.suffix == '.pt2'

        def call(images):
            ran.append(path)
            clock.sleep(0.019 if path.stem == '1' else 0.02)
            return []

        return call

    monkeypatch.setattr(export, 'read_exported', read)
    assert fastest_variant(small, x, 'pt2') is variants[1]
    assert {path.stem for path in ran} == {'0', '1', '2'}


@torch.no_grad()
@pytest.mark.parametrize('kind', ['onnx', 'openvino'])
def test_each_runtime_is_asked(kind):
    pytest.importorskip({'onnx': 'onnxruntime', 'openvino': 'openvino'}[kind])
    model = nn.Sequential(CPDConv2d(3, 6, 3, 1, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(384, 4)).eval()
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(fastest_variant(model, x, kind)(x), model(x), rtol=1e-4, atol=1e-5)
