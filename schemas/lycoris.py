"""LyCORIS' configuration file, of which pairline trains LoKr with one factor for all layers.

A key that is acted on is a field of `LoKr`; one that changes nothing is a line in `_IDLE`.
"""

from typing import Any, Literal

from pydantic import model_validator

from schemas.config_file import Findings, shown, validate
from schemas.errors import Fault
from schemas.options import Options, option

_WHOLE = 10_000  # a dimension from which LyCORIS decomposes nothing


class LoKr(Options):
    """The file that `lycoris_config` names: a change of weights that is the Kronecker product of two matrices."""

    algo: Literal["lokr"] = option(..., "algorithm; of LyCORIS', LoKr alone is trained")
    factor: int = option(
        ..., "size of the smaller matrix, or the nearest that divides a layer; -1 is the largest", ge=-1
    )
    linear_dim: int | None = option(None, "rank of the larger matrix; 10000 and more is a whole one", ge=1)
    linear_alpha: float | None = option(None, "strength is alpha / rank; of whole matrices it is 1", gt=0)
    full_matrix: bool = option(False, "both matrices are whole, whatever `linear_dim` says")
    multiplier: float = option(1.0, "strength of the whole adapter; 1 alone is supported", ge=1, le=1)

    @model_validator(mode="after")
    def _whole_or_rank(self) -> "LoKr":
        if self.factor == 0:
            raise ValueError("factor must be -1, or 1 and more")
        if not self.whole and (self.linear_dim is None or self.linear_alpha is None):
            raise ValueError("needs linear_dim and linear_alpha, or full_matrix: true")
        return self

    @property
    def whole(self) -> bool:
        """Tell whether no layer's larger matrix is of low rank."""
        return self.full_matrix or (self.linear_dim or 0) >= _WHOLE

    @property
    def rank(self) -> int:
        """Return the rank of larger matrices, one beyond all of them for whole ones."""
        return _WHOLE if self.whole else int(self.linear_dim or _WHOLE)

    @property
    def alpha(self) -> float:
        """Return what divided by the rank is the strength."""
        return float(_WHOLE) if self.whole else float(self.linear_alpha or _WHOLE)


DEFAULT = LoKr(algo="lokr", factor=10, full_matrix=True)

# Keys that change nothing in linear layers, and why.
_IDLE = {
    "bypass_mode": "it is another way to compute the same",
    "conv_dim": "no convolution is trained",
    "conv_alpha": "no convolution is trained",
    "use_tucker": "no convolution is trained",
}


def parse_lokr(raw: Any, file: str, found: Findings) -> LoKr:
    """Check a LyCORIS file; `apply_preset` may name layers, which flux_lora_target chooses, but not their factors."""
    if not isinstance(raw, dict):
        found.faults.append(Fault(file, "", f"must be an object, found {shown(raw)}"))
        return DEFAULT
    values = dict(raw)
    _check_preset(values.pop("apply_preset", None), values.get("factor"), file, found)
    for key in sorted(_IDLE.keys() & values.keys()):
        values.pop(key)
        found.warnings.append(f"{file}: {key} has no effect: {_IDLE[key]}")
    if values.get("algo", "lokr") != "lokr":
        hint = "trained are lokr, and LoRA with lora_type: standard"
        found.faults.append(Fault(file, "algo", "not supported", shown(values["algo"]), hint))
        return DEFAULT
    supported = f"supported: {', '.join(LoKr.model_fields)}"
    for key in sorted(values.keys() - LoKr.model_fields.keys()):
        found.faults.append(Fault(file, key, "not supported", shown(values.pop(key)), supported))
    return validate(values, LoKr, (file, ""), found) or DEFAULT


def _check_preset(preset: Any, factor: Any, file: str, found: Findings) -> None:
    """Refuse settings per class of layer: an adapter has one factor, or diffusers could not load it."""
    if preset is None:
        return
    if not isinstance(preset, dict):
        found.faults.append(Fault(file, "apply_preset", "must be an object", shown(preset), "or leave it out"))
        return
    found.warnings.append(f"{file}: apply_preset has no effect: flux_lora_target chooses the layers")
    for group in ("module_algo_map", "name_algo_map"):
        for name, own in (preset.get(group) or {}).items():
            if own != {} and own != {"factor": factor}:
                key, hint = f"apply_preset.{group}.{name}", f"all layers share factor {shown(factor)}; leave it out"
                found.faults.append(Fault(file, key, "layers cannot differ", shown(own), hint))
