"""Write what follows from the models: docs/options.md, docs/formats.md and the JSON Schemas of both files.

Run `make docs` after changing an option, a row or a recipe; a test compares what is checked in with `documents()`.
"""

import ast
import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from families import FAMILIES
from schemas import geometry, rows, shards
from schemas.datasets import (
    AlignmentCheck,
    AspectBucket,
    CaptionShuffle,
    CompositeImage,
    DatasetConfig,
    FilterFunc,
    Generator,
    HuggingFace,
    ImagePolicy,
    MetadataTable,
)
from schemas.lycoris import LoKr
from schemas.options import Options, facts_of
from schemas.recipes import RECIPE_ALIASES, RECIPES
from schemas.simpletuner import DATASET_KEYS, TRAINER_KEYS
from schemas.steps import STEP_MODELS, StepOptions
from schemas.trainer import TrainerConfig

ROOT = Path(__file__).parent.parent
MADE = "<!-- Made by docs/generate.py from the models in schemas/; `make docs` writes it anew. -->\n"


# Options that are objects, or lists of objects, of options.
_NESTED: Mapping[str, type[Options]] = {
    "crop_aspect_buckets": AspectBucket,
    "image_policy": ImagePolicy,
    "alignment_check": AlignmentCheck,
    "caption_shuffle": CaptionShuffle,
    "parquet": MetadataTable,
    "huggingface": HuggingFace,
    "huggingface.composite_image_config": CompositeImage,
    "huggingface.filter_func": FilterFunc,
}


# Where a default differs from SimpleTuner's, or decides how a run goes: the reason.
_WHY: Mapping[str, str] = {
    "learning_rate": "what diffusers' examples train LoRA with; upstream's 4e-7 is for whole models. Lion wants about "
    "a tenth of it, LoKr up to ten times as much",
    "max_grad_norm": "one odd sample cannot throw a run; upstream clips each value at 2, which is next to nothing",
    "lora_dropout": "noise and time are another at every showing; upstream has 0.1",
    "caption_dropout_probability": "FLUX.1 and FLUX.2 dev are distilled of guidance: they are never run without their "
    "prompt; klein is, in every step of classifier-free guidance",
    "flow_schedule_auto_shift": "FLUX was trained with times shifted by resolution; the target's tokens alone count",
    "flux_guidance_value": "what distilled models are trained at, as their makers advise; sampling may tell them more",
    "gradient_checkpointing": "a third slower, two thirds of the memory are free",
    "base_model_precision": "exact and fastest; `int8-quanto` is the next choice, for cards of 24 GB",
    "quantize_via": "a layer at a time: the accelerator never holds the whole model in bf16",
    "mixed_precision": "what the model is run in; adapters are float32 all the same",
    "checkpointing_steps": "a quarter of an hour on one H200",
    "num_eval_images": "with 16 times each these are 64 forward passes, the same every time: small differences show",
    "validation_num_inference_steps": "what Kontext's pipeline takes",
    "report_to": "needs no account",
    "seed": "a run can be repeated, unless one chooses otherwise",
}


def documents() -> dict[Path, str]:
    """Return every generated file and its text."""
    return {
        ROOT / "docs" / "options.md": options_page(),
        ROOT / "docs" / "formats.md": formats_page(),
        ROOT / "schemas" / "json" / "config.schema.json": _json(trainer_schema()),
        ROOT / "schemas" / "json" / "multidatabackend.schema.json": _json(datasets_schema()),
    }


def options_page() -> str:
    """Tell every option: type, default, meaning, and the commands that read it."""
    parts = [
        MADE,
        "# Options\n",
        "A project is a folder with SimpleTuner's two files: `config.json` holds the options of the trainer and the "
        "defaults of the datasets, `multidatabackend.json` (or whatever `data_backend_config` names) the list of "
        "datasets. Both are JSON; comments (`//`, `/* */`) and trailing commas are fine, and keys may carry "
        "SimpleTuner's leading `--`. Relative paths start from the folder of `config.json`, or from `--root DIR`.\n",
        "*Read by* names the commands whose results depend on an option: change it, and these have work to do. Options "
        "marked † are checked but have no effect; the note says what happens instead.\n",
        "For completion and checks in an editor, point `$schema` of your editor's settings to "
        "`schemas/json/config.schema.json` and `schemas/json/multidatabackend.schema.json`.\n",
        "## config.json\n",
        _options_table(TrainerConfig),
        "### Why these defaults\n",
        _why_table(),
        "### Families\n",
        _families_table(),
        "### lycoris_config\n",
        f"{inspect.getdoc(LoKr)} `apply_preset` may be there; `flux_lora_target` chooses the layers.\n",
        _options_table(LoKr),
        "## multidatabackend.json\n",
        "A list of objects. `resolution`, `resolution_type`, the three image-size options, `interpolation`, "
        "`write_batch_size` and `caption_strategy` default to the value in `config.json`; references have no captions "
        "unless they say so. An entry with `conditioning_type` and no `dataset_type` is a set of references. The "
        "options of `huggingface` may stand in the entry itself. `null` means not given where nothing else is said of "
        "it. Texts may hold `{id}`, `{model_family}`, `{output_dir}` and `{env:NAME}`.\n",
        _options_table(DatasetConfig),
    ]
    for path, model in _NESTED.items():
        parts += [f"### {path}\n", f"{inspect.getdoc(model)}\n", _options_table(model)]
    parts += [
        "### conditioning\n",
        "Each entry of `conditioning` makes one set of references, named `<id>_conditioning_<type>`. Its `type` says "
        "how, the parameters of the type stand beside it:\n",
        _options_table(Generator, leave_out={"recipe"}),
    ]
    for name, recipe in RECIPES.items():
        also = ", ".join(f"`{alias}`" for alias, kind in RECIPE_ALIASES.items() if kind == name)
        doc = f"{inspect.getdoc(recipe)} Also spelled {also}." if also else inspect.getdoc(recipe)
        parts += [f"#### type: {name}\n", f"{doc}\n", _options_table(recipe, leave_out={"type"})]
    parts += ["#### Steps of a chain\n", _STEPS, _options_table(StepOptions)]
    for name, step in STEP_MODELS.items():
        table = _options_table(step, leave_out={"step", *StepOptions.model_fields})
        parts += [f"##### step: {name}\n", f"{inspect.getdoc(step)}\n", *([table] if table.count("\n") > 2 else [])]
    parts += [
        "## SimpleTuner's other keys\n",
        "These are known and not acted on: each gives a warning that says what happens instead. Anything else is an "
        "error that names the nearest known key.\n",
        "### In config.json\n",
        _unneeded(TRAINER_KEYS),
        "### In multidatabackend.json\n",
        _unneeded(DATASET_KEYS),
    ]
    return "\n".join(parts)


_STEPS = """A step is an object with its name under `step` and its parameters beside it. A number may be a range
`[low, high]` from which each picture draws, evenly if nothing else is said; a word may be a list of words, of which
each draws one. [degradations.md](degradations.md) has examples, the presets, and what each step costs. Every step has:
"""


def _why_table() -> str:
    lines = ["| option | default | why |", "|---|---|---|"]
    for name, reason in _WHY.items():
        default = json.dumps(TrainerConfig.model_fields[name].default)
        lines.append(f"| `{name}` | `{default}` | {reason} |")
    return "\n".join(lines) + "\n"


def formats_page() -> str:
    """Tell every table and shard: columns, Arrow types, metadata."""
    comments = _field_comments(rows) | _field_comments(geometry)
    tables = [
        ("ImageRow", "manifests/&lt;dataset id&gt;.parquet", rows.ImageRow),
        ("PairRow", "pairs/&lt;dataset id&gt;.parquet", rows.PairRow),
        ("Reference", "an element of `references`", rows.Reference),
        ("Geometry", "a `geometry`", rows.Geometry),
        ("LatentRow", "&lt;store&gt;/&lt;encoder key&gt;/&lt;W&gt;x&lt;H&gt;/*.parquet", rows.LatentRow),
        ("TextRow", "&lt;store&gt;/&lt;encoder key&gt;/*.parquet", rows.TextRow),
        ("NotedRow", "cache/noted/&lt;dataset id&gt;.parquet", rows.NotedRow),
        ("NotedReference", "an element of its `references`", rows.NotedReference),
        ("RejectRow", "&lt;store&gt;/&lt;encoder key&gt;/rejects/*.parquet", rows.RejectRow),
    ]
    parts = [MADE, "# Files\n", _WORKSPACE, _READING]
    for name, where, row_type in tables:
        parts += [f"## {name}: {where}\n", f"{inspect.getdoc(row_type)}\n"]
        lines = ["| column | type | null | |", "|---|---|---|---|"]
        for field in rows.arrow_schema(row_type):
            note = comments[name].get(field.name, "")
            lines.append(f"| `{field.name}` | {_arrow(field.type)} | {'yes' if field.nullable else ''} | {note} |")
        parts.append("\n".join(lines) + "\n")
    header = _field_comments(shards)["ShardHeader"]
    lines = ["| field | |", "|---|---|"]
    lines += [f"| `{field.name}` | {header.get(field.name, '')} |" for field in fields(shards.ShardHeader)]
    parts += ["## Metadata\n", _METADATA, "\n".join(lines) + "\n", _PADDING, _KEYS]
    return "\n".join(parts)


_WORKSPACE = """Everything is Parquet; any reader opens it. The workspace is `work/` in the project's folder, or
`--workspace DIR`.

```
manifests/<dataset id>.parquet                  ImageRow    one per image file seen, rejected ones included
pairs/<dataset id>.parquet                      PairRow     one per training sample of that set of targets
pairs/<dataset id>.report.csv                   all that was odd when it was paired: kind, target, reference, detail
pairs/<dataset id>.preview.png                  contact sheet of prep pairs --preview
references/<2 digits of key>/<key>.png          generated references (storage: files), lossless, named by content; .jpg
                                                or .webp where the last step is that codec: its very bitstream
cache/latents/<encoder key>/<W>x<H>/*.parquet   LatentRow   one bucket per shard
cache/latents/<encoder key>/rejects/*.parquet   RejectRow   images that cannot be encoded, and why
cache/text/<encoder key>/*.parquet              TextRow     one per distinct prompt; of FLUX.2 dev in a folder
                                                            <rows>-rows for each number of rows that is stored
cache/<kind>/<encoder key>/encoder.json         what the encoder is: its key is the hash of what this says
cache/<kind>/<encoder key>/users/*.json         projects that use it, for prep cache --gc
cache/<kind>/<encoder key>/leases/*             who encodes what this moment
cache/noted/<dataset id>.parquet                NotedRow    what each sample was last cached from, for --explain
cache/encoders.json                             which encoder keys belong to which checkpoint
mirror/                                         what was read from caches behind URLs; may be deleted at any time
models/                                         built-in tiny checkpoints; remembered hashes of weight files
runs/<run name>/                                what train writes: checkpoints, metrics.jsonl, the LoRA
```

A dataset's `cache_dir_vae` replaces `cache/latents`, the text set's `cache_dir` replaces `cache/text`; several datasets
and projects may share one, and either may be a URL ([remote caches](remote.md)). No table or shard holds an absolute
path: they can be moved or copied as they are.
[cache.md](cache.md) tells how the cache is looked after.
"""

_READING = """```python
import numpy as np, pyarrow.parquet as pq, torch

table = pq.read_table("work/cache/latents/0fb04f60f3dfe10a/320x192")  # one bucket
bits = np.frombuffer(table["latent"][0].as_py(), np.uint16).reshape(16, 24, 40)  # shapes: see Metadata
latent = torch.from_numpy(bits.copy()).view(torch.bfloat16)
```
"""

_METADATA = """Manifests and pair tables carry `pairline.format`, `pairline.row`, `pairline.config` (hash of the
settings they depend on), `pairline.inputs` (hash of the data that went in), `pairline.limit` (of `--limit`, if it cut)
and `pairline.source` (hash of where a manifest's files lie). A stage compares them with those of a run now: equal means
there is nothing to do.

Shards carry a list of their keys under `pairline.keys`, whose hash is the file's name, and one JSON object under
`pairline.shard`. Row groups have at most 16 rows and 8 MiB; payloads are plain, uncompressed, one page per group, so
that a row lies at a place that follows from the footer: training reads it there, any other reader finds it too.
"""

_PADDING = """### Rows of padding

Embeds of FLUX.2 dev begin with rows of padding that are all the same; a shard holds one of them. `shapes` says how many
rows an embed has, `pad_rows` how many of them were left out in front, 0 for every other model. With `header` the
object under `pairline.shard` and `data` a value of `embed`:

```python
rows, width = header["shapes"]["embed"]
stored = np.frombuffer(data, np.uint16).reshape(rows - header["pad_rows"], width)  # the bits of bfloat16
embed = np.concatenate([np.repeat(stored[:1], header["pad_rows"], axis=0), stored])
```
"""

_KEYS = """## Keys

All hashes are xxh3-128 of canonical JSON or of a file's bytes (`schemas/keys.py`).

- `image_id`: the file's bytes.
- weights: the sum of the hashes of all tensors (name, dtype, shape, bytes), so that neither their order, nor a file's
  metadata, nor how they are split over files matters.
- encoder key: weights and configuration of the encoder's parts, never their path; the dtype it computes in. For images
  tiling, and what of the posterior is stored: targets and references have encoders of their own unless that is the
  mode. For text the tokenizers, lengths and quantisation, and the dtype of what is stored.
- latent key: encoder key, `image_id`, pixel policy, view (orientation, background, interpolation, where they are not
  the default), geometry, and for a generated reference recipe and seed.
- text key: encoder key and prompt.

Names, paths, captions, dataset ids, repeats and options of training enter no key of a shard. What they lead to may:
a random crop is drawn from `prep_seed`, dataset id and path, and the box it gives is part of the geometry.
"""


def trainer_schema() -> dict[str, Any]:
    """Return the JSON Schema of config.json."""
    schema = TrainerConfig.model_json_schema()
    return _closed(schema, TrainerConfig, TRAINER_KEYS, "pairline: config.json")


def datasets_schema() -> dict[str, Any]:
    """Return the JSON Schema of multidatabackend.json, with the parameters of generators flat as users write them."""
    schema = DatasetConfig.model_json_schema()
    definitions = schema.pop("$defs")
    generator = definitions.pop("Generator")
    shared = {name: value for name, value in generator["properties"].items() if name != "recipe"}
    kinds = []
    for name, recipe in RECIPES.items():
        own = definitions.pop(recipe.__name__)
        names = [name, *(alias for alias, kind in RECIPE_ALIASES.items() if kind == name)]
        own["properties"] = own["properties"] | {"type": {"enum": names}, "params": {"type": "object"}} | shared
        own["required"] = ["type"]
        definitions[recipe.__name__] = own
        kinds.append({"$ref": f"#/$defs/{recipe.__name__}"})
    for step in STEP_MODELS.values():
        definitions[step.__name__]["required"] = sorted({"step", *definitions[step.__name__].get("required", ())})
    listed = schema["properties"]["conditioning"] | {"items": {"anyOf": kinds}}
    schema["properties"]["conditioning"] = {"anyOf": [listed, *kinds, {"type": "null"}]}
    aspects = schema["properties"]["crop_aspect_buckets"]
    aspects["items"] = {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, aspects["items"]]}
    moved = HuggingFace.model_fields.keys() - DatasetConfig.model_fields.keys()
    entry = _closed(schema, DatasetConfig, [*DATASET_KEYS, *sorted(moved)], "dataset")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "pairline: multidatabackend.json",
        "type": "array",
        "minItems": 1,
        "items": entry,
        "$defs": definitions,
    }


def _closed(schema: dict[str, Any], model: type[Options], unneeded: Iterable[str], title: str) -> dict[str, Any]:
    """Allow, besides the options, their second spellings, SimpleTuner's other keys, and a leading `--`."""
    aliases = [extra["alias"] for _, extra in facts_of(model) if extra["alias"]]
    known = "|".join([*unneeded, *aliases])
    dashed = "|".join(schema["properties"])
    return (
        {"$schema": "https://json-schema.org/draft/2020-12/schema"}
        | schema
        | {
            "title": title,
            "patternProperties": {f"^(--)?({known})$": {}, f"^--({dashed})$": {}, r"^\$schema$": {}},
            "additionalProperties": False,
        }
    )


def _options_table(model: type[Options], leave_out: Iterable[str] = ()) -> str:
    schema = model.model_json_schema()
    # A model that holds itself stands among the definitions.
    properties = (schema if "properties" in schema else schema["$defs"][model.__name__])["properties"]
    lines = ["| option | type | default | meaning | read by |", "|---|---|---|---|---|"]
    for name, facts in facts_of(model):
        if name in leave_out:
            continue
        field = model.model_fields[name]
        default = "required" if field.is_required() else f"`{json.dumps(field.get_default(), default=_plain)}`"
        mark = " †" if facts["no_effect"] else ""
        alias = f" Also `{facts['alias']}`." if facts["alias"] else ""
        note = f" † {facts['no_effect']}." if facts["no_effect"] else ""
        stages = ", ".join(facts["stages"]) if not facts["no_effect"] else ""
        meaning = f"{field.description}.{alias}{note}"
        lines.append(f"| `{name}`{mark} | {_json_type(properties[name])} | {default} | {meaning} | {stages} |")
    return "\n".join(lines) + "\n"


def _families_table() -> str:
    lines = ["| `model_family` | `model_flavour` | checkpoint by default | alignment | `flux_lora_target` |"]
    lines.append("|---|---|---|---|---|")
    for name, spec in FAMILIES.items():
        presets = ", ".join(
            f"`{one}`" + (" (default)" * (one == spec.default_lora_target)) for one in spec.lora_targets
        )
        for flavour, model in spec.flavours.items():
            chosen = " (default)" if flavour == spec.default_flavour else ""
            lines.append(f"| `{name}` | `{flavour}`{chosen} | `{model.checkpoint}` | {spec.alignment} px | {presets} |")
    return "\n".join(lines) + "\n"


def _unneeded(keys: Mapping[str, str]) -> str:
    """Group keys by what happens instead."""
    groups: dict[str, list[str]] = {}
    for key, message in keys.items():
        groups.setdefault(message, []).append(f"`{key}`")
    return "\n".join(f"- {message}: {', '.join(names)}" for message, names in groups.items()) + "\n"


def _json_type(schema: Mapping[str, Any]) -> str:
    """Spell a JSON Schema in words."""
    if "anyOf" in schema:
        first, *others = schema["anyOf"]
        # A list of what may also stand alone, or a range of it, need not say it again.
        more = {json.dumps(first, sort_keys=True): "`[low, high]`" if "minimum" in first else "a list of them"}
        said = [more.get(json.dumps(one.get("items"), sort_keys=True)) or _json_type(one) for one in others]
        return " or ".join([_json_type(first), *said])
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        inner = schema.get("items") or {"anyOf": schema.get("prefixItems", [])}
        return "list" if not inner else f"list of {'/'.join(dict.fromkeys(_json_type(inner).split(' or ')))}"
    if "$ref" in schema or "oneOf" in schema or schema.get("type") == "object":
        return "object"
    limits = [
        f"{sign} {schema[key]:g}"
        for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if key in schema
    ]
    names = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true, false", "null": "null"}
    return " ".join([names[schema["type"]], ", ".join(limits)]).strip()


def _plain(value: Any) -> Any:
    """Spell a group of options at its defaults as the empty object that means it."""
    return {} if isinstance(value, Options) else list(value)


def _arrow(kind: Any) -> str:
    """Spell an Arrow type, with structs by name."""
    text = str(kind)
    if text.startswith("list<item: struct"):
        return "list of Reference" if "shift_x" in text else "list of NotedReference"
    return "Geometry" if text.startswith("struct") else text.replace("<item: ", " of ").replace(" not null>", "")


def _field_comments(module: Any) -> dict[str, dict[str, str]]:
    """Collect the comments behind the fields of a module's classes."""
    source = inspect.getsource(module)
    lines = source.splitlines()
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = {
                one.target.id: lines[one.lineno - 1].partition("  # ")[2]
                for one in node.body
                if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)
            }
    return found


def _json(schema: dict[str, Any]) -> str:
    return json.dumps(_without_facts(schema), indent=2, ensure_ascii=False) + "\n"


def _without_facts(value: Any) -> Any:
    """Leave out what only our own code reads of an option."""
    if isinstance(value, dict):
        own = ("stages", "no_effect", "alias") if "stages" in value and "description" in value else ()
        return {key: _without_facts(one) for key, one in value.items() if key not in own}
    return [_without_facts(one) for one in value] if isinstance(value, list) else value


if __name__ == "__main__":
    for path, text in documents().items():
        path.write_text(text)
        print(path.relative_to(ROOT))
