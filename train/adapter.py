"""What is trained: an adapter on a frozen network, LoRA or LoKr of peft, or all weights. Add, load, save.

Another kind of adapter is a branch of `_peft_config`, and of `_drawn` for its first weights. Tensors go by the names
that files have: those of fused layers are taken apart (`train/fusing.py`).
"""

import json
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import _collate_lora_metadata
from peft import LoKrConfig, LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lokr.layer import factorization
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from families.runtime import family_of
from schemas.errors import UserError
from schemas.keys import seed_of
from schemas.lycoris import LoKr
from schemas.paths import resolved
from schemas.project import Project
from schemas.storage import name_aside, sync, write_aside
from train.fusing import apart, together

LORA_NAME = "pytorch_lora_weights.safetensors"
RECORD = "pairline"  # entry of a file's header, and name of the JSON file beside whole weights
_METADATA = "lora_adapter_metadata"  # entry that diffusers reads


def add_adapter(denoiser: nn.Module, project: Project) -> list[nn.Parameter]:
    """Make what is trained of a frozen network and return the trainable parameters; raises UserError if there are none.

    Those of an adapter are float32. Their first values depend on the training seed and their layer's name alone.
    """
    if project.trainer.model_type == "full":
        return list(denoiser.requires_grad_(True).parameters())
    with torch.random.fork_rng():
        try:
            denoiser.add_adapter(_peft_config(denoiser, project))  # type: ignore[operator]
        except ValueError as fault:
            others = ", ".join(project.family.lora_targets)
            raise UserError(
                f"flux_lora_target: {preset_of(project)!r} wraps no layer of this model; presets: {others}"
            ) from fault
    named = [(name, parameter) for name, parameter in denoiser.named_parameters() if parameter.requires_grad]
    for name, parameter in named:
        generator = torch.Generator().manual_seed(seed_of(project.trainer.seed, "adapter", name))
        parameter.data = _drawn(name, parameter.shape, generator).to(parameter.device)
    return [parameter for _, parameter in named]


def preset_of(project: Project) -> str:
    """Name the preset of wrapped layers, the family's own where none is given."""
    return project.trainer.flux_lora_target or project.family.default_lora_target


def adapter_layers(denoiser: nn.Module) -> dict[str, Tensor]:
    """Return what is trained by the names of files, less their prefix: an adapter's tensors, or all weights."""
    if not _is_adapted(denoiser):
        return dict(denoiser.state_dict())
    return apart(denoiser, get_peft_model_state_dict(denoiser))


def load_adapter(denoiser: nn.Module, layers: Mapping[str, Tensor]) -> None:
    """Put back what `adapter_layers` gave; raises UserError that names the first difference if it is of another kind.

    Layers that are fused here may come from a network whose were not, if their parts have one A.
    """
    if wrong := _difference(layers, adapter_layers(denoiser)):
        raise UserError(wrong)
    if not _is_adapted(denoiser):
        denoiser.load_state_dict(layers)
        return
    own = get_peft_model_state_dict(denoiser)
    set_peft_model_state_dict(denoiser, together(denoiser, own, layers))


def start_from_file(denoiser: nn.Module, project: Project) -> None:
    """Load `init_lora` into a fresh adapter, if one is named; raises UserError unless it fits in every way."""
    if project.trainer.init_lora is None:
        return
    path, stored, metadata = _start_of(project)
    prefix = f"{project.family.denoiser[0]}."
    foreign = [name for name in stored if not name.startswith(prefix)]
    if foreign:
        raise UserError(
            f"init_lora: {path} is not in the format of diffusers, in which names start with {prefix!r}; "
            f"{foreign[0]} does not"
        )
    inner = {key.removeprefix(prefix): value for key, value in metadata.items()}
    try:
        load_adapter(denoiser, {name.removeprefix(prefix): tensor for name, tensor in stored.items()})
        _check_strength(inner, adapter_metadata(denoiser))
    except UserError as fault:
        raise UserError(f"init_lora: {path}: {fault}") from fault


def check_start(project: Project) -> None:
    """Raise UserError if `init_lora` names a file that is not there, or no adapter."""
    if project.trainer.init_lora is not None:
        _start_of(project)


def _start_of(project: Project) -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
    """Read the file that `init_lora` names: its path, its tensors, and what it says of itself."""
    path = resolved(project.root, str(project.trainer.init_lora))
    path = path / LORA_NAME if path.is_dir() else path
    try:
        with safe_open(path, "pt") as file:
            stored, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        return path, stored, json.loads(header.get(_METADATA, "{}"))
    except (OSError, SafetensorError, ValueError) as fault:
        raise UserError(f"init_lora: {path} cannot be read: {fault}") from fault


def adapter_metadata(denoiser: nn.Module) -> dict[str, Any]:
    """Return the adapter's configuration, alpha included, as diffusers reads it from a file; of all weights none."""
    if not _is_adapted(denoiser):
        return {}
    metadata: dict[str, Any] = _collate_lora_metadata({"transformer": denoiser})["transformer_lora_adapter_metadata"]
    return metadata


def save_adapter(
    folder: Path, project: Project, denoiser: nn.Module, layers: Mapping[str, Tensor], record: Mapping[str, Any]
) -> Path:
    """Write `layers`, what is trained or an average of it, as pipelines load them, and return the path.

    An adapter is one file, whose header carries `record`; all weights are a folder with the checkpoint's component.
    Either replaces an older one at once; raises UserError if it cannot be written.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in layers.items()}
    if not _is_adapted(denoiser):
        return _save_component(folder / project.family.denoiser[0], denoiser, whole, record)
    path = folder / LORA_NAME
    with write_aside(path) as aside:
        family_of(project).save_lora(aside, whole, adapter_metadata(denoiser))
        aside.write_bytes(_with_entry(aside.read_bytes(), RECORD, json.dumps(record, sort_keys=True)))
    return path


def check_gradients(named: Iterable[tuple[str, nn.Parameter]], project: Project) -> None:
    """Raise UserError if a trainable tensor received no gradient: some quantised layers lose it in silence."""
    trainable = {name: parameter for name, parameter in named if parameter.requires_grad}
    without = [name for name, parameter in trainable.items() if parameter.grad is None]
    if without:
        precision = project.trainer.base_model_precision
        raise UserError(
            f"{len(without)} of {len(trainable)} trained tensors receive no gradient, first {without[0]}; "
            f"choose another base_model_precision than {precision!r} or flux_lora_target than {preset_of(project)!r}"
        )


def _is_adapted(denoiser: nn.Module) -> bool:
    return bool(getattr(denoiser, "peft_config", None))


def _peft_config(denoiser: nn.Module, project: Project) -> LoraConfig | LoKrConfig:
    trainer, lokr = project.trainer, project.lokr
    pattern = project.family.lora_targets[preset_of(project)]
    if lokr is None:
        return LoraConfig(
            r=trainer.lora_rank,
            lora_alpha=trainer.strength,
            lora_dropout=trainer.lora_dropout,
            target_modules=pattern,
            init_lora_weights="gaussian",
        )
    return LoKrConfig(
        r=lokr.rank,
        alpha=lokr.alpha,
        decompose_factor=lokr.factor,
        alpha_pattern=dict.fromkeys(_whole_layers(denoiser, pattern, lokr), lokr.rank),
        target_modules=pattern,
        init_weights="lycoris",
    )


def _whole_layers(denoiser: nn.Module, pattern: str, lokr: LoKr) -> Iterator[str]:
    """Yield layers too small for the rank: both their matrices are whole, which LyCORIS gives the strength 1."""
    for name, layer in denoiser.named_modules():
        if isinstance(layer, nn.Linear) and not lokr.whole and re.fullmatch(pattern, name):
            sides = [factorization(size, lokr.factor)[1] for size in (layer.in_features, layer.out_features)]
            if lokr.rank >= max(sides) / 2:
                yield name


def _drawn(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Return the first values of an adapter's tensor: zero for one factor of each change, so that it starts at none."""
    kind = re.findall(r"\b(?:lora|lokr)_\w+", name)[-1]
    values = torch.zeros(shape)
    if kind == "lora_A":
        values.normal_(0, 1 / shape[0], generator=generator)
    elif kind not in ("lora_B", "lokr_w2", "lokr_w2_b"):
        nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
    return values


def _difference(layers: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str | None:
    """Say how layers differ from this configuration's `own`, None if in nothing but their values."""
    theirs, ours = _described(layers), _described(own)
    told = f"it holds {theirs}, this configuration trains {ours}" if theirs != ours else f"both are {ours}"
    for name in sorted(own.keys() | layers.keys()):
        if name not in layers:
            return f"{name} is not in it ({told})"
        if name not in own:
            return f"{name} is not trained by this configuration ({told})"
        if own[name].shape != layers[name].shape:
            return f"{name} is {tuple(layers[name].shape)} in it, {tuple(own[name].shape)} here ({told})"
    return None


def _described(layers: Mapping[str, Tensor]) -> str:
    """Say what kind of adapter, and of what rank, a set of tensors is."""
    for mark, kind, side in ((".lora_A.", "LoRA", 0), (".lokr_w2_a", "LoKr", 1)):
        ranks = {tensor.shape[side] for name, tensor in layers.items() if mark in name}
        if ranks:
            return f"{kind} of rank {', '.join(map(str, sorted(ranks)))} on {_count(layers)} layers"
    if any(".lokr_" in name for name in layers):
        return f"LoKr of whole matrices on {_count(layers)} layers"
    return "all weights"


def _count(layers: Mapping[str, Tensor]) -> int:
    return len({re.split(r"\.lo(?:ra|kr)_", name)[0] for name in layers})


def _check_strength(theirs: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise UserError if a file's adapter would act more or less strongly here than where it was made."""
    told = _alpha(theirs) or 1.0  # diffusers takes alpha for the rank where a file does not say
    here = _alpha(own)
    if told != here or bool(theirs.get("alpha_pattern")) != bool(own.get("alpha_pattern")):
        raise UserError(
            f"its strength, alpha / rank, is {told:g}, here it is {here:g}; set lora_alpha to {told:g} × the rank"
        )


def _alpha(metadata: Mapping[str, Any]) -> float | None:
    """Return alpha / rank, None if nothing is said of it."""
    alpha, rank = metadata.get("lora_alpha", metadata.get("alpha")), metadata.get("r")
    return float(alpha) / float(rank) if alpha and rank else None


def _with_entry(data: bytes, key: str, text: str) -> bytes:
    """Add an entry to the metadata of a safetensors file, in one order: equal tensors make equal files."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted({**header.get("__metadata__", {}), key: text}.items()))
    packed = json.dumps(header, separators=(",", ":")).encode()
    packed += b" " * (-len(packed) % 8)
    return len(packed).to_bytes(8, "little") + packed + data[end:]


def _save_component(path: Path, denoiser: nn.Module, layers: dict[str, Tensor], record: Mapping[str, Any]) -> Path:
    """Write all weights as `save_pretrained` does, into a folder that replaces an older one when it is whole."""
    with torch.device("meta"):
        network = type(denoiser).from_config(denoiser.config)  # type: ignore[attr-defined]
    network.load_state_dict(layers, assign=True)
    aside, old = name_aside(path), name_aside(path)
    for leftover in path.parent.glob(f"{path.name}.tmp.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        network.save_pretrained(aside)
        (aside / f"{RECORD}.json").write_text(json.dumps(record, indent=2, sort_keys=True))
        for file in aside.iterdir():
            sync(file)
        if path.exists():
            path.rename(old)
        aside.rename(path)
        sync(path.parent)
    except (OSError, RuntimeError, SafetensorError) as fault:
        raise UserError(f"{path}: cannot be written: {fault}") from fault
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    return path
