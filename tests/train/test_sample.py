"""`train sample`: the picture of diffusers' pipeline with the trained LoRA, and what is said when there is none."""

import json
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner, Result

from families import flux, open_project
from families.checkpoints import locate
from schemas.project import Project
from train import checkpoint
from train.adapter import LORA_NAME, adapter_layers, adapter_metadata, add_adapter, load_adapter
from train.cli import app
from train.order import Cursor

CPU = torch.device("cpu")
FEW = ["--steps", "2", "--set", "validation_resolution=128x96"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, copy_demo: Callable[..., Path]) -> Path:
    """A project whose run folder holds a LoRA that does something."""
    made = copy_demo(tmp_path_factory.mktemp("sample"), "edits", 2)
    project = open_project(made)
    _write_lora(project, project.run_folder)
    return made


def _write_lora(project: Project, folder: Path) -> None:
    denoiser = flux.load_denoiser(locate(project, project.family.denoiser), torch.float32).requires_grad_(False)
    add_adapter(denoiser, project)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in denoiser.named_parameters():
            if "lora_B" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    folder.mkdir(parents=True, exist_ok=True)
    flux.save_lora(folder / LORA_NAME, adapter_layers(denoiser), adapter_metadata(denoiser))


def _run(folder: Path, *arguments: object, code: int = 0) -> Result:
    done = CliRunner().invoke(app, ["sample", str(folder), *map(str, arguments), "--workers", "1"])
    assert done.exit_code == code, done.output
    return done


def _summary(folder: Path, *arguments: object) -> dict:
    return json.loads(_run(folder, *arguments, "--json").stdout)


def _read(path: str | Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.array(picture)


@pytest.mark.parametrize("guidance_real", [1.0, 2.0])
def test_a_picture_equals_that_of_the_pipeline_with_the_lora_loaded(folder: Path, guidance_real: float) -> None:
    image = folder / "reference" / "astronaut.jpg"
    summary = _summary(
        folder, "--prompt", "add colour", "--image", image, "--seed", 5, "--guidance", 2, *FEW,
        "--guidance-real", guidance_real, "--negative", "gray", "--scale", 0.5,
    )  # fmt: skip
    assert (summary["width"], summary["height"], summary["seed"]) == (112, 112, 5)  # the area of 128 × 96, square

    project = open_project(folder)
    pipeline = FluxKontextPipeline.from_pretrained(locate(project, project.family.denoiser))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.text_encoder.to(torch.bfloat16)
    pipeline.text_encoder_2.to(torch.bfloat16)
    pipeline.load_lora_weights(project.run_folder)
    pipeline.set_adapters("default_0", 0.5)
    with torch.no_grad():
        (embed, pooled, _), (against, against_pooled, _) = (
            pipeline.encode_prompt(prompt=prompt, prompt_2=None) for prompt in ("add colour", "gray")
        )
    with Image.open(image) as picture:
        reference = picture.convert("RGB").resize((112, 112), Image.Resampling.LANCZOS)
    expected = pipeline(
        image=reference, prompt_embeds=embed.float(), pooled_prompt_embeds=pooled.float(),
        negative_prompt_embeds=against.float(), negative_pooled_prompt_embeds=against_pooled.float(),
        true_cfg_scale=guidance_real, width=112, height=112, max_area=112 * 112, _auto_resize=False,
        num_inference_steps=2, guidance_scale=2.0, generator=torch.Generator().manual_seed(5),
    ).images[0]  # fmt: skip
    assert np.array_equal(_read(summary["path"]), np.asarray(expected))


def test_the_lora_of_the_run_is_the_default_and_nothing_is_overwritten(folder: Path) -> None:
    first, second = (_run(folder, "--prompt", "A cat, on/the mat!", *FEW) for _ in range(2))
    samples = folder / "work" / "runs" / "default" / "samples"
    assert "128x96, 2 steps, seed 42, guidance 3.5" in first.stdout and "layers, scale 1" in first.stdout
    assert f"wrote {samples / 'A-cat-on-the-mat-42.png'}" in first.stdout
    assert f"wrote {samples / 'A-cat-on-the-mat-42-2.png'}" in second.stdout
    assert np.array_equal(_read(samples / "A-cat-on-the-mat-42.png"), _read(samples / "A-cat-on-the-mat-42-2.png"))


def test_the_picture_without_the_lora_stands_beside_it(folder: Path, tmp_path: Path) -> None:
    image, output = folder / "reference" / "astronaut.jpg", tmp_path / "a" / "out.png"
    asked = ("--prompt", "add colour", "--image", image, "--output", output, *FEW)
    compared = _summary(folder, *asked, "--without")
    assert compared["path"] == str(output) and compared["compared"] == str(tmp_path / "a" / "out-compared.png")
    bare = _summary(folder, *asked, "--scale", 0)
    assert bare["path"] == str(tmp_path / "a" / "out-2.png")
    sheet, with_lora, without = (_read(path) for path in (compared["compared"], compared["path"], bare["path"]))
    assert not np.array_equal(with_lora, without)
    band = sheet[37 : 37 + 112]  # below margin and labels
    places = [
        [left for left in range(band.shape[1] - 111) if np.array_equal(band[:, left : left + 112], one)]
        for one in (without, with_lora)
    ]
    [[left], [right]] = places
    assert left + 112 < right


def test_images_are_upright_rgb_on_white_and_keep_their_shape(folder: Path, tmp_path: Path) -> None:
    from train.sample import _fitted, _opened

    plain = Image.new("RGBA", (60, 40), (255, 0, 0, 0))
    plain.paste((0, 0, 255, 255), (0, 0, 60, 10))
    plain.save(tmp_path / "clear.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    plain.convert("RGB").save(tmp_path / "turned.jpg", exif=exif, quality=95, subsampling=0)
    clear, turned = _opened(tmp_path / "clear.png"), _opened(tmp_path / "turned.jpg")
    assert clear.size == (60, 40) and clear.getpixel((30, 30)) == (255, 255, 255)
    assert clear.getpixel((30, 5)) == (0, 0, 255)
    assert turned.size == (40, 60) and turned.getpixel((37, 30))[2] > 200 > 50 > turned.getpixel((37, 30))[0]
    wide = Image.new("RGB", (64, 32), "white")
    wide.paste("black", (0, 0, 16, 32))
    assert (_fitted(wide, (32, 32)) > 250).all()  # the middle: nothing is squeezed

    tall = _summary(folder, "--prompt", "x", "--image", tmp_path / "turned.jpg", *FEW)
    assert (tall["width"], tall["height"]) == (96, 128)


@pytest.mark.parametrize(
    ("asked", "size"),
    [
        ((), (128, 96)),
        (("--width", 64), (64, 48)),
        (("--height", 192), (256, 192)),
        (("--width", 32, "--height", 80), (32, 80)),
    ],
)
def test_a_side_that_is_not_asked_for_follows_from_the_other(folder: Path, asked: tuple, size: tuple) -> None:
    summary = _summary(folder, "--prompt", "x", *FEW, *asked)
    assert (summary["width"], summary["height"]) == size == _read(summary["path"]).shape[1::-1]


def test_several_images_are_all_referred_to(folder: Path, tmp_path: Path) -> None:
    one, other = (folder / "reference" / f"{name}.jpg" for name in ("astronaut", "astronaut_smile"))
    pictures = [_read(_summary(folder, "--prompt", "x", *FEW, "--width", 96, "--height", 96, *images)["path"])
                for images in ((), ("--image", one), ("--image", one, "--image", other))]  # fmt: skip
    assert not any(np.array_equal(*two) for two in pairwise(pictures))


def test_a_quantised_base_samples_too(folder: Path) -> None:
    summary = _summary(
        folder, "--prompt", "x", *FEW, "--set", "base_model_precision=int8-quanto", "--set", "mixed_precision=bf16"
    )
    exact = _summary(folder, "--prompt", "x", *FEW)
    assert summary["layers"] == exact["layers"] == 14
    difference = np.abs(_read(summary["path"]).astype(int) - _read(exact["path"]))
    assert 0 < difference.mean() < 12


def test_what_is_asked_for_in_vain_is_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "none").mkdir()
    cases = {
        ("--image", tmp_path / "gone.jpg"): "gone.jpg: no such file; --image takes the path of a picture",
        ("--image", tmp_path / "text.jpg"): "text.jpg: cannot be read as a picture",
        ("--image", tmp_path): "cannot be read as a picture",
        ("--lora", tmp_path / "none"): "none: no LoRA there; name a .safetensors file, its folder, or a checkpoint's",
        ("--lora", tmp_path / "gone.safetensors"): "no LoRA there",
        ("--lora", tmp_path / "text.jpg"): "text.jpg: cannot be read",
        ("--width", "100"): "--width 100: must be a multiple of 16 pixels; 96 is the nearest",
        ("--width", "16000"): "would be 16000x12000: its sides are 8192 pixels at most",
        ("--scale", "nan"): "is not finite; try another checkpoint, or a lower --scale",
        ("--output", tmp_path / "out.jpg"): "pictures are written as PNG; end its name in .png",
        ("--set", "tracker_run_name=other"): "nothing is trained yet; run: train run",
    }
    for asked, told in cases.items():
        assert told in _run(folder, "--prompt", "x", *FEW, *asked, code=1).stderr


def test_of_several_files_one_must_be_named(folder: Path, tmp_path: Path) -> None:
    lora = folder / "work" / "runs" / "default" / "pytorch_lora_weights.safetensors"
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(lora.read_bytes())
    told = _run(folder, "--prompt", "x", *FEW, "--lora", tmp_path, code=1).stderr
    assert "several LoRA files (a.safetensors, b.safetensors); name one with --lora" in told
    (tmp_path / "b.safetensors").unlink()
    assert _summary(folder, "--prompt", "x", *FEW, "--lora", tmp_path)["lora"] == str(tmp_path / "a.safetensors")


def test_checkpoints_and_whole_weights_are_sampled_as_they_were_trained(folder: Path, tmp_path: Path) -> None:
    project, state = open_project(folder), Cursor()
    denoiser = flux.load_denoiser(locate(project, project.family.denoiser), torch.float32).requires_grad_(False)
    parameters = add_adapter(denoiser, project)
    stored = load_file(project.run_folder / LORA_NAME)
    load_adapter(denoiser, {name.removeprefix("transformer."): one for name, one in stored.items()})
    optimizer = torch.optim.AdamW(parameters)
    mark = checkpoint.Mark(3, state, {"lora_alpha": None, "lora_rank": 8})
    one = checkpoint.save(tmp_path, checkpoint.State(denoiser, parameters, optimizer, None, None), mark, keep=0)
    expected, found, other, half = (
        _summary(folder, "--prompt", "x", *FEW, *asked)
        for asked in (
            (),
            ("--lora", one),
            ("--lora", one, "--set", "lora_alpha=1"),  # the checkpoint says what its alpha was
            ("--lora", one, "--scale", 0.5),
        )
    )
    assert found["layers"] == other["layers"] == 14 and found["lora"] == str(one)
    assert np.array_equal(_read(expected["path"]), _read(found["path"]))
    assert np.array_equal(_read(expected["path"]), _read(other["path"]))
    assert not np.array_equal(_read(expected["path"]), _read(half["path"]))

    whole = flux.load_denoiser(locate(project, project.family.denoiser), torch.float32)
    with torch.no_grad():
        for name, weight in whole.named_parameters():
            if name.endswith("proj_out.weight"):
                weight.mul_(1.5)
    whole.save_pretrained(tmp_path / "full" / "transformer")
    full = ("--set", "model_type=full", "--set", f"output_dir={tmp_path / 'full'}", "--without")
    trained = _summary(folder, "--prompt", "x", *FEW, *full)
    assert trained["lora"] == str(tmp_path / "full" / "transformer") and trained["layers"] == 0
    base = _read(_summary(folder, "--prompt", "x", *FEW, "--scale", 0)["path"])
    assert not np.array_equal(_read(trained["path"]), base)
    assert np.array_equal(_read(trained["compared"])[37:133, 20:148], base)
    assert "--scale: whole weights" in _run(folder, "--prompt", "x", *full, "--scale", 2, code=1).stderr

    (one / "lora.safetensors").write_bytes(b"damaged")
    assert "choose another checkpoint" in _run(folder, "--prompt", "x", *FEW, "--lora", one, code=1).stderr


def test_help_has_an_example_and_the_readme_the_command() -> None:
    shown = CliRunner().invoke(app, ["sample", "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0 and "Example:  train sample my-project --image" in shown.stdout
    for option in ("--json", "--workers", "--workspace", "--root", "--set", "--without", "--image"):
        assert re.search(rf"{option}\b", shown.stdout)
    assert "train sample" in (Path(__file__).parents[2] / "README.md").read_text()
