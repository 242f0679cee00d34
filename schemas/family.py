"""What can be said of a model family without loading it.

The table of families, `families.FAMILIES`, is made of these; prep scan and prep pairs need nothing else of a family.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Width:
    """A size that a checkpoint decides: `usual` in those of the flavours, in any other what its configuration says."""

    usual: int
    component: str  # sub-folder of a checkpoint
    key: str  # in the component's config.json; a dot leads into an object
    times: int = 1  # values for each of what the key counts


@dataclass(frozen=True, slots=True)
class Expected:
    """What a component's config.json must say for the family to load it."""

    class_name: str | None = None  # its `_class_name`; null for components that carry none
    values: Mapping[str, object] = field(default_factory=dict)  # key -> value
    numbers: tuple[str, ...] = ()  # keys that must hold a number
    unsaid: Mapping[str, object] = field(default_factory=dict)  # key -> what it means that it is not there


@dataclass(frozen=True, slots=True)
class Scripts:
    """What other trainers train a model with: told to who takes pairs there."""

    musubi: str  # beginning of the names of musubi-tuner's scripts
    ai_toolkit: str  # a job of ai-toolkit
    diffusers: str  # script of diffusers' examples
    one_reference: bool = False  # whether musubi-tuner takes the first of several references


@dataclass(frozen=True, slots=True)
class Flavour:
    """What one of a family's models has to itself."""

    checkpoint: str  # hub id
    text_settings: Mapping[str, Any]  # what a text embed depends on besides weights: its rows, layers, chat
    text_width: Width  # values per row of a text embed
    told_guidance: bool  # whether the model is told a guidance scale
    true_guidance: Literal["usual", "possible", "none"]  # whether pipelines sample it with classifier-free guidance
    scripts: Scripts
    configs: Mapping[str, Expected] = field(default_factory=dict)  # in place of the family's own
    padding_first: bool = False  # its text embeds begin with rows of padding, all the same: a shard holds one of them
    distilled: str | None = None  # key of model_index.json that is true of checkpoints no LoRA can be trained on


@dataclass(frozen=True, slots=True)
class FamilySpec:
    """Facts of a family that need no tensor."""

    module: str  # importable name of the module that loads and runs it
    flavours: Mapping[str, Flavour]
    image_encoder: tuple[str, ...]  # sub-folders of a checkpoint that decide what a latent is
    text_encoders: tuple[str, ...]  # sub-folders of a checkpoint that decide what a text embed is
    denoiser: tuple[str, ...]  # sub-folders of a checkpoint that training needs
    configs: Mapping[str, Expected]  # sub-folder -> what its config.json must say; others have none
    numbered_text_encoders: tuple[str, ...]  # sub-folders that `text_encoder_1_precision` and so on are about
    latent_channels: Width  # values per cell of a latent
    latent_scale: int  # pixels per cell of a latent, along each side
    pooled_width: Width | None  # values of a pooled embed; null for families without one
    text_input: str  # key of the denoiser's config.json that says how wide the text embeds are that it takes
    pooled_input: str  # the same of pooled embeds, for families that have them
    default_flavour: str
    alignment: int  # pixels that target sides are multiples of, unless aspect_bucket_alignment says otherwise
    smallest_alignment: int  # pixels that sides must be multiples of for the model to run at all
    lora_targets: Mapping[str, str]  # preset -> regular expression over full module names
    default_lora_target: str
    elsewhere: Mapping[str, str]  # other trainer -> what its cache files of this family are named by
    unquantised: tuple[str, ...]  # layers that keep their precision: small ones that carry the picture itself
    conditioning: str  # regular expression of layers that see one row a picture: their errors are those of every token
    text_rows: str = "max_sequence_length"  # what keys of text stores call the number of an embed's rows

    @property
    def text_precision(self) -> str:
        """Name the option that quantises the largest text encoder, the last."""
        return f"text_encoder_{len(self.numbered_text_encoders)}_precision"
