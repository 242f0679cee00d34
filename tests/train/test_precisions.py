"""Every precision with every kind of adapter learns, trains all its tensors, and gives a file that loads again."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from families import flux, open_project
from families.checkpoints import locate
from families.protocol import TextEmbeds
from families.quantize import quantize_and_place
from schemas.project import Project
from schemas.trainer import TrainerConfig
from train.adapter import LORA_NAME, adapter_layers, add_adapter, check_gradients, save_adapter
from train.data import Batch
from train.memory import checkpoint_blocks
from train.step import base_dtype, step_loss

CPU = torch.device("cpu")
PRECISIONS = ("no_change", "int8-quanto", "int4-quanto", "int2-quanto", "fp8-quanto", "int8-torchao", "fp8-torchao")
STEPS = 15


def _batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    latents, noise, reference = (torch.randn(1, 16, 4, 6, generator=generator) for _ in range(3))
    text = torch.randn(1, 8, 64, generator=generator), torch.randn(1, 32, generator=generator)
    return Batch(("a",), (1,), latents, noise, (reference,), TextEmbeds(*text, (5,)))


def _quantised(project: Project) -> nn.Module:
    config = project.trainer
    denoiser = flux.load_denoiser(locate(project, project.family.denoiser), base_dtype(config)).requires_grad_(False)
    spared = project.family.unquantised
    return quantize_and_place(denoiser, config.base_model_precision, spared, CPU, config.quantize_via)


def _predicted(denoiser: nn.Module, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        time, guidance = torch.tensor([0.5]), torch.ones(1)
        return flux.velocity(denoiser.eval(), batch.noise, batch.references, batch.text, time, guidance)


@pytest.mark.parametrize("checkpointing", [True, False], ids=["recomputed", "kept"])
@pytest.mark.parametrize("kind", ["standard", "lycoris"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_trains_every_adapter_and_its_file_loads_into_diffusers(
    make_project: Callable[..., Path], tmp_path: Path, precision: str, kind: str, checkpointing: bool
) -> None:
    options = {"base_model_precision": precision, "lora_type": kind, "flux_lora_target": "all+ffs"}
    project = open_project(make_project(photos=1, mixed_precision="bf16", learning_rate=5e-3, **options))
    denoiser, batch = _quantised(project), _batch()
    parameters = add_adapter(denoiser, project)
    assert len(parameters) == 2 * 23
    assert all(one.dtype == torch.float32 for one in parameters)
    if checkpointing:
        checkpoint_blocks(flux, denoiser, TrainerConfig())
    optimizer = torch.optim.AdamW(parameters, lr=project.trainer.learning_rate)
    losses = []
    for step in range(1, STEPS + 1):
        loss = step_loss(flux, denoiser.train(), batch, step, project.trainer)
        loss.backward()
        check_gradients(denoiser.named_parameters(), project)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert all(math.isfinite(one) for one in losses)
    assert losses[-1] < 0.95 * losses[0], losses

    save_adapter(tmp_path, project, denoiser, adapter_layers(denoiser), {})
    fresh = _quantised(project)
    untrained = _predicted(fresh, batch)
    fresh.load_lora_adapter(tmp_path, weight_name=LORA_NAME, prefix="transformer")
    for parameter in parameters:  # pipelines hold adapters in the dtype of their model
        parameter.data = parameter.data.to(torch.bfloat16)
    loaded = _predicted(fresh, batch)
    assert torch.equal(loaded, _predicted(denoiser, batch))
    assert not torch.equal(loaded, untrained)


def _dequantised(network: nn.Module) -> nn.Module:
    """Replace quantised layers by plain ones with the very same weights."""
    layers = [(name, one) for name, one in network.named_modules() if isinstance(one, nn.Linear)]
    for name, layer in layers:
        if type(layer) is not nn.Linear:
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            given = torch.cat([torch.eye(layer.in_features), torch.zeros(1, layer.in_features)])
            *columns, bias = layer(given).detach()
            plain.weight.data = (torch.stack(columns) - bias).t().contiguous()
            if layer.bias is not None:
                plain.bias.data = bias
            network.set_submodule(name, plain.requires_grad_(False))
    return network


def _gradients(denoiser: nn.Module, project: Project) -> torch.Tensor:
    """Return all gradients of one step of an adapter that has left its start."""
    generator = torch.Generator().manual_seed(3)
    parameters = add_adapter(denoiser, project)
    for parameter in parameters:
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    step_loss(flux, denoiser, _batch(), 1, project.trainer).backward()
    return torch.cat([parameter.grad.flatten() for parameter in parameters])


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_gradients_are_those_of_the_same_weights_unquantised(make_project: Callable[..., Path], precision: str) -> None:
    project = open_project(make_project(photos=1, mixed_precision="no", base_model_precision=precision))
    network = _dequantised(_quantised(project))
    assert {type(one) for one in network.modules() if isinstance(one, nn.Linear)} == {nn.Linear}
    found, expected = _gradients(_quantised(project), project), _gradients(network, project)
    most = 0.1 if precision == "fp8-torchao" else 1e-5  # what weights meet is rounded too, to 4 bits in narrow rows
    assert 0 < (found - expected).norm() < most * expected.norm()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_trains_in_float32_too(make_project: Callable[..., Path], precision: str) -> None:
    project = open_project(make_project(photos=1, mixed_precision="no", base_model_precision=precision))
    denoiser, batch = _quantised(project), _batch()
    optimizer = torch.optim.AdamW(add_adapter(denoiser, project), lr=5e-3)
    losses = []
    for step in range(1, 5):
        loss = step_loss(flux, denoiser, batch, step, project.trainer)
        loss.backward()
        check_gradients(denoiser.named_parameters(), project)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
