"""Which layers are quantised, how much is lost, where they end up, and why it is done before an adapter is added."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from optimum.quanto import QTensor
from peft import LoraConfig
from torch import nn

from families import FAMILIES, flux, open_project
from families.checkpoints import locate
from families.products import Float8Linear, Int8Linear
from families.protocol import TextEmbeds
from families.quantize import quantize_and_place

CPU = torch.device("cpu")
SPARED = FAMILIES["flux"].unquantised
# Relative error of the tiny model's output, as measured.
LOSS = {
    "int8-quanto": 0.0008, "int4-quanto": 0.014, "int2-quanto": 0.068, "fp8-quanto": 0.0048, "int8-torchao": 0.0007,
    "fp8-torchao": 0.0048,
}  # fmt: skip


@pytest.fixture
def load(make_project: Callable[..., Path]) -> Callable[[torch.dtype], nn.Module]:
    """Load the tiny transformer, frozen, from its file."""
    project = open_project(make_project(photos=1))
    checkpoint = locate(project, project.family.denoiser)
    return lambda dtype: flux.load_denoiser(checkpoint, dtype).requires_grad_(False)


def _output(network: nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noisy, reference = (torch.randn(1, 16, 8, 8, generator=generator) for _ in range(2))
    text = TextEmbeds(torch.randn(1, 8, 64, generator=generator), torch.randn(1, 32, generator=generator), (5,))
    with torch.no_grad():
        return flux.velocity(network, noisy, [reference], text, torch.tensor([0.4]), torch.ones(1)).float()


def _quantised_layers(network: nn.Module) -> set[str]:
    named, own = network.named_modules(), (Int8Linear, Float8Linear)
    return {name for name, one in named if isinstance(one, own) or isinstance(getattr(one, "weight", None), QTensor)}


@pytest.mark.parametrize("precision", LOSS)
def test_all_linear_layers_are_quantised_but_the_three_that_carry_the_picture(
    load: Callable[[torch.dtype], nn.Module], precision: str
) -> None:
    network = load(torch.bfloat16)
    linear = {name for name, module in network.named_modules() if isinstance(module, nn.Linear)}
    assert set(SPARED) < linear
    quantised = _quantised_layers(quantize_and_place(network, precision, SPARED, CPU, "accelerator"))
    assert quantised == linear - set(SPARED)
    assert "single_transformer_blocks.0.proj_out" in quantised
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("precision", LOSS)
def test_what_is_lost_is_what_the_bits_allow(load: Callable[[torch.dtype], nn.Module], precision: str) -> None:
    exact = _output(load(torch.float32))
    quantised = quantize_and_place(load(torch.float32), precision, SPARED, CPU, "cpu")
    error = ((_output(quantised) - exact).norm() / exact.norm()).item()
    assert LOSS[precision] / 2 < error < LOSS[precision] * 2


@pytest.mark.parametrize("precision", LOSS)
def test_the_way_of_quantising_does_not_show(load: Callable[[torch.dtype], nn.Module], precision: str) -> None:
    ways = [quantize_and_place(load(torch.bfloat16), precision, SPARED, CPU, via) for via in ("cpu", "accelerator")]
    assert torch.equal(_output(ways[0]), _output(ways[1]))


@pytest.mark.parametrize("via", ["cpu", "accelerator"])
def test_without_quantisation_every_tensor_is_moved(load: Callable[[torch.dtype], nn.Module], via: str) -> None:
    network = quantize_and_place(load(torch.bfloat16), "no_change", SPARED, torch.device("meta"), via)
    tensors = [*network.parameters(), *network.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert {tensor.dtype for tensor in network.parameters()} == {torch.bfloat16}


def test_an_adapter_that_is_there_before_would_be_quantised_as_well(load: Callable[[torch.dtype], nn.Module]) -> None:
    network = load(torch.bfloat16)
    network.add_adapter(LoraConfig(r=4, target_modules=FAMILIES["flux"].lora_targets["all"]))
    network = quantize_and_place(network, "int8-quanto", SPARED, CPU, "cpu")
    assert any("lora_A" in name for name in _quantised_layers(network))
    network = quantize_and_place(load(torch.bfloat16), "int8-quanto", SPARED, CPU, "cpu")
    network.add_adapter(LoraConfig(r=4, target_modules=FAMILIES["flux"].lora_targets["all"]))
    assert not any("lora_" in name for name in _quantised_layers(network))


def test_frozen_weights_of_quanto_keep_their_dtype(load: Callable[[torch.dtype], nn.Module]) -> None:
    network = quantize_and_place(load(torch.bfloat16), "fp8-quanto", SPARED, CPU, "cpu")
    with pytest.raises(ValueError, match="dtype"):
        network.to(torch.float32)


def test_libraries_say_nothing_when_they_are_imported_beside_each_other() -> None:
    code = "import families.quantize, train.adapter, diffusers"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(("precision", "most"), [("int4-quanto", 0.1), ("int2-quanto", 0.5)])
def test_nothing_is_compiled_for_few_bits(monkeypatch: pytest.MonkeyPatch, precision: str, most: float) -> None:
    def refuse(**_: object) -> None:
        raise RuntimeError("there is no compiler")

    monkeypatch.setattr("optimum.quanto.library.extensions.extension.load", refuse)
    layer, given = nn.Linear(128, 256, dtype=torch.bfloat16).requires_grad_(False), torch.randn(3, 128)
    exact = layer(given.to(torch.bfloat16))
    quantised = quantize_and_place(nn.Sequential(layer), precision, (), CPU, "cpu")
    error = (quantised(given.to(torch.bfloat16)) - exact).norm() / exact.norm()
    assert error < most
