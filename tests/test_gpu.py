"""What only a GPU shows: the same step on it as on the CPU, and attention's backward at real shapes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig

from families import attention, flux, open_project
from families.attention import choose_attention
from families.checkpoints import encoder_keys, locate
from families.protocol import TextEmbeds
from families.quantize import quantize_and_place
from families.routing import Routing
from families.runtime import release_memory
from prep.cache import cache
from prep.pairs import pairs
from prep.scan import scan
from schemas import console
from schemas.errors import UserError
from schemas.shards import ShardIndex
from schemas.trainer import Route, TrainerConfig
from train.adapter import add_adapter
from train.data import Batch, Shelf
from train.likeness import psnr
from train.loop import run
from train.memory import checkpoint_blocks, enough_memory, offload_blocks
from train.pictures import Pictures, SampleReport, pictures_of
from train.sample import Request, sample
from train.step import in_half, step_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def _step(project: object, device: str, dtype: torch.dtype) -> tuple[float, dict[str, torch.Tensor]]:
    place = torch.device(device)
    denoiser = flux.load_denoiser(locate(project, project.family.denoiser), dtype)
    precision, via = project.trainer.base_model_precision, project.trainer.quantize_via
    quantize_and_place(denoiser.requires_grad_(False), precision, project.family.unquantised, place, via)
    choose_attention(denoiser, place, half=in_half(project.trainer))
    add_adapter(denoiser, project)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        for name, parameter in denoiser.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    generator = torch.Generator().manual_seed(1)
    latents, reference = (torch.randn(2, 16, *size, generator=generator) for size in ((32, 48), (48, 32)))
    text = torch.randn(2, 512, 64, generator=generator), torch.randn(2, 32, generator=generator)
    embeds = TextEmbeds(text[0].to(place), text[1].to(place), (5, 5))
    noise = torch.randn(latents.shape, generator=generator)
    batch = Batch(("a", "b"), (1, 2), latents.to(place), noise.to(place), (reference.to(place),), embeds)
    loss = step_loss(flux, denoiser, batch, 1, project.trainer)
    loss.backward()
    named = denoiser.named_parameters()
    return loss.item(), {name: one.grad.float().cpu() for name, one in named if one.grad is not None}


def _error(gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the relative error of all gradients together."""
    error = sum((gradients[name] - expected[name]).square().sum() for name in expected)
    return float((error / sum(one.square().sum() for one in expected.values())).sqrt())


def test_loss_and_gradients_on_the_gpu_agree_with_the_cpu(make_project: object) -> None:
    exact = open_project(make_project())
    expected, gradients = _step(exact, "cpu", torch.float32)
    loss, others = _step(exact, "cuda", torch.float32)
    assert loss == pytest.approx(expected, rel=1e-4)
    assert others.keys() == gradients.keys()
    assert _error(others, gradients) < 1e-4

    half = open_project(exact.config_path.parent, overrides=["mixed_precision=bf16"])
    rounding = _error(_step(half, "cpu", torch.bfloat16)[1], gradients)
    loss, others = _step(half, "cuda", torch.bfloat16)
    assert loss == pytest.approx(expected, rel=1e-2)
    assert _error(others, gradients) < 2 * rounding


PRECISIONS = ("no_change", "int8-quanto", "int4-quanto", "int2-quanto", "fp8-quanto", "int8-torchao", "fp8-torchao")


@pytest.mark.parametrize("kind", ["standard", "lycoris"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_all_stages_run_on_the_gpu_in_bfloat16(make_project: object, precision: str, kind: str) -> None:
    options = {"mixed_precision": "bf16", "vae_dtype": "bf16", "base_model_precision": precision, "lora_type": kind}
    project = open_project(make_project(**options))
    scan(project), pairs(project), cache(project)
    summary = run(project)
    assert summary.device.startswith("cuda")
    assert summary.last_step == 12
    assert summary.loss is not None and np.isfinite(summary.loss)


@pytest.mark.parametrize("mixed", ["bf16", "no"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_over_quantised_weights_are_those_of_the_cpu(
    make_project: object, precision: str, mixed: str
) -> None:
    options = {"base_model_precision": precision, "flux_lora_target": "all+ffs"}
    project = open_project(make_project(mixed_precision=mixed, **options))
    exact = open_project(project.config_path.parent, overrides=["mixed_precision=no"])
    expected = _step(exact, "cpu", torch.float32)[1]
    dtype = torch.bfloat16 if mixed == "bf16" else torch.float32
    found = _step(project, "cuda", dtype)[1]
    assert found.keys() == expected.keys()
    assert _error(found, expected) < (0.1 if mixed == "bf16" else 1e-3)


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_the_gpu_never_holds_all_layers_unquantised_and_the_way_there_does_not_show(precision: str) -> None:
    def network() -> torch.nn.Sequential:
        torch.manual_seed(1)
        layers = [torch.nn.Linear(2048, 2048, dtype=torch.bfloat16) for _ in range(16)]
        return torch.nn.Sequential(*layers).requires_grad_(False)

    place, picture = torch.device("cuda"), torch.randn(64, 2048, device="cuda", dtype=torch.bfloat16)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    quantised = quantize_and_place(network(), precision, (), place, "accelerator")
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 0.8 * 16 * 2048 * 2048 * 2
    moved = quantize_and_place(network(), precision, (), place, "cpu")
    one, other = quantised(picture).float(), moved(picture).float()
    assert (one - other).norm() < 0.02 * one.norm()


def _rows(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Return every row of a project's stores, as float32."""
    stores = [store for kind in ("latents", "text") for store in (folder / "work" / "cache" / kind).glob("*")]
    return {key: index.read(key) for index in map(ShardIndex, stores) for key in index._places}


def _values(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits).view(torch.bfloat16).float()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_the_gpu_encodes_is_what_the_cpu_does_within_rounding(
    make_project: object, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    folder = make_project("deblur", vae_dtype=dtype, vae_batch_size=4, text_encoder_batch_size=3)
    scan(folder), pairs(folder), cache(folder)
    found = _rows(folder)
    shutil.rmtree(folder / "work" / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        cache(folder)
    expected = _rows(folder)
    assert found.keys() == expected.keys()
    for key, row in expected.items():
        for column in ("latent", "embed", "pooled"):
            if row.get(column) is not None:
                exact = _values(row[column])
                error = (_values(found[key][column]) - exact).norm() / exact.norm()
                assert error < (0.1 if dtype == "bf16" or column != "latent" else 0.01), (column, error)


def test_real_memory_that_runs_out_halves_the_batch(
    make_project: object, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_project("deblur", vae_batch_size=16)
    sets = json.loads((folder / "multidatabackend.json").read_text())
    sets[0]["resolution"] = 1024
    (folder / "multidatabackend.json").write_text(json.dumps(sets))
    scan(folder), pairs(folder)
    monkeypatch.setattr(console.log, "propagate", True)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (250 << 20)) / total)
    try:
        summary = cache(folder)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert summary.stores[0].encoded == 12
    assert "out of memory with" in caplog.text


@pytest.mark.parametrize("tokens", [320, 1601, 8704])
def test_cudnn_attention_is_right_forwards_and_backwards_on_a_narrowed_gradient(tokens: int) -> None:
    generator = torch.Generator().manual_seed(2)
    drawn = [torch.randn(1, tokens, 4, 128, generator=generator).to("cuda", torch.bfloat16) for _ in range(3)]
    leaves = [one.requires_grad_() for one in drawn]
    gradient = torch.randn(1, tokens, 4, 256, generator=generator).to("cuda", torch.bfloat16)[..., :128]
    output = attention._cudnn(*leaves)
    found = [output, *torch.autograd.grad(output, leaves, gradient)]
    exact_leaves = [one.detach().float().requires_grad_() for one in drawn]
    exact = attention._plain(*exact_leaves)
    wanted = [exact, *torch.autograd.grad(exact, exact_leaves, gradient.float())]
    for one, other in zip(found, wanted, strict=True):
        assert (one.float() - other).norm() < 0.01 * other.norm()


def test_the_chosen_attention_is_cudnns_and_gradients_are_those_of_flash() -> None:
    place = torch.device("cuda")
    config = TrainerConfig(flux_guidance_value=1.0)
    plain = _several_blocks().to(place)
    torch.backends.cuda.enable_cudnn_sdp(False)
    expected, gradients, _ = _steps(plain, config)
    model = _several_blocks().to(place)
    assert choose_attention(model, place, half=True) == "_native_cudnn"
    losses, found, _ = _steps(model, config)
    assert losses == pytest.approx(expected, rel=1e-2)
    assert all((found[name] - one).norm() < 0.05 * one.norm() for name, one in gradients.items())


def _several_blocks() -> FluxTransformer2DModel:
    """Ten blocks of 8 to 18 MiB each, adapted, on the CPU."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        num_layers=4,
        num_single_layers=6,
        attention_head_dim=128,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=32,
    )
    model.to(torch.bfloat16).requires_grad_(False)
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v", "proj_mlp"], init_lora_weights=False))
    for one in model.parameters():
        one.data = one.data.float() if one.requires_grad else one.data
    return model.train()


def _steps(model: FluxTransformer2DModel, config: TrainerConfig) -> tuple[list[float], dict[str, torch.Tensor], int]:
    """Take two steps and a pass without gradients; returns losses, gradients and bytes in use at most."""
    place, generator = torch.device("cuda"), torch.Generator().manual_seed(1)
    latents, noise = (torch.randn(2, 16, 16, 24, generator=generator).to(place) for _ in range(2))
    embed, pooled = torch.randn(2, 32, 64, generator=generator), torch.randn(2, 32, generator=generator)
    text = TextEmbeds(embed.to(place), pooled.to(place), (5, 5))
    batch = Batch(("a", "b"), (1, 2), latents, noise, (latents[..., :8],), text)
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=1e-3)
    routing = Routing(flux.blocks(model), [Route(selection_ratio=0.5, start_layer_idx=2, end_layer_idx=-2)])
    losses, gradients = [], {}
    torch.cuda.reset_peak_memory_stats()
    for step in (1, 2):
        optimizer.zero_grad()
        loss = step_loss(flux, model, batch, step, config, routing)
        loss.backward()
        gradients = {name: one.grad.clone() for name, one in model.named_parameters() if one.requires_grad}
        optimizer.step()
        losses.append(loss.item())
        with torch.no_grad():
            losses.append(step_loss(flux, model, batch, step, config).item())
    return losses, gradients, torch.cuda.max_memory_allocated()


@pytest.mark.parametrize(
    "options",
    [{}, {"group_offload_blocks_per_group": 2}, {"group_offload_use_stream": True}],
    ids=["blocks", "pairs", "stream"],
)
def test_blocks_that_wait_on_the_cpu_change_nothing_but_memory(options: dict[str, object]) -> None:
    rollout = {"scheduled_sampling_max_step_offset": 100, "scheduled_sampling_probability": 1.0}
    config = TrainerConfig(enable_group_offload=True, flux_guidance_value=1.0, **rollout, **options)
    release_memory()
    plain = _several_blocks().to("cuda")
    choose_attention(plain, torch.device("cuda"), half=in_half(config))
    checkpoint_blocks(flux, plain, 1)
    expected, gradients, most = _steps(plain, config)
    weights = sum(one.nbytes for block in flux.blocks(plain) for one in block.module.parameters())
    del plain
    release_memory()

    model = _several_blocks()
    choose_attention(model, torch.device("cuda"), half=in_half(config))
    offload_blocks(flux, model, torch.device("cuda"), config)
    checkpoint_blocks(flux, model, 1)
    losses, found, less = _steps(model, config)
    assert losses == expected
    assert all(torch.equal(found[name], one) for name, one in gradients.items())
    assert most - less > 0.6 * weights
    away = [one for one in model.parameters() if one.device.type == "cpu"]
    assert all(not one.requires_grad and one.is_pinned() for one in away)
    assert sum(one.nbytes for one in away) > 0.7 * weights


def test_real_memory_that_runs_out_in_training_is_told_with_numbers() -> None:
    told = r"memory is full: \d+\.\d of \d+\.\d GiB were in use at most; what saves memory"
    with pytest.raises(UserError, match=told), enough_memory(TrainerConfig(), torch.device("cuda")):
        torch.empty(1 << 45, dtype=torch.uint8, device="cuda")


def _sampled(project: object, device: str, denoiser: torch.nn.Module) -> tuple[Pictures, SampleReport]:
    pictures = pictures_of(project, Shelf(project, encoder_keys(project)), torch.device(device))
    assert pictures is not None
    return pictures, pictures.sample(denoiser, 1 if device == "cpu" else 2)


@pytest.mark.parametrize("offloaded", [False, True])
def test_pictures_sampled_on_the_gpu_are_those_of_the_cpu(make_project: object, offloaded: bool) -> None:
    project = open_project(make_project("jpeg", validation_guidance_real=2.0))
    scan(project), pairs(project), cache(project)
    denoiser = flux.load_denoiser(locate(project, project.family.denoiser), torch.float32).requires_grad_(False)
    add_adapter(denoiser, project)
    _, expected = _sampled(project, "cpu", denoiser)
    if offloaded:
        offload_blocks(flux, denoiser, torch.device("cuda"), project.trainer)
    else:
        denoiser.cuda()
    pictures, report = _sampled(project, "cuda", denoiser)
    assert {one.device.type for one in pictures._encoder.parameters()} == {"cpu"}  # until the next event
    assert report.names == expected.names
    assert psnr(torch.from_numpy(report.pixels), torch.from_numpy(expected.pixels)) > 35
    assert report.psnr == pytest.approx(expected.psnr, abs=0.1)


@pytest.mark.parametrize("precision", ["no_change", "int8-quanto", "fp8-torchao"])
def test_a_trained_lora_is_sampled_on_the_gpu(make_project: object, precision: str) -> None:
    options = {"mixed_precision": "bf16", "vae_dtype": "bf16", "base_model_precision": precision}
    project = open_project(make_project(**options, validation_resolution="128x96", validation_num_inference_steps=3))
    scan(project), pairs(project), cache(project), run(project, limit=2)
    image = project.root / "reference" / "astronaut.jpg"
    summary = sample(project, Request("add colour", (image,), without=True))
    assert summary.device.startswith("cuda") and Path(summary.path).exists() and summary.layers
