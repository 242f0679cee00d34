"""GELU by a sigmoid: the same function and gradient as by tanh, in every layer that has one."""

import pytest
import torch
from diffusers.models.activations import GELU
from torch import nn
from torch.nn.functional import gelu

from families.activations import gelu_tanh, use_sigmoid


def _both(function: object, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = values.clone().requires_grad_()
    output = function(leaf)
    output.backward(torch.linspace(-1, 1, values.numel(), dtype=values.dtype))
    return output.detach(), leaf.grad


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-6), (torch.bfloat16, 1e-2)])
def test_values_and_gradients_are_those_of_tanh(dtype: torch.dtype, most: float) -> None:
    values = torch.cat([torch.linspace(-12, 12, 2001), torch.tensor([-1e4, -80.0, 0.0, 80.0, 1e4])]).to(dtype)
    found = _both(gelu_tanh, values)
    expected = _both(lambda leaf: gelu(leaf, approximate="tanh"), values)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype and torch.isfinite(one).all()
        assert ((one - other).abs() <= most * other.abs().clamp(min=1)).all()


def test_layers_change_how_they_compute_and_not_what() -> None:
    torch.manual_seed(0)
    by_tanh = nn.ModuleList([nn.GELU(approximate="tanh"), GELU(8, 12, approximate="tanh")])
    others = nn.ModuleList([nn.GELU(), GELU(8, 12), nn.SiLU()])
    values = torch.randn(3, 8)
    expected = [[layer(values) for layer in layers] for layers in (by_tanh, others)]
    weights = by_tanh.state_dict()
    for layers in (by_tanh, others):
        before = [type(layer) for layer in layers]
        use_sigmoid(layers)
        assert all((type(layer) is kind) == (layers is others) for layer, kind in zip(layers, before, strict=True))
    assert all(torch.equal(one, by_tanh.state_dict()[name]) for name, one in weights.items())
    for layers, outputs in zip((by_tanh, others), expected, strict=True):
        for layer, output in zip(layers, outputs, strict=True):
            torch.testing.assert_close(layer(values), output)
