"""Model families: what pairline can prepare for and train.

A new one is a module beside this file that offers the functions of `families.protocol.Family`, and an entry in
`FAMILIES`. This file loads no tensor library: scanning and pairing need only what an entry says.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from schemas.family import Expected, FamilySpec, Flavour, Scripts, Width
from schemas.loading import check_folders, load_project
from schemas.project import Project

# What these say when they are imported, where torchao is installed, is of kernels that this machine lacks.
for _library in ("torchao", "torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"):
    logging.getLogger(_library).setLevel(logging.ERROR)

# Presets name q, k and v both apart and fused (`fuse_qkv_projections`): a network has the one or the other.
_KONTEXT_SCRIPTS = Scripts(
    "flux_kontext",
    "a copy of config/examples/train_lora_flux_kontext_24gb.yaml",
    "train_dreambooth_lora_flux_kontext.py",
    one_reference=True,
)
_T5_WIDTH = Width(4096, "text_encoder_2", "d_model")
_FLUX_ATTENTION = r"attn\.(to_[qkv]|to_qkv|to_out\.0)"
_FLUX_CONTEXT = r"attn\.(add_[qkv]_proj|to_added_qkv|to_add_out)"
_FLUX_FF, _FLUX_FF_CONTEXT = (rf"{name}\.net\.(0\.proj|2)" for name in ("ff", "ff_context"))
_FLUX_BLOCKS = r"(single_)?transformer_blocks\.\d+\."
_FLUX_ALL_FFS = rf"{_FLUX_ATTENTION}|{_FLUX_CONTEXT}|{_FLUX_FF}|{_FLUX_FF_CONTEXT}|proj_mlp|proj_out"

_FLUX2_DOUBLE = r"transformer_blocks\.\d+\."
_FLUX2_ATTENTION = r"attn\.(to_[qkv]|to_qkv|to_out\.0|add_[qkv]_proj|to_added_qkv|to_add_out)"
_FLUX2_MLP = r"ff(_context)?\.linear_(in|out)"
# In single blocks attention and feed-forward are one layer on the way in, and one on the way out.
_FLUX2_SINGLE = r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
# What Flux2Pipeline has before every prompt, its line break included: part of what the model learnt to read.
_FLUX2_SYSTEM_MESSAGE = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)


def _flux2_transformer(*, guidance_embeds: bool) -> Expected:
    wanted = {"in_channels": 128, "guidance_embeds": guidance_embeds}
    return Expected("Flux2Transformer2DModel", wanted, unsaid={"guidance_embeds": True})  # dev's is older than klein


def _klein(checkpoint: str, text_width: int) -> Flavour:
    return Flavour(
        checkpoint,
        {"max_sequence_length": 512, "layers": (9, 18, 27)},
        Width(text_width, "text_encoder", "hidden_size", 3),
        told_guidance=False,
        true_guidance="usual",
        scripts=Scripts("flux_2", "a job of FLUX.2 klein", "train_dreambooth_lora_flux2_klein_img2img.py"),
        configs={
            "text_encoder": Expected(values={"model_type": "qwen3"}),
            "transformer": _flux2_transformer(guidance_embeds=False),
        },
        distilled="is_distilled",
    )


FAMILIES: Mapping[str, FamilySpec] = {
    "flux": FamilySpec(
        module="families.flux",
        # T5 is not masked, so that its rows depend on the length they are padded to.
        flavours={
            "dev": Flavour(
                "black-forest-labs/FLUX.1-dev",
                {"max_sequence_length": 512},
                _T5_WIDTH,
                told_guidance=True,
                true_guidance="possible",
                scripts=_KONTEXT_SCRIPTS,
            ),
            "schnell": Flavour(
                "black-forest-labs/FLUX.1-schnell",
                {"max_sequence_length": 256},
                _T5_WIDTH,
                told_guidance=False,
                true_guidance="possible",
                scripts=_KONTEXT_SCRIPTS,
            ),
            "kontext": Flavour(
                "black-forest-labs/FLUX.1-Kontext-dev",
                {"max_sequence_length": 512},
                _T5_WIDTH,
                told_guidance=True,
                true_guidance="possible",
                scripts=_KONTEXT_SCRIPTS,
            ),
        },
        image_encoder=("vae",),
        text_encoders=("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
        denoiser=("transformer",),
        configs={
            "vae": Expected("AutoencoderKL", {"latent_channels": 16}, ("scaling_factor", "shift_factor")),
            "text_encoder": Expected(),
            "text_encoder_2": Expected(),
            "transformer": Expected("FluxTransformer2DModel", {"in_channels": 64}),
        },
        numbered_text_encoders=("text_encoder", "text_encoder_2"),
        latent_channels=Width(16, "vae", "latent_channels"),
        latent_scale=8,
        pooled_width=Width(768, "text_encoder", "hidden_size"),
        text_input="joint_attention_dim",
        pooled_input="pooled_projection_dim",
        default_flavour="kontext",
        alignment=64,
        smallest_alignment=16,
        lora_targets={
            "mmdit": rf"{_FLUX_BLOCKS}{_FLUX_ATTENTION}",
            "context": rf"{_FLUX_BLOCKS}{_FLUX_CONTEXT}",
            "context+ffs": rf"{_FLUX_BLOCKS}({_FLUX_CONTEXT}|{_FLUX_FF_CONTEXT})",
            "all": rf"{_FLUX_BLOCKS}({_FLUX_ATTENTION}|{_FLUX_CONTEXT})",
            "all+ffs": rf"{_FLUX_BLOCKS}({_FLUX_ALL_FFS})|proj_out",
            "all+ffs+embedder": rf"{_FLUX_BLOCKS}({_FLUX_ALL_FFS})|proj_out|x_embedder",
            "ai-toolkit": rf"{_FLUX_BLOCKS}({_FLUX_ALL_FFS}|norm(1|1_context)?\.linear)|proj_out",
            "tiny": r"single_transformer_blocks\.(7|20)\.proj_out",
            "nano": r"single_transformer_blocks\.7\.proj_out",
            "diffusers": rf"{_FLUX_BLOCKS}({_FLUX_ATTENTION}|{_FLUX_CONTEXT}|{_FLUX_FF}|{_FLUX_FF_CONTEXT}|proj_mlp)",
        },
        default_lora_target="all",
        elsewhere={"simpletuner": "flux", "musubi": "fk", "sd-scripts": "flux"},
        unquantised=("proj_out", "x_embedder", "context_embedder"),
        conditioning=r"time_text_embed\..*|(.*\.)?norm(1|1_context|_out)?\.linear",
        text_rows="t5_tokens",
    ),
    "flux2": FamilySpec(
        module="families.flux2",
        flavours={
            "dev": Flavour(
                "black-forest-labs/FLUX.2-dev",
                {"max_sequence_length": 512, "layers": (10, 20, 30), "system_message": _FLUX2_SYSTEM_MESSAGE},
                Width(15360, "text_encoder", "text_config.hidden_size", 3),
                told_guidance=True,
                true_guidance="none",
                scripts=Scripts("flux_2", "a job of FLUX.2", "train_dreambooth_lora_flux2_img2img.py"),
                configs={
                    "text_encoder": Expected(values={"model_type": "mistral3"}),
                    "transformer": _flux2_transformer(guidance_embeds=True),
                },
                padding_first=True,
            ),
            "klein-9b": _klein("black-forest-labs/FLUX.2-klein-base-9B", 12288),
            "klein-4b": _klein("black-forest-labs/FLUX.2-klein-base-4B", 7680),
        },
        image_encoder=("vae",),
        text_encoders=("text_encoder", "tokenizer"),
        denoiser=("transformer",),
        configs={"vae": Expected("AutoencoderKLFlux2", {"latent_channels": 32}, ("batch_norm_eps",))},
        numbered_text_encoders=("text_encoder",),
        latent_channels=Width(128, "vae", "latent_channels", 4),
        latent_scale=16,
        pooled_width=None,
        text_input="joint_attention_dim",
        pooled_input="pooled_projection_dim",
        default_flavour="klein-9b",
        alignment=16,
        smallest_alignment=16,
        lora_targets={
            "all": rf"{_FLUX2_DOUBLE}({_FLUX2_ATTENTION}|{_FLUX2_MLP})|{_FLUX2_SINGLE}",
            "attention": rf"{_FLUX2_DOUBLE}{_FLUX2_ATTENTION}|{_FLUX2_SINGLE}",
            "mlp": rf"{_FLUX2_DOUBLE}{_FLUX2_MLP}",
            "tiny": rf"{_FLUX2_DOUBLE}attn\.(to_[qkv]|to_qkv)",
            "diffusers": rf"{_FLUX2_DOUBLE}attn\.(to_[qkv]|to_qkv|to_out\.0)|{_FLUX2_SINGLE}",
        },
        default_lora_target="all",
        elsewhere={},
        unquantised=("proj_out", "x_embedder", "context_embedder"),
        conditioning=r"time_guidance_embed\..*|.*_modulation(_img|_txt)?\.linear|norm_out\.linear",
    ),
}

Source: TypeAlias = Project | str | Path


def open_project(
    source: Source,
    *,
    root: str | Path | None = None,
    workspace: str | Path | None = None,
    overrides: Sequence[str] = (),
    need_images: bool = False,
) -> Project:
    """Read and check a project folder, or its config.json; a project that is open already is returned as it is.

    Relative paths resolve against `root`, by default the folder of config.json; `workspace` is by default `work/` in
    it. `overrides` are `key=value` texts for config.json. Raises ConfigError with every fault of both files.
    """
    if isinstance(source, Project):
        if need_images:
            check_folders(source)
        return source
    return load_project(source, FAMILIES, root=root, workspace=workspace, overrides=overrides, need_images=need_images)
