"""Norm and rotary embedding by kernels: processors that call them, when they are taken, and what they compute."""

import importlib.util
import logging
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor, nn

from families import flux, flux2, processors, rotary
from families.rotary import fuse_rotary, use_turned
from schemas import console

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
FAMILIES = [flux, flux2]


def _network(family: ModuleType) -> nn.Module:
    torch.manual_seed(0)
    kind = FluxTransformer2DModel if family is flux else Flux2Transformer2DModel
    own = {"pooled_projection_dim": 32} if family is flux else {"timestep_guidance_channels": 32}
    network = kind(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=3,
        joint_attention_dim=24,
        axes_dims_rope=(4, 4, 8) if family is flux else (4, 4, 4, 4),
        guidance_embeds=False,
        **own,
    )
    with torch.no_grad():
        for name, one in network.named_parameters():
            if "norm" in name and one.dim() == 1:
                one.normal_(1.0, 0.3)
    return network


def _both_ways(family: ModuleType, network: nn.Module) -> list[Tensor]:
    """Return the prediction of two samples, and the gradients of all weights."""
    generator = torch.Generator().manual_seed(1)
    axes = 3 if family is flux else 4
    inputs = {
        "hidden_states": torch.randn(2, 11, 16, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 24, generator=generator),
        "timestep": torch.tensor([0.3, 0.8]),
        "img_ids": torch.randint(0, 9, (11, axes), generator=generator).float(),
        "txt_ids": torch.randint(0, 9, (5, axes), generator=generator).float(),
    }
    if family is flux:
        inputs["pooled_projections"] = torch.randn(2, 32, generator=generator)
    network.zero_grad()
    output = network(**inputs, return_dict=False)[0]
    output.square().mean().backward()
    return [output.detach(), *(one.grad.clone() for one in network.parameters() if one.grad is not None)]


def _processors(network: nn.Module) -> list[Any]:
    return [one.processor for one in network.modules() if hasattr(one, "processor")]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_processors_compute_what_diffusers_own_do_to_the_bit(family: ModuleType, fused: bool) -> None:
    network = _network(family)
    if fused:
        network.fuse_qkv_projections()
    expected = _both_ways(family, network)
    use_turned(family, network)
    assert {type(one).__module__ for one in _processors(network)} == {processors.__name__}
    found = _both_ways(family, network)
    assert len(found) == len(expected) > 30
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_attention_hands_over_parts_that_are_turned_and_nothing_else(
    family: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, calls = _network(family), []
    use_turned(family, network)

    def counted(query: Any, key: Any, turning: Any) -> Any:
        calls.append([values.shape[1] for values, _ in [*query, *key]])
        return rotary.turned(query, key, turning)

    monkeypatch.setattr(processors, "turned", counted)
    _both_ways(family, network)
    assert calls == [[5, 11, 5, 11]] * 2 + [[16, 16]] * 2


def test_the_backend_of_attention_stays_the_one_that_was_chosen() -> None:
    network = _network(flux)
    for one in _processors(network):
        one._attention_backend = AttentionBackendName._NATIVE_MATH
    use_turned(flux, network)
    assert {one._attention_backend for one in _processors(network)} == {AttentionBackendName._NATIVE_MATH}


def test_a_processor_that_is_not_diffusers_usual_one_stays() -> None:
    class Other(processors.FluxAttnProcessor):
        pass

    network = _network(flux)
    network.transformer_blocks[0].attn.set_processor(Other())
    use_turned(flux, network)
    assert [type(one) for one in _processors(network)] == [Other] + [processors.FluxTurned] * 3


def test_the_cpu_float32_and_a_machine_without_triton_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    network = _network(flux)
    before = _processors(network)
    assert not fuse_rotary(flux, network, CPU, half=True)
    assert not fuse_rotary(flux, network, CUDA, half=False)
    monkeypatch.setattr(rotary, "kernels", None)
    assert not fuse_rotary(flux, network, CUDA, half=True)
    assert all(one is other for one, other in zip(_processors(network), before, strict=True))


def test_what_fails_is_told_in_one_line_and_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(console.log, "propagate", True)
    monkeypatch.setattr(rotary, "kernels", SimpleNamespace(forward=broken, FAULTS=(RuntimeError,)))
    assert rotary._tried(CPU, 3, 16) == "no compiler"
    assert rotary._tried(CPU, 3, 24) == "heads are 24 numbers wide, no power of two"
    network = _network(flux)
    before = _processors(network)
    monkeypatch.setattr(rotary, "_tried", lambda *_: "relative error 3")
    with caplog.at_level(logging.WARNING):
        assert not fuse_rotary(flux, network, CUDA, half=True)
    assert [one.getMessage() for one in caplog.records] == [
        "rotary embedding by a kernel fails its self-test here (relative error 3): PyTorch's own is used"
    ]
    assert all(one is other for one, other in zip(_processors(network), before, strict=True))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_kernels_compute_what_plain_operations_do() -> None:
    script = Path(__file__).with_name("interpreted.py")
    told = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert float(told.stdout) < 1e-6
