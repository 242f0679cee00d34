"""From a JSON file to checked options: comments, trailing commas and SimpleTuner's `--` prefixes welcome.

Every function returns what it could read and appends what is wrong to a list of faults, so that all are told at once.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, TypeVar, get_args, get_origin

import json5
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from schemas import datasets
from schemas.datasets import Generator
from schemas.errors import Fault, UserError
from schemas.options import Options, facts, facts_of
from schemas.recipes import RECIPE_ALIASES, RECIPES
from schemas.steps import STEP_MODELS

OptionsT = TypeVar("OptionsT", bound=Options)

_NESTED: Mapping[str, type[Options]] = {
    "huggingface": datasets.HuggingFace,
    "composite_image_config": datasets.CompositeImage,
    "filter_func": datasets.FilterFunc,
    "parquet": datasets.MetadataTable,
    "crop_aspect_buckets": datasets.AspectBucket,
    "caption_shuffle": datasets.CaptionShuffle,
    "image_policy": datasets.ImagePolicy,
    "alignment_check": datasets.AlignmentCheck,
}

_SECRETS = ("aws_access_key_id", "aws_secret_access_key", "aws_session_token")

_SHOWN = 60  # characters of a faulty value

# What pydantic's kinds of errors are called here; others keep its words.
_PROBLEMS: Mapping[str, str] = (
    dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "must be a whole number")
    | dict.fromkeys(("float_type", "float_parsing", "finite_number"), "must be a number")
    | dict.fromkeys(("bool_type", "bool_parsing"), "must be true or false")
    | dict.fromkeys(("tuple_type", "list_type"), "must be a list")
    | dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "must be an object")
    | {"string_type": "must be text", "string_too_short": "must not be empty", "too_short": "must not be empty"}
)
_PATTERNS: Mapping[str, tuple[str, str]] = {  # option -> what its pattern is for, and what it allows
    "id": ("must be fit for a file name", 'no / \\ : * ? " < > | and no dot in front'),
    "tracker_run_name": ("must be fit for a folder", "letters, digits, blanks, _ . - and / between folders"),
    "alpha_background": ("must be a colour", "white, black, gray or #rrggbb"),
}
_CHOICES: Mapping[str, str] = {  # option -> what some of its values need
    "optimizer": "adamw8bit needs pip install 'pairline[adamw8bit]', prodigy needs pip install 'pairline[prodigy]'",
}


@dataclass(slots=True)
class Findings:
    """What was found while reading: faults stop the command, warnings are told and work goes on."""

    faults: list[Fault] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    dropped: set[str] = field(default_factory=set)  # ids of datasets too faulty to go on with
    disabled: set[str] = field(default_factory=set)  # ids of datasets that are left out


def read_json(path: Path) -> Any:
    """Read JSON with comments and trailing commas; raises UserError with the line of a syntax error."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        return _whole(_parsed(text))
    except OSError as fault:
        raise UserError(f"{path}: {fault.strerror or fault}") from fault
    except UnicodeDecodeError as fault:
        raise UserError(f"{path}: not UTF-8 text ({fault.reason} at byte {fault.start})") from fault
    except RecursionError as fault:
        raise UserError(f"{path}: not valid JSON: nested too deeply") from fault
    except ValueError as fault:
        place = re.sub(r"^<string>:", "line ", str(fault))
        raise UserError(f"{path}: not valid JSON: {place}") from fault


def _parsed(text: str) -> Any:
    """Parse what is plain JSON at once; what is not, or is faulty, as JSON5, which takes hundreds of times as long."""
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except ValueError:
        return json5.loads(text, allow_duplicate_keys=False)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key is there twice")
    return values


def _whole(value: Any) -> Any:
    """Join characters that JSON escapes write as two halves."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16")
    if isinstance(value, dict):
        return {_whole(key): _whole(one) for key, one in value.items()}
    return [_whole(one) for one in value] if isinstance(value, list) else value


def normalise(
    raw: Mapping[str, Any], model: type[Options], unneeded: Mapping[str, str], where: tuple[str, str], found: Findings
) -> dict[str, Any]:
    """Strip `--`, resolve second spellings, and turn keys that are not needed into warnings.

    `where` is (file, prefix of the key path).
    """
    file, prefix = where
    aliases = {extra["alias"]: name for name, extra in facts_of(model) if extra["alias"]}
    values: dict[str, Any] = {}
    for spelled, value in raw.items():
        key = spelled.lstrip("-").replace("-", "_")
        key = aliases.get(key, key)
        if key in values:
            found.faults.append(Fault(file, prefix + spelled, f"given twice, as '{key}' already", hint="keep one"))
        elif key == "$schema":
            continue
        elif key in model.model_fields:
            values[key] = value
            if note := facts(model.model_fields[key])["no_effect"]:
                found.warnings.append(f"{file}: {prefix}{key} has no effect: {note}")
        elif key in unneeded:
            found.warnings.append(f"{file}: {prefix}{key}: {unneeded[key]}")
        else:
            known = [*model.model_fields, *aliases, *unneeded]
            misplaced = not prefix and key in datasets.DatasetConfig.model_fields
            hint = "it is an option of datasets: write it in their file" if misplaced else _nearest(key, known)
            found.faults.append(Fault(file, prefix + spelled, "unknown key", shown(value), hint))
    return values


def validate(
    values: Mapping[str, Any], model: type[OptionsT], where: tuple[str, str], found: Findings
) -> OptionsT | None:
    """Check values against a model. With faults, return what the sound options say, so that checking can go on.

    None if even that cannot be, because a required option is missing or faulty. An option that is null, and may not
    be, counts as not given.
    """
    file, prefix = where
    flags: dict[str, bool] = {}
    sifted: dict[str, Any] = _sifted(dict(values), {model}, (), flags)
    found.faults += [Fault(file, prefix + key, "must be a number", shown(flag)) for key, flag in flags.items()]
    try:
        return model.model_validate(sifted)
    except ValidationError as error:
        details = [one for one in error.errors(include_url=False) if _key_path(one["loc"]) not in flags]
    found.faults += [_fault(file, prefix, dict(detail)) for detail in details]
    faulty = {detail["loc"][0] for detail in details if detail["loc"]} | {re.split(r"[.\[]", key)[0] for key in flags}
    try:
        return model.model_validate({key: value for key, value in sifted.items() if key not in faulty})
    except ValidationError:
        return None


def split_generator(entry: Any, where: tuple[str, str], found: Findings) -> Any:
    """Part one `conditioning` entry into its recipe and the rest; parameters may also stand in `params`."""
    if not isinstance(entry, dict) or not isinstance(entry.get("type"), str):
        file, key = where
        kinds = ", ".join(RECIPES)
        found.faults.append(Fault(file, key, "must be an object with a 'type'", shown(entry), f"known types: {kinds}"))
        return None
    params = entry.get("params", {})
    if not isinstance(params, dict):
        found.faults.append(Fault(where[0], f"{where[1]}.params", "must be an object", shown(params)))
        return None
    flat = {**params, **{key: value for key, value in entry.items() if key != "params"}}
    kind = RECIPE_ALIASES.get(flat["type"], flat["type"])
    own = Generator.model_fields.keys() - {"recipe"}
    recipe = {key: value for key, value in flat.items() if key not in own}
    for model in (Generator, RECIPES.get(kind)):
        for name, extra in facts_of(model) if model is not None else ():
            if name in flat and extra["no_effect"]:
                found.warnings.append(f"{where[0]}: {where[1]}.{name} has no effect: {extra['no_effect']}")
    return {**{key: flat[key] for key in own if key in flat}, "recipe": {**recipe, "type": kind}}


def shown(value: object) -> str:
    """Spell a value for a message, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def _sifted(value: Any, kinds: set[Any], place: tuple[str | int, ...], flags: dict[str, bool]) -> Any:
    """Take out nulls that say nothing, and every true or false in place of a number, which goes to `flags`."""
    if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
        flags[_key_path(place)] = value
        return None
    if isinstance(value, list):
        return [_sifted(one, kinds, (*place, number), flags) for number, one in enumerate(value)]
    if not isinstance(value, dict):
        return value
    fields = {name: _kinds(one.annotation) for kind in kinds for name, one in _fields(kind).items()}
    kept: dict[Any, Any] = {}
    for key, one in value.items():
        inner = fields.get(key, kinds)
        sifted = _sifted(one, inner, (*place, key), flags)
        if sifted is not None or NoneType in inner or key not in fields:
            kept[key] = sifted
    return kept


def _fields(kind: Any) -> Mapping[str, FieldInfo]:
    return kind.model_fields if isinstance(kind, type) and issubclass(kind, Options) else {}


def _kinds(annotation: Any) -> set[Any]:
    """Return the types that an option may hold, those inside lists and objects too."""
    if get_origin(annotation) is Annotated:
        return _kinds(get_args(annotation)[0])
    parts = get_args(annotation)
    return set().union(*map(_kinds, parts)) if parts else {annotation}


def _nearest(key: str, known: Iterable[str]) -> str | None:
    close = difflib.get_close_matches(key, list(known), n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else None


def _fault(file: str, prefix: str, detail: dict[str, Any]) -> Fault:
    """Put one pydantic error into our words."""
    place, kind, value = tuple(detail["loc"]), detail["type"], shown(detail["input"])
    if any(part in _SECRETS for part in place):
        value = "(not shown)"
    key = prefix + _key_path(place)
    context = detail.get("ctx", {})
    if kind == "missing":
        return Fault(file, key, "missing, but required")
    if kind == "extra_forbidden":
        return Fault(file, key, "unknown key", value, _nearest(str(place[-1]), _known_options(place)))
    if kind == "union_tag_not_found":
        known = ", ".join(STEP_MODELS)
        return Fault(file, key, f"must be an object with a {context['discriminator']}", value, f"known: {known}")
    if kind in ("literal_error", "union_tag_invalid"):
        allowed = str(context.get("expected") or context.get("expected_tags"))
        tag = context.get("tag")
        key, value = (f"{key}.{context['discriminator'][1:-1]}", shown(tag)) if tag else (key, value)
        choices = re.findall(r"'([^']*)'", allowed)
        hints = (_nearest(str(tag or detail["input"]), choices), _CHOICES.get(key))
        return Fault(file, key, f"must be one of {allowed}", value, "; ".join(filter(None, hints)) or None)
    if kind == "value_error":
        value_shown = value if place else None
        return Fault(file, key.rstrip("."), str(context["error"]), value_shown)
    if kind == "string_pattern_mismatch" and place[-1] in _PATTERNS:
        problem, hint = _PATTERNS[str(place[-1])]
        return Fault(file, key, problem, value, hint)
    message = str(detail["msg"]).replace("Input should be", "must be")
    return Fault(file, key, _PROBLEMS.get(kind, message[0].lower() + message[1:]), value)


def _key_path(place: tuple[str | int, ...]) -> str:
    """Spell pydantic's location as the user wrote it: the parts that we put in between are left out."""
    path = ""
    for index, part in enumerate(place):
        if isinstance(part, int):
            path += f"[{part}]"
        elif part != "recipe" and part not in RECIPES and not _is_step(place, index):
            path += f".{part}" if path else part
    return path


def _is_step(place: tuple[str | int, ...], index: int) -> bool:
    """Tell a step's name, which pydantic puts behind its number, from an option of that name."""
    return index > 1 and place[index - 2] == "steps" and place[index] in STEP_MODELS


def _known_options(place: tuple[str | int, ...]) -> Iterable[str]:
    """Return the options of the innermost object on the way to a place."""
    known: Iterable[str] = ()
    for index, part in enumerate(place[:-1]):
        name = str(part)
        model = STEP_MODELS.get(name) if _is_step(place, index) else RECIPES.get(name) or _NESTED.get(name)
        known = model.model_fields if model is not None else known
    return known
