"""Caches as other trainers write them, by their documented layouts, from pixels that Pillow decoded."""

import gzip
import io
import json
from collections.abc import Mapping, Sequence
from hashlib import md5, sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from families import open_project
from families.checkpoints import locate
from families.protocol import Placement
from families.runtime import family_of
from schemas.project import Project


class Encoders:
    """The models of a project, as another trainer would run them: diffusers' own calls."""

    def __init__(self, folder: Path) -> None:
        self.project: Project = open_project(folder)
        checkpoint = locate(self.project, self.project.family.denoiser)
        family = family_of(self.project)
        self.vae = family.load_image_encoder(
            checkpoint, torch.float32, torch.device("cpu"), tiling=False, slicing=False
        )
        self._text = family.load_text_encoders(
            checkpoint, torch.bfloat16, Placement(torch.device("cpu")), self.project.text_settings
        )

    @torch.no_grad()
    def latent(self, picture: Image.Image, *, drawn: bool = False) -> Tensor:
        """Encode a picture as it is, normalised, C × H × W."""
        values = 2.0 * (torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255.0) - 1.0
        posterior = self.vae.encode(values).latent_dist
        raw = posterior.sample(torch.Generator().manual_seed(1)) if drawn else posterior.mode()
        return ((raw - self.vae.config.shift_factor) * self.vae.config.scaling_factor)[0]

    @torch.no_grad()
    def prompt(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Encode a prompt: rows of tokens and the pooled embed."""
        embed, pooled, _ = self._text.encode_prompt(prompt=prompt, prompt_2=None, max_sequence_length=512)
        return embed[0], pooled[0]


def pt(content: object, path: Path, *, zipped: bool = False) -> None:
    """Write what torch.save writes, gzipped as SimpleTuner does where it is asked to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(gzip.compress(buffer.getvalue()) if zipped else buffer.getvalue())


def simpletuner_latent(cache: Path, image: str, latent: Tensor, *, zipped: bool = False) -> Path:
    """Write a latent in bfloat16 under the hash of its image's name."""
    path = cache / Path(image).parent / f"{sha256(Path(image).stem.encode()).hexdigest()}.pt"
    pt(latent.to(torch.bfloat16).clone(), path, zipped=zipped)
    return path


def simpletuner_metadata(
    images: Path, dataset_id: str, records: Mapping[str, Mapping[str, Any]], config: Mapping[str, Any]
) -> None:
    """Write the two JSON files that lie beside the images."""
    spelled = {str(images / path): record for path, record in records.items()}
    (images / f"aspect_ratio_bucket_metadata_{dataset_id}.json").write_text(json.dumps(spelled))
    indices = {"config": config, "aspect_ratio_bucket_indices": {"1.0": sorted(spelled)}}
    (images / f"aspect_ratio_bucket_indices_{dataset_id}.json").write_text(json.dumps(indices))


def simpletuner_text(cache: Path, prompt: str, embed: Tensor, pooled: Tensor) -> Path:
    """Write an embed with its ids and its mask, as batches of one but for the pooled one."""
    path = cache / f"{md5(prompt.encode()).hexdigest()}-flux.pt"
    content = {
        "prompt_embeds": embed[None],
        "pooled_prompt_embeds": pooled,
        "time_ids": torch.zeros(1, len(embed), 3),
        "attention_masks": torch.ones(1, len(embed)),
    }
    pt(content, path)
    return path


def musubi_latent(cache: Path, image: str, size: tuple[int, int], target: Tensor, control: Tensor | None) -> Path:
    """Write a target and its control in float32."""
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"{Path(image).stem}_{size[0]:04d}x{size[1]:04d}_fk.safetensors"
    tensors = {f"latents_1x{target.shape[1]}x{target.shape[2]}_float32": target.contiguous()}
    if control is not None:
        tensors[f"latents_control_1x{control.shape[1]}x{control.shape[2]}_float32"] = control.contiguous()
    said = {"architecture": "flux_kontext", "width": f"{size[0]}", "height": f"{size[1]}", "format_version": "1.0.1"}
    save_file(tensors, path, metadata=said)
    return path


def musubi_text(cache: Path, image: str, prompt: str, embed: Tensor, pooled: Tensor) -> Path:
    """Write an embed, its caption in the metadata."""
    path = cache / f"{Path(image).stem}_fk_te.safetensors"
    tensors = {"t5_vec_bfloat16": embed.contiguous(), "clip_l_pooler_bfloat16": pooled.contiguous()}
    said = {"architecture": "flux_kontext", "caption1": prompt, "format_version": "1.0.1"}
    save_file(tensors, path, metadata=said)
    return path


def sd_scripts_latent(image: Path, size: tuple[int, int], latents: Sequence[Tensor]) -> Path:
    """Write the latents of several resolutions beside an image."""
    path = image.with_name(f"{image.stem}_{size[0]:04d}x{size[1]:04d}_flux.npz")
    arrays: dict[str, np.ndarray] = {}
    for latent in latents:
        shape = f"{latent.shape[1]}x{latent.shape[2]}"
        arrays[f"latents_{shape}"] = latent.float().numpy()
        arrays[f"original_size_{shape}"] = np.array(size)
        arrays[f"crop_ltrb_{shape}"] = np.array([0, 0, *size])
    np.savez(path, **arrays)
    return path


def sd_scripts_safetensors(image: Path, size: tuple[int, int], latent: Tensor) -> Path:
    """Write the latent of one resolution as newer versions do."""
    path = image.with_name(f"{image.stem}_{size[0]:04d}x{size[1]:04d}_flux.safetensors")
    shape = f"{latent.shape[1]}x{latent.shape[2]}"
    said = {"architecture": "flux", "width": f"{size[0]}", "height": f"{size[1]}", "format_version": "1.0.0"}
    said[f"crop_ltrb_{shape}"] = f"0,0,{size[0]},{size[1]}"
    save_file({f"latents_{shape}_float32": latent.contiguous()}, path, metadata=said)
    return path
