"""What recomputation starts from, waiting elsewhere: the same gradients, and nothing small or trained goes."""

from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import nn
from torch.utils.checkpoint import checkpoint

from families import flux
from families.protocol import TextEmbeds
from schemas.trainer import TrainerConfig
from train.memory import checkpoint_blocks
from train.waiting import _Away, _Room, let_wait

CPU = torch.device("cpu")


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.product = nn.Linear(32, 32)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states + torch.tanh(self.product(states))


def _blocks() -> list[_Block]:
    torch.manual_seed(0)
    blocks = [_Block() for _ in range(5)]
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    return blocks


def _gradients(blocks: list[_Block], times: int) -> list[torch.Tensor]:
    for one in range(times):
        states = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(one)).requires_grad_()
        narrowed = states[:, 3:]
        for block in blocks:
            narrowed = block(narrowed)
        narrowed.square().sum().backward()
    return [one.grad for block in blocks for one in block.parameters() if one.grad is not None]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of the compiler, which looks at every tensor
@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_gradients_are_the_same_and_what_is_large_waits(monkeypatch: pytest.MonkeyPatch, backend: str | None) -> None:
    expected = _gradients(_blocks(), 3)
    blocks = _blocks()
    rooms: list[_Room] = []
    monkeypatch.setattr("train.waiting._LEAST_BYTES", 4096)  # inputs are larger, weights as large
    monkeypatch.setattr("train.waiting._Room", lambda *given: rooms.append(_Room(*given)) or rooms[0])
    if backend is not None:
        for block in blocks:
            block.forward = torch.compile(block.forward, backend=backend)
    let_wait(blocks, [one for block in blocks for one in block.parameters()], CPU)
    found = _gradients(blocks, 3)
    assert len(found) == 10
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert len(rooms[0]._free) == len(blocks)  # one for each block's input, used again in later passes


def test_small_tensors_and_weights_stay() -> None:
    weight = torch.zeros(64, 64)
    room = _Room([weight], CPU, least=4096)
    assert not isinstance(room.pack(weight.t()), _Away)
    assert isinstance(room.pack(torch.zeros(64, 64)), _Away)
    assert not isinstance(room.pack(torch.zeros(8, 8)), _Away)


def test_a_tensor_comes_back_with_the_strides_it_had() -> None:
    room = _Room([], CPU, least=0)
    given = torch.arange(2 * 6 * 4.0).view(2, 6, 4)[:, 2:]
    away = room.pack(given)
    back = room.unpack(away)
    assert torch.equal(back, given) and back.stride() == given.stride()


@pytest.mark.parametrize("keep", ["nothing", "attention"])
def test_inputs_of_a_familys_blocks_wait_where_nothing_is_compiled(
    monkeypatch: pytest.MonkeyPatch, tiny_models: Path, keep: str
) -> None:
    sent: list[_Away] = []
    pack = _Room.pack

    def counted(room: _Room, tensor: torch.Tensor) -> torch.Tensor | _Away:
        kept = pack(room, tensor)
        sent.extend([kept] if isinstance(kept, _Away) else [])
        return kept

    monkeypatch.setattr("train.waiting._LEAST_BYTES", 2048)
    monkeypatch.setattr(_Room, "pack", counted)
    results = []
    for waits in (False, True):
        denoiser = flux.load_denoiser(tiny_models / "tiny-flux-kontext", torch.float32).requires_grad_(False)
        torch.manual_seed(3)
        denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q", "proj_mlp"], init_lora_weights=False))
        checkpoint_blocks(flux, denoiser.train(), TrainerConfig(gradient_checkpointing_keep=keep))
        if waits:
            weights = [*denoiser.parameters(), *denoiser.buffers()]
            let_wait([block.module for block in flux.blocks(denoiser)], weights, CPU)
        generator = torch.Generator().manual_seed(1)
        text = TextEmbeds(torch.randn(1, 16, 64, generator=generator), torch.randn(1, 32, generator=generator), (5,))
        noisy = torch.randn(1, 16, 8, 8, generator=generator)
        flux.velocity(denoiser, noisy, [noisy], text, torch.ones(1), torch.ones(1)).square().sum().backward()
        results.append([one.grad for one in denoiser.parameters() if one.grad is not None])
    plain, found = results
    assert len(plain) > 4 and all(torch.equal(one, other) for one, other in zip(plain, found, strict=True))
    assert len(sent) >= len(flux.blocks(denoiser))
