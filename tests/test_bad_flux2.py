"""What goes wrong around FLUX.2: caches and checkpoints of other models, parts that are missing, options that clash."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from families import open_project
from families.checkpoints import locate
from families.flux2 import load_denoiser, load_tokenizer
from families.runtime import dtype_of
from prep.cache import cache
from prep.importing.run import import_cache
from prep.pairs import pairs
from prep.plan import plan
from prep.scan import scan
from schemas.errors import UserError
from schemas.project import Project
from train.loop import run
from train.sample import Request, sample

PICTURE = Path(__file__).parent.parent / "datasets_demo" / "edits" / "target" / "cat.jpg"
ENCODERS = ("vae", "text_encoder", "tokenizer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of one picture, scanned, paired and cached as klein-9b, with tiny checkpoints beside it."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "pictures").mkdir()
    for file in (PICTURE, PICTURE.with_suffix(".txt")):
        shutil.copy2(file, folder / "pictures")
    config = {"model_family": "flux2", "pretrained_model_name_or_path": "tiny", "mixed_precision": "no"}
    (folder / "config.json").write_text(json.dumps(config | {"max_train_steps": 1, "lora_rank": 1}))
    dataset = {"id": "one", "instance_data_dir": "pictures", "resolution": 64, "caption_strategy": "textfile"}
    (folder / "multidatabackend.json").write_text(json.dumps([dataset]))
    for flavour in ("dev", "klein-4b", "klein-9b"):
        project = open_project(folder, overrides=[f"model_flavour={flavour}"])
        shutil.copytree(locate(project, project.family.denoiser), folder / flavour)
    shutil.copytree(folder / "klein-9b", folder / "checkpoint")
    project = _opened(folder)
    scan(project, workers=1)
    pairs(project, workers=1)
    cache(project, workers=1)
    return folder


@pytest.fixture(autouse=True)
def checkpoint(folder: Path) -> Path:
    """The folder that the project names as its checkpoint: that which the cache was made with, whole again."""
    shutil.rmtree(folder / "checkpoint")
    shutil.copytree(folder / "klein-9b", folder / "checkpoint")
    return folder / "checkpoint"


def _opened(folder: Path, *overrides: str) -> Project:
    return open_project(folder, overrides=["pretrained_model_name_or_path=checkpoint", *overrides])


def _replace(folder: Path, flavour: str, *parts: str) -> None:
    """Put parts of another flavour's checkpoint in place of those of the project's."""
    for part in parts:
        shutil.rmtree(folder / "checkpoint" / part)
        shutil.copytree(folder / flavour / part, folder / "checkpoint" / part)


def _edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def _shortened(config: dict[str, Any]) -> None:
    config.update(num_hidden_layers=27, layer_types=config["layer_types"][:27])


def _without(file: Path, tensor: str) -> None:
    save_file({name: one for name, one in load_file(file).items() if name != tensor}, file, {"format": "pt"})


@pytest.mark.parametrize("flavour", ["klein-4b", "dev"])
def test_a_cache_of_another_flavour_is_not_trained_on(folder: Path, flavour: str) -> None:
    with pytest.raises(
        UserError, match=rf"embeds are not cached for this checkpoint, flux2 {flavour} .* run: prep cache"
    ):
        run(_opened(folder, "pretrained_model_name_or_path=tiny", f"model_flavour={flavour}"))


def test_a_cache_of_flux2_is_not_trained_on_by_flux1(folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"nothing is cached for .*\(there is a cache for .* flux2 klein-9b\); run: prep"
    ):
        run(_opened(folder, "model_family=flux"))


def test_a_cache_of_flux1_is_not_trained_on_by_flux2(folder: Path, tmp_path: Path, tiny_models: Path) -> None:
    shutil.copytree(tiny_models, tmp_path / "models")
    project = open_project(
        folder,
        workspace=tmp_path,
        overrides=["model_family=flux", "pretrained_model_name_or_path=tiny", "aspect_bucket_alignment=16"],
    )
    scan(project, workers=1)
    pairs(project, workers=1)
    cache(project, workers=1)
    second = open_project(folder, workspace=tmp_path, overrides=["aspect_bucket_alignment=16"])
    scan(second, workers=1)
    pairs(second, workers=1)
    with pytest.raises(UserError, match=r"nothing is cached for .*\(there is a cache for tiny flux kontext\)"):
        run(second)


def test_a_checkpoint_that_was_replaced_by_another_flavours_has_no_cache(folder: Path) -> None:
    _replace(folder, "klein-4b", *ENCODERS, "transformer")
    with pytest.raises(UserError, match=r"embeds are not cached for this checkpoint, .* run: prep cache"):
        run(_opened(folder))


def test_a_transformer_of_another_width_than_the_embeds_is_refused(folder: Path) -> None:
    _replace(folder, "klein-4b", "transformer")
    for part in ENCODERS:  # a machine that trains alone: it goes by the keys that were noted
        shutil.rmtree(folder / "checkpoint" / part)
    with pytest.raises(UserError, match=r"transformer/config.json: joint_attention_dim is 48, .* are 96 wide"):
        run(_opened(folder))


@pytest.mark.parametrize(
    ("given", "wanted", "says"),
    [("dev", "klein-9b", '"mistral3", flux2 klein-9b needs qwen3'), ("klein-9b", "dev", '"qwen3", flux2 dev needs')],
)
def test_dev_and_klein_are_told_apart(folder: Path, given: str, wanted: str, says: str) -> None:
    project = open_project(
        folder, overrides=[f"pretrained_model_name_or_path={folder / given}", f"model_flavour={wanted}"]
    )
    with pytest.raises(UserError, match=rf"text_encoder/config.json: model_type is {says}"):
        cache(project, workers=1)
    with pytest.raises(UserError, match=r"transformer/config.json: guidance_embeds is (true|false), .* needs"):
        locate(project, ("transformer",))


def test_klein_of_4b_given_as_9b_is_told_by_its_width(folder: Path, checkpoint: Path) -> None:
    _edit(checkpoint / "transformer" / "config.json", lambda values: values.update(joint_attention_dim=7680))
    with pytest.raises(
        UserError, match=r"transformer/config.json: of klein-4b by its width, .* set model_flavour to kl"
    ):
        run(_opened(folder))
    _edit(checkpoint / "text_encoder" / "config.json", lambda values: values.update(hidden_size=2560))
    with pytest.raises(UserError, match=r"text_encoder/config.json: of klein-4b by its width, not of flux2 klein-9b"):
        cache(_opened(folder), workers=1)


def test_a_vae_without_the_statistics_of_its_latents_is_refused(folder: Path, checkpoint: Path) -> None:
    _without(checkpoint / "vae" / "diffusion_pytorch_model.safetensors", "bn.running_mean")
    with pytest.raises(UserError, match=r"vae: 1 tensors are not there, first bn.running_mean; fetch"):
        cache(_opened(folder), workers=1)
    _edit(checkpoint / "vae" / "config.json", lambda values: values.pop("batch_norm_eps"))
    with pytest.raises(UserError, match=r"vae/config.json: batch_norm_eps is null, flux2 klein-9b needs a number"):
        cache(_opened(folder), workers=1)


def test_a_transformer_that_is_not_whole_is_an_error(checkpoint: Path) -> None:
    file = checkpoint / "transformer" / "diffusion_pytorch_model.safetensors"
    _without(file, "x_embedder.weight")
    with pytest.raises(UserError, match=r"transformer: 1 tensors are not there, first x_embedder.weight; fetch"):
        load_denoiser(checkpoint, dtype_of("fp32"))


def test_no_other_trainers_cache_is_read(folder: Path) -> None:
    with pytest.raises(UserError, match="caches of other trainers are not read for flux2; run: prep cache"):
        import_cache(_opened(folder), folder)


def test_what_dev_takes_is_an_upper_bound_as_long_as_its_tokenizer_is_not_there(folder: Path) -> None:
    planned = {}
    for checkpoint in ("null", "dev"):
        found = plan(_opened(folder, "model_flavour=dev", f"pretrained_model_name_or_path={checkpoint}"), workers=1)
        planned[checkpoint] = next(one for one in found.stages if one.stage == "text embeds")
        assert planned[checkpoint].at_most == any("text embeds take less" in note for note in found.notes)
    assert planned["null"].at_most and planned["null"].bytes == 2 * 512 * 15360 * 2
    assert not planned["dev"].at_most and planned["dev"].bytes < 2 * 512 * 3 * 48 * 2


def test_a_length_without_room_for_a_prompt_is_refused(folder: Path) -> None:
    project = _opened(folder, "model_flavour=dev", "pretrained_model_name_or_path=dev", "max_sequence_length=100")
    scan(project), pairs(project)
    with pytest.raises(UserError, match=r"max_sequence_length 100: what stands around every prompt takes \d+ tokens"):
        cache(project)


def test_whole_weights_of_another_flavour_are_not_sampled_with(folder: Path, tiny_flux2: Path) -> None:
    with pytest.raises(UserError, match=r"dev/transformer/config.json: guidance_embeds is true, flux2 klein-9b needs"):
        sample(_opened(folder, "validation_resolution=64"), Request("a cat", lora=tiny_flux2 / "dev", steps=1))


def test_a_tokenizer_without_the_chat_is_an_error(checkpoint: Path) -> None:
    for file in (checkpoint / "tokenizer").glob("*.jinja"):
        file.unlink()
    _edit(checkpoint / "tokenizer" / "tokenizer_config.json", lambda values: values.pop("chat_template", None))
    with pytest.raises(UserError, match=r"tokenizer: no chat template; fetch the checkpoint again"):
        load_tokenizer(checkpoint)


def test_a_tokenizer_without_its_vocabulary_is_an_error(checkpoint: Path) -> None:
    (checkpoint / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer: no vocabulary; fetch the checkpoint again"):
        load_tokenizer(checkpoint)


def test_a_tokenizer_without_any_file_of_tokens_is_an_error(tiny_flux2: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_flux2 / "dev" / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer: cannot be loaded \(.*\); fetch the checkpoint again"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_cannot_pad_is_an_error(tiny_flux2: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_flux2 / "dev" / "tokenizer", tmp_path / "tokenizer")
    _edit(tmp_path / "tokenizer" / "tokenizer_config.json", lambda values: values.pop("pad_token"))
    with pytest.raises(UserError, match=r"tokenizer: no padding token; fetch the checkpoint again"):
        load_tokenizer(tmp_path)


def test_a_text_encoder_that_ends_too_early_is_refused(folder: Path, checkpoint: Path) -> None:
    _edit(checkpoint / "text_encoder" / "config.json", _shortened)
    with pytest.raises(UserError, match=r"text_encoder/config.json: 27 layers; what layer 27 gives is read"):
        cache(_opened(folder), workers=1)


def test_a_distilled_klein_is_trained_on_only_if_that_is_asked_for(folder: Path, checkpoint: Path) -> None:
    _edit(checkpoint / "model_index.json", lambda values: values.update(is_distilled=True))
    with pytest.raises(UserError, match=r"model_index.json: is_distilled is true.*FLUX.2-klein-base-9B.*allow_disti"):
        run(_opened(folder))
    trained = _opened(folder, "allow_distilled=true", "tracker_run_name=distilled", "validation_resolution=64")
    assert run(trained).last_step == 1
    assert sample(trained, Request("a cat", steps=1, guidance_real=4.0)).guidance_real == 1.0, "it takes none"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("max_sequence_length=513",), "max_sequence_length = 513: the model reads 512 tokens at most"),
        (
            ("group_offload_text_encoder=true", "text_encoder_1_precision=int8-quanto"),
            'text_encoder_1_precision = "int8-quanto": contradicts group_offload_text_encoder',
        ),
        (("model_flavour=klein",), 'model_flavour = "klein": unknown; flux2 has dev, klein-9b, klein-4b'),
        (("flux_lora_target=mmdit",), 'flux_lora_target = "mmdit": unknown; flux2 has all, attention, mlp, tiny'),
        (("aspect_bucket_alignment=24",), "aspect_bucket_alignment = 24: flux2 needs a multiple of 16"),
    ],
)
def test_options_that_flux2_cannot_have_are_errors(folder: Path, overrides: tuple[str, ...], says: str) -> None:
    with pytest.raises(UserError) as fault:
        _opened(folder, *overrides)
    assert says in str(fault.value)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("flux_guidance_min=1",), "flux_guidance_min has no effect: flux2 klein-9b is told no guidance"),
        (
            ("flux_guidance_mode=random-range", "flux_guidance_max=5"),
            "flux_guidance_mode, flux_guidance_max have no effect: flux2 klein-9b is told no guidance",
        ),
        (("text_encoder_2_precision=int8-quanto",), "text_encoder_2_precision has no effect: flux2 has no second text"),
        (
            ("model_flavour=dev", "flux_guidance_min=1"),
            "flux_guidance_min has no effect without flux_guidance_mode: random-range",
        ),
        (("model_flavour=dev", "validation_guidance_real=3"), "validation_guidance_real has no effect: flux2 dev"),
    ],
)
def test_options_that_do_nothing_are_told_once(folder: Path, overrides: tuple[str, ...], says: str) -> None:
    [told] = _opened(folder, *overrides).warnings
    assert says in told
