"""What is counted of a step without computing it, against what computing it counts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from families import open_project
from families.protocol import TextEmbeds
from families.quantize import quantize_and_place
from families.runtime import family_of
from families.shapes import config_of, random_denoiser
from schemas.project import Project
from schemas.trainer import BasePrecision
from train.adapter import add_adapter
from train.costs import Shaped, Sizes, costs_of, shaped
from train.devices import DEVICES, H200, device_named
from train.estimate import _STATES, PRECISIONS, peak_bytes, seconds, trained_bytes, weights_of
from train.optimizer import OPTIMIZERS

CPU = torch.device("cpu")
ONE_REFERENCE = Sizes((128, 128), ((128, 96),))
CHOICE = {
    "base_model_precision": "no_change", "dynamo_backend": "inductor", "gradient_checkpointing": False,
    "gradient_checkpointing_interval": 1, "gradient_checkpointing_keep": "nothing",
    "gradient_checkpointing_backend": "torch", "enable_group_offload": False, "group_offload_use_stream": True,
    "group_offload_blocks_per_group": 1,
}  # fmt: skip
UNSEEN = {"pretrained_model_name_or_path": "nobody/has-this", "lora_rank": 16}
MODELS = [
    {"flux_lora_target": "all+ffs"},
    {"flux_lora_target": "all+ffs+embedder"},
    {"model_family": "flux2", "model_flavour": "klein-4b"},
    {"model_family": "flux2", "model_flavour": "dev"},
]


@pytest.fixture
def project_with(make_project: Callable[..., Path]) -> Callable[..., Project]:
    return lambda **options: open_project(make_project(max_sequence_length=32, mixed_precision="bf16", **options))


@pytest.fixture
def full_size(make_project: Callable[..., Path]) -> Callable[..., Shaped]:
    """The network of Kontext as published, without memory."""

    def made(**options: Any) -> Shaped:
        named = {"flux_lora_target": "all+ffs", "mixed_precision": "bf16", **UNSEEN} | options
        return shaped(open_project(make_project(**named)))

    return made


def _pass(project: Project, backward: bool) -> int:
    """Return the operations of a real pass over two samples."""
    family = family_of(project)
    network = random_denoiser(family, config_of(project), torch.float32, CPU)
    add_adapter(network, project)
    spec, config = project.family, network.config
    text = TextEmbeds(torch.randn(2, 32, config[spec.text_input]), None, (32, 32))
    if spec.pooled_width is not None:
        text = TextEmbeds(text.embed, torch.randn(2, config[spec.pooled_input]), (32, 32))

    def latents(width: int, height: int) -> Tensor:
        return torch.randn(2, spec.latent_channels.usual, height // spec.latent_scale, width // spec.latent_scale)

    guidance = torch.ones(2) if family.takes_guidance(network) else None
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # attention as products, which count
        found = family.velocity(network, latents(128, 128), [latents(128, 96)], text, torch.ones(2), guidance)
        if backward:
            found.square().mean().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("options", MODELS)
def test_operations_are_those_that_a_pass_counts(project_with: Callable[..., Project], options: dict[str, Any]) -> None:
    project = project_with(**options)
    costs = costs_of(shaped(project), ONE_REFERENCE, 2)
    forward = costs.forward_frozen + costs.adapter + costs.attention
    assert forward == pytest.approx(_pass(project, backward=False), rel=0.01)
    assert costs.operations == pytest.approx(_pass(project, backward=True), rel=0.03)
    assert costs.tokens == 2 * (32 + family_of(project).num_tokens(_latent(project, 128, 128))
                                + family_of(project).num_tokens(_latent(project, 128, 96)))  # fmt: skip


def _latent(project: Project, width: int, height: int) -> tuple[int, int, int]:
    return 1, height // project.family.latent_scale, width // project.family.latent_scale


def test_gradients_stop_at_the_first_layer_that_is_trained(full_size: Callable[..., Shaped]) -> None:
    late = costs_of(full_size(flux_lora_target="nano"), ONE_REFERENCE, 1)
    assert [block.trains for block in late.blocks].index(True) == 19 + 7
    assert all(block.kept == 0 for block in late.blocks if not block.trains)
    assert not any(one.flows for one in late.products if one.block is not None and one.block < 26)


def test_what_blocks_keep_is_what_the_docstring_derives(full_size: Callable[..., Shaped]) -> None:
    blocks = costs_of(full_size(), Sizes((1024, 1024), ((1024, 1024),)), 1).blocks
    assert [blocks[0].kept / blocks[0].inputs, blocks[-1].kept / blocks[-1].inputs] == [19, 17]
    assert blocks[0].inputs == 8704 * 3072 * 2


def _bytes(tensor: Any) -> int:
    """Count the bytes of a tensor, of one that is made of others those of these."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.numel() * tensor.itemsize
    return sum(_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("options", [MODELS[0], MODELS[2]])
def test_bytes_of_weights_are_those_of_quantised_ones(
    project_with: Callable[..., Project], options: dict[str, Any], precision: str
) -> None:
    project = project_with(base_model_precision=precision, **options)
    network = random_denoiser(family_of(project), config_of(project), torch.bfloat16, CPU)
    quantize_and_place(network, precision, project.family.unquantised, CPU, "cpu")
    real = sum(_bytes(one) for one in (*network.parameters(), *network.buffers()))
    assert weights_of(shaped(project), precision).total == real


def test_estimates_are_near_what_an_h200_measured(full_size: Callable[..., Shaped]) -> None:
    shape = full_size()
    costs = costs_of(shape, Sizes((1024, 1024), ((1024, 1024),)), 1)

    def estimated(**options: Any) -> tuple[float, float]:
        choice = CHOICE | options
        weights = weights_of(shape, choice["base_model_precision"])
        return seconds(costs, weights, choice, H200), peak_bytes(costs, weights, trained_bytes(shape), choice) / 2**30

    eager = {"dynamo_backend": "no", "gradient_checkpointing": True}
    assert estimated() == pytest.approx((0.795, 74.3), rel=0.03)
    assert estimated(gradient_checkpointing=True) == pytest.approx((1.046, 27.1), rel=0.02)
    quick = {"base_model_precision": "fp8-torchao", "gradient_checkpointing_keep": "attention"}
    assert estimated(gradient_checkpointing=True, **quick) == pytest.approx((0.779, 19.0), rel=0.07)
    assert estimated(**eager) == pytest.approx((1.622, 28.2), rel=0.02)
    assert estimated(**eager)[1] - estimated(**eager, base_model_precision="int8-quanto")[1] == pytest.approx(
        11, rel=0.05
    )
    assert estimated(**eager, enable_group_offload=True)[1] == pytest.approx(6.6, rel=0.2)


def test_estimates_order_as_what_is_saved_and_computed_twice(full_size: Callable[..., Shaped]) -> None:
    shape = full_size()
    small, large = (costs_of(shape, Sizes((side, side), ()), 1) for side in (512, 1024))
    twice = costs_of(shape, Sizes((512, 512), ()), 2)

    def estimated(costs: Any, **options: Any) -> tuple[float, float]:
        choice = CHOICE | options
        weights = weights_of(shape, choice["base_model_precision"])
        return seconds(costs, weights, choice, H200), peak_bytes(costs, weights, trained_bytes(shape), choice)

    assert twice.operations == 2 * small.operations
    for options in ({}, {"gradient_checkpointing": True}, {"dynamo_backend": "no"}):
        assert all(
            less < more for less, more in zip(estimated(small, **options), estimated(large, **options), strict=True)
        )
    full = {"gradient_checkpointing": True}
    ways = [
        {}, full | {"gradient_checkpointing_interval": 2}, full | {"gradient_checkpointing_keep": "attention"}, full,
        full | {"gradient_checkpointing_backend": "unsloth"},
        full | {"gradient_checkpointing_backend": "unsloth", "enable_group_offload": True},
    ]  # fmt: skip
    peaks = [estimated(large, **one)[1] for one in ways]
    assert peaks == sorted(peaks, reverse=True) and len(set(peaks)) == len(peaks)
    assert estimated(large)[0] < estimated(large, **ways[2])[0] < estimated(large, **full)[0]
    by_bits = [weights_of(shape, one).total for one in ("no_change", "int8-quanto", "int4-quanto", "int2-quanto")]
    assert by_bits == sorted(by_bits, reverse=True)
    assert estimated(large, base_model_precision="fp8-torchao")[0] < estimated(large)[0]


def test_every_precision_and_optimiser_is_estimated() -> None:
    assert set(PRECISIONS) == set(get_args(BasePrecision)) and set(_STATES) == set(OPTIMIZERS)


@pytest.mark.parametrize(("called", "name", "gib"), [
    ("NVIDIA H200", "H200", 139.8), ("NVIDIA H200 NVL", "H200 NVL", 139.8), ("H200 141GB", "H200", 139.8),
    ("NVIDIA H100 80GB HBM3", "H100", 79.2), ("NVIDIA H100 PCIe", "H100 PCIe", 79.2), ("h100 80 GB", "H100", 79.2),
    ("NVIDIA H100 NVL", "H100 NVL", 93.1), ("H100 94GB", "H100 NVL", 93.1), ("H100 64GB", "H100 64GB", 64),
    ("NVIDIA A100-SXM4-80GB", "A100", 79.2), ("NVIDIA A100 80GB PCIe", "A100", 79.2), ("A100", "A100", 79.2),
    ("NVIDIA A100-SXM4-40GB", "A100 40GB", 39.4), ("A100-PCIE-40GB", "A100 40GB", 39.4),
    ("A100 40 gb", "A100 40GB", 39.4), ("NVIDIA GeForce RTX 5090", "RTX 5090", 31.4), ("4090", "RTX 4090", 23.5),
    ("RTX 4090 48GB", "RTX 4090 48GB", 48), ("nvidia rtx 3090", "RTX 3090", 23.6), ("3090 24GB", "RTX 3090", 23.6),
])  # fmt: skip
def test_accelerators_are_known_by_what_pytorch_calls_them(called: str, name: str, gib: float) -> None:
    found = device_named(called)
    assert found is not None and (found.name, found.gib) == (name, gib)


@pytest.mark.parametrize("called", [
    "cpu", "", "100", "00", "RTX", "NVL", "PCIe", "NVIDIA", "80GB", "Tesla T4", "NVIDIA RTX A6000", "NVIDIA GH200 480GB",
    "NVIDIA GeForce RTX 5090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "RTX 3090 Ti", "4090 Max-Q", "RTX 40901",
    "NVIDIA A100-SXM4-80GB MIG 3g.40gb", "A100X",
])  # fmt: skip
def test_accelerators_of_names_alike_are_others(called: str) -> None:
    assert device_named(called) is None


def test_rates_are_less_than_peaks() -> None:
    assert all(one.products < one.peak and one.attention_both < one.attention < one.peak for one in DEVICES)
    assert len({one.name for one in DEVICES}) == len(DEVICES) and all(device_named(one.name) == one for one in DEVICES)
