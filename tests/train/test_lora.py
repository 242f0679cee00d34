"""LoRA in few products gives the numbers of peft's own layers, and files with the same names."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import LoKrConfig, LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn

from families import FAMILIES, flux, flux2
from families.protocol import TextEmbeds
from families.quantize import quantize_and_place
from train.adapter import adapter_layers, load_adapter
from train.fusing import fuse
from train.lora import JoinedLora, LeanLora, make_lean

CPU = torch.device("cpu")
LAYERS = {"flux": FAMILIES["flux"].lora_targets["all+ffs"], "flux2": FAMILIES["flux2"].lora_targets["all"]}
FAMILY = {"flux": flux, "flux2": flux2}


@pytest.fixture
def adapted(tiny_models: Path, tiny_flux2: Path) -> Callable[..., nn.Module]:
    """Load a tiny network with an adapter that changes much, the same each time."""
    folders = {"flux": tiny_models / "tiny-flux-kontext", "flux2": tiny_flux2 / "klein-4b"}

    def made(
        name: str, *, fused: bool = False, precision: str = "no_change", kind: str = "lora", dropout: float = 0.0
    ) -> nn.Module:
        denoiser = FAMILY[name].load_denoiser(folders[name], torch.float32).requires_grad_(False)
        if fused:
            fuse(denoiser)
        quantize_and_place(denoiser, precision, FAMILIES[name].unquantised, CPU, "cpu")
        config = {"r": 4, "target_modules": LAYERS[name]}
        if kind == "lora":
            denoiser.add_adapter(LoraConfig(**config, lora_alpha=6, lora_dropout=dropout, init_lora_weights=False))
        else:
            denoiser.add_adapter(LoKrConfig(**config, decompose_factor=4))
        generator = torch.Generator().manual_seed(3)
        for one in denoiser.parameters():
            if one.requires_grad:
                one.data = 0.1 * torch.randn(one.shape, generator=generator)
        return denoiser.train()

    return made


def _both_ways(family: ModuleType, denoiser: nn.Module) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the output of a pass, and all gradients."""
    generator = torch.Generator().manual_seed(1)
    channels, pooled = (16, torch.randn(2, 32, generator=generator)) if family is flux else (128, None)
    noisy, reference = (torch.randn(2, channels, *size, generator=generator) for size in ((4, 6), (6, 4)))
    embed = torch.randn(2, 8, denoiser.config.joint_attention_dim, generator=generator)
    guidance = torch.ones(2) if family.takes_guidance(denoiser) else None
    denoiser.zero_grad()
    torch.manual_seed(5)
    text = TextEmbeds(embed, pooled, (5, 5))
    output = family.velocity(denoiser, noisy, [reference], text, torch.full((2,), 0.5), guidance)
    output.square().mean().backward()
    return output.detach(), {name: one.grad for name, one in denoiser.named_parameters() if one.requires_grad}


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(("fused", "join"), [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("name", FAMILY)
def test_lean_lora_is_pefts_own(adapted: Callable[..., nn.Module], name: str, fused: bool, join: bool) -> None:
    expected, gradients = _both_ways(FAMILY[name], adapted(name, fused=fused))
    denoiser = adapted(name, fused=fused)
    make_lean(denoiser, join=join)
    assert sum(type(one) is LeanLora for one in denoiser.modules()) == len(gradients) / 2 > 10
    assert not any(type(one) is LoraLinear for one in denoiser.modules())
    assert any(type(one) is JoinedLora for one in denoiser.modules()) == (join and not fused)
    output, found = _both_ways(FAMILY[name], denoiser)
    assert _error(output, expected) < 1e-6
    assert found.keys() == gradients.keys() and all(one.any() for one in gradients.values())
    assert all(_error(found[one], gradients[one]) < 5e-6 for one in gradients)
    flat, exact = (torch.cat([one[name].flatten() for name in gradients]) for one in (found, gradients))
    assert _error(flat, exact) < 1e-6


@pytest.mark.parametrize("precision", ["int8-quanto", "int4-quanto", "fp8-torchao"])
def test_lean_lora_on_quantised_weights_is_pefts_own(adapted: Callable[..., nn.Module], precision: str) -> None:
    expected, gradients = _both_ways(flux, adapted("flux", precision=precision))
    denoiser = adapted("flux", precision=precision)
    make_lean(denoiser, join=True)
    assert any(type(one) is JoinedLora for one in denoiser.modules()) == (precision != "int4-quanto")
    output, found = _both_ways(flux, denoiser)
    # What float8 rounds of is rounded otherwise where inputs differ by a last bit, and gradients are where q, k, v join.
    most = 5e-2 if precision == "fp8-torchao" else 1e-6
    assert _error(output, expected) < most
    flat, exact = (torch.cat([one[name].flatten() for name in gradients]) for one in (found, gradients))
    assert _error(flat, exact) < 2 * most


@pytest.mark.parametrize("options", [{"kind": "lokr"}, {"dropout": 0.5}], ids=str)
def test_other_adapters_and_dropout_stay_as_they_are(
    adapted: Callable[..., nn.Module], options: dict[str, object]
) -> None:
    expected, gradients = _both_ways(flux, adapted("flux", **options))
    denoiser = adapted("flux", **options)
    before = [type(one) for one in denoiser.modules()]
    make_lean(denoiser, join=True)
    assert [type(one) for one in denoiser.modules()] == before
    output, found = _both_ways(flux, denoiser)
    assert torch.equal(output, expected)
    assert all(torch.equal(found[one], gradients[one]) for one in gradients)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", FAMILY)
def test_what_is_trained_has_the_same_names_and_can_be_put_back(
    adapted: Callable[..., nn.Module], name: str, fused: bool
) -> None:
    plain, lean = adapted(name, fused=fused), adapted(name, fused=fused)
    make_lean(lean, join=True)
    assert [key for key, one in lean.named_parameters() if one.requires_grad] == [
        key for key, one in plain.named_parameters() if one.requires_grad
    ]
    layers = adapter_layers(plain)
    assert list(adapter_layers(lean)) == list(layers)
    with torch.no_grad():
        for one in lean.parameters():
            if one.requires_grad:
                one.zero_()
    load_adapter(lean, layers)
    assert all(torch.equal(one, layers[key]) for key, one in adapter_layers(lean).items())
    expected, _ = _both_ways(FAMILY[name], plain)
    assert _error(_both_ways(FAMILY[name], lean)[0], expected) < 1e-6


def test_joined_weights_are_kept_once(adapted: Callable[..., nn.Module]) -> None:
    def held(denoiser: nn.Module) -> int:
        storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in denoiser.parameters()}
        return sum(storages.values())

    for precision in ("no_change", "int8-quanto", "fp8-torchao"):
        denoiser = adapted("flux", precision=precision)
        before = held(denoiser)
        make_lean(denoiser, join=True)
        assert held(denoiser) == before


@pytest.mark.parametrize("name", FAMILY)
def test_an_adapter_that_is_off_changes_nothing(adapted: Callable[..., nn.Module], name: str) -> None:
    found = []
    for lean in (False, True):
        denoiser = adapted(name)
        if lean:
            make_lean(denoiser, join=True)
        trained, _ = _both_ways(FAMILY[name], denoiser)
        denoiser.disable_adapters()
        denoiser.requires_grad_(True)  # there is nothing else to take gradients of
        plain, _ = _both_ways(FAMILY[name], denoiser)
        assert _error(plain, trained) > 0.01
        found.append(plain)
    assert _error(*found) < 1e-6
