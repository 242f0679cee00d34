"""FLUX.2's numbers against diffusers' own pipelines, loaded from the same checkpoints: equal, not close."""

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline, Flux2Pipeline
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from PIL import Image
from torch import Tensor, nn

from families import FAMILIES, flux2
from families.protocol import Placement, Sampling, TextEmbeds
from schemas.keys import seed_of
from schemas.trainer import TrainerConfig
from train import flow
from train.data import Batch
from train.step import drawn_times, step_loss

CPU = torch.device("cpu")
FLAVOURS = FAMILIES["flux2"].flavours
SIZE = {"width": 160, "height": 96}  # 60 tokens
ROWS = 256  # of text embeds: half of what they have, for speed; dev's chat alone takes 190
PROMPTS = ("a cat", "", "a [IMG] cat, then [IMG]", "a long way down the road " * 40)


@dataclass(frozen=True)
class Loaded:
    """A flavour's pipeline, and what is asked of ours."""

    flavour: str
    checkpoint: Path
    pipeline: Any
    dtype: torch.dtype = torch.float32

    @property
    def is_dev(self) -> bool:
        return self.flavour == "dev"

    @property
    def guidance(self) -> float:
        return 3.0 if self.is_dev else 4.0

    def latents(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        """Encode references as `prep cache` does."""
        vae = flux2.load_image_encoder(self.checkpoint, self.dtype, CPU, tiling=False, slicing=False)
        return [flux2.encode_images(vae, torch.from_numpy(np.array(one))[None]).mean for one in pictures]

    def encoded(self, *prompts: str, rows: int = ROWS) -> TextEmbeds:
        settings = {**FLAVOURS[self.flavour].text_settings, "max_sequence_length": rows}
        return flux2.encode_prompts(self.encoders, prompts, settings)

    @cached_property
    def encoders(self) -> Any:
        settings = FLAVOURS[self.flavour].text_settings
        return flux2.load_text_encoders(self.checkpoint, self.dtype, Placement(CPU), settings)


@pytest.fixture(scope="module", params=FLAVOURS)
def loaded(request: pytest.FixtureRequest, tiny_flux2: Path) -> Loaded:
    return _loaded(tiny_flux2, request.param)


each_kind = pytest.mark.parametrize("loaded", ["dev", "klein-9b"], indirect=True)  # the klein models run the same code


def _loaded(folder: Path, flavour: str, dtype: torch.dtype = torch.float32) -> Loaded:
    pipeline = DiffusionPipeline.from_pretrained(folder / flavour, dtype=dtype)
    assert type(pipeline) is (Flux2Pipeline if flavour == "dev" else Flux2KleinPipeline)
    pipeline.set_progress_bar_config(disable=True)
    return Loaded(flavour, folder / flavour, pipeline, dtype)


def _picture(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


PICTURES = ((), (_picture(160, 96),), (_picture(96, 128), _picture(160, 64)))


@contextmanager
def _calls(module: nn.Module) -> Iterator[list[tuple[dict[str, Any], Any]]]:
    """Note what a module is called with, and what it returns."""
    calls: list[tuple[dict[str, Any], Any]] = []
    handle = module.register_forward_hook(
        lambda _module, _args, kwargs, output: calls.append((kwargs, output)), with_kwargs=True
    )
    try:
        yield calls
    finally:
        handle.remove()


# Latents


@each_kind
@pytest.mark.parametrize(
    ("size", "dtype"), [((160, 96), torch.float32), ((64, 112), torch.float32), ((160, 96), torch.bfloat16)]
)
def test_latents_equal_the_pipelines_own_encoding(loaded: Loaded, size: tuple[int, int], dtype: torch.dtype) -> None:
    one = loaded if dtype == loaded.dtype else _loaded(loaded.checkpoint.parent, loaded.flavour, dtype)
    picture, pipeline = _picture(*size), one.pipeline
    values = pipeline.image_processor.preprocess(picture)
    with torch.no_grad():
        expected = pipeline._encode_vae_image(values.to(dtype), None)
        raw = pipeline._patchify_latents(pipeline.vae.encode(values.to(dtype)).latent_dist.mode())
    [ours] = one.latents([picture])
    assert ours.shape == (1, 128, size[1] // 16, size[0] // 16)
    assert torch.equal(ours, expected) and not torch.allclose(ours, raw, atol=0.05)


@each_kind
def test_a_draw_from_our_posterior_is_the_vaes_own_normalised(loaded: Loaded) -> None:
    picture, pipeline = _picture(64, 96), loaded.pipeline
    with torch.no_grad():
        theirs = pipeline.vae.encode(pipeline.image_processor.preprocess(picture)).latent_dist
    drawn = torch.randn(theirs.mean.shape, generator=torch.Generator().manual_seed(1))
    mean, variance = (one.view(1, -1, 1, 1) for one in (pipeline.vae.bn.running_mean, pipeline.vae.bn.running_var))
    expected = (pipeline._patchify_latents(theirs.mean + theirs.std * drawn) - mean) / (variance + 1e-4).sqrt()
    ours = flux2.encode_images(pipeline.vae, torch.from_numpy(np.array(picture))[None])
    torch.testing.assert_close(ours.mean + ours.std * pipeline._patchify_latents(drawn), expected)


# Texts


def test_the_system_message_is_diffusers_own_to_the_letter() -> None:
    assert FLAVOURS["dev"].text_settings["system_message"] == SYSTEM_MESSAGE
    assert "\n" in SYSTEM_MESSAGE and not any("system_message" in FLAVOURS[one].text_settings for one in PADDED_LAST)


PADDED_LAST = ("klein-9b", "klein-4b")


def test_embeds_equal_those_of_encode_prompt_and_counts_the_attention_mask(loaded: Loaded) -> None:
    pipeline = loaded.pipeline
    tokenizer, settings = flux2.load_tokenizer(loaded.checkpoint), FLAVOURS[loaded.flavour].text_settings
    for prompts in (PROMPTS[:1], PROMPTS[1:3], PROMPTS[3:]):
        ours = loaded.encoded(*prompts, rows=512)
        with torch.no_grad(), _calls(pipeline.text_encoder) as calls:
            expected, _ = pipeline.encode_prompt(prompt=list(prompts))
        assert expected.shape[1] == 512
        assert torch.equal(ours.embed, expected) and ours.pooled is None
        kept = calls[0][0]["attention_mask"].sum(dim=1).tolist()
        assert [min(one, 512) for one in ours.num_tokens] == kept
        assert flux2.count_tokens(tokenizer, prompts, settings) == ours.num_tokens
    counts = flux2.count_tokens(tokenizer, PROMPTS, settings)
    assert counts[3] - counts[1] == len(PROMPTS[3].encode()) > 512
    assert counts[2] - counts[1] == len(PROMPTS[2].replace("[IMG]", "") if loaded.is_dev else PROMPTS[2])


@each_kind
def test_fewer_rows_are_those_of_encode_prompt_too(loaded: Loaded) -> None:
    with torch.no_grad():
        expected, _ = loaded.pipeline.encode_prompt(prompt=PROMPTS[3], max_sequence_length=64)
    assert torch.equal(loaded.encoded(PROMPTS[3], rows=64).embed, expected)
    assert expected.shape[1] == 64


@pytest.mark.parametrize("loaded", ["dev"], indirect=True)
def test_the_chat_is_what_the_settings_say(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**FLAVOURS["dev"].text_settings, "max_sequence_length": 64, "system_message": "Be short."}
    ours = flux2.encode_prompts(loaded.encoders, ["a cat"], settings)
    monkeypatch.setattr(loaded.pipeline, "system_message", "Be short.")
    with torch.no_grad():
        expected, _ = loaded.pipeline.encode_prompt(prompt="a cat", max_sequence_length=64)
    assert torch.equal(ours.embed, expected)
    assert ours.num_tokens == (len("Be short.a cat") + 5,)  # and five marks


# Positions


@each_kind
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("sizes", [(), ((6, 10),), ((8, 6), (4, 10))])
def test_positions_and_tokens_equal_those_of_the_pipelines_helpers(
    loaded: Loaded, sizes: Sequence[tuple[int, int]], batch: int
) -> None:
    pipeline, target, text = loaded.pipeline, torch.randn(batch, 128, 5, 7), torch.randn(batch, 9, 4)
    references = [torch.randn(batch, 128, *size) for size in sizes]
    for row in range(batch):
        assert torch.equal(flux2.target_ids(target), pipeline._prepare_latent_ids(target)[row])
        assert torch.equal(flux2.text_ids(text), pipeline._prepare_text_ids(text)[row])
    if references:
        theirs = pipeline._prepare_image_ids([one[:1] for one in references])
        assert torch.equal(torch.cat(list(flux2.reference_ids(references)))[None], theirs)
        assert theirs[0, :, 0].unique().tolist() == [10 * (number + 1) for number in range(len(sizes))]
    for one in (target, *references):
        assert torch.equal(flux2.pack(one), pipeline._pack_latents(one))
        assert torch.equal(flux2.unpack(flux2.pack(one), *one.shape[-2:]), one)
        assert flux2.num_tokens(one.shape[1:]) == flux2.pack(one).shape[1]
        assert torch.equal(flux2.unpatchify(one), pipeline._unpatchify_latents(one))
        assert torch.equal(flux2.patchify(flux2.unpatchify(one)), one)


# Forward


@pytest.mark.parametrize("pictures", PICTURES, ids=len)
def test_one_forward_equals_the_first_denoising_call_of_the_pipeline(
    loaded: Loaded, pictures: Sequence[Image.Image]
) -> None:
    noise = torch.randn(1, 128, 6, 10, generator=torch.Generator().manual_seed(1))
    with _calls(loaded.pipeline.transformer) as calls:
        loaded.pipeline(
            image=list(pictures) or None, prompt="a cat", latents=noise, guidance_scale=loaded.guidance, **SIZE,
            num_inference_steps=1, max_sequence_length=ROWS, output_type="latent",
        )  # fmt: skip
    assert len(calls) == (1 if loaded.is_dev else 2)  # klein: the prompt, then the empty one
    for prompt, (called, expected) in zip(("a cat", "")[: len(calls)], calls, strict=True):
        assert called["timestep"].item() == 1.0
        told = torch.tensor([loaded.guidance]) if loaded.is_dev else None
        with torch.no_grad(), _calls(loaded.pipeline.transformer) as own:
            ours = flux2.velocity(
                loaded.pipeline.transformer,
                noise,
                loaded.latents(pictures),
                loaded.encoded(prompt),
                torch.ones(1),
                told,
            )
        assert ours.shape == noise.shape
        assert torch.equal(flux2.pack(ours), expected[0][:, :60])
        assert torch.equal(own[0][0]["img_ids"], called["img_ids"][0])
        assert torch.equal(own[0][0]["txt_ids"], called["txt_ids"][0])
        assert torch.equal(own[0][0]["hidden_states"], called["hidden_states"])


@each_kind
def test_a_batch_equals_the_transformer_called_with_the_pipelines_helpers(loaded: Loaded) -> None:
    pipeline, generator = loaded.pipeline, torch.Generator().manual_seed(7)
    noisy, *others = (torch.randn(3, 128, *size, generator=generator) for size in ((4, 7), (6, 4), (3, 5)))
    text = torch.randn(3, 20, pipeline.transformer.config.joint_attention_dim, generator=generator)
    times, guidance = torch.linspace(0.3, 0.9, 3), torch.linspace(1.0, 3.5, 3) if loaded.is_dev else None
    ids = [pipeline._prepare_latent_ids(noisy)[:1], pipeline._prepare_image_ids([one[:1] for one in others])]
    assert flux2.takes_guidance(pipeline.transformer) == loaded.is_dev
    with torch.no_grad():
        ours = flux2.velocity(pipeline.transformer, noisy, others, TextEmbeds(text, None, (5,) * 3), times, guidance)
        theirs = pipeline.transformer(
            hidden_states=torch.cat([pipeline._pack_latents(one) for one in (noisy, *others)], dim=1),
            timestep=times,
            guidance=guidance,
            encoder_hidden_states=text,
            txt_ids=pipeline._prepare_text_ids(text),
            img_ids=torch.cat(ids, dim=1).expand(3, -1, -1),
        ).sample
    expected = pipeline._unpack_latents_with_ids(theirs[:, :28], pipeline._prepare_latent_ids(noisy))
    assert torch.equal(ours, torch.cat(list(expected)) if isinstance(expected, list) else expected)


# Sampling


def _sampled(loaded: Loaded, pictures: Sequence[Image.Image], guidance: float) -> Tensor:
    told, real = (guidance, 9.0) if loaded.is_dev else (9.0, guidance)  # each heeds one of the two
    how = Sampling(**SIZE, steps=2, guidance=told, guidance_real=real, seed=7)
    text, negative = loaded.encoded("a cat"), loaded.encoded("")
    references, parts = loaded.latents(pictures), flux2.load_pipeline(loaded.checkpoint)
    return flux2.sample(parts, loaded.pipeline.transformer, text, negative, references, how)


def _expected(loaded: Loaded, pictures: Sequence[Image.Image], guidance: float) -> tuple[Tensor, Image.Image]:
    """Return the last latents of the whole pipeline, normalised and packed, and the picture it makes of them."""
    seen: list[Tensor] = []

    def keep(_pipeline: object, _step: int, _time: object, values: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(values["latents"])
        return {}

    made = loaded.pipeline(
        image=list(pictures) or None, prompt="a cat", guidance_scale=guidance, **SIZE, num_inference_steps=2,
        max_sequence_length=ROWS, generator=torch.Generator().manual_seed(7), callback_on_step_end=keep,
    )  # fmt: skip
    return seen[-1], made.images[0]


@each_kind
@pytest.mark.parametrize("pictures", [PICTURES[0], PICTURES[2]], ids=len)
def test_a_picture_equals_that_of_the_pipeline_called_plainly(loaded: Loaded, pictures: Sequence[Image.Image]) -> None:
    expected, picture = _expected(loaded, pictures, loaded.guidance)
    ours = _sampled(loaded, pictures, loaded.guidance)
    assert torch.equal(flux2.pack(ours), expected)
    assert np.array_equal(flux2.decode_latents(loaded.pipeline.vae, ours)[0].numpy(), np.asarray(picture))
    assert pictures or not torch.equal(_sampled(loaded, pictures, 1.0), ours)


@each_kind
def test_in_bfloat16_too(loaded: Loaded) -> None:
    half = _loaded(loaded.checkpoint.parent, loaded.flavour, torch.bfloat16)
    expected, _ = _expected(half, PICTURES[2], half.guidance)
    assert torch.equal(flux2.pack(_sampled(half, PICTURES[2], half.guidance)), expected)
    noise, one, [reference] = torch.randn(1, 128, 4, 6), torch.full((1,), 0.7), half.latents(PICTURES[1])
    told = torch.full((1,), half.guidance) if half.is_dev else None
    embed = half.encoded("a cat").embed
    with torch.no_grad():
        whole, cut = (
            flux2.velocity(half.pipeline.transformer, noise.to(dtype), [reference.to(dtype)],
                           TextEmbeds(embed.to(dtype), None, (5,)), one.to(dtype), told)
            for dtype in (torch.float32, torch.bfloat16)
        )  # fmt: skip
    assert whole.dtype == torch.bfloat16 and torch.equal(whole, cut)


def test_a_distilled_klein_takes_no_true_guidance(tiny_flux2: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_flux2 / "klein-9b", tmp_path / "klein-9b")
    index = tmp_path / "klein-9b" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"is_distilled": True}))
    few = _loaded(tmp_path, "klein-9b")
    assert few.pipeline.config.is_distilled
    ours = _sampled(few, (), 4.0)
    assert torch.equal(flux2.pack(ours), _expected(few, (), 4.0)[0])
    assert torch.equal(ours, _sampled(few, (), 1.0))


# Step


def test_the_shift_counts_tokens_of_the_target_alone() -> None:
    tokens = flux2.num_tokens((128, 1024 // 16, 1024 // 16))
    assert tokens == 4096 and flow.auto_shift(tokens) == pytest.approx(3.158, abs=5e-4)
    assert [flow.auto_shift((side // 16) ** 2) for side in (512, 768)] == pytest.approx([1.878, 2.332], abs=5e-4)
    batch = Batch(("a",), (1,), torch.zeros(1, 128, 64, 64), torch.zeros(1), (torch.zeros(1, 128, 64, 64),) * 2, None)
    found = drawn_times(batch, flux2.num_tokens(batch.latents.shape[1:]), TrainerConfig())
    plain = torch.sigmoid(torch.tensor(np.random.default_rng(seed_of(1, "time")).standard_normal()))
    assert found.item() == pytest.approx((3.158 * plain / (1 + 2.158 * plain)).item(), abs=1e-4)


def test_the_training_step_compares_the_models_prediction_on_target_tokens(loaded: Loaded) -> None:
    pipeline, generator = loaded.pipeline, torch.Generator().manual_seed(2)
    latents, noise, first, second = (
        torch.randn(3, 128, *size, generator=generator) for size in ((4, 6), (4, 6), (6, 4), (2, 8))
    )
    text = torch.randn(3, 20, pipeline.transformer.config.joint_attention_dim, generator=generator)
    batch = Batch(("a", "b", "c"), (1, 2, 3), latents, noise, (first, second), TextEmbeds(text, None, (5, 5, 5)))
    config = TrainerConfig(mixed_precision="no", flux_guidance_value=3.5)
    with torch.no_grad():
        ours = step_loss(flux2, pipeline.transformer, batch, 1, config)

    normal = [np.random.default_rng(seed_of(seed, "time")).standard_normal() for seed in (1, 2, 3)]
    times = torch.sigmoid(torch.tensor(normal, dtype=torch.float32))
    shift = torch.tensor(0.5 + (1.15 - 0.5) * (24 - 256) / (4096 - 256)).exp()  # 24 target tokens
    times = shift * times / (1 + (shift - 1) * times)
    mixed = (1 - times)[:, None, None, None] * latents + times[:, None, None, None] * noise
    ids = [pipeline._prepare_latent_ids(latents[:1]), pipeline._prepare_image_ids([first[:1], second[:1]])]
    with torch.no_grad():
        predicted = pipeline.transformer(
            hidden_states=torch.cat([pipeline._pack_latents(one) for one in (mixed, first, second)], 1),
            timestep=times,
            guidance=torch.full((3,), 3.5) if loaded.is_dev else None,
            encoder_hidden_states=text,
            txt_ids=pipeline._prepare_text_ids(text),
            img_ids=torch.cat(ids, 1).expand(3, -1, -1),
        ).sample
    expected = (predicted[:, :24] - pipeline._pack_latents(noise - latents)).square().mean()
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)
