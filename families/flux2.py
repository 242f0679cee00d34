"""FLUX.2: dev, klein-9b and klein-4b. A VAE of 32 channels, packed to 128 at 1/16, and a language model as encoder.

Latent scaling, positions, the chat that prompts are put in and the call of the transformer live here and nowhere else.
Maths, ids and texts are those of diffusers' Flux2Pipeline and Flux2KleinPipeline, where people run the result.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.pipeline_flux2 import format_input
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AutoConfig,
    AutoTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from families.adapters import AdapterFile, put_adapter
from families.components import CPU, load_scheduler, load_vae, load_whole, pixels_of, place_vae, values_of
from families.offloading import Groups, offload
from families.processors import turning
from families.protocol import Block, Placement, Posterior, Sampling, TextEmbeds
from families.quantize import quantize_and_place
from families.runtime import check_whole
from families.tiny import mistral_tokenizer, qwen_tokenizer, seeded
from schemas.errors import UserError

_PATCH = 2  # cells of the VAE along a side of one of ours
_PIXELS = 16  # of pictures along a side of one of ours
_APART = 10  # between the times of references, the first of which has this one
_BYTES = 256  # each of which is a token at least, in both vocabularies
_ROTARY = "image_rotary_emb"
# Kernels that give zeros to a row with nothing to attend to, as PyTorch defines it; cuDNN's gives other numbers.
_MASKING = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
_NOTHING = dict.fromkeys(("scheduler", "vae", "text_encoder", "tokenizer", "transformer"))  # parts of a pipeline

# Of hidden states; multiples of 16, or PyTorch 2.13's int8 product on a CPU, which quanto calls, reads past their end.
_TINY_WIDTHS = {"dev": 48, "klein-9b": 32, "klein-4b": 16}

# The transformers of tiny checkpoints, and those of klein.
_TINY: Mapping[str, Any] = {
    "num_layers": 2,
    "num_single_layers": 6,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "axes_dims_rope": (8, 8, 8, 8),
}
_KLEIN: Mapping[str, Mapping[str, Any]] = {
    "klein-9b": {"num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288},
    "klein-4b": {"num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680},
}


def load_image_encoder(
    checkpoint: Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    tiling: bool,
    slicing: bool,
    groups: Groups | None = None,
) -> AutoencoderKLFlux2:
    """Load the VAE with the statistics of its latents.

    Raises UserError if weights are not what config.json tells, or statistics cannot be divided by.
    """
    vae = load_vae(AutoencoderKLFlux2, checkpoint, dtype, tiling=tiling, slicing=slicing)
    mean, variance = vae.bn.running_mean, vae.bn.running_var
    if not (mean.isfinite() & variance.isfinite() & (variance > 0)).all():
        raise UserError(
            f"{checkpoint / 'vae'}: of the statistics of its latents, bn.running_mean and bn.running_var, some are not "
            "finite, or a variance is not above 0; fetch the checkpoint again"
        )
    return place_vae(vae, device, groups)


@torch.no_grad()
def encode_images(encoder: AutoencoderKLFlux2, pixels: Tensor) -> Posterior:
    """Encode, pack 2×2 cells into one and normalise; the mean is what the pipelines make of a reference."""
    posterior = encoder.encode(values_of(pixels).to(encoder.device, encoder.dtype)).latent_dist
    mean, deviation = _statistics(encoder)
    return Posterior((patchify(posterior.mode()) - mean) / deviation, patchify(posterior.std) / deviation)


@torch.no_grad()
def decode_latents(encoder: AutoencoderKLFlux2, latents: Tensor) -> Tensor:
    """Undo normalisation and packing, and decode."""
    mean, deviation = _statistics(encoder)
    raw = unpatchify(latents.to(encoder.device, encoder.dtype) * deviation + mean)
    return pixels_of(encoder.decode(raw).sample)


def _statistics(encoder: AutoencoderKLFlux2) -> tuple[Tensor, Tensor]:
    """Return mean and deviation of packed channels, 1 × 128 × 1 × 1, in the VAE's dtype, as the pipelines take them."""
    mean, variance = encoder.bn.running_mean, encoder.bn.running_var
    deviation = torch.sqrt(variance.view(1, -1, 1, 1) + encoder.config.batch_norm_eps)
    return mean.view(1, -1, 1, 1).to(encoder.dtype), deviation.to(encoder.dtype)


def patchify(latents: Tensor) -> Tensor:
    """Pack 2×2 cells, B × C × H × W, into one of four times the channels, B × 4C × H/2 × W/2, channels outermost."""
    batch, channels, height, width = latents.shape
    cells = latents.view(batch, channels, height // _PATCH, _PATCH, width // _PATCH, _PATCH)
    return cells.permute(0, 1, 3, 5, 2, 4).reshape(batch, -1, height // _PATCH, width // _PATCH)


def unpatchify(latents: Tensor) -> Tensor:
    """Undo `patchify`."""
    batch, packed, height, width = latents.shape
    channels = packed // (_PATCH * _PATCH)
    cells = latents.reshape(batch, channels, _PATCH, _PATCH, height, width)
    return cells.permute(0, 1, 4, 2, 5, 3).reshape(batch, channels, height * _PATCH, width * _PATCH)


def load_text_encoders(
    checkpoint: Path, dtype: torch.dtype, how: Placement, settings: Mapping[str, Any]
) -> Flux2Pipeline | Flux2KleinPipeline:
    """Load Mistral (dev) or Qwen3 (klein) with the tokenizer, as a pipeline that has nothing else.

    Layers after the last that is read are left out but for one, since what the very last layer gives is normalised; so
    are the head and what sees pictures. Raises UserError if tensors are missing.
    """
    folder = checkpoint / "text_encoder"
    config = AutoConfig.from_pretrained(folder)
    text, last = config.get_text_config(), max(settings["layers"])
    if text.num_hidden_layers <= last:
        raise UserError(
            f"{folder / 'config.json'}: {text.num_hidden_layers} layers; what layer {last} gives is read, and one must "
            "follow it; is it the checkpoint of another model?"
        )
    text.num_hidden_layers = last + 1
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: last + 1]
    dev = isinstance(config, Mistral3Config)
    network, told = (Mistral3ForConditionalGeneration if dev else Qwen3ForCausalLM).from_pretrained(
        folder, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True
    )
    check_whole(folder, network, told["missing_keys"])
    encoder = (network.model.language_model if dev else network.model).eval().requires_grad_(False)
    place = torch.device("cpu") if how.groups is not None else how.device
    precision = how.precisions.get("text_encoder", "no_change")
    encoder = quantize_and_place(encoder, precision, (), place, how.quantize_via)
    if how.groups is not None:
        offload(encoder, list(encoder.get_submodule("layers").children()), how.device, how.groups)
    kind = Flux2Pipeline if dev else Flux2KleinPipeline
    return kind(**_NOTHING | {"text_encoder": encoder, "tokenizer": load_tokenizer(checkpoint)})


@torch.no_grad()
def encode_prompts(
    encoders: Flux2Pipeline | Flux2KleinPipeline, prompts: Sequence[str], settings: Mapping[str, Any]
) -> TextEmbeds:
    """Encode prompts with the pipeline's own `encode_prompt`."""
    encoders.system_message = settings.get("system_message")
    with sdpa_kernel(_MASKING):
        embed, _ = encoders.encode_prompt(
            prompt=list(prompts),
            max_sequence_length=settings["max_sequence_length"],
            text_encoder_out_layers=settings["layers"],
        )
    return TextEmbeds(embed, None, count_tokens(encoders.tokenizer, prompts, settings))


def load_tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer; of dev, without the processor of pictures it is part of.

    Such a processor takes tokenizer.json as it is, whatever class its tokenizer_config.json names. Raises UserError if
    there is no chat template, without which no prompt can be put as the model learnt to read it, nothing that prompts
    are padded with, or no vocabulary: a tokenizer whose file is not there would be built without.
    """
    folder = checkpoint / "tokenizer"
    try:
        said = json.loads((folder / "tokenizer_config.json").read_text())
        tokenizer = (PreTrainedTokenizerFast if "processor_class" in said else AutoTokenizer).from_pretrained(folder)
    except (OSError, ValueError) as fault:
        first = str(fault).splitlines()[0]
        raise UserError(f"{folder}: cannot be loaded ({first}); fetch the checkpoint again") from fault
    there = {
        "chat template": bool(tokenizer.chat_template),
        "padding token": tokenizer.pad_token is not None,
        "vocabulary": len(tokenizer) > _BYTES,
    }
    if lacking := [name for name, whole in there.items() if not whole]:
        raise UserError(f"{folder}: no {', no '.join(lacking)}; fetch the checkpoint again")
    return tokenizer


def count_tokens(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], settings: Mapping[str, Any]
) -> tuple[int, ...]:
    """Count the tokens of the chats that prompts are put into."""
    if "system_message" in settings:
        chats = format_input(list(prompts), settings["system_message"])
        told = {"add_generation_prompt": False}
    else:
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        told = {"add_generation_prompt": True, "enable_thinking": False}
    return tuple(map(len, tokenizer.apply_chat_template(chats, return_dict=True, **told)["input_ids"]))


def denoiser_config(flavour: str, *, tiny: bool) -> Mapping[str, Any]:
    """Return what is not the class's default, which is dev."""
    own = {**_TINY, "joint_attention_dim": 3 * _TINY_WIDTHS[flavour]} if tiny else _KLEIN.get(flavour, {})
    return {"guidance_embeds": flavour == "dev", **own}


def build_denoiser(config: Mapping[str, Any]) -> Flux2Transformer2DModel:
    """Make a transformer."""
    return Flux2Transformer2DModel.from_config(config)


def load_denoiser(checkpoint: Path, dtype: torch.dtype, device: torch.device = CPU) -> Flux2Transformer2DModel:
    """Load the transformer; raises UserError if its weights are not those its config.json tells of."""
    return load_whole(Flux2Transformer2DModel, checkpoint, "transformer", dtype, device)


def blocks(denoiser: Flux2Transformer2DModel) -> list[Block]:
    """Return the double blocks, then the single ones, which have text and images in one tensor."""
    double = [Block(one, "hidden_states", _ROTARY, joined=False, output=1) for one in denoiser.transformer_blocks]
    single = [
        Block(one, "hidden_states", _ROTARY, joined=True, output=None) for one in denoiser.single_transformer_blocks
    ]
    return double + single


def rotary_processors(denoiser: Flux2Transformer2DModel) -> list[tuple[nn.Module, Any]]:
    """Return attentions of all blocks and the processors that fuse norm and rotary embedding."""
    return turning(denoiser)


def takes_guidance(denoiser: Flux2Transformer2DModel) -> bool:
    """Tell dev, which embeds a guidance scale, from klein."""
    return bool(denoiser.config.guidance_embeds)


def num_tokens(latent_shape: Sequence[int]) -> int:
    """Count the cells: latents are packed already."""
    return latent_shape[-2] * latent_shape[-1]


def velocity(
    denoiser: Flux2Transformer2DModel,
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
    tokens = torch.cat([pack(image) for image in (noisy, *references)], dim=1).to(dtype)  # batch × all tokens × 128
    predicted = denoiser(
        hidden_states=tokens,
        timestep=sigma.to(dtype),
        guidance=guidance,
        encoder_hidden_states=text.embed.to(dtype),
        txt_ids=text_ids(text.embed),
        img_ids=torch.cat([target_ids(noisy), *reference_ids(references)]),
        return_dict=False,
    )[0]
    return unpack(predicted[:, : num_tokens(noisy.shape)], *noisy.shape[-2:])


def pack(latents: Tensor) -> Tensor:
    """Turn latents, B × C × H × W, into tokens, B × H·W × C, row by row."""
    return latents.flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """Turn tokens back into latents of `height` × `width`."""
    return tokens.transpose(1, 2).reshape(tokens.shape[0], -1, height, width)


def target_ids(latents: Tensor) -> Tensor:
    """Return the positions (0, row, column, 0) of a target's tokens, tokens × 4."""
    return _ids(latents, 0)


def reference_ids(references: Sequence[Tensor]) -> Iterator[Tensor]:
    """Yield the positions (time, row, column, 0) of each reference's tokens; times are 10, 20 and so on."""
    for number, latents in enumerate(references):
        yield _ids(latents, _APART * (number + 1))


def text_ids(embed: Tensor) -> Tensor:
    """Return the positions (0, 0, 0, number) of text tokens, tokens × 4."""
    ids = torch.zeros(embed.shape[1], 4, dtype=torch.int64, device=embed.device)
    ids[:, 3] = torch.arange(embed.shape[1], device=embed.device)
    return ids


def _ids(latents: Tensor, time: int) -> Tensor:
    height, width = latents.shape[-2:]
    ids = torch.zeros(height, width, 4, dtype=torch.int64, device=latents.device)
    ids[..., 0] = time
    ids[..., 1] = torch.arange(height, device=latents.device)[:, None]
    ids[..., 2] = torch.arange(width, device=latents.device)[None, :]
    return ids.reshape(-1, 4)


def save_lora(path: Path, layers: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Write a safetensors file; the metadata keeps alpha, without which strength is lost."""
    Flux2Pipeline.save_lora_weights(
        path.parent,
        transformer_lora_layers=layers,
        transformer_lora_adapter_metadata=metadata,
        weight_name=path.name,
    )


@dataclass(frozen=True, slots=True)
class _Sampling:
    """What sampling needs of a checkpoint."""

    scheduler: FlowMatchEulerDiscreteScheduler
    distilled: bool  # a klein of few steps, which takes no classifier-free guidance


class _Sampler:
    """Has a pipeline take references that are latents already, and leave what it makes normalised."""

    references: Sequence[Tensor] = ()
    place = torch.device("cpu")

    @property
    def _execution_device(self) -> torch.device:
        return self.place  # weights that are offloaded lie elsewhere

    def prepare_image_latents(self, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Return tokens and positions of the references, those of `velocity`."""
        tokens = torch.cat([pack(one) for one in self.references], dim=1)
        return tokens, torch.cat(list(reference_ids(self.references)))[None]


class _Dev(_Sampler, Flux2Pipeline):  # type: ignore[misc]
    """Flux2Pipeline between text embeds and latents."""


class _Klein(_Sampler, Flux2KleinPipeline):  # type: ignore[misc]
    """Flux2KleinPipeline between text embeds and latents."""


def load_pipeline(checkpoint: Path) -> _Sampling:
    """Load the scheduler, and whether the model is distilled."""
    index = checkpoint / "model_index.json"
    said = json.loads(index.read_text()) if index.exists() else {}
    return _Sampling(load_scheduler(checkpoint), said.get("is_distilled") is True)


def sample(
    pipeline: _Sampling,
    denoiser: Flux2Transformer2DModel,
    text: TextEmbeds,
    negative: TextEmbeds | None,
    references: Sequence[Tensor],
    how: Sampling,
) -> Tensor:
    """Sample with the family's own pipeline, up to where it would decode. dev has no true guidance."""
    dtype, place = denoiser.x_embedder.weight.dtype, text.embed.device
    parts = _NOTHING | {"scheduler": pipeline.scheduler, "transformer": denoiser}
    told: dict[str, Any] = {"guidance_scale": how.guidance}
    if takes_guidance(denoiser):
        sampler = _Dev(**parts)
    else:
        sampler = _Klein(**parts, is_distilled=pipeline.distilled)
        guided = negative is not None and how.guidance_real > 1
        told = {"guidance_scale": how.guidance_real if guided else 1.0}
        told |= {"negative_prompt_embeds": negative.embed.to(dtype)} if negative is not None and guided else {}
    sampler.set_progress_bar_config(disable=True)
    sampler.vae = _unchanging(denoiser.config.in_channels, dtype)
    sampler.references, sampler.place = [one.to(dtype) for one in references], place
    last: dict[str, Tensor] = {}

    def keep(_: object, step: int, time: object, values: dict[str, Tensor]) -> dict[str, Tensor]:
        last.update(values)
        return {}

    sampler(
        image=[_BLANK] if references else None,  # what stands for them in the pipeline's checks
        prompt_embeds=text.embed.to(dtype),
        **told,
        width=how.width,
        height=how.height,
        num_inference_steps=how.steps,
        generator=torch.Generator().manual_seed(how.seed),
        output_type="latent",
        callback_on_step_end=keep,  # the two pipelines return latents in two ways
    )
    return unpack(last["latents"], how.height // _PIXELS, how.width // _PIXELS)


_BLANK = Image.new("RGB", (64, 64))


def _unchanging(channels: int, dtype: torch.dtype) -> SimpleNamespace:
    """Stand in for a VAE whose latents have mean 0 and deviation 1: klein's pipeline undoes what it normalises."""
    bn = SimpleNamespace(running_mean=torch.zeros(channels), running_var=torch.ones(channels))
    return SimpleNamespace(bn=bn, dtype=dtype, config=SimpleNamespace(batch_norm_eps=0.0))


def load_adapter(denoiser: Flux2Transformer2DModel, file: Path, strength: float) -> int:
    """Read a file as the pipelines do, and load it into the transformer itself."""

    def read() -> AdapterFile:
        weights, metadata = Flux2Pipeline.lora_state_dict(
            file.parent, weight_name=file.name, use_safetensors=True, return_lora_metadata=True
        )
        return AdapterFile(weights, None, metadata)

    return put_adapter(denoiser, file, strength, read)


def build_tiny(folder: Path, flavour: str) -> None:
    """Write a small random checkpoint; the VAE is that of every flavour."""
    dev, width = flavour == "dev", _TINY_WIDTHS[flavour]
    tokenizer = mistral_tokenizer() if dev else qwen_tokenizer()
    pipeline = (Flux2Pipeline if dev else Flux2KleinPipeline)(
        scheduler=FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=4096
        ),
        vae=_tiny_vae(),
        text_encoder=_tiny_mistral(tokenizer, width) if dev else _tiny_qwen(tokenizer, width),
        tokenizer=tokenizer,
        transformer=_tiny_transformer(flavour),
    )
    pipeline.save_pretrained(folder)


def _tiny_vae() -> AutoencoderKLFlux2:
    with seeded("flux2 vae"):
        vae = AutoencoderKLFlux2(
            block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, sample_size=64
        ).eval()
        vae.bn.running_mean.normal_(0, 0.1)
        vae.bn.running_var.uniform_(0.5, 2)
        return vae


def _tiny_text(tokenizer: PreTrainedTokenizerBase, width: int, layers: int) -> dict[str, Any]:
    """Return what both language models have in common; each has a layer more than is loaded."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 1024,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _tiny_mistral(tokenizer: PreTrainedTokenizerBase, width: int) -> Mistral3ForConditionalGeneration:
    config = Mistral3Config(
        text_config={"model_type": "mistral", "sliding_window": None, **_tiny_text(tokenizer, width, 32)},
        vision_config={
            "model_type": "pixtral",
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 37,
            "image_size": 28,
            "patch_size": 14,
            "num_channels": 3,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
    )
    with seeded("flux2 mistral"), torch.no_grad():
        network = Mistral3ForConditionalGeneration(config).eval()
        network.model.language_model.embed_tokens.weight[tokenizer.pad_token_id].normal_(0, 0.02)  # as if it had learnt
        return network


def _tiny_qwen(tokenizer: PreTrainedTokenizerBase, width: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(tie_word_embeddings=True, **_tiny_text(tokenizer, width, 29))
    with seeded(f"flux2 qwen {width}"):
        return Qwen3ForCausalLM(config).eval()


def _tiny_transformer(flavour: str) -> Flux2Transformer2DModel:
    with seeded(f"flux2 transformer {flavour}"):
        return build_denoiser(denoiser_config(flavour, tiny=True)).eval()
