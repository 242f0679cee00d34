"""Our numbers against diffusers' own pipeline on the same weights: equal, not close."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline, FluxPipeline, FluxTransformer2DModel
from PIL import Image

from families import flux, open_project
from families.protocol import TextEmbeds
from families.runtime import default_device
from prep.cache import cache
from prep.images import decode, frame
from prep.pairs import pairs
from prep.pixels import pixels_of, reference_picture, target_picture
from prep.scan import scan
from schemas.freshness import read_pairs
from schemas.keys import seed_of
from train import flow
from train.data import Batch
from train.step import step_loss

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pipeline(tiny_models: Path) -> FluxKontextPipeline:
    return FluxKontextPipeline.from_pretrained(tiny_models / "tiny-flux-kontext")


def _picture(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def _first_call(pipeline: FluxKontextPipeline, **arguments: object) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Run the pipeline and return what it first called the transformer with, and what came back."""
    calls: list[tuple[dict[str, torch.Tensor], torch.Tensor]] = []

    def record(_module: object, _args: object, kwargs: dict[str, torch.Tensor], output: tuple[torch.Tensor]) -> None:
        calls.append((kwargs, output[0]))

    handle = pipeline.transformer.register_forward_hook(record, with_kwargs=True)
    try:
        pipeline(num_inference_steps=2, output_type="latent", **arguments)
    finally:
        handle.remove()
    return calls[0]


def test_one_forward_equals_the_first_denoising_call_of_the_pipeline(pipeline: FluxKontextPipeline) -> None:
    torch.manual_seed(1)
    noise = torch.randn(1, 16, 16, 24)
    reference = _picture(160, 96)  # another size than the target's 192x128
    text = TextEmbeds(torch.randn(1, 512, 64), torch.randn(1, 32), (5,))
    called, expected = _first_call(
        pipeline,
        image=reference,
        prompt_embeds=text.embed,
        pooled_prompt_embeds=text.pooled,
        latents=FluxKontextPipeline._pack_latents(noise, 1, 16, 16, 24),
        height=128,
        width=192,
        max_area=128 * 192,
        guidance_scale=1.0,
        _auto_resize=False,
    )
    assert called["timestep"].item() == 1.0

    latents = flux.encode_images(pipeline.vae, torch.from_numpy(np.array(reference))[None]).mean
    with torch.no_grad():
        ours = flux.velocity(pipeline.transformer, noise, [latents], text, torch.ones(1), torch.ones(1))
    assert torch.equal(flux.pack(ours), expected[:, : 8 * 12])


@pytest.fixture(scope="module")
def transformers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FluxTransformer2DModel]:
    """Tiny transformers, one of each flavour."""
    folder = tmp_path_factory.mktemp("flavours")
    for flavour in ("dev", "schnell", "kontext"):
        flux.build_tiny(folder / flavour, flavour)
    load = FluxTransformer2DModel.from_pretrained
    return {one.name: load(one, subfolder="transformer") for one in folder.iterdir()}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("references", [(), ((12, 8),), ((12, 8), (8, 10))])
@pytest.mark.parametrize("flavour", ["dev", "schnell", "kontext"])
def test_velocity_equals_the_transformer_called_as_the_pipelines_do(
    transformers: dict[str, FluxTransformer2DModel], flavour: str, references: tuple[tuple[int, int], ...], batch: int
) -> None:
    transformer, generator = transformers[flavour], torch.Generator().manual_seed(7)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator)

    noisy, others = draw(16, 8, 14), [draw(16, *size) for size in references]
    tokens = 256 if flavour == "schnell" else 512
    text = TextEmbeds(draw(tokens, 64), draw(32), (5,) * batch)
    times = torch.linspace(0.3, 0.9, batch)
    guidance = torch.linspace(1.0, 3.5, batch) if flux.takes_guidance(transformer) else None
    assert (guidance is None) == (flavour == "schnell")

    pack, place = FluxKontextPipeline._pack_latents, FluxKontextPipeline._prepare_latent_image_ids
    ids = [FluxPipeline._prepare_latent_image_ids(batch, 4, 7, CPU, torch.float32)]
    for number, (height, width) in enumerate(references):
        own = place(batch, height // 2, width // 2, CPU, torch.float32)
        own[..., 0] = 1
        own[..., 2] += 4 * number  # tokens: the first is 6 × 4, so the second, 4 × 5, goes right of it
        ids.append(own)
    packed = [pack(one, batch, 16, *one.shape[-2:]) for one in (noisy, *others)]
    with torch.no_grad():
        ours = flux.velocity(transformer, noisy, others, text, times, guidance)
        theirs = transformer(
            hidden_states=torch.cat(packed, dim=1),
            timestep=times,
            guidance=guidance,
            pooled_projections=text.pooled,
            encoder_hidden_states=text.embed,
            txt_ids=torch.zeros(tokens, 3),
            img_ids=torch.cat(ids),
        ).sample
    assert torch.equal(ours, FluxPipeline._unpack_latents(theirs[:, : 4 * 7], 64, 112, 8))


def test_ids_and_packing_equal_the_pipelines_own_helpers() -> None:
    target, reference = torch.randn(2, 16, 10, 14), torch.randn(2, 16, 8, 6)
    assert torch.equal(flux.pack(target), FluxKontextPipeline._pack_latents(target, 2, 16, 10, 14))
    assert torch.equal(
        flux.unpack(flux.pack(target), 10, 14), FluxPipeline._unpack_latents(flux.pack(target), 80, 112, 8)
    )
    assert torch.equal(
        flux.target_ids(target), FluxKontextPipeline._prepare_latent_image_ids(2, 5, 7, CPU, torch.float32)
    )
    expected = FluxKontextPipeline._prepare_latent_image_ids(2, 4, 3, CPU, torch.float32)
    expected[..., 0] = 1
    [ids] = flux.reference_ids([reference])
    assert torch.equal(ids, expected)


def test_further_references_are_laid_beside_or_below_the_first() -> None:
    def offsets(*sizes: tuple[int, int]) -> list[tuple[int, int]]:
        return [tuple(ids[0, 1:].int().tolist()) for ids in flux.reference_ids([torch.zeros(1, 16, *s) for s in sizes])]

    assert offsets((8, 8), (8, 8)) == [(0, 0), (4, 0)]
    assert offsets((8, 12), (8, 8), (12, 8)) == [(0, 0), (4, 0), (0, 6)]


def test_the_training_step_compares_the_models_prediction_on_target_tokens(
    pipeline: FluxKontextPipeline, make_project: object
) -> None:
    config = open_project(make_project()).trainer  # type: ignore[operator]
    torch.manual_seed(2)
    latents, reference = torch.randn(3, 16, 8, 12), torch.randn(3, 16, 12, 8)
    text = TextEmbeds(torch.randn(3, 512, 64), torch.randn(3, 32), (5, 5, 5))
    noise = torch.randn(3, 16, 8, 12)
    batch = Batch(("a", "b", "c"), (1, 2, 3), latents, noise, (reference,), text)
    with torch.no_grad():
        ours = step_loss(flux, pipeline.transformer, batch, 1, config)

    normal = [np.random.default_rng(seed_of(seed, "time")).standard_normal() for seed in (1, 2, 3)]
    times = torch.sigmoid(torch.tensor(normal, dtype=torch.float32))
    shift = torch.tensor(0.5 + (1.15 - 0.5) * (24 - 256) / (4096 - 256)).exp()  # 24 target tokens
    times = shift * times / (1 + (shift - 1) * times)
    mixed = (1 - times)[:, None, None, None] * latents + times[:, None, None, None] * noise
    pack, ids = FluxKontextPipeline._pack_latents, FluxKontextPipeline._prepare_latent_image_ids
    second = ids(3, 6, 4, CPU, torch.float32)
    second[..., 0] = 1
    with torch.no_grad():
        predicted = pipeline.transformer(
            hidden_states=torch.cat([pack(mixed, 3, 16, 8, 12), pack(reference, 3, 16, 12, 8)], 1),
            timestep=times,
            guidance=torch.ones(3),
            pooled_projections=text.pooled,
            encoder_hidden_states=text.embed,
            txt_ids=torch.zeros(512, 3),
            img_ids=torch.cat([ids(3, 4, 6, CPU, torch.float32), second]),
        ).sample
    expected = (predicted[:, :24] - pack(noise - latents, 3, 16, 8, 12)).square().mean()
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


def test_shift_depends_on_target_tokens_as_in_the_scheduler(pipeline: FluxKontextPipeline) -> None:
    from diffusers.pipelines.flux.pipeline_flux_kontext import calculate_shift

    for tokens in (256, 1024, 4096, 9216):
        assert flow.auto_shift(tokens) == pytest.approx(float(np.exp(calculate_shift(tokens))), rel=1e-12)
    times = torch.tensor([0.1, 0.5, 0.9])
    expected = pipeline.scheduler.time_shift(calculate_shift(1024), 1.0, times)
    torch.testing.assert_close(flow.shifted(times, flow.auto_shift(1024)), expected)


@pytest.mark.parametrize("vae_dtype", ["fp32", "bf16"])
def test_cached_latents_equal_the_pipelines_own_encoding_of_the_same_pixels(
    make_project: object, tiny_models: Path, vae_dtype: str
) -> None:
    project = open_project(make_project(vae_dtype=vae_dtype, vae_batch_size=1))  # type: ignore[operator]
    scan(project), pairs(project), cache(project)

    from families.checkpoints import image_encoder_key, locate
    from schemas.shards import ShardIndex

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[vae_dtype]
    pipeline = FluxKontextPipeline.from_pretrained(tiny_models / "tiny-flux-kontext", dtype=dtype)
    pipeline.to(default_device())
    encoder = image_encoder_key(project, locate(project, project.family.image_encoder), "mode")
    [target] = project.targets
    rows = read_pairs(project, target)
    assert len(rows) == 6
    for row in rows:
        pictures = [(row.target_key(encoder), target_picture(project, row))]
        pictures += [(one.key(encoder), reference_picture(project, row, one)) for one in row.references]
        for key, picture in pictures:
            values = pipeline.image_processor.preprocess(Image.fromarray(pixels_of(picture)))
            with torch.no_grad():
                expected = pipeline._encode_vae_image(values.to(default_device(), dtype), None)[0].cpu()
            store = ShardIndex(project.latent_store(target) / encoder)
            stored = torch.from_numpy(store.read(key)["latent"]).view(torch.bfloat16)
            assert torch.equal(stored, expected.to(torch.bfloat16))


def test_cached_text_embeds_equal_the_pipelines_encode_prompt(make_project: object, tiny_models: Path) -> None:
    project = open_project(make_project())  # type: ignore[operator]
    scan(project), pairs(project), cache(project)

    from families.checkpoints import locate, text_encoder_key
    from schemas.keys import text_key
    from schemas.shards import ShardIndex

    pipeline = FluxKontextPipeline.from_pretrained(tiny_models / "tiny-flux-kontext", dtype=torch.bfloat16)
    pipeline.to(default_device())
    encoder = text_encoder_key(project, locate(project, project.family.text_encoders))
    store = ShardIndex(project.text_store / encoder)
    [target] = project.targets
    prompts = {prompt for row in read_pairs(project, target) for prompt in row.prompts} | {""}
    assert len(store) == len(prompts) == 7
    for prompt in prompts:
        with torch.no_grad():
            embed, pooled, _ = pipeline.encode_prompt(prompt=prompt, prompt_2=None, max_sequence_length=512)
        record = store.read(text_key(encoder, prompt))
        assert record["prompt"] == prompt
        assert torch.equal(torch.from_numpy(record["embed"]).view(torch.bfloat16), embed[0].cpu())
        assert torch.equal(torch.from_numpy(record["pooled"]).view(torch.bfloat16), pooled[0].cpu())
        assert record["num_tokens"] == len(pipeline.tokenizer_2(prompt).input_ids)


def test_decoding_undoes_the_normalisation(pipeline: FluxKontextPipeline) -> None:
    picture = _picture(64, 64)
    latents = flux.encode_images(pipeline.vae, torch.from_numpy(np.array(picture))[None]).mean
    raw = latents / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor
    with torch.no_grad():
        decoded = pipeline.vae.decode(raw).sample
    expected = pipeline.image_processor.postprocess(decoded, output_type="pil")[0]
    assert np.array_equal(flux.decode_latents(pipeline.vae, latents)[0].numpy(), np.asarray(expected))


def test_strict_references_show_the_targets_box_to_the_pixel(make_project: object, tmp_path: Path) -> None:
    folder = make_project()  # type: ignore[operator]
    for picture in (folder / "target").glob("*.jpg"):
        copy = picture.read_bytes() + b"after the end of the picture"
        (folder / "reference" / picture.name).write_bytes(copy)
    project = open_project(folder)
    scan(project), pairs(project)
    [target] = project.targets
    for row in read_pairs(project, target):
        [reference] = row.references
        ours = pixels_of(reference_picture(project, row, reference))
        assert np.array_equal(ours, pixels_of(target_picture(project, row)))
        whole = decode((folder / "target" / row.target_path).read_bytes())
        assert np.array_equal(ours, frame(whole, row.geometry))
