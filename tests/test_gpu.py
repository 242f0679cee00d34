"""What only a GPU shows: the same step on it as on the CPU, and attention's backward at real shapes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from families import flux, open_project
from families.checkpoints import locate
from families.protocol import TextEmbeds
from families.quantize import quantize_and_place
from families.runtime import choose_attention
from prep.cache import cache
from prep.pairs import pairs
from prep.scan import scan
from schemas import console
from schemas.shards import ShardIndex
from train.adapter import add_adapter
from train.data import Batch
from train.loop import run
from train.step import step_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def _step(project: object, device: str, dtype: torch.dtype) -> tuple[float, dict[str, torch.Tensor]]:
    choose_attention()
    place = torch.device(device)
    denoiser = flux.load_denoiser(locate(project, project.family.denoiser), dtype)
    precision, via = project.trainer.base_model_precision, project.trainer.quantize_via
    quantize_and_place(denoiser.requires_grad_(False), precision, project.family.unquantised, place, via)
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
