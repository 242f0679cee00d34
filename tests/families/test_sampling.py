"""Pictures are those of diffusers' own pipeline, and adapters are loaded whatever wrote them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline, FluxTransformer2DModel
from peft import LoKrConfig, LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

from families import FAMILIES, flux
from families.protocol import Sampling, TextEmbeds
from families.quantize import quantize_and_place
from schemas.errors import UserError
from train.adapter import adapter_metadata

CPU = torch.device("cpu")
SIZE = {"width": 160, "height": 96}


@pytest.fixture(scope="module")
def checkpoint(tiny_models: Path) -> Path:
    return tiny_models / "tiny-flux-kontext"


@pytest.fixture(scope="module")
def pipeline(checkpoint: Path) -> FluxKontextPipeline:
    loaded = FluxKontextPipeline.from_pretrained(checkpoint)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def _picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def _embeds(pipeline: FluxKontextPipeline, prompt: str) -> TextEmbeds:
    return flux.encode_prompts(pipeline, [prompt], {"max_sequence_length": 512})


def _sampled(
    pipeline: FluxKontextPipeline, checkpoint: Path, references: list[torch.Tensor], guidance_real: float = 1.0
) -> torch.Tensor:
    text, negative = _embeds(pipeline, "a cat"), _embeds(pipeline, "blurred")
    how = Sampling(**SIZE, steps=3, guidance=2.5, guidance_real=guidance_real, seed=7)
    latents = flux.sample(flux.load_pipeline(checkpoint), pipeline.transformer, text, negative, references, how)
    assert latents.shape == (1, 16, 12, 20)
    return latents


@pytest.mark.parametrize("guidance_real", [1.0, 3.0])
@pytest.mark.parametrize("picture", [None, _picture(160, 96), _picture(96, 128)], ids=["none", "equal", "another size"])
def test_a_picture_equals_that_of_the_pipeline_called_plainly(
    pipeline: FluxKontextPipeline, checkpoint: Path, picture: Image.Image | None, guidance_real: float
) -> None:
    expected = pipeline(
        image=picture,
        prompt="a cat",
        negative_prompt="blurred",
        true_cfg_scale=guidance_real,
        **SIZE,
        max_area=96 * 160,
        _auto_resize=False,
        num_inference_steps=3,
        guidance_scale=2.5,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    references = []
    if picture is not None:
        references.append(flux.encode_images(pipeline.vae, torch.from_numpy(np.array(picture))[None]).mean)
    latents = _sampled(pipeline, checkpoint, references, guidance_real)
    assert np.array_equal(flux.decode_latents(pipeline.vae, latents)[0].numpy(), np.asarray(expected))


def test_several_references_are_placed_as_in_training(pipeline: FluxKontextPipeline, checkpoint: Path) -> None:
    references = [torch.randn(1, 16, 12, 20), torch.randn(1, 16, 8, 8)]
    calls: list[dict[str, torch.Tensor]] = []
    handle = pipeline.transformer.register_forward_pre_hook(
        lambda _module, _args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    try:
        _sampled(pipeline, checkpoint, references)
    finally:
        handle.remove()
    assert len(calls) == 3
    for call in calls:
        expected = torch.cat([flux.target_ids(torch.zeros(1, 16, 12, 20)), *flux.reference_ids(references)])
        assert torch.equal(call["img_ids"], expected)
        assert torch.equal(call["hidden_states"][:, 60:], torch.cat([flux.pack(one) for one in references], 1))


def test_a_flavour_without_guidance_samples_too(tmp_path: Path, pipeline: FluxKontextPipeline) -> None:
    flux.build_tiny(tmp_path, "schnell")
    denoiser = flux.load_denoiser(tmp_path, torch.float32)
    text = _embeds(pipeline, "a cat")
    first, second = (
        flux.sample(flux.load_pipeline(tmp_path), denoiser, text, None, [], Sampling(64, 64, 2, guidance, 1.0, 1))
        for guidance in (1.0, 9.0)
    )
    assert torch.equal(first, second) and first.isfinite().all()


def test_a_checkpoint_without_scheduler_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="scheduler: missing or damaged"):
        flux.load_pipeline(tmp_path)


# Adapters


def _denoiser(checkpoint: Path, precision: str = "no_change") -> FluxTransformer2DModel:
    dtype = torch.float32 if precision == "no_change" else torch.bfloat16
    denoiser = flux.load_denoiser(checkpoint, dtype).requires_grad_(False)
    return quantize_and_place(denoiser, precision, FAMILIES["flux"].unquantised, CPU, "cpu")


def _adapted(checkpoint: Path, kind: str) -> FluxTransformer2DModel:
    pattern = FAMILIES["flux"].lora_targets["all+ffs"]
    denoiser, torch_state = _denoiser(checkpoint), torch.get_rng_state()
    torch.manual_seed(0)
    denoiser.add_adapter(
        LoraConfig(r=4, lora_alpha=8, target_modules=pattern)
        if kind == "lora"
        else LoKrConfig(r=4, alpha=4, target_modules=pattern, decompose_factor=4)
    )
    with torch.no_grad():
        for name, weight in denoiser.named_parameters():
            if "lora_B" in name or "lokr" in name:
                weight.normal_(0, 0.2)
    torch.set_rng_state(torch_state)
    return denoiser


def _file(denoiser: FluxTransformer2DModel, kind: str, folder: Path) -> Path:
    if kind == "lora":
        flux.save_lora(folder / "lora.safetensors", get_peft_model_state_dict(denoiser), adapter_metadata(denoiser))
        return folder / "lora.safetensors"
    layers = {f"transformer.{name}": one.contiguous() for name, one in get_peft_model_state_dict(denoiser).items()}
    save_file(layers, folder / "lokr.safetensors")
    return folder / "lokr.safetensors"


def _velocity(denoiser: FluxTransformer2DModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    noisy, embed, pooled = (torch.randn(shape, generator=generator) for shape in ((1, 16, 8, 8), (1, 16, 64), (1, 32)))
    with torch.no_grad():
        return flux.velocity(denoiser, noisy, [], TextEmbeds(embed, pooled, (5,)), torch.ones(1), torch.ones(1))


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_an_adapter_does_what_it_did_when_it_was_saved_and_no_more_than_its_strength(
    checkpoint: Path, tmp_path: Path, kind: str
) -> None:
    adapted = _adapted(checkpoint, kind)
    file = _file(adapted, kind, tmp_path)
    denoiser = _denoiser(checkpoint)
    plain = _velocity(denoiser)
    assert flux.load_adapter(denoiser, file, 1.0) == 23
    assert torch.equal(_velocity(denoiser), _velocity(adapted))
    off = _denoiser(checkpoint)
    flux.load_adapter(off, file, 0.0)
    torch.testing.assert_close(_velocity(off), plain)
    assert (_velocity(denoiser) - plain).abs().max() > 0.01


@pytest.mark.parametrize("precision", ["int8-quanto", "int8-torchao"])
@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_an_adapter_goes_on_quantised_layers(checkpoint: Path, tmp_path: Path, kind: str, precision: str) -> None:
    file = _file(_adapted(checkpoint, kind), kind, tmp_path)
    denoiser = _denoiser(checkpoint, precision)
    plain = _velocity(denoiser)
    assert flux.load_adapter(denoiser, file, 1.0) == 23
    assert (_velocity(denoiser) - plain).abs().max() > 0.01


def test_the_layout_of_kohya_is_read(checkpoint: Path, tmp_path: Path) -> None:
    name = "lora_unet_double_blocks_0_img_attn_proj"
    weights = {"lora_down.weight": torch.randn(4, 64), "lora_up.weight": torch.randn(64, 4), "alpha": torch.tensor(2.0)}
    save_file({f"{name}.{part}": weight for part, weight in weights.items()}, tmp_path / "kohya.safetensors")
    denoiser = _denoiser(checkpoint)
    assert flux.load_adapter(denoiser, tmp_path / "kohya.safetensors", 1.0) == 1
    layer = denoiser.transformer_blocks[0].attn.to_out[0]
    [own] = layer.lora_A
    product = layer.lora_B[own].weight @ layer.lora_A[own].weight * layer.scaling[own]
    torch.testing.assert_close(product, weights["lora_up.weight"] @ weights["lora_down.weight"] * 2.0 / 4)


def test_files_of_other_models_and_damaged_ones_are_refused_in_words(checkpoint: Path, tmp_path: Path) -> None:
    file = _file(_adapted(checkpoint, "lora"), "lora", tmp_path)
    layers = load_file(file)
    cases = {
        "another.safetensors": {name.replace("transformer.", "unet.", 1): one for name, one in layers.items()},
        "names.safetensors": {f"{name[:12]}blocks.{name[12:]}": one for name, one in layers.items()},
        "sizes.safetensors": {name: one[: one.shape[0] // 2].contiguous() for name, one in layers.items()},
    }
    for name, content in cases.items():
        save_file(content, tmp_path / name)
        with pytest.raises(UserError, match="is it the LoRA of another one"):
            flux.load_adapter(_denoiser(checkpoint), tmp_path / name, 1.0)
    (tmp_path / "broken.safetensors").write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match="cannot be read"):
        flux.load_adapter(_denoiser(checkpoint), tmp_path / "broken.safetensors", 1.0)


def test_layers_that_are_none_of_this_model_are_told(checkpoint: Path, tmp_path: Path, caplog) -> None:
    file = _file(_adapted(checkpoint, "lora"), "lora", tmp_path)
    layers = load_file(file)
    save_file({name.replace(".single_", ".double_"): one for name, one in layers.items()}, tmp_path / "x.safetensors")
    assert flux.load_adapter(_denoiser(checkpoint), tmp_path / "x.safetensors", 1.0) == 13
    assert "10 of its 23 layers are none of this model" in caplog.text
