"""Pictures sampled while training: which, from what noise, at what cost to the training, and what is told of them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from families import flux, open_project
from families.checkpoints import encoder_keys, locate
from families.protocol import Sampling
from families.quantize import quantize_and_place
from prep.cache import cache
from prep.pairs import pairs
from prep.scan import scan
from schemas.config_file import read_json
from schemas.errors import UserError
from schemas.project import Project
from schemas.summaries import TrainSummary
from train.adapter import add_adapter
from train.data import Shelf
from train.grid import Cell, drawn
from train.held_out import held_out, held_out_pairs
from train.likeness import psnr, ssim
from train.pictures import Pictures, SampleReport, check_pictures, pictures_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, copy_demo: Callable[..., Path]) -> Path:
    """The demo that has prompts and a held-out set, cached."""
    made = copy_demo(
        tmp_path_factory.mktemp("pictures"), "jpeg", 3, validation_resolution="64x96", validation_prompt="one more",
        validation_negative_prompt="blurred", validation_num_inference_steps=2,
    )  # fmt: skip
    project = open_project(made)
    scan(project, workers=1), pairs(project, workers=1), cache(project, workers=1)
    return made


def _opened(folder: Path, **options: object) -> tuple[Project, Shelf]:
    spelled = {name: value if isinstance(value, str) else json.dumps(value) for name, value in options.items()}
    project = open_project(folder, overrides=[f"{name}={value}" for name, value in spelled.items()])
    return project, Shelf(project, encoder_keys(project))


def _denoiser(project: Project) -> nn.Module:
    denoiser = flux.load_denoiser(locate(project, project.family.denoiser), torch.float32).requires_grad_(False)
    add_adapter(denoiser, project)
    denoiser.enable_gradient_checkpointing()
    return denoiser.train()


def _read(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.array(picture)


def _pictures(project: Project, shelf: Shelf) -> Pictures:
    pictures = pictures_of(project, shelf, CPU)
    assert pictures is not None
    return pictures


@pytest.fixture(scope="module")
def sampled(folder: Path) -> tuple[Project, Shelf, nn.Module, SampleReport]:
    project, shelf = _opened(folder, tracker_run_name="sampled")
    denoiser = _denoiser(project)
    return project, shelf, denoiser, _pictures(project, shelf).sample(denoiser, 7)


def test_every_held_out_pair_and_prompt_becomes_a_picture(
    sampled: tuple[Project, Shelf, nn.Module, SampleReport],
) -> None:
    project, _, _, report = sampled
    assert report.names == ("grass_blades", "retina_disc", "retina_vessels", "cat", "lighthouse", "validation_prompt")
    assert report.folder == project.run_folder / "samples" / "step-7" and report.step == 7
    shapes = [_read(report.folder / f"{name}.png").shape for name in report.names]
    assert shapes == [(128, 128, 3)] * 3 + [(96, 64, 3)] * 3
    assert sorted(path.name for path in report.folder.iterdir()) == sorted(f"{n}.png" for n in (*report.names, "grid"))
    assert np.array_equal(_read(report.grid), report.pixels)


def test_a_sampled_pair_is_the_pipelines_picture_of_its_cached_reference(
    sampled: tuple[Project, Shelf, nn.Module, SampleReport],
) -> None:
    project, shelf, denoiser, report = sampled
    folder = locate(project, project.family.image_encoder)
    encoder = flux.load_image_encoder(folder, torch.float32, CPU, tiling=False, slicing=False)
    [score, *_] = report.scores
    [first, *_] = held_out(project, shelf)
    batch = shelf.load([first], CPU)
    how = Sampling(128, 128, 2, 2.5, 1.0, first.seed)
    latents = flux.sample(flux.load_pipeline(folder), denoiser.eval(), batch.text, None, batch.references, how)
    denoiser.train()
    output, target, reference = (
        flux.decode_latents(encoder, one)[0] for one in (latents, batch.latents, batch.references[0])
    )
    assert np.array_equal(_read(report.folder / f"{score.name}.png"), output.numpy())
    assert score.sample_id == first.sample_id
    assert (score.psnr, score.ssim) == (psnr(output, target), ssim(output, target))
    assert (score.reference_psnr, score.reference_ssim) == (psnr(reference, target), ssim(reference, target))
    assert report.psnr == pytest.approx(sum(one.psnr for one in report.scores) / 3)
    assert set(report.values()) == {f"samples/{name}" for name in ("psnr", "ssim", "reference_psnr", "reference_ssim")}


def test_the_pictures_of_an_event_depend_on_weights_alone(
    folder: Path, sampled: tuple[Project, Shelf, nn.Module, SampleReport]
) -> None:
    _, _, denoiser, before = sampled
    project, shelf = _opened(folder, tracker_run_name="again")
    again = _pictures(project, shelf).sample(denoiser, 9)
    assert np.array_equal(before.pixels, again.pixels) and before.scores == again.scores
    with torch.no_grad():
        for name, weight in denoiser.named_parameters():
            if "lora_B" in name:
                weight.add_(0.5)
    changed = _pictures(project, shelf).sample(denoiser, 10)
    with torch.no_grad():
        for name, weight in denoiser.named_parameters():
            if "lora_B" in name:
                weight.sub_(0.5)
    assert changed.psnr != before.psnr and changed.reference_psnr == before.reference_psnr


def test_training_is_left_as_it_was(folder: Path) -> None:
    project, shelf = _opened(folder, tracker_run_name="left", lora_dropout=0.5)
    denoiser, pictures = _denoiser(project), _pictures(project, shelf)
    denoiser.transformer_blocks[0].attn.to_q.lora_A["default"].weight.grad = torch.ones(8, 64)
    torch.manual_seed(5)
    modes, state = [module.training for module in denoiser.modules()], torch.get_rng_state()
    pictures.sample(denoiser, 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in denoiser.modules()] == modes and denoiser.training
    grads = [one for one in denoiser.parameters() if one.grad is not None]
    assert len(grads) == 1 and torch.equal(grads[0].grad, torch.ones(8, 64))
    assert denoiser.is_gradient_checkpointing


@pytest.mark.parametrize("precision", ["no_change", "int8-quanto", "fp8-quanto", "int8-torchao"])
def test_pictures_are_sampled_in_the_numbers_that_are_trained_in(folder: Path, precision: str) -> None:
    options = {"mixed_precision": "bf16", "base_model_precision": precision, "num_eval_images": 1}
    project, shelf = _opened(folder, **options, tracker_run_name=f"in-{precision}")
    denoiser = flux.load_denoiser(locate(project, project.family.denoiser), torch.bfloat16).requires_grad_(False)
    quantize_and_place(denoiser, precision, project.family.unquantised, CPU, "cpu")
    add_adapter(denoiser, project)
    report = _pictures(project, shelf).sample(denoiser.train(), 1)
    exact = _pictures(*_opened(folder, num_eval_images=1)).sample(_denoiser(project), 1)
    alike = psnr(*(torch.from_numpy(_read(one.folder / "grass_blades.png")) for one in (report, exact)))
    assert 25 < alike < 100


def test_true_guidance_reads_the_cached_negative_prompt(folder: Path) -> None:
    plain, guided, other = (
        _opened(folder, tracker_run_name="guided", num_eval_images=1, **options)
        for options in (
            {},
            {"validation_guidance_real": 3.0},
            {"validation_guidance_real": 3.0, "validation_negative_prompt": ""},
        )
    )
    denoiser = _denoiser(plain[0])
    reports = [_pictures(*one).sample(denoiser, 1) for one in (plain, guided, other)]
    assert len({report.psnr for report in reports}) == 3
    assert all(len(report.scores) == 1 for report in reports)


def test_prompts_are_sampled_at_every_size(folder: Path) -> None:
    project, shelf = _opened(folder, validation_resolution="64x96,90", num_eval_images=1, tracker_run_name="sizes")
    report = _pictures(project, shelf).sample(_denoiser(project), 1)
    assert report.names[1:3] == ("cat-64x96", "cat-96x96")  # 90 is no size that the model runs at
    assert _read(report.folder / "cat-96x96.png").shape == (96, 96, 3)


def test_nothing_is_sampled_where_that_is_said_or_nothing_is_there(folder: Path) -> None:
    assert pictures_of(*_opened(folder, validation_disable=True), CPU) is None
    bare = {"eval_dataset_id": None, "user_prompt_library": None, "validation_prompt": None}
    project, shelf = _opened(folder, **bare)
    assert [one.name for one in held_out_pairs(project, shelf)] == ["grass_blades", "retina_disc", "retina_vessels"]
    datasets = read_json(folder / "multidatabackend.json")[:1]
    (folder / "one.json").write_text(json.dumps(datasets))
    project, shelf = _opened(folder, **bare, data_backend_config="one.json")
    assert held_out(project, shelf) == [] and pictures_of(project, shelf, CPU) is None


def test_held_out_pairs_are_always_the_same_and_as_many_as_asked_for(folder: Path) -> None:
    project, shelf = _opened(folder, num_eval_images=2)
    first, again = held_out(project, shelf), held_out(*_opened(folder, num_eval_images=0))
    assert first == again[:2] and len(again) == 3
    assert all(one.prompt in ("remove compression artifacts", "restore quality", "fix jpeg artifacts") for one in again)
    assert {one.sample_id for one in again}.isdisjoint(one.sample_id for one in shelf.samples)
    other = held_out(*_opened(folder, validation_seed=1))
    assert [one.sample_id for one in other] == [one.sample_id for one in again] and other[0].seed != again[0].seed


def test_of_several_references_all_are_shown_together_or_the_first(folder: Path, tmp_path: Path) -> None:
    project_folder = tmp_path / "two"
    shutil.copytree(folder, project_folder)
    datasets = read_json(folder / "multidatabackend.json")
    generator = dict(datasets[1]["conditioning"][0], captions=False)
    datasets[1]["conditioning"] = [generator, {"type": "superresolution", "captions": False}]
    datasets[0]["conditioning"] = [generator]
    (project_folder / "multidatabackend.json").write_text(json.dumps(datasets))
    opened = open_project(project_folder)
    scan(opened, workers=1), pairs(opened, workers=1), cache(opened, workers=1)
    single = held_out(*_opened(project_folder))
    together = held_out(*_opened(project_folder, conditioning_multidataset_sampling="combined"))
    assert all(one.references == two.references[:1] and len(two.references) == 2
               for one, two in zip(single, together, strict=True))  # fmt: skip
    project, shelf = _opened(project_folder, conditioning_multidataset_sampling="combined", num_eval_images=1)
    report = _pictures(project, shelf).sample(_denoiser(project), 1)
    assert report.pixels.shape[1] > 4 * 128  # both references, output, target


def test_what_is_not_cached_is_told_before_the_first_step(folder: Path) -> None:
    project, shelf = _opened(folder, validation_prompt="never cached")
    for check in (pictures_of, check_pictures):
        with pytest.raises(UserError, match="first prompt 'never cached'; run: prep cache"):
            check(project, shelf, *([CPU] if check is pictures_of else []))
    project, shelf = _opened(folder, validation_negative_prompt="nor this")
    assert pictures_of(project, shelf, CPU) is not None  # it is not used
    project, shelf = _opened(folder, validation_negative_prompt="nor this", validation_guidance_real=2.0)
    with pytest.raises(UserError, match="nor this"):
        pictures_of(project, shelf, CPU)


def test_a_held_out_set_that_is_not_paired_or_not_cached_is_told(folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    project, shelf = _opened(copied)
    project.pair_table("held-out").unlink()
    with pytest.raises(UserError, match="held-out: not paired yet"):
        held_out(project, shelf)
    (copied / "held_out" / "retina_disc.jpg").write_bytes(
        (copied / "photos" / "astronaut_flag.jpg").read_bytes() + b" "
    )
    fresh = open_project(copied)
    scan(fresh, workers=1), pairs(fresh, workers=1)
    with pytest.raises(UserError, match=r"not cached .* of held-out/retina_disc\.jpg; run: prep cache"):
        held_out(*_opened(copied))


def test_a_held_out_set_whose_pairs_are_all_rejected_is_told(folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    for picture in (copied / "held_out").glob("*.jpg"):
        picture.write_bytes(b"no picture")
    project = open_project(copied)
    scan(project, workers=1), pairs(project, workers=1)
    with pytest.raises(UserError, match="held-out: held out for evaluation, but no pair of it can be shown"):
        held_out(*_opened(copied))


def test_a_checkpoint_without_scheduler_is_told_before_the_first_step(folder: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(folder, copied)
    shutil.rmtree(copied / "work" / "models" / "tiny-flux-kontext" / "scheduler")
    with pytest.raises(UserError, match="scheduler"):
        pictures_of(*_opened(copied), CPU)


def test_names_of_prompts_become_names_of_files(folder: Path, tmp_path: Path) -> None:
    library = tmp_path / "library.json"
    library.write_text(json.dumps({"a/b": "one more", "a:b": "one more", "Grid": "one more", "..": "one more"}))
    project, shelf = _opened(folder, user_prompt_library=str(library), validation_prompt=None, num_eval_images=1)
    assert _pictures(project, shelf).sample(_denoiser(project), 1).names == (
        "grass_blades", "a_b", "a_b-2", "Grid-2", "picture",
    )  # fmt: skip


def test_a_grid_holds_cells_of_any_shape_with_their_texts() -> None:
    red, wide = np.full((600, 300, 3), (255, 0, 0), np.uint8), np.full((40, 4000, 3), 7, np.uint8)
    pixels = drawn([Cell((("reference", red), ("output", red)), ("a\x00 prompt " * 100, "長い文章" * 100)), *[
        Cell((("output", wide),), ("",))] * 3])  # fmt: skip
    assert pixels.shape[1] <= 2080 + 40 and (pixels == (255, 0, 0)).all(2).sum() == 2 * 512 * 256
    assert (pixels[:600] < 100).all(2).any()  # text


def test_the_summary_says_what_the_samples_scored() -> None:
    told = TrainSummary(
        "run", "lora", 1, 0, 0, 0, "cpu", False, (), psnr=21.34, reference_psnr=24.81, ssim=0.7, reference_ssim=0.8
    )
    assert "samples: PSNR 21.3 dB, references 24.8 dB, SSIM 0.700, references 0.800" in list(told.lines())
    alone = TrainSummary("run", "lora", 1, 0, 0, 0, "cpu", False, (), psnr=21.34, ssim=0.7)
    assert "samples: PSNR 21.3 dB, SSIM 0.700" in list(alone.lines())
