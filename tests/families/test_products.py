"""Layers of eight bits: how near they are to the layer they stand for, both ways, and what they keep in memory."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from families import open_project
from families.products import Float8Linear, Int8Linear, _rounded, added, joined, multiplies_float8
from families.quantize import check_precision
from prep.cache import cache
from prep.pairs import pairs
from prep.scan import scan
from schemas.errors import UserError
from train.loop import run
from train.sample import Request, sample

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
KINDS = (Int8Linear, Float8Linear)
# Relative error of a product with normal numbers: of 255 steps a row, and of two factors with three bits after the first.
MOST = {Int8Linear: (1e-3, 1e-2), Float8Linear: (1e-2, 5e-2)}


def _layer(bias: bool = True, rows: int = 80, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(96, rows, bias=bias).requires_grad_(False)


def _values(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 7, 96, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def _both_ways(layer: nn.Module, values: Tensor) -> tuple[Tensor, Tensor]:
    output = layer(values)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).to(output.dtype)
    return output.detach(), torch.autograd.grad(output, values, weights)[0]


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_products_and_gradients_are_near_those_of_the_plain_layer(
    kind: type[Int8Linear] | type[Float8Linear], bias: bool
) -> None:
    layer, (least, most) = _layer(bias), MOST[kind]
    quick = kind.of(layer)
    for found, expected in zip(_both_ways(quick, _values()), _both_ways(layer, _values()), strict=True):
        assert found.shape == expected.shape and found.dtype == torch.float32
        assert least < _error(found, expected) < most
    assert not any(one.requires_grad for one in quick.parameters())
    assert (quick.in_features, quick.out_features) == (96, 80)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_unlike_size_have_scales_of_their_own_and_a_bias_is_exact(
    kind: type[Int8Linear] | type[Float8Linear],
) -> None:
    layer, values = _layer(), _values()
    layer.weight.mul_(torch.logspace(-6, 6, 80)[:, None])
    layer.weight[3] = 0
    output, expected = kind.of(layer)(values) - layer.bias, layer(values) - layer.bias
    errors = (output - expected).norm(dim=(0, 1))[10:] / expected.norm(dim=(0, 1))[10:]  # above: the bias rounds them
    assert errors.max() < 2 * MOST[kind][1]
    assert torch.equal(kind.of(layer)(torch.zeros(1, 96))[0], layer.bias)
    assert torch.equal(kind.of(layer)(values)[..., 3], layer.bias[3].expand(2, 7))


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_of_unlike_size_lose_no_more_than_others(kind: type[Int8Linear] | type[Float8Linear]) -> None:
    layer, sizes = _layer(bias=False), torch.logspace(-6, 6, 7)[:, None]
    values = (_values().detach() * sizes).requires_grad_()
    errors = (kind.of(layer)(values) - layer(values)).norm(dim=(0, 2)) / layer(values).norm(dim=(0, 2))
    assert errors.max() < 2 * MOST[kind][1]


@pytest.mark.parametrize("kind", KINDS)
def test_the_dtype_is_that_of_the_values_and_of_autocast_under_it(kind: type[Int8Linear] | type[Float8Linear]) -> None:
    quick = kind.of(_layer())
    exact, half = _both_ways(quick, _values()), _both_ways(quick, _values(torch.bfloat16))
    assert {one.dtype for one in half} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        output, gradient = _both_ways(quick, _values())
    assert (output.dtype, gradient.dtype) == (torch.bfloat16, torch.float32)
    assert all(_error(one, other) < 2 * MOST[kind][1] for one, other in zip(half, exact, strict=True))
    assert _error(output, half[0]) < (1e-2 if kind is Float8Linear else 1e-6)  # values may be rounded once, or twice


def test_int8_is_the_product_with_its_own_weights_to_rounding() -> None:
    quick, plain = Int8Linear.of(_layer(bias=False)), _layer(bias=False)
    plain.weight.copy_(quick(torch.eye(96)).t())
    for found, expected in zip(_both_ways(quick, _values()), _both_ways(plain, _values()), strict=True):
        assert _error(found, expected) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_row_has_no_other_shape(kind: type[Int8Linear] | type[Float8Linear]) -> None:
    quick, row = kind.of(_layer()), _values().detach()[0, 0]
    assert torch.equal(quick(row), quick(row[None])[0]) and quick(row).shape == (80,)
    assert quick(torch.zeros(0, 96)).shape == (0, 80)


def test_rounded_rows_lie_one_after_the_other_however_they_came() -> None:
    columns = _values().detach()[0].t().contiguous().t()
    rounded, _ = _rounded(columns)
    assert not columns.is_contiguous() and rounded.is_contiguous()
    assert torch.equal(rounded.float(), _rounded(columns.contiguous())[0].float())


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_a_layer_keeps_its_input_only_for_what_is_trained(kind: type[Int8Linear] | type[Float8Linear] | None) -> None:
    layer, kept = _layer() if kind is None else kind.of(_layer()), []
    down, up = torch.randn(4, 96, requires_grad=True), torch.randn(80, 4, requires_grad=True)
    values = _values() * 1
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.data_ptr()) or one, lambda one: one):
        layer(values)
        assert values.data_ptr() not in kept
        added(layer, values, down, up)
        assert values.data_ptr() in kept


# Joined


def _storages(*layers: nn.Module) -> set[int]:
    return {one.untyped_storage().data_ptr() for layer in layers for one in layer.parameters()}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_joined_layers_keep_their_weights_once_and_give_the_outputs_of_all(
    kind: type[Int8Linear] | type[Float8Linear] | None, bias: bool
) -> None:
    plain = [_layer(bias, rows, rows) for rows in (32, 48, 80)]
    layers = [one if kind is None else kind.of(one) for one in plain]
    before = [one(_values()).detach() for one in layers]
    whole = joined(layers)
    assert whole is not None and whole.out_features == 160
    assert _storages(whole) == _storages(*layers) and len(_storages(whole)) == 1 + bias
    assert all(torch.equal(one(_values()), other) for one, other in zip(layers, before, strict=True))
    output, gradient = _both_ways(whole, _values())
    assert _error(output, torch.cat(before, dim=-1)) < 1e-6
    apart = lambda values: torch.cat([one(values) for one in layers], dim=-1)  # noqa: E731
    # Gradients of float8 are rounded by rows of what is joined, otherwise than apart.
    assert _error(gradient, _both_ways(apart, _values())[1]) < (5e-2 if kind is Float8Linear else 1e-6)


def test_layers_that_are_unlike_are_not_joined() -> None:
    assert joined([_layer(), Int8Linear.of(_layer())]) is None
    assert joined([Float8Linear.of(_layer()), Int8Linear.of(_layer())]) is None
    assert joined([_layer(), _layer(bias=False)]) is None

    class Other(nn.Linear):
        pass

    assert joined([Other(96, 8), Other(96, 8)]) is None


# State


@pytest.mark.parametrize("kind", KINDS)
def test_a_layers_state_can_be_kept_moved_and_put_back(kind: type[Int8Linear] | type[Float8Linear]) -> None:
    quick, other = kind.of(_layer()), kind.of(_layer(seed=7))
    expected = quick(_values())
    assert not torch.equal(other(_values()), expected)
    other.load_state_dict(quick.state_dict())
    assert torch.equal(other(_values()), expected)
    assert torch.equal(deepcopy(quick).to(CPU)(_values()), expected)
    away = deepcopy(quick).to("meta")
    assert {one.device.type for one in (*away.parameters(), *away.buffers())} == {"meta"}
    assert {one.dtype for one in away.parameters()} == {one.dtype for one in quick.parameters()}
    held = sum(one.nbytes for one in (*quick.parameters(), *quick.buffers()))
    assert held == 80 * 96 + 2 * 80 * 4  # a byte a number, a scale a row, the bias


# What multiplies float8


@pytest.mark.parametrize(("capability", "can"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_a_gpu_without_float8_is_refused_with_what_there_is_instead(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], can: bool
) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "an old one")
    assert multiplies_float8(CUDA) == can and multiplies_float8(CPU)
    for precision in ("no_change", "int8-quanto", "int8-torchao", "fp8-quanto"):
        check_precision(precision, CUDA)
    check_precision("fp8-torchao", CPU)
    if can:
        monkeypatch.setattr("families.quantize._tried", lambda _: None)
        check_precision("fp8-torchao", CUDA)
        monkeypatch.setattr("families.quantize._tried", lambda _: "no such kernel")
    with pytest.raises(
        UserError, match=r"base_model_precision: fp8-torchao .* an old one .* int8-quanto, or fp8-quanto"
    ):
        check_precision("fp8-torchao", CUDA)


def test_neither_a_run_nor_a_sample_loads_anything_then(
    make_project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object, **__: object) -> nn.Module:
        raise AssertionError("nothing is to be loaded")

    project = open_project(make_project(photos=2, base_model_precision="fp8-torchao"))
    scan(project), pairs(project), cache(project)
    monkeypatch.setattr("families.quantize.multiplies_float8", lambda _: False)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda _: "an old one")
    for dry in (True, False):
        with pytest.raises(UserError, match="fp8-torchao multiplies in float8"):
            run(project, dry_run=dry, load=loaded)
    assert not project.run_folder.exists()
    with pytest.raises(UserError, match="fp8-torchao multiplies in float8"):
        sample(project, Request("add colour"))
