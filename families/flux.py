"""FLUX.1: dev, schnell and Kontext. A VAE of 16 channels at 1/8, CLIP-L and T5, a transformer over 2×2 patches.

Latent scaling, packing, positions and the call of the transformer live here and nowhere else. Maths and ids
are those of diffusers' FluxPipeline and FluxKontextPipeline, where people run the result.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import Tensor, nn
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from families.adapters import AdapterFile, put_adapter
from families.components import CPU, load_scheduler, load_vae, load_whole, pixels_of, place_vae, values_of
from families.offloading import Groups, offload
from families.processors import turning
from families.protocol import Block, Placement, Posterior, Sampling, TextEmbeds
from families.quantize import quantize_and_place
from families.runtime import check_whole
from families.tiny import clip_tokenizer, seeded, t5_tokenizer

_PATCH = 2  # latent pixels of a token's side

# The transformer of tiny checkpoints.
_TINY: Mapping[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 1,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 64,
    "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 12, 16),
}


def load_image_encoder(
    checkpoint: Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    tiling: bool,
    slicing: bool,
    groups: Groups | None = None,
) -> AutoencoderKL:
    """Load the VAE; raises UserError if its weights are not those that its config.json tells of."""
    vae = load_vae(AutoencoderKL, checkpoint, dtype, tiling=tiling, slicing=slicing)
    return place_vae(vae, device, groups)


@torch.no_grad()
def encode_images(encoder: AutoencoderKL, pixels: Tensor) -> Posterior:
    """Encode and normalise; the mean is what FluxKontextPipeline makes of its reference."""
    posterior = encoder.encode(values_of(pixels).to(encoder.device, encoder.dtype)).latent_dist
    scale = encoder.config.scaling_factor
    return Posterior((posterior.mode() - encoder.config.shift_factor) * scale, posterior.std * scale)


@torch.no_grad()
def decode_latents(encoder: AutoencoderKL, latents: Tensor) -> Tensor:
    """Undo the normalisation and decode."""
    raw = latents.to(encoder.device, encoder.dtype) / encoder.config.scaling_factor + encoder.config.shift_factor
    return pixels_of(encoder.decode(raw).sample)


def load_text_encoders(
    checkpoint: Path, dtype: torch.dtype, how: Placement, settings: Mapping[str, Any]
) -> FluxKontextPipeline:
    """Load CLIP-L and T5 with their tokenizers, as a pipeline that has nothing else.

    Raises UserError if tensors are missing.
    """
    nothing = {"transformer": None, "vae": None, "image_encoder": None, "feature_extractor": None}
    loaded = {}
    waiting = how.groups is not None or (how.turns and how.device.type != "cpu")
    place = torch.device("cpu") if waiting else how.device
    for component, kind in (("text_encoder", CLIPTextModel), ("text_encoder_2", T5EncoderModel)):
        encoder, found = kind.from_pretrained(
            checkpoint, subfolder=component, dtype=dtype, use_safetensors=True, output_loading_info=True
        )
        check_whole(checkpoint / component, encoder, found["missing_keys"])
        precision = how.precisions.get(component, "no_change")
        quantize_and_place(encoder.eval().requires_grad_(False), precision, (), place, how.quantize_via)
        loaded[component] = encoder
    pipeline = FluxKontextPipeline.from_pretrained(checkpoint, dtype=dtype, **nothing, **loaded)
    if how.groups is not None:
        pipeline.text_encoder.to(how.device)
        offload(pipeline.text_encoder_2, pipeline.text_encoder_2.encoder.block, how.device, how.groups)
    elif waiting:
        pipeline.enable_model_cpu_offload(device=how.device)
    return pipeline


@torch.no_grad()
def encode_prompts(encoders: FluxKontextPipeline, prompts: Sequence[str], settings: Mapping[str, Any]) -> TextEmbeds:
    """Encode prompts with the pipeline's own `encode_prompt`."""
    length = settings["max_sequence_length"]
    embed, pooled, _ = encoders.encode_prompt(prompt=list(prompts), prompt_2=None, max_sequence_length=length)
    return TextEmbeds(embed, pooled, count_tokens(encoders.tokenizer_2, prompts, settings))


def load_tokenizer(checkpoint: Path) -> Any:
    """Load T5's, whose rows the transformer reads."""
    return AutoTokenizer.from_pretrained(checkpoint / "tokenizer_2")


def count_tokens(tokenizer: Any, prompts: Sequence[str], settings: Mapping[str, Any]) -> tuple[int, ...]:
    """Count T5's tokens."""
    return tuple(len(ids) for ids in tokenizer(list(prompts))["input_ids"])


def denoiser_config(flavour: str, *, tiny: bool) -> Mapping[str, Any]:
    """Return what is not the class's default; flavours differ in guidance alone."""
    return {"guidance_embeds": flavour != "schnell", **(_TINY if tiny else {})}


def build_denoiser(config: Mapping[str, Any]) -> FluxTransformer2DModel:
    """Make a transformer."""
    return FluxTransformer2DModel.from_config(config)


def load_denoiser(checkpoint: Path, dtype: torch.dtype, device: torch.device = CPU) -> FluxTransformer2DModel:
    """Load the transformer; raises UserError if its weights are not those its config.json tells of."""
    return load_whole(FluxTransformer2DModel, checkpoint, "transformer", dtype, device)


def blocks(denoiser: FluxTransformer2DModel) -> list[Block]:
    """Return the double blocks, then the single ones; both take and give text apart from images."""
    modules = (*denoiser.transformer_blocks, *denoiser.single_transformer_blocks)
    return [Block(one, "hidden_states", "image_rotary_emb", joined=False, output=1) for one in modules]


def rotary_processors(denoiser: FluxTransformer2DModel) -> list[tuple[nn.Module, Any]]:
    """Return attentions of all blocks and the processors that fuse norm and rotary embedding."""
    return turning(denoiser)


def takes_guidance(denoiser: FluxTransformer2DModel) -> bool:
    """Tell dev and Kontext, which embed a guidance scale, from schnell."""
    return bool(denoiser.config.guidance_embeds)


def num_tokens(latent_shape: Sequence[int]) -> int:
    """Count 2×2 patches."""
    return (latent_shape[-2] // _PATCH) * (latent_shape[-1] // _PATCH)


def velocity(
    denoiser: FluxTransformer2DModel,
    noisy: Tensor,
    references: Sequence[Tensor],
    text: TextEmbeds,
    sigma: Tensor,
    guidance: Tensor | None,
) -> Tensor:
    """Run the transformer on target and reference tokens together and keep the target's rows.

    Inputs take the dtype of its weights, as in the pipelines.
    """
    dtype = denoiser.x_embedder.weight.dtype
    tokens = torch.cat([pack(image) for image in (noisy, *references)], dim=1).to(dtype)  # batch × all tokens × 64
    ids = torch.cat([target_ids(noisy), *reference_ids(references)])
    predicted = denoiser(
        hidden_states=tokens,
        timestep=sigma.to(dtype),
        guidance=guidance,
        pooled_projections=None if text.pooled is None else text.pooled.to(dtype),
        encoder_hidden_states=text.embed.to(dtype),
        txt_ids=torch.zeros(text.embed.shape[1], 3, device=tokens.device, dtype=dtype),
        img_ids=ids.to(dtype),
        return_dict=False,
    )[0]
    return unpack(predicted[:, : num_tokens(noisy.shape)], noisy.shape[-2], noisy.shape[-1])


def pack(latents: Tensor) -> Tensor:
    """Turn latents, B × C × H × W, into tokens of 2×2 patches, B × H/2·W/2 × 4C, channels outermost."""
    batch, channels, height, width = latents.shape
    patches = latents.view(batch, channels, height // _PATCH, _PATCH, width // _PATCH, _PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * _PATCH * _PATCH)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Turn tokens back into latents of `height` × `width`."""
    batch, _, size = tokens.shape
    channels = size // (_PATCH * _PATCH)
    patches = tokens.view(batch, height // _PATCH, width // _PATCH, channels, _PATCH, _PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def target_ids(latents: Tensor) -> Tensor:
    """Return the positions (0, row, column) of a target's tokens, tokens × 3."""
    return _ids(latents, 0, 0, 0)


def reference_ids(references: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the positions (1, row, column) of each reference's tokens.

    The first starts at the origin, as in FluxKontextPipeline. Each further one is laid right of or below the canvas of
    those before it, whichever keeps the canvas closer to a square (ComfyUI's placement; the pipeline takes one only).
    """
    canvas_width = canvas_height = 0  # of the references so far, in latent pixels
    for latents in references:
        height, width = latents.shape[-2:]
        left = top = 0
        if height + canvas_height > width + canvas_width:
            left = canvas_width
        else:
            top = canvas_height
        yield _ids(latents, 1, top // _PATCH, left // _PATCH)
        canvas_width, canvas_height = max(canvas_width, width + left), max(canvas_height, height + top)


def _ids(latents: Tensor, kind: int, top: int, left: int) -> Tensor:
    height, width = latents.shape[-2] // _PATCH, latents.shape[-1] // _PATCH
    ids = torch.zeros(height, width, 3, device=latents.device)
    ids[..., 0] = kind
    ids[..., 1] += torch.arange(top, top + height, device=latents.device)[:, None]
    ids[..., 2] += torch.arange(left, left + width, device=latents.device)[None, :]
    return ids.reshape(-1, 3)


def save_lora(path: Path, layers: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a safetensors file; the metadata keeps alpha, without which strength is lost."""
    FluxKontextPipeline.save_lora_weights(
        path.parent,
        transformer_lora_layers=layers,
        transformer_lora_adapter_metadata=metadata,
        weight_name=path.name,
    )


class _Sampler(FluxKontextPipeline):  # type: ignore[misc]
    """FluxKontextPipeline between text embeds and latents, for any number of references that are latents already."""

    references: Sequence[Tensor] = ()
    place = torch.device("cpu")

    @property
    def _execution_device(self) -> torch.device:
        return self.place  # weights that are offloaded lie elsewhere

    def prepare_latents(self, image: None, *others: Any, **named: Any) -> tuple[Tensor, Tensor | None, Tensor, Any]:
        """Draw the noise as the pipeline does; tokens and positions of references are those of `velocity`."""
        latents, _, ids, _ = super().prepare_latents(image, *others, **named)
        if not self.references:
            return latents, None, ids, None
        tokens = torch.cat([pack(one) for one in self.references], dim=1)
        return latents, tokens.to(latents), ids, torch.cat(list(reference_ids(self.references))).to(ids)


def load_pipeline(checkpoint: Path) -> FluxKontextPipeline:
    """Load the scheduler into Kontext's pipeline: without references it is that of dev and schnell too."""
    nothing = dict.fromkeys(("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = _Sampler(scheduler=load_scheduler(checkpoint), **nothing)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(
    pipeline: FluxKontextPipeline,
    denoiser: FluxTransformer2DModel,
    text: TextEmbeds,
    negative: TextEmbeds | None,
    references: Sequence[Tensor],
    how: Sampling,
) -> Tensor:
    """Sample with FluxKontextPipeline itself, up to where it would decode."""
    dtype = denoiser.x_embedder.weight.dtype
    against: dict[str, Any] = {}
    if negative is not None and how.guidance_real > 1:
        against = _embeds(negative, dtype, "negative_") | {"true_cfg_scale": how.guidance_real}
    pipeline.register_modules(transformer=denoiser)
    pipeline.references, pipeline.place = references, text.embed.device
    tokens = pipeline(
        **_embeds(text, dtype, ""),
        **against,
        width=how.width,
        height=how.height,
        max_area=how.width * how.height,  # or it is scaled to 1024²
        num_inference_steps=how.steps,
        guidance_scale=how.guidance,
        generator=torch.Generator().manual_seed(how.seed),
        output_type="latent",
        return_dict=False,
    )[0]
    return unpack(tokens, how.height // pipeline.vae_scale_factor, how.width // pipeline.vae_scale_factor)


def _embeds(text: TextEmbeds, dtype: torch.dtype, prefix: str) -> dict[str, Tensor]:
    assert text.pooled is not None, "the family has pooled embeds"
    return {f"{prefix}prompt_embeds": text.embed.to(dtype), f"{prefix}pooled_prompt_embeds": text.pooled.to(dtype)}


def load_adapter(denoiser: FluxTransformer2DModel, file: Path, strength: float) -> int:
    """Read a file as the pipeline does, and load it into the transformer itself."""

    def read() -> AdapterFile:
        weights, alphas, metadata = FluxKontextPipeline.lora_state_dict(
            file.parent,
            weight_name=file.name,
            use_safetensors=True,
            return_alphas=True,
            return_lora_metadata=True,
        )
        return AdapterFile(weights, alphas, metadata)

    return put_adapter(denoiser, file, strength, read)


def build_tiny(folder: Path, flavour: str) -> None:
    """Write a small random checkpoint; VAE and text encoders are those of every flavour."""
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    pipeline = (FluxKontextPipeline if flavour == "kontext" else FluxPipeline)(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=4096
        ),
        vae=_tiny_vae(),
        text_encoder=_tiny_clip(clip),
        tokenizer=clip,
        text_encoder_2=_tiny_t5(t5),
        tokenizer_2=t5,
        transformer=_tiny_transformer(flavour),
    )
    pipeline.save_pretrained(folder)


def _tiny_vae() -> AutoencoderKL:
    with seeded("flux vae"):
        return AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=4,
            sample_size=64,
            use_quant_conv=False,
            use_post_quant_conv=False,
            shift_factor=0.1159,
            scaling_factor=0.3611,
        ).eval()


def _tiny_clip(tokenizer: Any) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with seeded("flux clip"):
        return CLIPTextModel(config).eval()


def _tiny_t5(tokenizer: Any) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    with seeded("flux t5"):
        return T5EncoderModel(config).eval()


def _tiny_transformer(flavour: str) -> FluxTransformer2DModel:
    with seeded(f"flux transformer {flavour}"):
        return build_denoiser(denoiser_config(flavour, tiny=True)).eval()
