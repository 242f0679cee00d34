"""Compiled blocks give the same numbers, and are compiled no more once sizes vary."""

import logging
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch._dynamo.utils import counters
from torch._functorch import config as functorch
from torch._inductor import config as inductor
from torch._inductor.runtime.cache_dir_utils import cache_dir, triton_cache_dir
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from families import FAMILIES, attention, flux
from families.compiled import keep_compiled
from families.protocol import TextEmbeds
from families.quantize import quantize_and_place
from families.routing import Routing
from schemas import console
from schemas.errors import UserError
from schemas.trainer import Route, TrainerConfig
from train import compiling
from train.compiling import compile_blocks, compiled_graphs
from train.data import Batch
from train.lora import make_lean
from train.memory import checkpoint_blocks
from train.step import step_loss

SIZES = ((8, 8), (8, 12), (12, 8), (8, 16))


@pytest.fixture
def made(tiny_models: Path) -> Callable[..., nn.Module]:
    """Load the tiny network in a precision, with an adapter of layers that match."""

    def made(layers: str | list[str], precision: str = "no_change", *, blocks: int | None = None) -> nn.Module:
        model = flux.load_denoiser(tiny_models / "tiny-flux-kontext", torch.bfloat16).requires_grad_(False)
        if blocks is not None:  # single ones
            del model.transformer_blocks[:], model.single_transformer_blocks[blocks:]
        quantize_and_place(model, precision, FAMILIES["flux"].unquantised, torch.device("cpu"), "cpu")
        model.add_adapter(LoraConfig(r=4, target_modules=layers, init_lora_weights=False))
        generator = torch.Generator().manual_seed(4)
        for one in model.parameters():
            if one.requires_grad:
                one.data = 0.1 * torch.randn(one.shape, generator=generator)
        return model.train()

    return made


@pytest.fixture
def denoiser(made: Callable[..., nn.Module]) -> nn.Module:
    model = made(["to_q", "to_v", "proj_mlp"])
    checkpoint_blocks(flux, model, TrainerConfig())
    return model


def _batch(height: int, width: int) -> Batch:
    generator = torch.Generator().manual_seed(height * width)
    latents, noise = (torch.randn(1, 16, height, width, generator=generator) for _ in range(2))
    text = TextEmbeds(torch.randn(1, 16, 64, generator=generator), torch.randn(1, 32, generator=generator), (5,))
    return Batch(("a",), (height,), latents, noise, (latents[..., :8],), text)


def _passes(denoiser: nn.Module, routing: Routing) -> tuple[list[float], list[torch.Tensor], list[int]]:
    """Take a pass at every size; returns losses, gradients and how many graphs there are after each."""
    losses, graphs = [], []
    for size in SIZES:
        loss = step_loss(flux, denoiser, _batch(*size), 1, TrainerConfig(), routing)
        loss.backward()
        losses.append(loss.item())
        graphs.append(compiled_graphs())
    return losses, [one.grad for one in denoiser.parameters() if one.grad is not None], graphs


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of the compiler, which looks at every tensor
def test_compiled_blocks_give_the_same_numbers_and_are_compiled_twice_at_most(
    denoiser: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    routing = Routing(flux.blocks(denoiser), [Route(selection_ratio=0.5, start_layer_idx=1, end_layer_idx=1)])
    expected, gradients, _ = _passes(denoiser, routing)
    denoiser.zero_grad()
    before = compiled_graphs()
    compile_blocks(flux, denoiser, tmp_path, "eager")  # traced as for a compiler, and run as it was traced
    losses, found, graphs = _passes(denoiser, routing)
    assert losses == expected
    assert len(found) == len(gradients) > 4
    assert all(torch.equal(one, other) for one, other in zip(found, gradients, strict=True))
    assert before < graphs[0] < graphs[1] == graphs[2] == graphs[3]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore:.*should not be instantiated")
@pytest.mark.parametrize(
    ("precision", "keep", "backend"),
    [
        ("int8-quanto", "nothing", "eager"),
        ("fp8-torchao", "attention", "eager"),
    ],
)
def test_every_way_that_compiles_is_whole_graphs_that_are_right(
    made: Callable[..., nn.Module],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    keep: str,
    backend: str,
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()
    layers, route = FAMILIES["flux"].lora_targets["all+ffs"], Routing([], [])
    expected, gradients, _ = _passes(made(layers, precision, blocks=1), route)
    denoiser = made(layers, precision, blocks=1)
    make_lean(denoiser, join=True)
    checkpoint_blocks(flux, denoiser, TrainerConfig(gradient_checkpointing_keep=keep))
    compile_blocks(flux, denoiser, tmp_path, backend)
    counters["graph_break"].clear()
    before = compiled_graphs()
    losses, found, graphs = _passes(denoiser, route)
    assert not counters["graph_break"]
    assert [one - before for one in graphs] == [1, 2, 2, 2]
    assert losses == pytest.approx(expected, rel=1e-2)
    whole, exact = (torch.cat([one.flatten() for one in each]) for each in (found, gradients))
    assert (whole - exact).norm() < (0.05 if precision == "fp8-torchao" else 0.02) * exact.norm()


class _Kind(nn.Module):
    """A block that computes in its own way."""

    def __init__(self, way: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layer, self.way = nn.Linear(8, 8), way

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.way(self.layer(values)) + values


def _ways(tmp_path: Path) -> Iterator[int]:
    """Compile three kinds of blocks; yield the number of graphs after every way to call them."""
    torch._dynamo.reset()
    blocks = [_Kind(way) for way in (torch.tanh, torch.relu, torch.sigmoid) for _ in range(2)]
    family = SimpleNamespace(blocks=lambda _: [SimpleNamespace(module=one) for one in blocks])
    before = compiled_graphs()
    compile_blocks(family, nn.Identity(), tmp_path, "eager")
    wholes = [torch.randn(batch, tokens, 16) for batch in (1, 2, 3) for tokens in (16, 24, 32)]
    for whole, narrow, grads in product(wholes, (True, False), (None, False, True)):
        values = whole[..., :8] if narrow else whole[..., :8].contiguous()
        with torch.set_grad_enabled(grads is not None):
            for block in blocks:
                block(values.detach().requires_grad_(bool(grads)))
        yield compiled_graphs() - before


def test_no_way_to_call_three_kinds_of_blocks_is_too_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(console.log, "propagate", True)
    graphs = list(_ways(tmp_path))
    assert 32 < graphs[-1] == graphs[-19] <= compiling._MOST_GRAPHS  # batches of three are as those of two
    assert not [one for one in caplog.records if one.levelno >= logging.WARNING]


def test_what_is_compiled_no_more_is_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(console.log, "propagate", True)
    monkeypatch.setattr(compiling, "_MOST_GRAPHS", 4)
    assert list(_ways(tmp_path))[-1] == 4
    said = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
    assert len(said) == 1 and said[0].startswith("blocks differ in more ways than the 4 that are compiled: ")


def test_what_compilers_make_lies_in_the_workspace_unless_the_environment_names_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    assert not Path(cache_dir()).is_relative_to(tmp_path)  # it is in the environment from now on
    keep_compiled(tmp_path / "compiled")
    assert Path(cache_dir()) == tmp_path / "compiled"
    assert Path(triton_cache_dir(0)).is_relative_to(tmp_path / "compiled")
    keep_compiled(tmp_path / "other")
    assert Path(cache_dir()) == tmp_path / "compiled"
    assert functorch.enable_autograd_cache and inductor.fx_graph_cache
    assert functorch.autograd_cache_allow_custom_autograd_functions


def test_a_folder_that_cannot_be_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"/file: File exists; what compilers make is kept there: name another folder"):
        keep_compiled(tmp_path / "compiled")


class _Attends(nn.Module):
    """Attention by a kernel that is named, its gradient made dense, as on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(16, 16)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        query = self.project(values)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return attention._DenseGradient.apply(scaled_dot_product_attention(query, query, values))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler, which uses what is deprecated
@pytest.mark.parametrize("keep", ["nothing", "attention"])
def test_a_second_start_finds_whole_graphs_of_blocks_that_name_their_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: str
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    keep_compiled(tmp_path)
    torch.manual_seed(0)
    block, values = _Attends(), torch.randn(1, 2, 8, 16)
    expected = torch.autograd.grad(block(values).square().sum(), block.parameters())
    family = SimpleNamespace(blocks=lambda model: [SimpleNamespace(module=block)])
    checkpoint_blocks(family, block, TrainerConfig(gradient_checkpointing_keep=keep, dynamo_backend="inductor"))
    recomputed, found = block.forward, []
    for _ in range(2):
        torch._dynamo.reset()
        counters.clear()
        block.forward = recomputed
        compile_blocks(family, block, tmp_path)
        gradients = torch.autograd.grad(block(values).square().sum(), block.parameters())
        assert all(map(torch.allclose, gradients, expected))
        found.append(dict(counters["aot_autograd"]))
    first, second = found
    assert first["autograd_cache_saved"] == second["autograd_cache_hit"] == 1
    assert "autograd_cache_bypass" not in first and "autograd_cache_bypass" not in second


def _kept(denoiser: nn.Module) -> int:
    """Return the bytes that a pass keeps until the backward pass, weights aside."""
    own = {one.untyped_storage().data_ptr() for one in [*denoiser.parameters(), *denoiser.buffers()]}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step_loss(flux, denoiser, _batch(16, 16), 1, TrainerConfig(), Routing([], []))
    return sum(kept.values())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore::DeprecationWarning")
@pytest.mark.parametrize("precision", ["no_change", "fp8-torchao"])
def test_what_is_recomputed_is_not_kept_where_blocks_are_compiled(
    made: Callable[..., nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    layers, found = FAMILIES["flux"].lora_targets["all+ffs"], []
    for keep in (None, "attention", "nothing"):
        torch._dynamo.reset()
        denoiser = made(layers, precision, blocks=2)
        make_lean(denoiser, join=True)
        if keep is not None:
            told = TrainerConfig(gradient_checkpointing_keep=keep, dynamo_backend="inductor")
            checkpoint_blocks(flux, denoiser, told)
        compile_blocks(flux, denoiser, tmp_path, "aot_eager_decomp_partition")
        found.append(_kept(denoiser))
    whole, attention_kept, nothing_kept = found
    assert nothing_kept < attention_kept < 0.4 * whole
