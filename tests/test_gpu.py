"""What only a GPU shows: the same step on it as on the CPU, and attention's backward at real shapes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    Flux2KleinPipeline,
    Flux2Pipeline,
    FluxTransformer2DModel,
)
from peft import LoraConfig
from transformers import MistralConfig, MistralModel, Qwen3Config, Qwen3ForCausalLM

from families import FAMILIES, attention, flux, flux2, open_project, rotary
from families.attention import choose_attention
from families.checkpoints import encoder_keys, locate
from families.fast_vae import speed_up
from families.offloading import Groups
from families.products import Float8Linear, Frozen, multiplies_float8
from families.protocol import Placement, TextEmbeds
from families.quantize import quantize_and_place
from families.rotary import fuse_rotary, normed_turned, plain
from families.routing import Routing
from families.runtime import family_of, placement, release_memory
from families.shapes import shaped_denoiser
from families.tiny import mistral_tokenizer, qwen_tokenizer
from prep import launching, units
from prep.cache import cache
from prep.pairs import pairs
from prep.scan import scan
from schemas import console
from schemas.errors import UserError
from schemas.keys import seed_of
from schemas.project import Project
from schemas.shards import ShardIndex
from schemas.trainer import Route, TrainerConfig
from train import loop
from train.adapter import add_adapter
from train.compiling import compile_blocks, compiled_graphs
from train.data import Batch, Shelf
from train.likeness import psnr
from train.loop import run
from train.memory import checkpoint_blocks, enough_memory, offload_blocks
from train.network import loaded_to, make_network
from train.pictures import Pictures, SampleReport, pictures_of
from train.sample import Request, sample
from train.step import in_half, predicted, step_loss

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MODELS = [("flux", "kontext"), ("flux2", "dev"), ("flux2", "klein-9b")]


def _step(project: object, device: str, dtype: torch.dtype) -> tuple[float, dict[str, torch.Tensor]]:
    place, family, spec = torch.device(device), family_of(project), project.family
    denoiser = family.load_denoiser(locate(project, project.family.denoiser), dtype)
    precision, via = project.trainer.base_model_precision, project.trainer.quantize_via
    quantize_and_place(denoiser.requires_grad_(False), precision, project.family.unquantised, place, via)
    choose_attention(denoiser, place, half=in_half(project.trainer))
    fuse_rotary(family, denoiser, place, half=in_half(project.trainer))
    add_adapter(denoiser, project)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        for name, parameter in denoiser.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    generator = torch.Generator().manual_seed(1)
    sizes = [(256 // spec.latent_scale, 384 // spec.latent_scale), (384 // spec.latent_scale, 256 // spec.latent_scale)]
    latents, reference = (torch.randn(2, spec.latent_channels.usual, *size, generator=generator) for size in sizes)
    embed = torch.randn(2, 512, denoiser.config[spec.text_input], generator=generator)
    pooled = torch.randn(2, 32, generator=generator).to(place) if spec.pooled_width else None
    embeds = TextEmbeds(embed.to(place), pooled, (5, 5))
    noise = torch.randn(latents.shape, generator=generator)
    batch = Batch(("a", "b"), (1, 2), latents.to(place), noise.to(place), (reference.to(place),), embeds)
    loss = step_loss(family, denoiser, batch, 1, project.trainer)
    loss.backward()
    named = denoiser.named_parameters()
    return loss.item(), {name: one.grad.float().cpu() for name, one in named if one.grad is not None}


def _error(gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Return the relative error of all gradients together."""
    error = sum((gradients[name] - expected[name]).square().sum() for name in expected)
    return float((error / sum(one.square().sum() for one in expected.values())).sqrt())


@pytest.mark.parametrize(("family", "flavour"), MODELS)
def test_loss_and_gradients_on_the_gpu_agree_with_the_cpu(make_project: object, family: str, flavour: str) -> None:
    exact = open_project(make_project(model_family=family, model_flavour=flavour))
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
    rounded = 1e-2 if precision == "fp8-torchao" else 1e-3  # products of float8 come in bfloat16 from a GPU
    assert _error(found, expected) < (0.1 if mixed == "bf16" else rounded)


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_the_gpu_never_holds_all_layers_unquantised_and_the_way_there_does_not_show(precision: str) -> None:
    def network() -> torch.nn.Sequential:
        torch.manual_seed(1)
        layers = [torch.nn.Linear(2048, 2048, dtype=torch.bfloat16) for _ in range(32)]
        return torch.nn.Sequential(*layers).requires_grad_(False)

    place, picture = torch.device("cuda"), torch.randn(64, 2048, device="cuda", dtype=torch.bfloat16)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    quantised = quantize_and_place(network(), precision, (), place, "accelerator")
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 0.8 * 32 * 2048 * 2048 * 2
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


@pytest.mark.parametrize(("family", "flavour"), MODELS)
def test_encoders_whose_blocks_wait_on_the_cpu_fill_the_cache_with_the_same(
    make_project: object, family: str, flavour: str
) -> None:
    folder = make_project(model_family=family, model_flavour=flavour, vae_dtype="bf16")
    scan(folder), pairs(folder), cache(folder)
    expected = _rows(folder)
    offloaded = ["group_offload_text_encoder=true", "group_offload_vae=true"]
    for more in ([], ["group_offload_blocks_per_group=2"], ["group_offload_use_stream=true"]):
        shutil.rmtree(folder / "work" / "cache")
        cache(open_project(folder, overrides=offloaded + more))
        found = _rows(folder)
        assert found.keys() == expected.keys() and len(found) > 12
        for key, row in expected.items():
            assert all(np.array_equal(value, found[key][name]) for name, value in row.items()), (more, key)


@pytest.mark.parametrize("ahead", [False, True])
def test_a_text_encoder_whose_layers_wait_on_the_cpu_takes_less_memory(tmp_path: Path, ahead: bool) -> None:
    tokenizer, layers = qwen_tokenizer(), (1, 3, 5)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        intermediate_size=8192,
        num_hidden_layers=7,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    with torch.device("cuda"):
        Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "text_encoder")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    settings = FAMILIES["flux2"].flavours["klein-9b"].text_settings | {"layers": layers}
    found = []
    for groups in (None, Groups(1, ahead=ahead)):
        release_memory()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        how = Placement(torch.device("cuda"), groups=groups)
        encoders = flux2.load_text_encoders(tmp_path, torch.bfloat16, how, settings)
        embed = flux2.encode_prompts(
            encoders, ["add colour", "take the colour away, and the light too"], settings
        ).embed
        weights = sum(one.nbytes for one in encoders.text_encoder.layers.parameters())
        found.append((embed.cpu(), torch.cuda.max_memory_allocated() - before))
        del encoders, embed
    (expected, most), (offloaded, less) = found
    assert torch.equal(offloaded, expected)
    assert most - less > 0.5 * weights


PROMPTS = ["add colour", "", "replace the sky with a sunset, and leave everything else as it is"]


@pytest.mark.parametrize("count", [1, 3])
def test_rows_of_padding_are_all_the_same_on_the_gpu_at_real_width(count: int) -> None:
    tokenizer = mistral_tokenizer()
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=5120,
        intermediate_size=32768,
        num_hidden_layers=3,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        sliding_window=None,
        pad_token_id=None,  # or its embedding would be zeros, and stay so
    )
    with torch.device("cuda"):
        encoder = MistralModel._from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    parts = {"scheduler": None, "vae": None, "transformer": None}
    encoders = Flux2Pipeline(text_encoder=encoder, tokenizer=tokenizer, **parts)
    settings = FAMILIES["flux2"].flavours["dev"].text_settings | {"layers": (1, 2)}
    embeds = flux2.encode_prompts(encoders, PROMPTS[:count], settings)
    assert encoder.config._attn_implementation == "sdpa"
    for embed, tokens in zip(embeds.embed, embeds.num_tokens, strict=True):
        padding = embed[: len(embed) - tokens]
        assert len(padding) > 100 and torch.isfinite(embed).all()
        assert (padding == padding[0]).all()
        assert not torch.equal(embed[-1], embed[-2])


@pytest.mark.parametrize("flavour", ["dev", "klein-9b"])
def test_text_encoders_without_their_last_layers_give_the_same_on_the_gpu(make_project: object, flavour: str) -> None:
    project = open_project(make_project(model_family="flux2", model_flavour=flavour))
    checkpoint, settings, place = locate(project, project.family.text_encoders), project.text_settings, "cuda"
    encoders = flux2.load_text_encoders(checkpoint, torch.bfloat16, Placement(torch.device(place)), settings)
    kind = Flux2Pipeline if flavour == "dev" else Flux2KleinPipeline
    whole = kind.from_pretrained(checkpoint, vae=None, transformer=None, dtype=torch.bfloat16).to(place)
    expected = flux2.encode_prompts(whole, PROMPTS, settings).embed
    assert torch.equal(flux2.encode_prompts(encoders, PROMPTS, settings).embed, expected)


@pytest.mark.parametrize("via", ["accelerator", "cpu"])
@pytest.mark.parametrize(("precision", "most"), [("int8-quanto", 0.05), ("int4-quanto", 0.5)])
@pytest.mark.parametrize("flavour", ["dev", "klein-9b"])
def test_text_encoders_in_fewer_bits_give_nearly_the_same_on_the_gpu(
    make_project: object, flavour: str, precision: str, most: float, via: str
) -> None:
    options = {"text_encoder_1_precision": precision, "quantize_via": via}
    project = open_project(make_project(model_family="flux2", model_flavour=flavour, **options))
    checkpoint, settings, place = locate(project, project.family.text_encoders), project.text_settings, "cuda"
    exact = flux2.load_text_encoders(checkpoint, torch.bfloat16, Placement(torch.device(place)), settings)
    expected = flux2.encode_prompts(exact, PROMPTS, settings).embed.float()
    encoders = flux2.load_text_encoders(checkpoint, torch.bfloat16, placement(project, torch.device(place)), settings)
    embeds = flux2.encode_prompts(encoders, PROMPTS, settings)
    error = (embeds.embed.float() - expected).norm() / expected.norm()
    assert 0 < error < most
    if project.model.padding_first:
        for embed, tokens in zip(embeds.embed, embeds.num_tokens, strict=True):
            assert (embed[: len(embed) - tokens] == embed[0]).all()


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


def _full_size_vae(kind: type) -> AutoencoderKL | AutoencoderKLFlux2:
    """Return a VAE of the real width, of which config.json's of both families agree but for channels of latents."""
    torch.manual_seed(0)
    flux2_too = {} if kind is AutoencoderKLFlux2 else {"use_quant_conv": False, "use_post_quant_conv": False}
    with torch.device("cuda"):
        vae = kind(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512),
            layers_per_block=2,
            latent_channels=32 if kind is AutoencoderKLFlux2 else 16,
            norm_num_groups=32,
            sample_size=1024,
            **flux2_too,
        )
    return vae.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", [AutoencoderKL, AutoencoderKLFlux2])
def test_the_compiled_image_encoder_is_as_exact_as_the_plain_one_in_bfloat16(
    kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    vae, generator = _full_size_vae(kind), torch.Generator().manual_seed(5)
    smooth = torch.rand(2, 3, 24, 32, generator=generator) * 2 - 1
    pictures = torch.nn.functional.interpolate(smooth, (384, 512), mode="bicubic").clamp(-1, 1).to("cuda")
    pictures = pictures.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        exact = vae.encode(pictures.float()).latent_dist.mode()
        vae.to(torch.bfloat16)
        plain = vae.encode(pictures).latent_dist.mode().float()
        fast = speed_up(vae, tmp_path)
        assert fast is not None and fast.prepare(pictures)
        found = vae.encode(pictures).latent_dist.mode().float()
        alone = vae.encode(pictures[:1]).latent_dist.mode().float()
    assert not torch.equal(found, plain)
    assert (found - exact).norm() < 1.5 * (plain - exact).norm()
    assert (alone - exact[:1]).norm() < 1.5 * (plain - exact).norm()  # a shape that was not prepared
    assert any(tmp_path.rglob("*.py"))


def test_tiles_slices_and_float32_keep_the_plain_image_encoder(tmp_path: Path) -> None:
    vae = _full_size_vae(AutoencoderKL)
    assert speed_up(vae, tmp_path) is None
    vae.to(torch.bfloat16).enable_tiling()
    assert speed_up(vae, tmp_path) is None
    vae.disable_tiling(), vae.enable_slicing()
    assert speed_up(vae, tmp_path) is None
    vae.disable_slicing()
    assert speed_up(vae, tmp_path) is not None


def test_a_cache_of_compiled_batches_is_that_of_plain_ones_within_rounding(
    make_project: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    folder = make_project("deblur", vae_dtype="bf16", vae_batch_size=4)
    sets = json.loads((folder / "multidatabackend.json").read_text())
    sets[0] |= {"crop": True, "crop_aspect": "square", "crop_style": "center"}
    (folder / "multidatabackend.json").write_text(json.dumps(sets))
    scan(folder), pairs(folder)
    plain = cache(folder).accelerator
    assert plain is not None and plain.images == 12 and plain.compiling_s == 0 and 0 < plain.busy <= 1
    expected = _rows(folder)
    shutil.rmtree(folder / "work" / "cache")
    monkeypatch.setattr(launching, "_WORTH", 1)
    monkeypatch.setattr(units, "_MOST_ROWS", 7)  # the last batches are short: 4 and 3, 4 and 1
    used = cache(folder).accelerator
    assert used is not None and used.images == 12 and used.compiling_s > 0 and 0 < used.busy <= 1
    found = _rows(folder)
    assert found.keys() == expected.keys()
    for key, row in expected.items():
        if "latent" in row:
            exact = _values(row["latent"])
            assert (_values(found[key]["latent"]) - exact).norm() < 0.1 * exact.norm()


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


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(("batch", "lengths"), [(1, (8704,)), (1, (512, 8192)), (2, (77, 1601)), (2, (333,))])
def test_kernels_of_norm_and_rotary_embedding_round_no_more_than_the_result(
    batch: int, lengths: tuple[int, ...], width: int
) -> None:
    generator, heads = torch.Generator().manual_seed(3), 24
    wide = [torch.randn(batch, one, 3 * heads * width + 64, generator=generator) for one in lengths]
    leaves = [one.to("cuda", torch.bfloat16).requires_grad_() for one in wide]
    norms = [torch.nn.RMSNorm(width, eps=1e-6, device="cuda").requires_grad_(False) for _ in range(2 * len(lengths))]
    for norm in norms:
        norm.weight.copy_(1 + torch.randn(width, generator=generator) / 4)
    norms[-1].bfloat16()
    angles = torch.randn(sum(lengths), width, generator=generator).to("cuda")
    turning, many = (angles.cos(), angles.sin()), len(lengths)
    drawn = torch.randn(2, batch, heads, sum(lengths), width, generator=generator).to("cuda", torch.bfloat16)

    def both_ways(exact: bool) -> list[torch.Tensor]:
        inputs = [one.detach().float().requires_grad_() for one in leaves] if exact else leaves
        cut = [one[..., : 3 * heads * width].chunk(3, dim=-1) for one in inputs]
        values = [one[kind].unflatten(-1, (heads, width)) for kind in range(2) for one in cut]
        gradients = [one.transpose(1, 2).to(values[0].dtype) for one in drawn]
        if exact:
            parts = list(zip(values, (norm.float() for norm in norms), strict=True))
            output = [plain(parts[:many], turning), plain(parts[many:], turning)]
        else:
            output = list(normed_turned(values, [norm.weight for norm in norms], *turning, 1e-6))
            assert all(one.is_contiguous() and one.dtype == torch.bfloat16 for one in output)
        return [*(one.detach() for one in output), *torch.autograd.grad(output, inputs, gradients)]

    for one, other in zip(both_ways(exact=False), both_ways(exact=True), strict=True):
        rounded = other.to(torch.bfloat16)
        assert (one.float() - rounded.float()).norm() < 1e-3 * other.norm()  # rounding itself is off by 1.7e-3
        assert (one != rounded).float().mean() < 0.01


def _turned_steps(fused: bool, compiled: Path | None) -> tuple[list[float], dict[str, torch.Tensor], int]:
    """Take steps of several blocks with checkpoints; returns losses, gradients and the number of graphs."""
    place, config = torch.device("cuda"), TrainerConfig(flux_guidance_value=1.0)
    torch._dynamo.reset()
    model, before = _several_blocks().to(place), compiled_graphs()
    choose_attention(model, place, half=True)
    if fused:
        assert fuse_rotary(flux, model, place, half=True)
    checkpoint_blocks(flux, model, config)
    if compiled is not None:
        compile_blocks(flux, model, compiled)
    losses, gradients, _ = _steps(model, config)
    return losses, gradients, compiled_graphs() - before


@pytest.mark.parametrize("compiled", [False, True])
def test_blocks_whose_norm_and_rotary_embedding_are_kernels_learn_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bool
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    calls = []
    monkeypatch.setattr(rotary, "plain", lambda *parts: calls.append(parts) or plain(*parts))
    expected, gradients, most = _turned_steps(False, tmp_path if compiled else None)
    torch._dynamo.utils.counters.clear()
    losses, found, graphs = _turned_steps(True, tmp_path if compiled else None)
    assert len(calls) == 2  # of the test at the start
    assert losses == pytest.approx(expected, rel=1e-2)
    assert all((found[name] - one).norm() < 0.05 * one.norm() for name, one in gradients.items())
    assert not torch._dynamo.utils.counters["graph_break"]
    assert graphs <= most and (graphs > 0) == compiled


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
    checkpoint_blocks(flux, plain, TrainerConfig())
    expected, gradients, most = _steps(plain, config)
    weights = sum(one.nbytes for block in flux.blocks(plain) for one in block.module.parameters())
    del plain
    release_memory()

    model = _several_blocks()
    choose_attention(model, torch.device("cuda"), half=in_half(config))
    checkpoint_blocks(flux, model, config)
    offload_blocks(flux, model, torch.device("cuda"), config)
    losses, found, less = _steps(model, config)
    assert losses == expected
    assert all(torch.equal(found[name], one) for name, one in gradients.items())
    assert most - less > 0.6 * weights
    away = [one for one in model.parameters() if one.device.type == "cpu"]
    assert all(not one.requires_grad and one.is_pinned() for one in away)
    assert sum(one.nbytes for one in away) > 0.7 * weights


class _Enough(Exception):
    pass


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["use_ema=true", "lora_dropout=0.1", "train_batch_size=2", "gradient_accumulation_steps=2"],
        ['tread_config={"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -1}]}',
         "scheduled_sampling_max_step_offset=100", "scheduled_sampling_probability=0.8"],
    ],
)  # fmt: skip
def test_steps_between_checkpoints_wait_for_nothing(
    make_project: object, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    folder = make_project("edits")
    quiet = ["max_train_steps=20", "checkpointing_steps=0", "validation_disable=true", "eval_steps_interval=0"]
    project = open_project(folder, overrides=[*quiet, *options])
    scan(project), pairs(project), cache(project)

    def strict(family: object, denoiser: object, batch: Batch, step: int, *others: object) -> torch.Tensor:
        torch.cuda.set_sync_debug_mode("error" if 3 <= step <= 10 else "default")
        if step > 10:
            raise _Enough
        return step_loss(family, denoiser, batch, step, *others)

    monkeypatch.setattr(loop, "step_loss", strict)
    with pytest.raises(_Enough):
        run(project)
    lines = [json.loads(line) for line in (project.run_folder / "metrics.jsonl").read_text().splitlines()]
    assert [one["step"] for one in lines] == list(range(1, 11))


def test_weights_that_go_straight_to_the_gpu_are_those_of_the_file(make_project: object) -> None:
    project = open_project(make_project("edits"))
    checkpoint = locate(project, project.family.denoiser)
    there, here = (flux.load_denoiser(checkpoint, torch.bfloat16, torch.device(one)) for one in ("cuda", "cpu"))
    for name, tensor in here.state_dict().items():
        assert there.state_dict()[name].is_cuda and torch.equal(there.state_dict()[name].cpu(), tensor)


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


@pytest.mark.parametrize(
    ("family", "flavour", "precision"),
    [
        *(("flux", "kontext", precision) for precision in ("no_change", "int8-quanto", "fp8-torchao")),
        ("flux2", "dev", "int8-quanto"),
        ("flux2", "klein-9b", "no_change"),
    ],
)
def test_a_trained_lora_is_sampled_on_the_gpu(make_project: object, family: str, flavour: str, precision: str) -> None:
    options = {"model_family": family, "model_flavour": flavour, "base_model_precision": precision}
    options |= {"mixed_precision": "bf16", "vae_dtype": "bf16"}
    project = open_project(make_project(**options, validation_resolution="128x96", validation_num_inference_steps=3))
    scan(project), pairs(project), cache(project), run(project, limit=2)
    image = project.root / "reference" / "astronaut.jpg"
    summary = sample(project, Request("add colour", (image,), without=True))
    assert summary.device.startswith("cuda") and Path(summary.path).exists() and summary.layers


# Fast paths, at real widths


WIDTHS = [("flux", "kontext"), ("flux2", "klein-4b")]
COMPILED = {"dynamo_backend": "inductor"}
RECOMPUTED = COMPILED | {"gradient_checkpointing": True}
WAYS = {
    "all kept": COMPILED | {"gradient_checkpointing": False},
    "recomputed": RECOMPUTED,
    "attention kept": RECOMPUTED | {"gradient_checkpointing_keep": "attention"},
    "group offload": RECOMPUTED | {"enable_group_offload": True, "group_offload_use_stream": True},
    "attention kept, inputs away": RECOMPUTED | {"gradient_checkpointing_keep": "attention",
                                                 "gradient_checkpointing_backend": "unsloth"},
}  # fmt: skip
EIGHT_BITS = COMPILED | {"gradient_checkpointing": True, "gradient_checkpointing_keep": "attention"}


@pytest.fixture
def wide(make_project: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Project]:
    """Open one project of a published model under other and other options, nothing of it compiled yet."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.enable_cudnn_sdp(False)  # as every run has it: its backward pass is wrong on narrowed gradients
    torch._dynamo.reset()
    release_memory()
    folder = make_project(photos=1)

    def opened(family: str, flavour: str, **options: object) -> Project:
        preset = "all+ffs" if family == "flux" else "all"
        asked = {"model_family": family, "model_flavour": flavour, "flux_lora_target": preset, "lora_rank": 16}
        asked |= {"mixed_precision": "bf16", "dynamo_backend": "no", "gradient_checkpointing": False}
        texts = {
            name: value if isinstance(value, str) else json.dumps(value) for name, value in (asked | options).items()
        }
        return open_project(folder, overrides=[f"{name}={value}" for name, value in texts.items()])

    return opened


def _wide(project: Project) -> torch.nn.Module:
    """Make one double and two single blocks of the published width, of random weights in bfloat16."""
    family = family_of(project)
    config = {**family.denoiser_config(project.flavour, tiny=False), "num_layers": 1, "num_single_layers": 2}
    denoiser = shaped_denoiser(family, config, torch.bfloat16).to_empty(device="cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    for name, one in denoiser.named_parameters():
        if one.ndim > 1:
            one.data.normal_(0, 0.02, generator=generator)
        else:
            one.data.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return denoiser


def _changed(denoiser: torch.nn.Module) -> torch.nn.Module:
    """Have the adapter change something, the same in whatever network."""
    trained = {name: one for name, one in denoiser.named_parameters() if one.requires_grad}
    for name in sorted(trained):
        generator = torch.Generator().manual_seed(seed_of(0, name))
        trained[name].data.copy_(0.02 * torch.randn(trained[name].shape, generator=generator))
    return denoiser.train()


def _plain(project: Project, denoiser: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Adapt a network by peft alone, in the way that nothing is faster than."""
    denoiser.to(dtype).requires_grad_(False)
    add_adapter(denoiser, project)
    return _changed(denoiser)


def _fast(project: Project) -> torch.nn.Module:
    device = torch.device("cuda")
    return _changed(make_network(project, _wide(project).to(loaded_to(project.trainer, device)), device).denoiser)


def _drawn_batch(project: Project, seed: int = 1) -> Batch:
    """Draw 1024 tokens of a target, 1024 of a reference, 128 of text."""
    family, spec = family_of(project), project.family
    config = shaped_denoiser(family, family.denoiser_config(project.flavour, tiny=False), torch.bfloat16).config
    side, generator = 512 // spec.latent_scale, torch.Generator().manual_seed(seed)
    latents, noise, reference = (
        torch.randn(1, spec.latent_channels.usual, side, side, generator=generator).cuda() for _ in range(3)
    )
    embed = torch.randn(1, 128, config[spec.text_input], generator=generator).cuda()
    pooled = torch.randn(1, config[spec.pooled_input], generator=generator).cuda() if spec.pooled_width else None
    return Batch((str(seed),), (seed,), latents, noise, (reference,), TextEmbeds(embed, pooled, (100,)))


def _results(project: Project, denoiser: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the output of a pass, and LoRA's gradients in blocks: those of the last product outweigh all others."""
    family, batch = family_of(project), _drawn_batch(project)
    assert family.num_tokens(batch.latents.shape[1:]) == 1024
    guidance = torch.ones(1, device="cuda") if family.takes_guidance(denoiser) else None
    times = torch.full((1,), 0.6, device="cuda")
    output = predicted(family, denoiser, batch, (batch.noise, times, guidance), project.trainer).float()
    (output - (batch.noise - batch.latents)).square().mean().backward()
    named = [(name, one) for name, one in denoiser.named_parameters() if one.requires_grad and "blocks" in name]
    return output.detach().cpu(), {name: one.grad.float().cpu() for name, one in named}


def _errors(
    found: tuple[torch.Tensor, dict[str, torch.Tensor]], expected: tuple[torch.Tensor, dict[str, torch.Tensor]]
) -> tuple[float, float]:
    """Return the relative errors of output and gradients."""
    assert found[1].keys() == expected[1].keys() and len(found[1]) > 20
    return float((found[0] - expected[0]).norm() / expected[0].norm()), _error(found[1], expected[1])


@pytest.mark.parametrize(("family", "flavour"), WIDTHS)
def test_compiled_networks_are_as_near_to_float32_as_the_plain_one_in_bfloat16(
    wide: Callable[..., Project], monkeypatch: pytest.MonkeyPatch, family: str, flavour: str
) -> None:
    monkeypatch.setattr("train.waiting._LEAST_BYTES", 1 << 20)  # there are fewer tokens than in a run
    half, exact = wide(family, flavour), wide(family, flavour, mixed_precision="no")
    expected = _results(exact, _plain(exact, _wide(exact), torch.float32))
    least = _errors(_results(half, _plain(half, _wide(half), torch.bfloat16)), expected)
    for way, options in WAYS.items():
        release_memory()
        project = wide(family, flavour, **options)
        errors = _errors(_results(project, _fast(project)), expected)
        print(f"{family} {flavour} {way}: {errors}, plain bfloat16 {least}")
        assert all(one < 1.3 * plain for one, plain in zip(errors, least, strict=True)), (way, errors, least)


@pytest.mark.parametrize("precision", ["no_change", "int8-quanto", "fp8-torchao"])
def test_what_is_recomputed_is_not_kept_where_blocks_are_compiled(wide: Callable[..., Project], precision: str) -> None:
    kept = {}
    for way in ("all kept", "attention kept", "recomputed"):
        release_memory()
        project = wide("flux", "kontext", base_model_precision=precision, **WAYS[way])
        denoiser, batch = _fast(project), _drawn_batch(project)
        for _ in range(2):  # the first compiles
            before = torch.cuda.memory_allocated()
            loss = step_loss(flux, denoiser, batch, 1, project.trainer)
            kept[way] = torch.cuda.memory_allocated() - before
            loss.backward()
        del denoiser, batch, loss
    print(f"{precision}: MiB kept { ({way: one >> 20 for way, one in kept.items()}) }")
    assert kept["recomputed"] < kept["attention kept"] < 0.4 * kept["all kept"]


def _dequantised(project: Project, precision: str) -> torch.nn.Module:
    """Make blocks whose layers of eight bits are plain ones in float32 with the very same weights."""
    spec, place = project.family, torch.device("cuda")
    network = _wide(project)
    network = quantize_and_place(network, precision, spec.unquantised, place, "accelerator", spec.conditioning)
    for name, layer in [(name, one) for name, one in network.named_modules() if isinstance(one, Frozen)]:
        plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="cuda")
        with torch.no_grad():
            bias = layer(torch.zeros(1, layer.in_features, device="cuda"))
            plain.weight.copy_((layer(torch.eye(layer.in_features, device="cuda")) - bias).t())
            if layer.bias is not None:
                plain.bias.copy_(bias[0])
        network.set_submodule(name, plain)
    return network


@pytest.mark.parametrize(("family", "flavour"), WIDTHS)
def test_compiled_int8_is_as_near_to_its_weights_in_float32_as_bfloat16(
    wide: Callable[..., Project], family: str, flavour: str
) -> None:
    half, exact = wide(family, flavour), wide(family, flavour, mixed_precision="no")
    expected = _results(exact, _plain(exact, _dequantised(half, "int8-quanto"), torch.float32))
    least = _errors(_results(half, _plain(half, _dequantised(half, "int8-quanto"), torch.bfloat16)), expected)
    for options in ({"dynamo_backend": "no"}, EIGHT_BITS, WAYS["group offload"]):
        release_memory()
        project = wide(family, flavour, base_model_precision="int8-quanto", **options)
        errors = _errors(_results(project, _fast(project)), expected)
        print(f"{family} {flavour} int8-quanto {options}: {errors}, plain bfloat16 {least}")
        assert all(one < 1.3 * plain for one, plain in zip(errors, least, strict=True)), (options, errors, least)


needs_float8 = pytest.mark.skipif(
    torch.cuda.is_available() and not multiplies_float8(torch.device("cuda")), reason="needs products of float8"
)


@needs_float8
@pytest.mark.parametrize(("family", "flavour"), WIDTHS)
def test_products_of_float8_cost_gradients_a_twentieth_and_with_rounded_weights_a_tenth_at_most(
    wide: Callable[..., Project], family: str, flavour: str
) -> None:
    half = wide(family, flavour)
    expected = _results(half, _plain(half, _wide(half), torch.bfloat16))
    release_memory()
    same_weights = _results(half, _plain(half, _dequantised(half, "fp8-torchao"), torch.bfloat16))
    for options in ({"dynamo_backend": "no"}, EIGHT_BITS, WAYS["group offload"]):
        release_memory()
        project = wide(family, flavour, base_model_precision="fp8-torchao", **options)
        found = _results(project, _fast(project))
        products, errors = _errors(found, same_weights), _errors(found, expected)
        print(f"{family} {flavour} fp8-torchao {options}: products {products}, rounded weights too {errors}")
        assert 0 < products[1] <= 0.05, (options, products)
        assert 0 < errors[1] <= 0.1, (options, errors)  # most of it is that weights are rounded: 0.067 and 0.079


@needs_float8
@pytest.mark.parametrize("rows", [1, 2, 15, 16, 17, 100, 2177])
def test_products_of_float8_take_any_number_of_rows(rows: int) -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(3072, 768).requires_grad_(False)
    values = torch.randn(rows, 3072)
    expected = Float8Linear.of(layer)(values)  # on the CPU, in float32
    quick = Float8Linear.of(layer).to("cuda")
    leaf = values.to("cuda", torch.bfloat16).requires_grad_()
    output = quick(leaf)
    output.square().sum().backward()
    assert output.shape == (rows, 768) and torch.isfinite(leaf.grad).all()
    assert (output.float().cpu() - expected).norm() < 0.02 * expected.norm()


@needs_float8
def test_losses_with_float8_products_follow_those_of_bfloat16(wide: Callable[..., Project]) -> None:
    curves = {}
    for precision in ("no_change", "fp8-torchao"):
        torch._dynamo.reset()
        release_memory()
        project = wide("flux", "kontext", base_model_precision=precision, **EIGHT_BITS)
        network = make_network(project, _wide(project), torch.device("cuda"))
        optimizer = torch.optim.AdamW(network.parameters, lr=1e-3, fused=True)
        losses = []
        for step in range(1, 41):
            loss = step_loss(flux, network.denoiser, _drawn_batch(project, 1 + step % 4), step, project.trainer)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        curves[precision] = torch.stack(losses).cpu()
    plain, quick = curves.values()
    print("losses of bfloat16 and fp8:", [f"{one:.4f} {other:.4f}" for one, other in zip(plain, quick, strict=True)])
    assert plain[-8:].mean() < 0.97 * plain[:4].mean()  # there is something to follow
    assert not torch.equal(plain, quick)
    apart = (quick.view(-1, 8).mean(1) / plain.view(-1, 8).mean(1) - 1).abs()
    assert apart.max() < 0.02, apart
