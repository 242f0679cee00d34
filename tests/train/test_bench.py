"""`train bench` on small networks: rows of real runs, whatever fails a row too."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from families import FAMILIES, open_project
from families.checkpoints import locate
from families.runtime import family_of
from families.shapes import config_of, random_denoiser, shaped_denoiser
from schemas.errors import UserError
from schemas.timed import BenchSummary
from train.bench import Request, Row, _measured, _sizes, parse_row, synthesised
from train.cli import app
from train.costs import Sizes
from train.data import Shelf
from train.order import Cursor, turns

CPU = torch.device("cpu")
SMALL = ["--tiny", "--pixels", "64", "--steps", "2", "--warmup", "1", "--set", "max_sequence_length=16"]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure rows in this process: a new one takes seconds to import what this one has."""
    monkeypatch.setattr("train.bench._alone", _measured)


@pytest.mark.usefixtures("here")
def test_rows_of_a_model_are_measured_and_one_that_fails_says_why() -> None:
    rows = ["--row", "plain:", "--row", "int8, kept: base_model_precision=int8-quanto,gradient_checkpointing=false",
            "--row", "bad: base_model_precision=int3"]  # fmt: skip
    asked = ["bench", "--family", "flux2", "--flavour", "klein-4b", *SMALL, *rows, "--batch", "2", "--json"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    plain, int8, bad = found["rows"]
    assert (found["family"], found["flavour"], found["batch"], found["tokens"]) == ("flux2", "klein-4b", 2, 16 + 2 * 16)
    assert found["references"] == ["64x64"] and found["device"] and found["versions"]["torch"] == torch.__version__
    for one in (plain, int8):
        assert one["error"] is None and one["seconds_per_step"] > 0 and one["loss"] > 0
        assert one["tokens_per_second"] == pytest.approx(2 * found["tokens"] / one["seconds_per_step"])
        assert one["trainable_parameters"] > 0 and 0 <= one["data_wait"] <= 1 and one["compile_seconds"] >= 0
    assert plain["settings"] == {} and bad["settings"] == {"base_model_precision": "int3"}
    assert int8["settings"] == {"base_model_precision": "int8-quanto", "gradient_checkpointing": False}
    assert found["options"]["gradient_checkpointing"] is True and found["options"]["max_sequence_length"] == 16
    assert bad["seconds_per_step"] is None and "base_model_precision" in bad["error"] and "int3" in bad["error"]
    assert plain["loss"] != int8["loss"]


def test_a_projects_own_options_and_sizes_are_measured(
    make_project: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_project(lora_rank=3, max_sequence_length=16, conditioning_dropout_probability=1.0)
    assert _sizes(Request(folder), open_project(folder)) == Sizes((1024, 1024), ((1024, 1024),))
    assert "not paired yet" in caplog.text
    size = ["--pixels", "128", "--references", "1"]
    done = CliRunner().invoke(app, ["bench", str(folder), "--steps", "1", "--warmup", "1", *size])
    assert done.exit_code == 0 and "not scanned" not in done.stdout, done.output
    head, _, titles, _, row = done.stdout.splitlines()
    assert head.startswith("flux kontext, random weights, 128x128 px, 1 reference, 144 tokens, batch 1; ")
    assert titles.startswith("| setting | s/step | tokens/s | MFU") and row.startswith("| as set  | ")
    assert not (folder / "work" / "runs").exists()


@pytest.mark.usefixtures("here")
def test_options_are_those_before_a_rows_own_which_are_told_as_values() -> None:
    route = '{"routes": [{"selection_ratio": 0.5, "start_layer_idx": 0, "end_layer_idx": -1}]}'
    row = f"own: lora_rank=3, tracker_run_name=7, max_grad_norm=2e-1, tread_config={route}"
    done = CliRunner().invoke(
        app, ["bench", *SMALL, "--references", "0", "--set", "lora_rank=5", "--row", row, "--json"]
    )
    found = json.loads(done.stdout)
    (own,) = found["rows"]
    assert own["error"] is None and found["options"]["lora_rank"] == 5 and found["options"]["tread_config"] is None
    assert own["settings"] == {
        "lora_rank": 3, "tracker_run_name": "7", "max_grad_norm": 0.2, "tread_config": json.loads(route)}  # fmt: skip


@pytest.mark.parametrize(("number", "told"), [(0, "0 references"), (1, "1 reference"), (2, "2 references")])
def test_references_are_counted_in_words(number: int, told: str) -> None:
    numbers = {"width": 64, "height": 64, "tokens": 16, "batch": 1, "steps": 1, "warmup": 1}
    one = BenchSummary("flux", "dev", references=("64x64",) * number, device="cpu", versions={}, options={}, rows=(),
                       **numbers)  # fmt: skip
    assert f"64x64 px, {told}, 16 tokens, batch 1" in next(one.lines())


def test_what_cannot_be_asked_is_refused(make_project: Callable[..., Path]) -> None:
    both = CliRunner().invoke(app, ["bench", str(make_project()), "--family", "flux"])
    odd = CliRunner().invoke(app, ["bench", "--tiny", "--pixels", "50"])
    unknown = CliRunner().invoke(app, ["bench", "--family", "sdxl", "--tiny"])
    assert [one.exit_code for one in (both, odd, unknown)] == [1, 1, 1]
    assert "--family and --flavour" in both.stderr and "multiple of 16" in odd.stderr and "sdxl" in unknown.stderr
    assert unknown.stderr.startswith("error: options: model_family")  # no folder that is gone by now


@pytest.mark.usefixtures("here")
def test_a_command_of_which_every_row_fails_fails() -> None:
    done = CliRunner().invoke(app, ["bench", *SMALL, "--row", "bad: optimizer=none"])
    assert done.exit_code == 1 and "| bad     | failed |" in done.stdout and "bad: " in done.stdout.splitlines()[-1]


def test_settings_of_rows_may_have_commas() -> None:
    text = 'routes: tread_config={"routes": [{"selection_ratio": 0.5, "start_layer_idx": 2}]}, lora_rank=4'
    route = 'tread_config={"routes": [{"selection_ratio": 0.5, "start_layer_idx": 2}]}'
    assert parse_row(text) == Row("routes", (route, "lora_rank=4"))
    assert parse_row("as set:") == Row("as set", ())
    for wrong in ("lora_rank=4", ": lora_rank=4", "row: lora_rank"):
        with pytest.raises(UserError, match=r"--row .*: must be 'name: key=value"):
            parse_row(wrong)


@pytest.mark.parametrize(("family", "flavour", "billions"), [
    ("flux", "dev", 11.90), ("flux", "schnell", 11.89), ("flux", "kontext", 11.90), ("flux2", "dev", 32.22),
    ("flux2", "klein-9b", 9.08), ("flux2", "klein-4b", 3.88)])  # fmt: skip
def test_full_size_networks_are_those_that_are_published(
    make_project: Callable[..., Path], family: str, flavour: str, billions: float
) -> None:
    options = {"model_family": family, "model_flavour": flavour, "pretrained_model_name_or_path": "nobody/has-this"}
    project = open_project(make_project(**options))
    config = config_of(project)
    network = shaped_denoiser(family_of(project), config, torch.bfloat16)
    assert sum(one.numel() for one in network.parameters()) / 1e9 == pytest.approx(billions, abs=0.006)
    spec = FAMILIES[family]
    assert network.config[spec.text_input] == project.model.text_width.usual
    assert family_of(project).takes_guidance(network) == project.model.told_guidance


def test_a_checkpoints_own_configuration_is_taken_without_its_weights(make_project: Callable[..., Path]) -> None:
    project = open_project(make_project())
    config = locate(project, project.family.denoiser) / "transformer" / "config.json"
    assert config_of(project)["num_layers"] == json.loads(config.read_text())["num_layers"]
    (config.parent / "diffusion_pytorch_model.safetensors").unlink()
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_layers": 3}))
    assert config_of(project)["num_layers"] == 3


def test_random_weights_differ_and_scales_of_norms_are_one(make_project: Callable[..., Path]) -> None:
    project = open_project(make_project())
    network = random_denoiser(family_of(project), config_of(project), torch.float32, CPU)
    named = dict(network.named_parameters())
    first, second = (named[f"transformer_blocks.0.attn.to_{name}.weight"] for name in "qk")
    assert 0.018 < float(first.std()) < 0.022 and not any(one.requires_grad for one in named.values())
    assert (
        bool((named["transformer_blocks.0.attn.norm_q.weight"] == 1).all()) and float(named["proj_out.bias"].sum()) == 0
    )
    assert first.shape == second.shape


def test_a_synthetic_project_is_read_as_any_other(make_project: Callable[..., Path], tmp_path: Path) -> None:
    like = open_project(make_project(train_batch_size=2, max_sequence_length=16, validation_prompt="never cached"))
    sizes = Sizes((96, 64), ((96, 64), (32, 128)))
    (tmp_path / "made").mkdir()
    made = synthesised(like, tmp_path / "made", sizes, Request())
    from families.checkpoints import encoder_keys

    shelf = Shelf(made, encoder_keys(made))
    turn = next(turns(made, shelf, Cursor()))
    batch = shelf.load(turn.batches[0], CPU)
    assert batch.latents.shape == (2, 16, 8, 12) and [one.shape for one in batch.references] == [
        (2, 16, 8, 12), (2, 16, 16, 4)]  # fmt: skip
    assert batch.text.embed.shape == (2, 16, 64) and batch.text.pooled is not None
    assert made.trainer.lora_rank == like.trainer.lora_rank and made.trainer.max_train_steps == 8
    assert float(batch.latents.std()) == pytest.approx(0.5, rel=0.1)


def test_its_help_names_every_argument() -> None:
    shown = CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "200"}).stdout
    for name in ("PROJECT", "--family", "--flavour", "--pixels", "--references", "--batch", "--steps", "--warmup",
                 "--tiny", "--row", "--set", "--json"):  # fmt: skip
        assert name in shown
