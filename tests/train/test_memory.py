"""Recomputed blocks, blocks that wait, and what a run that ran out of memory is told."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode

from families import flux, open_project
from families.offloading import _groups
from families.protocol import TextEmbeds
from schemas.errors import ConfigError, UserError
from schemas.trainer import TrainerConfig, Tread
from train.loop import run
from train.memory import advice, check_memory, checkpoint_blocks, enough_memory
from train.plan import supply_of
from train.processes import Processes
from train.sample import Request, sample

CPU = torch.device("cpu")


def _adapted() -> FluxTransformer2DModel:
    torch.manual_seed(5)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
    )
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, lora_dropout=0.5, target_modules=["to_q", "proj_mlp"], init_lora_weights=False))
    return model.train()


def _gradients(**options: Any) -> tuple[dict[str, torch.Tensor], list[int], list[int]]:
    """Return gradients, and how often each block and its insides ran in forward and backward."""
    model, hooks, calls = _adapted(), Counter(), Counter()
    for number, block in enumerate(flux.blocks(model)):
        block.module.register_forward_pre_hook(lambda *_, number=number: hooks.update([number]))
        block.module.attn.register_forward_pre_hook(lambda *_, number=number: calls.update([number]))
    if options:
        checkpoint_blocks(flux, model, TrainerConfig(lora_dropout=0.5, **options))
    torch.manual_seed(1)
    text = TextEmbeds(torch.randn(1, 4, 24), torch.randn(1, 8), (4,))
    flux.velocity(model, torch.randn(1, 16, 8, 8), [], text, torch.ones(1), None).square().mean().backward()
    trained = {name: one.grad for name, one in model.named_parameters() if one.requires_grad}
    return trained, [hooks[number] for number in range(5)], [calls[number] for number in range(5)]


@pytest.mark.parametrize("keep", ["nothing", "attention"])
@pytest.mark.parametrize(("interval", "runs"), [(1, [2, 2, 2, 2, 2]), (2, [2, 1, 2, 1, 2]), (4, [2, 1, 1, 1, 2])])
def test_every_nth_block_is_recomputed_and_gradients_stay_the_same(interval: int, runs: list[int], keep: str) -> None:
    expected, *plain = _gradients()
    found, hooks, calls = _gradients(gradient_checkpointing_interval=interval, gradient_checkpointing_keep=keep)
    assert plain == [[1] * 5] * 2
    assert hooks == [1] * 5 and calls == runs
    assert expected and all(torch.equal(found[name], one) for name, one in expected.items())


def test_hooks_that_bring_weights_run_again_where_blocks_wait() -> None:
    expected, *_ = _gradients()
    found, *runs = _gradients(enable_group_offload=True)
    assert runs == [[2] * 5] * 2
    assert expected and all(torch.equal(found[name], one) for name, one in expected.items())


class _Attentions(TorchDispatchMode):
    """Counts the attentions that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.count += "scaled_dot_product" in name and "backward" not in name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("options", "computed"),
    [({}, 5), ({"gradient_checkpointing_keep": "nothing"}, 10), ({"gradient_checkpointing_keep": "attention"}, 5)],
)  # fmt: skip
def test_attention_that_is_kept_is_not_computed_again(options: dict[str, Any], computed: int) -> None:
    with _Attentions() as attentions:
        _gradients(**options)
    assert attentions.count == computed


@pytest.mark.parametrize(("size", "sizes"), [(1, [1] * 5), (2, [2, 2, 1]), (9, [5])])
def test_frozen_weights_of_blocks_take_turns_and_adapters_never(size: int, sizes: list[int]) -> None:
    blocks = [block.module for block in flux.blocks(_adapted())]
    groups = _groups(blocks, size)
    assert [len(callers) for callers, _ in groups] == sizes
    for callers, weights in groups:
        frozen = {id(one) for block in callers for one in block.parameters() if not one.requires_grad}
        assert len(weights) == len(frozen) and {id(one) for one in weights} == frozen


@pytest.mark.parametrize("dry_run", [True, False])
def test_blocks_wait_on_the_cpu_only_beside_a_cuda_device(
    make_project: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, dry_run: bool
) -> None:
    project = open_project(make_project(enable_group_offload=True))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    told = "enable_group_offload: needs a CUDA device, and this run is on cpu"
    with pytest.raises(UserError, match=told):  # before it is known whether anything is cached
        run(project, dry_run=dry_run)
    with pytest.raises(UserError, match=told):  # before it is known whether anything is trained
        sample(project, Request("sharpen"))
    assert not project.run_folder.exists()


def test_a_budget_that_cuda_itself_takes_is_refused_where_it_has_an_effect() -> None:
    cuda = torch.device("cuda")
    with pytest.raises(UserError, match=r"memory_budget_gib 0\.5: CUDA itself takes about"):
        check_memory(TrainerConfig(memory_budget_gib=0.5), cuda)
    check_memory(TrainerConfig(memory_budget_gib=0.7, enable_group_offload=True), cuda)
    check_memory(TrainerConfig(memory_budget_gib=0.5), CPU)


def test_a_budget_is_checked_before_anything_is_there(make_project: Callable[..., Path]) -> None:
    project = open_project(make_project(memory_budget_gib=0.5))
    with pytest.raises(UserError, match="CUDA itself takes about"):
        supply_of(project, Processes(0, 1, torch.device("cuda")), dry_run=True)


def test_what_does_not_go_with_waiting_blocks_is_a_fault(make_project: Callable[..., Path]) -> None:
    def faults(number: int, **options: Any) -> list[tuple[str, str | None]]:
        with pytest.raises(ConfigError) as caught:
            open_project(make_project(name="deblur" if number else "edits", enable_group_offload=True, **options))
        assert all(one.problem == "contradicts enable_group_offload" for one in caught.value.faults)
        return [(one.key, one.value) for one in caught.value.faults]

    assert faults(0, gradient_checkpointing=False) == [("gradient_checkpointing", "false")]
    assert faults(1, base_model_precision="int4-quanto", gradient_checkpointing_interval=2) == [
        ("gradient_checkpointing_interval", "2"),
        ("base_model_precision", '"int4-quanto"'),
    ]


def test_advice_names_what_is_not_done_yet_the_cheapest_first() -> None:
    def named(**options: Any) -> list[str]:
        told = advice(TrainerConfig(**options)).partition("first: ")[2].split("; ")
        return [one.partition(":")[0].partition(" ")[0] for one in told]

    assert named(gradient_checkpointing=False, train_batch_size=4) == [
        "gradient_checkpointing", "base_model_precision", "train_batch_size", "optimizer", "enable_group_offload",
        "lora_rank", "tread_config", "resolution",
    ]  # fmt: skip
    assert named(gradient_checkpointing_interval=3, gradient_checkpointing_keep="attention")[:3] == [
        "gradient_checkpointing_backend", "gradient_checkpointing_keep", "gradient_checkpointing_interval",
    ]  # fmt: skip
    route = {"selection_ratio": 0.5, "start_layer_idx": 2, "end_layer_idx": -3}
    saved = {"base_model_precision": "int8-quanto", "optimizer": "adamw8bit", "tread_config": Tread(routes=[route])}
    saved["lora_rank"] = 1
    assert named(**saved) == ["gradient_checkpointing_backend", "enable_group_offload", "resolution"]
    assert "enable_group_offload: true (" in advice(TrainerConfig(**saved))
    odd = TrainerConfig(base_model_precision="int4-quanto", gradient_checkpointing_backend="unsloth")
    undone = (
        "enable_group_offload: true with base_model_precision: int8-quanto and gradient_checkpointing_backend: torch"
    )
    assert undone in advice(odd)
    assert named(enable_group_offload=True) == ["optimizer", "lora_rank", "tread_config", "resolution"]
    assert "lora_rank" not in named(lora_type="lycoris", lora_rank=64)
    assert advice(TrainerConfig(**saved), without=["enable_group_offload", "resolution"]).endswith(
        "first: gradient_checkpointing_backend: unsloth (hardly slower, and the run can be resumed with it)"
    )
    assert "train_batch_size: 1 with gradient_accumulation_steps: 12" in advice(
        TrainerConfig(train_batch_size=4, gradient_accumulation_steps=3)
    )


def test_running_out_of_memory_is_told_with_what_to_change() -> None:
    config = TrainerConfig(gradient_checkpointing=False)
    told = r"the accelerator's memory is full; .*gradient_checkpointing: true"
    with pytest.raises(UserError, match=told) as caught, enough_memory(config, CPU):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    with pytest.raises(RuntimeError, match="another"), enough_memory(config, CPU):
        raise RuntimeError("another")
