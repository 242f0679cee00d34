"""FLUX.2: what is loaded of its encoders, what is stored of dev's padding, and which layers presets wrap."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DiffusionPipeline, Flux2Transformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from families import FAMILIES, flux2, open_project
from families.checkpoints import encoder_keys, locate
from families.protocol import Placement, TextEmbeds
from prep.cache import cache
from prep.pairs import pairs
from prep.scan import scan
from prep.upkeep.compact import compact
from prep.upkeep.explain import explain
from prep.upkeep.verify import verify
from schemas.errors import UserError
from schemas.freshness import read_pairs
from schemas.keys import text_key
from schemas.project import Project
from schemas.shards import ShardIndex
from train.checkpoint import settings_of
from train.data import Shelf

Open = Callable[..., Project]

CPU = torch.device("cpu")
SPEC = FAMILIES["flux2"]
ROWS = 256  # of text embeds: half of what they have, for speed
LAST = {"dev": 30, "klein-9b": 27, "klein-4b": 27}  # layer that is read
WEIGHTS = "model.safetensors"


# Encoders


def _encoders(checkpoint: Path, flavour: str) -> Any:
    settings = SPEC.flavours[flavour].text_settings
    return flux2.load_text_encoders(checkpoint, torch.float32, Placement(CPU), settings)


def _bands(pipeline: Any, flavour: str, prompt: str = "a cat") -> Sequence[Tensor]:
    """Encode a prompt and return what came of each of the three layers."""
    settings = SPEC.flavours[flavour].text_settings
    with torch.no_grad():
        embed, _ = pipeline.encode_prompt(
            prompt=prompt, text_encoder_out_layers=settings["layers"], max_sequence_length=ROWS
        )
    return embed.chunk(3, dim=-1)


@pytest.fixture
def copied(tiny_flux2: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copy a tiny checkpoint, to change it."""
    return lambda flavour: Path(shutil.copytree(tiny_flux2 / flavour, tmp_path / flavour))


@pytest.mark.parametrize("flavour", LAST)
def test_a_language_model_is_kept_up_to_one_layer_after_the_last_that_is_read(tiny_flux2: Path, flavour: str) -> None:
    whole = DiffusionPipeline.from_pretrained(tiny_flux2 / flavour)
    ours = _encoders(tiny_flux2 / flavour, flavour)
    theirs = whole.text_encoder.model.language_model if flavour == "dev" else whole.text_encoder.model
    assert len(ours.text_encoder.layers) == LAST[flavour] + 1 == len(theirs.layers) - 1
    assert ours.vae is ours.transformer is ours.scheduler is None
    kept = {name: one for name, one in theirs.state_dict().items() if f"layers.{LAST[flavour] + 1}." not in name}
    assert ours.text_encoder.state_dict().keys() == kept.keys()  # no head, nothing that sees pictures
    assert not any(one.requires_grad for one in ours.text_encoder.parameters())
    for own, expected in zip(_bands(ours, flavour), _bands(whole, flavour), strict=True):
        assert torch.equal(own, expected)


@pytest.mark.parametrize("flavour", ["dev", "klein-9b"])
def test_without_that_layer_the_last_third_would_be_another(tiny_flux2: Path, flavour: str) -> None:
    expected, short = _encoders(tiny_flux2 / flavour, flavour), _encoders(tiny_flux2 / flavour, flavour)
    del short.text_encoder.layers[LAST[flavour] :]
    short.text_encoder.config.num_hidden_layers = LAST[flavour]
    *same, off = zip(_bands(short, flavour), _bands(expected, flavour), strict=True)
    assert all(torch.equal(*one) for one in same)
    assert (off[0] - off[1]).abs().max() > 0.1


@pytest.mark.parametrize("flavour", ["dev", "klein-9b"])
def test_a_checkpoint_with_too_few_layers_is_refused(copied: Callable[[str], Path], flavour: str) -> None:
    checkpoint, count = copied(flavour), LAST[flavour]
    file = checkpoint / "text_encoder" / "config.json"
    config = json.loads(file.read_text())
    text = config.get("text_config", config)
    text["num_hidden_layers"], text["layer_types"] = count, ["full_attention"] * count
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"text_encoder/config.json: {count} layers; what layer {count} gives is read"):
        _encoders(checkpoint, flavour)


@pytest.mark.parametrize("flavour", ["dev", "klein-9b"])
def test_tensors_that_are_not_there_are_told(copied: Callable[[str], Path], flavour: str) -> None:
    checkpoint = copied(flavour)
    file = checkpoint / "text_encoder" / WEIGHTS
    lost = f"layers.{LAST[flavour]}.mlp.up_proj.weight"
    save_file({name: one for name, one in load_file(file).items() if not name.endswith(lost)}, file, {"format": "pt"})
    with pytest.raises(UserError, match=rf"1 tensors are not there, first .*{lost}"):
        _encoders(checkpoint, flavour)


@pytest.mark.parametrize("name", ["bn.running_mean", "bn.running_var", "encoder.conv_in.weight"])
def test_a_vae_without_the_statistics_of_its_latents_is_told(copied: Callable[[str], Path], name: str) -> None:
    file = copied("klein-4b") / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({one: tensor for one, tensor in load_file(file).items() if one != name}, file, {"format": "pt"})
    with pytest.raises(UserError, match=rf"vae: 1 tensors are not there, first {name}"):
        flux2.load_image_encoder(file.parent.parent, torch.float32, CPU, tiling=False, slicing=False)


@pytest.mark.parametrize(
    ("name", "value"), [("running_mean", float("nan")), ("running_var", 0.0), ("running_var", -1.0)]
)
def test_statistics_that_latents_cannot_be_divided_by_are_refused(
    copied: Callable[[str], Path], name: str, value: float
) -> None:
    file = copied("klein-4b") / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors[f"bn.{name}"][5] = value
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(
        UserError, match=r"vae: of the statistics of its latents, .* some are not finite, or a variance"
    ):
        flux2.load_image_encoder(file.parent.parent, torch.float32, CPU, tiling=False, slicing=False)


@pytest.mark.parametrize(
    ("flavour", "part", "change", "message"),
    [
        ("klein-9b", "vae", {"batch_norm_eps": None}, "batch_norm_eps is null, flux2 klein-9b needs a number"),
        ("klein-9b", "vae", {"latent_channels": 16}, "latent_channels is 16, flux2 klein-9b needs 32"),
        ("klein-9b", "vae", {"_class_name": "AutoencoderKL"}, "is \"AutoencoderKL\", .* needs AutoencoderKLFlux2"),
        ("klein-9b", "transformer", {"guidance_embeds": True}, "guidance_embeds is true, flux2 klein-9b needs False"),
        ("dev", "transformer", {"guidance_embeds": False}, "guidance_embeds is false, flux2 dev needs True"),
        ("dev", "transformer", {"_class_name": "FluxTransformer2DModel"}, "needs Flux2Transformer2DModel"),
        ("dev", "text_encoder", {"model_type": "qwen3"}, 'model_type is "qwen3", flux2 dev needs mistral3'),
        ("klein-4b", "text_encoder", {"model_type": "mistral3"}, "model_type is .*, flux2 klein-4b needs qwen3"),
    ],
)  # fmt: skip
def test_a_component_of_another_model_is_refused(
    copied: Callable[[str], Path], project: Open, flavour: str, part: str, change: dict[str, object], message: str
) -> None:
    checkpoint = copied(flavour)
    file = checkpoint / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    opened = project(model_flavour=flavour, pretrained_model_name_or_path=checkpoint)
    with pytest.raises(UserError, match=rf"{part}/config.json: .*{message}"):
        locate(opened, (part,))


def test_a_transformer_that_does_not_speak_of_guidance_is_told_it_as_the_published_dev(
    copied: Callable[[str], Path], project: Open
) -> None:
    for flavour in ("dev", "klein-9b"):
        file = copied(flavour) / "transformer" / "config.json"
        config = json.loads(file.read_text())
        del config["guidance_embeds"]
        file.write_text(json.dumps(config))
        opened = project(model_flavour=flavour, pretrained_model_name_or_path=file.parent.parent)
        if flavour == "dev":
            assert locate(opened, ("transformer",)) == file.parent.parent
            assert flux2.takes_guidance(flux2.load_denoiser(file.parent.parent, torch.float32))
        else:
            with pytest.raises(UserError, match="guidance_embeds is true, flux2 klein-9b needs False"):
                locate(opened, ("transformer",))


def test_a_tokenizer_that_is_part_of_a_processor_is_the_processors(copied: Callable[[str], Path]) -> None:
    checkpoint = copied("dev")
    file, plain = checkpoint / "tokenizer" / "tokenizer_config.json", flux2.load_tokenizer(checkpoint)
    told = {
        "tokenizer_class": "LlamaTokenizerFast",
        "processor_class": "PixtralProcessor",
    }  # as published; it is no Llama's
    file.write_text(json.dumps(json.loads(file.read_text()) | told))
    found = flux2.load_tokenizer(checkpoint)
    chats = [flux2.format_input([text], "Be short.")[0] for text in ("Don't — été\n 123", "[INST] a  cat </s>")]
    ours, theirs = (one.apply_chat_template(chats, padding=True, return_dict=True) for one in (found, plain))
    assert ours["input_ids"] == theirs["input_ids"] and ours["attention_mask"] == theirs["attention_mask"]
    assert ours["attention_mask"][1][0] == 0


def test_a_file_in_a_layout_that_is_not_read_is_told_as_such(copied: Callable[[str], Path], tmp_path: Path) -> None:
    denoiser = flux2.load_denoiser(copied("klein-4b"), torch.float32)
    file = tmp_path / "other.safetensors"
    names = [f"transformer.transformer_blocks.0.attn.to_q.lora_{end}.weight" for end in ("down", "up")]
    save_file({name: torch.zeros(8, 8) for name in names}, file)
    with pytest.raises(
        UserError, match=r"other.safetensors: no layers of a LoRA or LoKr by names that diffusers reads"
    ):
        flux2.load_adapter(denoiser, file, 1.0)


# dev's padding


@pytest.fixture(scope="module")
def project(copy_demo: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, tiny_flux2: Path) -> Open:
    """Open one project of dev under other and other options; it is cached."""
    library = {"one": "one cat", "two": "two cat", "long": "a long way down the road " * 40}
    folder = copy_demo(
        tmp_path_factory.mktemp("dev"), photos=1, model_family="flux2", model_flavour="dev", user_prompt_library="p.json",
        pretrained_model_name_or_path=str(tiny_flux2 / "dev"), max_sequence_length=ROWS,
    )  # fmt: skip
    (folder / "p.json").write_text(json.dumps(library))

    def opened(**options: object) -> Project:
        return open_project(folder, overrides=[f"{name}={value}" for name, value in options.items()])

    scan(opened()), pairs(opened()), cache(opened())
    return opened


PROMPTS = ("", "one cat", "two cat", "a long way down the road " * 40)


@pytest.fixture(scope="module")
def expected(tiny_flux2: Path) -> dict[str, Tensor]:
    """What the pipeline makes of prompts, in bfloat16."""
    pipeline = DiffusionPipeline.from_pretrained(tiny_flux2 / "dev", dtype=torch.bfloat16)
    with torch.no_grad():
        embeds = {prompt: pipeline.encode_prompt(prompt=prompt, max_sequence_length=ROWS)[0] for prompt in PROMPTS}
    assert embeds[""][:, 0].any(), "zeros may lie in memory anyway"
    return embeds


def _store(project: Project) -> ShardIndex:
    return ShardIndex(project.text_store / encoder_keys(project).text)


def _counts(project: Project) -> dict[str, int]:
    """Count the rows of each prompt that are no padding."""
    tokenizer = flux2.load_tokenizer(locate(project, ("tokenizer",)))
    counts = flux2.count_tokens(tokenizer, PROMPTS, project.text_settings)
    return {prompt: min(ROWS, count) for prompt, count in zip(PROMPTS, counts, strict=True)}


def _check(project: Project, expected: dict[str, Tensor]) -> None:
    """Hold every way to read embeds against those that are expected, bit for bit."""
    shelf, store = Shelf(project, encoder_keys(project)), _store(project)
    for prompt, embed in expected.items():
        assert torch.equal(shelf.text([prompt], CPU).embed, embed.float())
        record = store.read(text_key(encoder_keys(project).text, prompt))
        assert record["prompt"] == prompt and record["embed"].shape == embed.shape[1:]
        if project.trainer.text_cache_dtype == "bf16":
            assert torch.equal(torch.from_numpy(record["embed"]).view(torch.bfloat16), embed[0])
    together = shelf.text(["one cat", "two cat"], CPU)  # of one length, so in one batch
    assert torch.equal(together.embed, torch.cat([expected["one cat"], expected["two cat"]]).float())
    assert together.num_tokens == (_counts(project)["one cat"],) * 2


def test_what_is_cached_is_explained_as_unchanged(project: Open) -> None:
    opened = project()
    [row] = read_pairs(opened, opened.targets[0])
    assert [part.changes for part in explain(opened, row.sample_id).parts] == [(), (), ()]


def test_a_run_goes_on_under_the_caption_dropout_that_it_had_unsaid(project: Open) -> None:
    told = {}
    for options in ({}, {"caption_dropout_probability": 0.0}, {"caption_dropout_probability": 0.1}):
        opened = project(**options)
        told[str(options)] = settings_of(opened, Shelf(opened, encoder_keys(opened)), None, 1, remember=False)
    unsaid, none, some = told.values()
    assert unsaid == none != some


def test_dev_stores_real_rows_and_one_of_padding_and_reads_all_of_them(
    project: Open, expected: dict[str, Tensor], tmp_path: Path
) -> None:
    opened = _apart(project, tmp_path)
    summary = cache(opened)
    store, key = _store(opened), encoder_keys(opened).text
    width = expected[""].shape[2]
    for prompt, count in _counts(opened).items():
        header, (name, _) = store.header_of(text_key(key, prompt)), store.place_of(text_key(key, prompt))
        stored = min(ROWS, count + 1)
        assert header.shapes["embed"] == (ROWS, width) and header.pad_rows == ROWS - stored
        assert name.split("/")[0] == f"{stored}-rows"
        kind = pq.read_schema(store.store.local(name)).field("embed").type
        assert kind.byte_width == stored * width * 2
    assert 150 < _counts(opened)[""] < 200 and _counts(opened)[PROMPTS[3]] == ROWS
    [text] = [one for one in summary.stores if one.kind == "text"]
    assert text.bytes_written == text.bytes < len(store) * ROWS * width * 2
    assert cache(opened).stores[-1].encoded == 0
    _check(opened, expected)
    compact(opened)
    _check(opened, expected)
    assert verify(opened, decode=0).faults == 0
    _flip_and_find(opened, width)


def _flip_and_find(project: Project, width: int) -> None:
    """A byte of the one row of padding, and one further on: each is noticed by who reads it, and by --verify."""
    store, key = _store(project), text_key(encoder_keys(project).text, "one cat")
    path = store.store.local(store.place_of(key)[0])
    sound = path.read_bytes()
    header = store.header_of(key)
    start = sound.index(header.stored(store.read(key))["embed"].tobytes())
    for place in (3, width * 2 * 7 + 1, header.bytes_of("embed") - 1):
        data = bytearray(sound)
        data[start + place] ^= 1
        path.write_bytes(bytes(data))
        assert verify(project, decode=0).faults == 1
        with pytest.raises(UserError, match="its checksum differs"):
            _store(project).read(key)
    path.write_bytes(sound)
    assert verify(project, decode=0).faults == 0


def _apart(project: Open, workspace: Path, **options: object) -> Project:
    """Open the project with a text store of its own, empty."""
    opened = project(**options)
    shutil.copytree(opened.workspace, workspace / "work", ignore=shutil.ignore_patterns("models", "text"))
    return open_project(
        opened.config_path, workspace=workspace / "work", overrides=[f"{name}={one}" for name, one in options.items()]
    )


def test_float8_embeds_of_dev_are_those_of_all_rows(project: Open, expected: dict[str, Tensor], tmp_path: Path) -> None:
    opened = _apart(project, tmp_path, text_cache_dtype="float8")
    text = cache(opened).stores[-1]
    assert text.bytes_written == text.bytes  # what was told before is what it takes
    rounded = {}
    for prompt, embed in expected.items():
        scale = float(embed.float().abs().max()) / 448
        rounded[prompt] = (embed.float() / scale).to(torch.float8_e4m3fn).float() * torch.tensor(scale)
        assert (rounded[prompt] - embed).norm() < 0.05 * embed.float().norm()
    assert _store(opened).header_of(text_key(encoder_keys(opened).text, "")).pad_rows > 0
    _check(opened, rounded)
    compact(opened)
    _check(opened, rounded)


def test_where_rows_of_padding_differ_all_are_stored(
    project: Open,
    expected: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    encode, seen, off = flux2.encode_prompts, [], dict(expected)

    def uneven(encoders: Any, prompts: Sequence[str], settings: Any) -> TextEmbeds:
        embeds = encode(encoders, prompts, settings)
        if seen:  # all but the first prompt
            embeds.embed[:, 5] += 0.25
        [prompt] = prompts
        seen.append(prompt)
        off[prompt] = embeds.embed
        return embeds

    opened = _apart(project, tmp_path)
    monkeypatch.setattr(flux2, "encode_prompts", uneven)
    cache(opened)
    store, key = _store(opened), encoder_keys(opened).text
    padded = {prompt for prompt in seen if store.header_of(text_key(key, prompt)).pad_rows}
    assert padded == {seen[0]} and len(store) == len(seen) > 4
    assert caplog.text.count("rows of padding differ on this device: embeds are stored whole") == 1
    off = {prompt: off[prompt] for prompt in PROMPTS}
    _check(opened, off)
    compact(opened)
    _check(opened, off)
    assert verify(opened, decode=0).faults == 0


def test_klein_stores_every_row(project: Open, tiny_flux2: Path, tmp_path: Path) -> None:
    klein = tiny_flux2 / "klein-4b"
    opened = _apart(project, tmp_path, model_flavour="klein-4b", pretrained_model_name_or_path=klein)
    cache(opened)
    store, key = _store(opened), encoder_keys(opened).text
    assert {header.pad_rows for header in store.headers.values()} == {0} and not any(
        "rows" in one for one in store.headers
    )
    pipeline = DiffusionPipeline.from_pretrained(klein, dtype=torch.bfloat16)
    shelf = Shelf(opened, encoder_keys(opened))
    for prompt in PROMPTS:
        with torch.no_grad():
            embed, _ = pipeline.encode_prompt(prompt=prompt, max_sequence_length=ROWS)
        assert torch.equal(shelf.text([prompt], CPU).embed, embed.float())
        assert torch.equal(torch.from_numpy(store.read(text_key(key, prompt))["embed"]).view(torch.bfloat16), embed[0])


# Presets

# Full-size models: what differs from the class's own values, which are dev's.
FULL: dict[str, dict[str, object]] = {
    "dev": {},
    "klein-9b": {
        "num_layers": 8, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 12288,
        "guidance_embeds": False,
    },
    "klein-4b": {
        "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24, "joint_attention_dim": 7680,
        "guidance_embeds": False,
    },
}  # fmt: skip
# Layers, and parameters at rank 16 in millions; dev, klein-9b, klein-4b.
PRESETS = {
    "all": ((192, 100.66), (144, 43.52), (100, 24.08)),
    "attention": ((160, 83.36), (112, 31.98), (80, 18.68)),
    "mlp": ((32, 17.30), (32, 11.53), (20, 5.41)),
    "tiny": ((24, 4.72), (24, 3.15), (15, 1.47)),
    "diffusers": ((128, 77.07), (80, 27.79), (60, 16.71)),
}


@pytest.fixture(scope="module")
def full() -> dict[str, nn.Module]:
    """Full-size transformers, without their numbers."""
    with torch.device("meta"):
        return {flavour: Flux2Transformer2DModel(**values) for flavour, values in FULL.items()}


@pytest.mark.parametrize("flavour", FULL)
def test_presets_wrap_as_many_layers_of_the_real_models_as_elsewhere(full: dict[str, nn.Module], flavour: str) -> None:
    linear = {name: one for name, one in full[flavour].named_modules() if isinstance(one, nn.Linear)}
    found = {}
    for preset, pattern in SPEC.lora_targets.items():
        wrapped = [layer for name, layer in linear.items() if re.fullmatch(pattern, name)]
        parameters = sum(16 * (layer.in_features + layer.out_features) for layer in wrapped)
        found[preset] = (len(wrapped), round(parameters / 1e6, 2))
    assert found == {preset: numbers[list(FULL).index(flavour)] for preset, numbers in PRESETS.items()}
    assert flux2.takes_guidance(full[flavour]) == (flavour == "dev")
    assert len(flux2.blocks(full[flavour])) == {"dev": 56, "klein-9b": 32, "klein-4b": 25}[flavour]
    assert full[flavour].config.joint_attention_dim == SPEC.flavours[flavour].text_width.usual
    assert set(SPEC.unquantised) < linear.keys()


def test_the_usual_preset_is_all_and_the_usual_flavour_klein_9b() -> None:
    assert (SPEC.default_lora_target, SPEC.default_flavour, SPEC.alignment) == ("all", "klein-9b", 16)


def test_advice_names_the_option_of_the_largest_text_encoder() -> None:
    named = {name: spec.text_precision for name, spec in FAMILIES.items()}
    assert named == {"flux": "text_encoder_2_precision", "flux2": "text_encoder_1_precision"}


@pytest.mark.parametrize("flavour", FULL)
def test_tiny_checkpoints_are_the_same_everywhere_and_their_latents_have_statistics(
    tiny_flux2: Path, tmp_path: Path, flavour: str
) -> None:
    flux2.build_tiny(tmp_path, flavour)
    files = [
        {path.relative_to(one): path.read_bytes() for path in one.rglob("*") if path.is_file()}
        for one in (tmp_path, tiny_flux2 / flavour)
    ]
    assert files[0] == files[1]
    vae = flux2.load_image_encoder(tmp_path, torch.float32, CPU, tiling=False, slicing=False)
    assert vae.bn.running_mean.std() > 0.05 and vae.bn.running_var.std() > 0.2
