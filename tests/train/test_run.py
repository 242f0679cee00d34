"""A run as a whole: what it looks at, what it leaves, and that looking changes nothing."""

import json
import os
import signal
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from commands import forked, run_with
from diffusers import FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from torch._inductor import config as inductor
from torch._inductor.exc import CppCompileError

from families import flux, open_project
from families.checkpoints import encoder_keys, locate
from prep.cache import cache
from prep.pairs import pairs
from prep.scan import scan
from schemas import console
from schemas.errors import UserError
from schemas.project import Project
from schemas.trainer import TrainerConfig
from train import loop, network
from train.adapter import LORA_NAME, add_adapter
from train.compiling import able_to_compile, check_compiler, compile_blocks, compiled_graphs
from train.data import Shelf
from train.ema import averaged, make_average, update
from train.evaluate import evaluate, times_of
from train.held_out import held_out
from train.loop import run
from train.pictures import Pictures
from train.plan import FINISHED
from train.processes import Processes
from train.step import sample_losses

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, copy_demo: Callable[..., Path]) -> Path:
    """The JPEG demo with its held-out pairs, small and cached."""
    small = {"max_train_steps": 6, "checkpointing_steps": 0, "eval_timesteps": 4, "validation_resolution": "64x64",
             "validation_num_inference_steps": 2, "eval_steps_interval": 3, "validation_steps": 3}  # fmt: skip
    project = copy_demo(tmp_path_factory.mktemp("run"), "jpeg", photos=4, **small)
    scan(project), pairs(project), cache(project)
    return project


def _project(folder: Path, name: str, *overrides: str) -> Project:
    return open_project(folder, overrides=[f"tracker_run_name={name}", *overrides])


def _weights(project: Project, name: str = LORA_NAME) -> dict[str, torch.Tensor]:
    return load_file(project.run_folder / name)


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _metrics(project: Project) -> list[dict[str, float]]:
    return [json.loads(line) for line in (project.run_folder / "metrics.jsonl").read_text().splitlines()]


def test_evaluations_and_samples_change_no_bit_of_what_is_trained(folder: Path) -> None:
    watched = _project(folder, "watched", "lora_dropout=0.1", "use_ema=true")
    summary = run(watched)
    blind = _project(folder, "blind", "lora_dropout=0.1", "use_ema=true", "eval_steps_interval=0",
                     "validation_disable=true", "report_to=none")  # fmt: skip
    run(blind)
    assert _equal(_weights(watched), _weights(blind))
    assert _equal(_weights(watched, f"ema/{LORA_NAME}"), _weights(blind, f"ema/{LORA_NAME}"))
    assert not _equal(_weights(watched), _weights(watched, f"ema/{LORA_NAME}"))

    told = _metrics(watched)
    assert [one["step"] for one in told if "eval_loss" in one] == [0, 3, 6]
    assert [one["step"] for one in told if "samples/psnr" in one] == [3, 6]
    assert {path.name for path in (watched.run_folder / "samples").iterdir()} == {"step-3", "step-6"}
    assert not (blind.run_folder / "samples").exists() and not (blind.run_folder / "tensorboard").exists()
    last = [one for one in told if "eval_loss" in one][-1]
    assert summary.seconds_to_first_step is not None and 0 < summary.seconds_to_first_step < summary.seconds
    assert summary.eval_loss == last["eval_loss"] != summary.first_eval_loss
    lines = "\n".join(summary.lines())
    assert f"s/step, the first after {summary.seconds_to_first_step:.0f} s" in lines
    assert f"held-out pairs: loss {summary.first_eval_loss:.4f} to {summary.eval_loss:.4f}" in lines
    assert f"samples: PSNR {summary.psnr:.1f} dB, references {summary.reference_psnr:.1f} dB" in lines


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`")  # of the compiler, when it is imported
def test_without_a_compiler_that_works_nothing_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    torch._dynamo.reset()
    loaded: list[Path] = []

    def load(path: Path, *_: object) -> torch.nn.Module:
        loaded.append(path)
        raise AssertionError

    project = _project(folder, "uncompiled", "dynamo_backend=inductor")
    with (
        inductor.patch({"cpp.cxx": (None, str(tmp_path / "missing"))}),
        pytest.raises(UserError, match=r"^dynamo_backend: inductor cannot compile here \(No working C\+\+ ") as caught,
    ):
        run(project, load=load)
    assert str(caught.value).endswith(
        "; install g++ (apt install g++), or set dynamo_backend: no, which does without"
    ) and "\n" not in str(caught.value)
    assert not loaded and [path.name for path in project.run_folder.rglob("*")] == [".lock"]


@pytest.mark.parametrize("graphs", [0, 3])
def test_a_compiler_that_works_passes_and_its_trial_is_no_graph_of_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graphs: int
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    torch._dynamo.reset()
    counters["stats"]["unique_graphs"] = graphs
    asked: list[object] = []
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda one, backend: asked.append(backend) or compiled(one, backend="eager"))
    check_compiler(TrainerConfig(), tmp_path, CPU)
    assert not asked
    check_compiler(TrainerConfig(dynamo_backend="inductor"), tmp_path, CPU)
    assert asked == ["inductor"] and compiled_graphs() == graphs


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore:.*should not be instantiated")
def test_what_a_compiler_says_of_blocks_is_told_with_the_option(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise ValueError("PTX version 9.1 is not known\nand more")

    torch._dynamo.reset()
    monkeypatch.setattr(loop, "check_compiler", lambda *_: None)
    monkeypatch.setattr(
        network, "compile_blocks", lambda family, denoiser, kept, *_: compile_blocks(family, denoiser, kept, failing)
    )
    project = _project(folder, "compiler fails", "dynamo_backend=inductor", "validation_disable=true")
    with pytest.raises(UserError) as caught:
        run(project)
    assert str(caught.value) == (
        "dynamo_backend: inductor cannot compile the blocks (PTX version 9.1 is not known); dynamo_backend: no does "
        "without, and the run can be resumed with it"
    )


def test_of_a_compiler_that_ran_its_first_error_is_told() -> None:
    output = "In file included from x.cpp:1:\nx.cpp:3: fatal error: omp.h: No such file\ncompilation terminated.\n"
    inner = CppCompileError(["g++", "x.cpp"], output)
    with (
        pytest.raises(UserError, match=r"\(x.cpp:3: fatal error: omp.h: No such file\)"),
        able_to_compile(TrainerConfig(dynamo_backend="inductor")),
    ):
        raise BackendCompilerFailed(None, inner, None)


def test_memory_that_is_full_while_compiling_is_told_as_such() -> None:
    with pytest.raises(torch.OutOfMemoryError), able_to_compile(TrainerConfig(dynamo_backend="inductor")):
        raise BackendCompilerFailed(None, torch.OutOfMemoryError("full"), None)


def test_tensorboard_has_curves_and_pictures_and_a_resumed_run_repeats_none(folder: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    project = _project(folder, "board")
    run(project, limit=4)
    assert run(project).first_step == 4
    events = EventAccumulator(str(project.run_folder / "tensorboard"))
    events.Reload()
    assert [one.step for one in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [one.step for one in events.Scalars("eval_loss")] == [0, 3, 6]
    assert [one.step for one in events.Images("samples")] == [3, 6]


def test_a_stopped_run_neither_evaluates_nor_samples_out_of_turn(folder: Path) -> None:
    project = _project(folder, "limited")
    summary = run(project, limit=2)
    assert summary.psnr is None and [one["step"] for one in _metrics(project) if "eval_loss" in one] == [0]


def test_the_evaluation_is_the_mean_over_a_fixed_grid_of_times(folder: Path) -> None:
    project = _project(folder, "evaluated")
    shelf, config = Shelf(project, encoder_keys(project)), project.trainer
    denoiser = flux.load_denoiser(locate(project, project.family.denoiser), torch.float32)
    add_adapter(denoiser.requires_grad_(False), project)
    held = held_out(project, shelf)
    assert len(held) == 3
    denoiser.train()

    def seen() -> object:
        return evaluate(flux, denoiser, (shelf.load([one], CPU) for one in held), config)

    first = seen()
    torch.manual_seed(99)
    assert seen() == first
    assert denoiser.training
    expected: list[list[float]] = []
    with torch.no_grad():
        for one in held:
            batch = shelf.load([one], CPU)
            grid = times_of(flux.num_tokens(batch.latents.shape[1:]), config)
            assert len(grid) == 4 and all(low < high for low, high in pairwise([0.0, *grid.tolist(), 1.0]))
            losses = [sample_losses(flux, denoiser, batch, t[None], torch.ones(1), config).item() for t in grid]
            expected.append(losses)
    columns = [sum(column) / len(held) for column in zip(*expected, strict=True)]
    assert first.by_time == pytest.approx(tuple(columns))
    assert first.loss == pytest.approx(sum(columns) / 4)


def test_the_average_follows_its_decay_and_gives_the_weights_back(folder: Path) -> None:
    config = _project(folder, "average", "use_ema=true", "ema_decay=0.5", "ema_update_interval=2").trainer
    weight = torch.nn.Parameter(torch.zeros(3))
    average = make_average([weight], config)
    expected, updates = torch.zeros(3), 0
    for step in range(1, 9):
        weight.data += 1
        update(average, [weight], step, config)
        if step % 2 == 0:
            decay = min(0.5, (1 + updates) / (10 + updates)) if updates else 0.0
            updates += 1
            expected = decay * expected + (1 - decay) * weight.data
    with averaged(average, [weight]):
        torch.testing.assert_close(weight.data, expected)
    assert torch.equal(weight.data, torch.full((3,), 8.0))


def test_checkpoints_of_both_kinds_have_limits_of_their_own(folder: Path) -> None:
    project = _project(folder, "limits", "max_train_steps=12", "checkpointing_steps=5", "checkpoints_total_limit=2",
                       "checkpointing_rolling_steps=2", "checkpoints_rolling_total_limit=2", "eval_steps_interval=0",
                       "validation_disable=true")  # fmt: skip
    run(project)
    names = {path.name for path in project.run_folder.glob("checkpoint-*")}
    assert names == {"checkpoint-10", "checkpoint-12", "checkpoint-6-rolling", "checkpoint-8-rolling"}


@pytest.mark.parametrize(
    "options",
    [
        ['tread_config={"routes": [{"selection_ratio": 0.5, "start_layer_idx": 1, "end_layer_idx": -1}]}',
         "scheduled_sampling_max_step_offset=100", "scheduled_sampling_probability=0.8", "loss_type=huber"],
        ["lora_type=lycoris", "base_model_precision=int8-torchao", "flow_use_beta_schedule=true", "flux_guidance_mode=random-range", "use_ema=true"],
        ["optimizer=prodigy", "fuse_qkv_projections=true", "gradient_checkpointing_interval=2",
         "gradient_accumulation_steps=2", "conditioning_dropout_probability=0.5"],
    ],
    ids=["tread and rollout", "lokr", "fused, prodigy"],
)  # fmt: skip
def test_every_kind_of_training_resumes_to_the_same_bits(folder: Path, options: list[str]) -> None:
    quiet = ["eval_steps_interval=0", "validation_disable=true", "report_to=none", *options]
    name = options[0].partition("=")[0]
    whole, parts = _project(folder, f"{name} whole", *quiet), _project(folder, f"{name} parts", *quiet)
    first = run(whole)
    run(parts, limit=2), run(parts)
    assert _equal(_weights(whole), _weights(parts))
    assert first.loss is not None and first.loss > 0


def test_all_weights_are_trained_and_load_as_a_checkpoint_does(folder: Path) -> None:
    quiet = ["eval_steps_interval=0", "validation_disable=true", "report_to=none"]
    full = [*quiet, "model_type=full", "learning_rate=1e-4", "max_grad_norm=0.5"]
    whole, parts = _project(folder, "full whole", *full), _project(folder, "full parts", *full)
    summary = run(whole)
    run(parts, limit=3), run(parts)
    trained, again = (
        FluxTransformer2DModel.from_pretrained(one.run_folder, subfolder="transformer") for one in (whole, parts)
    )
    before = flux.load_denoiser(locate(whole, whole.family.denoiser), torch.float32).state_dict()
    assert _equal(trained.state_dict(), again.state_dict())
    assert summary.trainable_parameters == sum(one.numel() for one in before.values())
    assert not any(
        torch.equal(before[name], tensor) for name, tensor in trained.state_dict().items() if tensor.ndim > 1
    )
    assert run(whole).first_step == 6


def test_run_folder_and_adapter_say_what_made_them(folder: Path) -> None:
    project = _project(folder, "record", "eval_steps_interval=0", "validation_disable=true")
    run(project)
    settings = json.loads((project.run_folder / "settings.json").read_text())
    with safe_open(project.run_folder / LORA_NAME, "pt") as file:
        header = file.metadata()
    assert json.loads(header["pairline"]) == settings
    assert set(settings["datasets"]) == {"photos", "held-out"}
    assert settings["config"]["learning_rate"] == project.trainer.learning_rate
    assert settings["config"]["model_flavour"] == "kontext"
    assert {"torch", "diffusers", "peft", "pairline"} <= settings["versions"].keys()
    assert json.loads(header["lora_adapter_metadata"])["transformer.lora_alpha"] == 8


def test_a_second_run_in_the_same_folder_is_told_who_is_at_work(folder: Path) -> None:
    options = ["max_train_steps=2000", "eval_steps_interval=0", "validation_disable=true"]
    process = forked(run_with, folder, ["tracker_run_name=shared", *options])
    process.start()
    project = _project(folder, "shared", *options)
    limit = time.monotonic() + 60
    while not (project.run_folder / "metrics.jsonl").exists() and time.monotonic() < limit:
        time.sleep(0.01)
    with pytest.raises(UserError, match=rf"train run \(process {process.pid} .*is at work there"):
        run(project)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 0
    assert [path.name for path in project.run_folder.glob("checkpoint-*")]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_samples(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console.log, "propagate", True)
    project = _project(folder, "infinite", "learning_rate=1e30", "max_grad_norm=0", "validation_disable=true",
                       "eval_steps_interval=0")  # fmt: skip
    shelf = Shelf(project, encoder_keys(project))
    with pytest.raises(UserError, match=r"step \d+: the loss is (nan|inf); samples: \w+") as told:
        run(project)
    assert any(one.sample_id in str(told.value) for one in shelf.samples)
    assert not (project.run_folder / LORA_NAME).exists()


def test_a_layer_that_loses_its_gradient_is_noticed_by_each_of_several_processes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summed: list[int] = []
    monkeypatch.setattr(Processes, "sum_gradients", lambda self, parameters: summed.append(len(parameters)))
    project = _project(folder, "lost", "eval_steps_interval=0", "validation_disable=true", "report_to=none")
    load = flux.load_denoiser

    def deaf(*arguments: object) -> torch.nn.Module:
        denoiser = load(*arguments)
        block = denoiser.single_transformer_blocks[-1]
        block.act_mlp.register_forward_hook(lambda _module, _args, output: output.detach())
        return denoiser

    monkeypatch.setattr(flux, "load_denoiser", deaf)
    with pytest.raises(UserError, match=r"trained tensors receive no gradient, first .*proj_mlp"):
        run(project)
    assert not summed


def test_a_finished_run_says_so_only_if_all_it_writes_is_there(folder: Path) -> None:
    quiet = ["eval_steps_interval=0", "validation_disable=true", "report_to=none", "use_ema=true"]
    project = _project(folder, "whole again", *quiet)
    run(project)
    files = [project.run_folder / LORA_NAME, project.run_folder / "ema" / LORA_NAME]
    before = [file.read_bytes() for file in files]
    for file in files:
        file.unlink()
        assert run(project).first_step == 6
        assert [one.read_bytes() for one in files] == before
    full = [*quiet[:3], "model_type=full", "learning_rate=1e-4"]
    short = _project(folder, "longer", *full)
    run(short, limit=4)
    saved = (short.run_folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    finished = (short.run_folder / FINISHED).read_text()
    run(short)
    (short.run_folder / FINISHED).write_text(finished)  # as if killed between the last checkpoint and the end
    (short.run_folder / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(saved)
    run(short)
    assert (short.run_folder / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() != saved


def test_a_damaged_checkpoint_never_costs_the_one_just_written(folder: Path) -> None:
    project = _project(folder, "damaged", "max_train_steps=10", "checkpointing_steps=5", "checkpointing_rolling_steps=2",
                       "checkpoints_total_limit=1", "eval_steps_interval=0", "validation_disable=true")  # fmt: skip
    run(project)
    (project.run_folder / "checkpoint-10" / "optimizer.pt").write_bytes(b"")
    assert run(project, limit=1).first_step == 8
    assert {path.name for path in project.run_folder.glob("checkpoint-*")} == {"checkpoint-9", "checkpoint-8-rolling"}
    assert run(project).first_step == 9


def test_a_checkpoint_is_there_before_anything_is_sampled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project = _project(folder, "saved first", "checkpointing_steps=3")
    monkeypatch.setattr(Pictures, "sample", lambda self, denoiser, step: (_ for _ in ()).throw(OSError(28, "full")))
    with pytest.raises(OSError, match="full"):
        run(project)
    assert [path.name for path in project.run_folder.glob("checkpoint-*")] == ["checkpoint-3"]
    assert (project.run_folder / "settings.json").exists()


def test_memory_that_runs_out_while_sampling_ends_the_samples_not_the_run(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console.log, "propagate", True)
    asked: list[int] = []

    def full(self: Pictures, denoiser: object, step: int) -> None:
        asked.append(step)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(Pictures, "sample", full)
    assert run(_project(folder, "no room for samples")).last_step == 6
    assert asked == [3] and "nothing is sampled any more; a smaller validation_resolution" in caplog.text


def test_an_average_starts_from_the_adapter_that_training_starts_from(folder: Path) -> None:
    first = _project(folder, "to start from", "eval_steps_interval=0", "validation_disable=true")
    run(first)
    start = [f"init_lora={first.run_folder / LORA_NAME}", "ema_update_interval=6", "validation_disable=true"]
    one, other = (run(_project(folder, f"from it {ema}", f"use_ema={ema}", *start)) for ema in ("true", "false"))
    assert one.first_eval_loss == other.first_eval_loss


def test_a_shift_that_is_given_is_taken_and_what_does_nothing_is_told(folder: Path) -> None:
    given = _project(folder, "shift", "flow_schedule_shift=2.5")
    assert not given.trainer.flow_schedule_auto_shift and _project(folder, "none").trainer.flow_schedule_auto_shift
    both = _project(folder, "both", "flow_schedule_shift=2.5", "flow_schedule_auto_shift=true", "huber_c=0.2")
    assert any("flow_schedule_shift has no effect beside flow_schedule_auto_shift" in one for one in both.warnings)
    assert any("huber_c has no effect under loss_type: l2" in one for one in both.warnings)
