"""What identifies a checkpoint, what is refused, and what of the options enters an encoder's key."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from families import flux, open_project
from families.checkpoints import (
    check_unchanged,
    describe_text_encoder,
    encoder_keys,
    fingerprint,
    here,
    image_encoder_key,
    key_of,
    locate,
    text_encoder_key,
)
from families.protocol import Placement
from families.runtime import default_device
from families.weights import combined, tensors_id
from prep.cache import cache
from prep.pairs import pairs
from prep.plan import plan
from prep.scan import scan
from schemas.errors import UserError
from schemas.project import Project

MakeProject = Callable[..., Path]
CPU = torch.device("cpu")
VAE = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def project(make_project: MakeProject) -> Project:
    return open_project(make_project())


def _checkpoint(project: Project) -> Path:
    return locate(project, (*project.family.image_encoder, *project.family.text_encoders))


# The hash of weights


def test_neither_the_order_nor_the_metadata_nor_the_split_of_tensors_counts(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5, dtype=torch.bfloat16), "none": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / "whole.safetensors")
    save_file(dict(reversed(tensors.items())), tmp_path / "other.safetensors", {"format": "pt", "who": "somebody"})
    save_file({"a": tensors["a"]}, tmp_path / "one.safetensors")
    save_file({name: tensors[name] for name in ("b", "none")}, tmp_path / "two.safetensors")
    whole, other, one, two = (tensors_id(tmp_path / f"{name}.safetensors") for name in ("whole", "other", "one", "two"))
    assert whole == other == combined([one, two]) == combined([two, one])
    assert len({whole, one, two}) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"a": torch.tensor([1.0, 2.0, 3.5])},
        {"a": torch.tensor([1.0, 2.0, 3.0]).view(1, 3)},
        {"a": torch.tensor([1.0, 2.0, 3.0]).view(torch.int32)},
        {"b": torch.tensor([1.0, 2.0, 3.0])},
        {"a": torch.tensor([1.0, 2.0, 3.0]), "b": torch.zeros(0)},
        {"a": torch.tensor([2.0, 1.0, 3.0])},
    ],
    ids=["value", "shape", "dtype", "name", "one more", "order of values"],
)
def test_whatever_else_changes_in_a_tensor_counts(tmp_path: Path, change: dict[str, torch.Tensor]) -> None:
    save_file({"a": torch.tensor([1.0, 2.0, 3.0])}, tmp_path / "before.safetensors")
    save_file(change, tmp_path / "after.safetensors")
    assert tensors_id(tmp_path / "before.safetensors") != tensors_id(tmp_path / "after.safetensors")


def _with_header(header: bytes, payload: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + payload


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"12345",
        b"\xff" * 64,
        _with_header(b"{ not json"),
        _with_header(b"[1, 2]"),
        _with_header(b'{"a": 1}'),
        _with_header(b'{"a": {"dtype": "F32", "shape": [2]}}'),
        _with_header(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', b"1234"),
        _with_header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', b"12345678"),
        _with_header(b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}', b"1234"),
        _with_header(b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', b"1234"),
    ],
    ids=str,
)
def test_a_damaged_weight_file_is_an_error_that_names_it(project: Project, data: bytes) -> None:
    folder = _checkpoint(project)
    (folder / "vae" / VAE).write_bytes(data)
    with pytest.raises(UserError, match=rf"vae/{VAE}: damaged .*fetch or build the checkpoint again"):
        fingerprint(project, folder, ("vae",))


@pytest.mark.parametrize(("part", "load"), [("vae", AutoencoderKL), ("text_encoder_2", T5EncoderModel)])
def test_a_checkpoint_in_shards_is_the_same_encoder(project: Project, part: str, load: type) -> None:
    folder = _checkpoint(project)
    before = fingerprint(project, folder, (part,))
    config = json.loads((folder / part / "config.json").read_text())
    model = load.from_pretrained(folder / part, dtype=torch.float32)
    for file in (folder / part).glob("*.safetensors"):
        file.unlink()
    model.save_pretrained(folder / part, max_shard_size="20KB")
    (folder / part / "config.json").write_text(json.dumps(config))
    assert len(list((folder / part).glob("*.safetensors"))) > 2
    assert len(list((folder / part).glob("*.safetensors.index.json"))) == 1
    assert fingerprint(project, folder, (part,)) == before


def test_one_changed_value_another_name_and_another_dtype_are_other_encoders(project: Project) -> None:
    folder = _checkpoint(project)
    weights = load_file(folder / "vae" / VAE)
    name = next(iter(weights))
    changed = weights[name].clone()
    changed.view(-1)[0] += 1e-3
    seen = {fingerprint(project, folder, ("vae",))}
    others = [
        weights | {name: changed},
        {f"new.{one}" if one == name else one: tensor for one, tensor in weights.items()},
        {one: tensor.half() for one, tensor in weights.items()},
    ]
    for other in others:
        save_file(other, folder / "vae" / VAE)
        seen.add(fingerprint(project, folder, ("vae",)))
    assert len(seen) == 4
    save_file(weights, folder / "vae" / VAE, {"written by": "somebody else"})
    assert fingerprint(project, folder, ("vae",)) in seen


# What is refused


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("vae", {"_class_name": "AutoencoderDC"}, r'_class_name is "AutoencoderDC", flux kontext needs AutoencoderKL'),
        ("vae", {"latent_channels": 4}, r"latent_channels is 4, flux kontext needs 16"),
        ("vae", {"shift_factor": None}, r"shift_factor is null, flux kontext needs a number"),
        ("vae", {"scaling_factor": "big"}, r'scaling_factor is "big", flux kontext needs a number'),
        ("transformer", {"_class_name": "SD3Transformer2DModel"}, r'.* is "SD3.*", flux kontext needs FluxTransf'),
        ("transformer", {"in_channels": 384}, r"in_channels is 384, flux kontext needs 64"),
    ],
)
def test_a_component_of_another_family_is_an_error_that_says_what_was_expected(
    project: Project, part: str, change: dict[str, object], message: str
) -> None:
    folder = locate(project, ("vae", "transformer"))
    file = folder / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    for find in (locate, here):
        with pytest.raises(UserError, match=rf"{part}/config.json: {message}"):
            find(project, (part,))


@pytest.mark.parametrize("key", ["scaling_factor", "shift_factor", "latent_channels"])
def test_a_configuration_that_lacks_a_number_is_refused(project: Project, key: str) -> None:
    file = _checkpoint(project) / "vae" / "config.json"
    file.write_text(json.dumps({name: one for name, one in json.loads(file.read_text()).items() if name != key}))
    with pytest.raises(UserError, match=rf"vae/config.json: {key} is null, flux kontext needs"):
        locate(project, ("vae",))


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("vae/config.json", r"it lacks vae/config.json$"),
        (f"vae/{VAE}", r"it lacks vae/\*.safetensors$"),
        ("text_encoder_2", r"it lacks text_encoder_2$"),
        ("tokenizer_2/*", r"it lacks all of tokenizer_2$"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_an_error_that_names_what_it_lacks(
    project: Project, lost: str, message: str
) -> None:
    folder = _checkpoint(project)
    for path in folder.glob(lost):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    components = (*project.family.image_encoder, *project.family.text_encoders)
    with pytest.raises(UserError, match=message):
        locate(project, components)
    assert here(project, components) is None


def test_an_index_of_shards_that_is_damaged_is_an_error_that_names_it(project: Project) -> None:
    folder = _checkpoint(project)
    for text in ("{}", "[1]", "{"):
        (folder / "vae" / f"{VAE}.index.json").write_text(text)
        with pytest.raises(UserError, match=rf"{VAE}.index.json: damaged"):
            locate(project, ("vae",))


@pytest.mark.parametrize(
    ("change", "message"),
    [(None, r"vae: 1 tensors are not there, first encoder.conv_in.weight"),
     (torch.zeros(8, 2, 3, 3), r"vae: config.json and weights do not fit: .*conv_in.weight")],
)  # fmt: skip
def test_weights_that_do_not_fit_their_configuration_are_an_error(
    project: Project, change: torch.Tensor | None, message: str
) -> None:
    folder = _checkpoint(project)
    weights = load_file(folder / "vae" / VAE)
    kept = {name: tensor for name, tensor in weights.items() if name != "encoder.conv_in.weight"}
    save_file(kept | ({"encoder.conv_in.weight": change} if change is not None else {}), folder / "vae" / VAE)
    with pytest.raises(UserError, match=rf"(?s){message}"):
        flux.load_image_encoder(folder, torch.float32, CPU, tiling=False, slicing=False)


def test_another_familys_vae_ends_plan_and_cache_before_anything_is_encoded(make_project: MakeProject) -> None:
    folder = make_project()
    project = open_project(folder)
    scan(project), pairs(project), cache(project)
    file = _checkpoint(project) / "vae" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"_class_name": "AutoencoderDC"}))
    for stage in (plan, cache, lambda project: cache(project, dry_run=True)):
        with pytest.raises(UserError, match="is it the checkpoint of another model"):
            stage(project)


def test_weights_that_change_while_they_are_loaded_end_the_command_and_nothing_is_written(
    make_project: MakeProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = open_project(make_project())
    scan(project), pairs(project)
    file = _checkpoint(project) / "vae" / VAE
    load = AutoencoderKL.from_pretrained

    def replaced(*arguments: object, **options: object) -> AutoencoderKL:
        weights = load_file(file)
        save_file({name: tensor + 1 for name, tensor in weights.items()}, file)
        return load(*arguments, **options)

    monkeypatch.setattr(AutoencoderKL, "from_pretrained", replaced)
    with pytest.raises(UserError, match="changed while they were loaded; run the command again"):
        cache(project)
    assert not list(project.workspace.glob("cache/**/*.parquet"))
    monkeypatch.undo()
    assert [store.encoded for store in cache(project).stores] == [12, 7]


def test_an_unchanged_key_is_no_error(tmp_path: Path) -> None:
    check_unchanged(tmp_path, ("a", "b"), ("a", "b"))
    with pytest.raises(UserError, match="changed"):
        check_unchanged(tmp_path, ("a", "b"), ("a", "c"))


# Options in keys


def _keys(project: Project, *overrides: str) -> tuple[str, str, str]:
    keys = encoder_keys(open_project(project.config_path, overrides=overrides))
    return keys.target, keys.reference, keys.text


def test_each_option_enters_the_keys_of_what_it_changes(project: Project) -> None:
    _checkpoint(project)
    target, reference, text = _keys(project)
    assert target == reference
    assert _keys(project, "vae_enable_slicing=true", "offload_during_startup=true", "write_batch_size=3") == (
        target,
        reference,
        text,
    )
    others = {}
    for options in ("posterior=sample", "posterior=moments"):
        others[options] = _keys(project, options)
        assert others[options][0] != target and others[options][1:] == (reference, text)
    for options in ("vae_enable_tiling=true", "vae_dtype=bf16"):
        others[options] = _keys(project, options)
        assert others[options][0] == others[options][1] != target and others[options][2] == text
    for options in ("text_encoder_1_precision=int8-quanto", "text_encoder_2_precision=int8-quanto",
                    "text_encoder_2_precision=int4-quanto", "text_cache_dtype=float8"):  # fmt: skip
        others[options] = _keys(project, options)
        assert others[options][:2] == (target, reference) and others[options][2] != text
    assert len({one[0] for one in others.values()}) == 5  # four others, and the one that text options leave alone
    assert len({one[2] for one in others.values()}) == 5


def test_keys_of_caches_that_older_versions_made_stay(project: Project) -> None:
    described = describe_text_encoder(project, _checkpoint(project))
    weights = described.pop("weights")
    assert described == {"encoder": "text", "cache_version": 3, "dtype": "bf16", "t5_tokens": 512}
    old = {"encoder": "text", "cache_version": 3, "weights": weights, "dtype": "bf16", "t5_tokens": 512}
    assert encoder_keys(project).text == key_of(old)


def test_keys_are_noted_by_all_options_they_depend_on(make_project: MakeProject) -> None:
    folder = make_project(posterior="sample", vae_dtype="fp32")
    project = open_project(folder)
    scan(project), pairs(project), cache(project)
    noted = encoder_keys(project)
    for part in ("vae", "text_encoder"):
        shutil.rmtree(project.models / "tiny-flux-kontext" / part)
    assert encoder_keys(project) == noted
    for other in ("posterior=mode", "vae_enable_tiling=true", "text_cache_dtype=float8", "vae_dtype=bf16"):
        with pytest.raises(UserError, match="nothing is cached for checkpoint tiny"):
            encoder_keys(open_project(folder, overrides=[other]))


# How encoders are loaded


def test_tiles_change_pictures_that_are_larger_than_a_tile_alone(project: Project) -> None:
    folder = _checkpoint(project)
    plain, tiled, sliced = (
        flux.load_image_encoder(folder, torch.float32, CPU, tiling=tiling, slicing=slicing)
        for tiling, slicing in ((False, False), (True, False), (False, True))
    )
    generator = torch.Generator().manual_seed(1)
    small, large = (
        torch.randint(0, 256, (2, side, side, 3), generator=generator, dtype=torch.uint8) for side in (64, 128)
    )
    assert torch.equal(flux.encode_images(plain, small).mean, flux.encode_images(tiled, small).mean)
    assert not torch.equal(flux.encode_images(plain, large).mean, flux.encode_images(tiled, large).mean)
    one_by_one = torch.cat([flux.encode_images(plain, large[place : place + 1]).mean for place in range(2)])
    assert torch.equal(flux.encode_images(sliced, large).mean, one_by_one)


def test_a_posterior_is_the_vaes_own_normalised(project: Project) -> None:
    vae = flux.load_image_encoder(_checkpoint(project), torch.float32, CPU, tiling=False, slicing=False)
    pixels = torch.randint(0, 256, (2, 64, 96, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    ours = flux.encode_images(vae, pixels)
    with torch.no_grad():
        theirs = vae.encode(pixels.permute(0, 3, 1, 2) / 127.5 - 1.0).latent_dist
    torch.testing.assert_close(ours.mean, (theirs.mean - 0.1159) * 0.3611)
    torch.testing.assert_close(ours.std, (0.5 * theirs.logvar).exp() * 0.3611)


@pytest.mark.parametrize("precision", ["int8-quanto", "fp8-quanto", "int4-quanto"])
def test_a_precision_quantises_the_text_encoder_it_is_about(project: Project, precision: str) -> None:
    folder, prompts = _checkpoint(project), ["a photo of a dog", "b"]
    settings = project.text_settings

    def encoded(**precisions: str) -> tuple[torch.Tensor, torch.Tensor]:
        encoders = flux.load_text_encoders(folder, torch.bfloat16, Placement(CPU, precisions, turns=True), settings)
        embeds = flux.encode_prompts(encoders, prompts, settings)
        assert embeds.pooled is not None
        return embeds.embed, embeds.pooled

    embed, pooled = encoded()
    first, second = encoded(text_encoder=precision), encoded(text_encoder_2=precision)
    assert torch.equal(first[0], embed) and not torch.equal(first[1], pooled)
    assert torch.equal(second[1], pooled) and not torch.equal(second[0], embed)
    off = (second[0] - embed).float().norm() / embed.float().norm()
    assert 1e-4 < off < (0.1 if precision != "int4-quanto" else 0.5)


def test_a_project_with_quantised_text_encoders_is_cached_apart(make_project: MakeProject) -> None:
    project = open_project(make_project())
    scan(project), pairs(project), cache(project)
    other = open_project(project.config_path, overrides=["text_encoder_2_precision=int8-quanto"])
    assert [store.encoded for store in cache(other).stores] == [0, 7]
    plain, less = (project.text_store / text_encoder_key(one, _checkpoint(one)) for one in (project, other))
    assert plain != less and len(plain.files()) == len(less.files()) == 1


def test_a_process_of_torchrun_takes_its_own_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert default_device() == torch.device("cuda", 3)
    monkeypatch.delenv("LOCAL_RANK")
    assert default_device() == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert default_device() == CPU


def test_the_posterior_of_a_key_is_given(project: Project) -> None:
    folder = _checkpoint(project)
    assert len({image_encoder_key(project, folder, kind) for kind in ("mode", "sample", "moments")}) == 3
