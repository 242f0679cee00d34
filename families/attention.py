"""Which attention a denoiser is trained with: the quickest that proves right on this machine.

Another one is a function that takes q, k and v, batch × tokens × heads × width, and a line in `_CANDIDATES`.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.benchmark import Timer

from families.runtime import library_silenced
from schemas.console import log
from schemas.errors import first_line

# Batch, tokens and heads of what is tried; the width of a head is the model's.
_TRIED = ((1, 320, 2), (1, 4352, 1))  # what is wrong with many tokens alone shows in the second: text, and 1024 px
_TIMED = (1, 4352, 24)
_ROUNDS = 3
_CLEARLY = 0.95  # of the time of one that stands before: less is no accident
_TOLERANCE = 2e-2  # largest relative error of bfloat16 against float32, of outputs and gradients

_DEFAULT = "native"  # of diffusers: PyTorch chooses

Attention = Callable[..., Tensor]
Candidate = tuple[AttentionBackendName, Attention]


class _DenseGradient(torch.autograd.Function):
    """The identity, with a dense gradient.

    cuDNN's backward pass (PyTorch 2.11 on Hopper) reads out of bounds if the gradient that comes in is a narrowed view,
    as blocks give it that concatenate attention with something else.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        """Return the values."""
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Return the gradient in memory of its own."""
        return gradient.contiguous()


def _cudnn(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Compute attention by cuDNN."""
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        output = scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask
        )
    dense: Tensor = _DenseGradient.apply(output.transpose(1, 2))  # type: ignore[no-untyped-call]
    return dense


def _native(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute attention as PyTorch chooses, as diffusers does by default."""
    return scaled_dot_product_attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)).transpose(
        1, 2
    )


# What may be quicker than PyTorch's own choice; of those that are equally quick the first is taken.
_CANDIDATES: tuple[Candidate, ...] = ((AttentionBackendName._NATIVE_CUDNN, _cudnn),)


def choose_attention(denoiser: nn.Module, device: torch.device, *, half: bool) -> str:
    """Have a denoiser compute attention in the quickest way that passes a self-test; returns its name.

    `half` says that it computes in bfloat16, which all that is quicker needs. What fails is told in one line. Where
    nothing that passes is quicker PyTorch chooses, but for cuDNN, which is right with a dense gradient alone.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    if device.type != "cuda" or not half:
        return _DEFAULT
    width: int = denoiser.config.attention_head_dim  # type: ignore[union-attr, assignment]
    right: list[Candidate] = []
    for name, attention in _CANDIDATES:
        wrong = _tried(attention, device, width)
        if wrong is None:
            right.append((name, attention))
        else:
            log.warning("attention by %s fails its self-test here (%s) and is not used", name.value, wrong)
    chosen = _quickest(right, device, width)
    torch.cuda.empty_cache()  # of what was tried
    if chosen is None:
        return _DEFAULT
    _AttentionBackendRegistry.register(chosen[0])(chosen[1])
    _use(denoiser, chosen[0])
    return str(chosen[0].value)


def _tried(attention: Attention, device: torch.device, width: int) -> str | None:
    """Run an attention forwards and backwards with few tokens, then many; say what is wrong, None if nothing is.

    Many are passed over where there is not enough memory for their scores in float32.
    """
    few, many = _TRIED
    wrong = _compared(attention, device, (*few, width))
    with suppress(torch.OutOfMemoryError):
        wrong = wrong or _compared(attention, device, (*many, width))
    return wrong


def _compared(attention: Attention, device: torch.device, shape: tuple[int, ...]) -> str | None:
    """Hold an attention against its definition in float32; say what is wrong, None if nothing is."""
    inputs, gradient = _drawn(device, shape)
    try:
        found = _both_ways(attention, inputs, gradient)
    except torch.OutOfMemoryError:
        raise
    except Exception as fault:  # noqa: BLE001 - kernels of others raise what they like; PyTorch's own does without
        return first_line(fault)
    exact = _both_ways(_plain, [one.float() for one in inputs], gradient.float())
    errors = [float((one.float() - wanted).norm() / wanted.norm()) for one, wanted in zip(found, exact, strict=True)]
    return None if max(errors) < _TOLERANCE else f"relative error {max(errors):.2g} at {shape[1]} tokens"


def _quickest(right: Sequence[Candidate], device: torch.device, width: int) -> Candidate | None:
    """Return which of those that are right is clearly quicker than PyTorch's own choice; None if none is.

    One that stands behind another has to be clearly quicker than that. Untimed, for want of memory, it is the first.
    """
    ways = [*(attention for _, attention in right), _native]
    try:
        rounds = [[_seconds(attention, device, width) for attention in ways] for _ in range(_ROUNDS if right else 0)]
    except torch.OutOfMemoryError:
        return right[0]
    took = [min(one) for one in zip(*rounds, strict=True)]
    best = 0
    for place, seconds in enumerate(took):
        best = place if seconds < _CLEARLY * took[best] else best
    return right[best] if best < len(right) else None


def _seconds(attention: Attention, device: torch.device, width: int) -> float:
    """Return what a pass forwards and backwards takes, of a block at 1024 px."""
    inputs, gradient = _drawn(device, (*_TIMED, width))
    known = {"both_ways": _both_ways, "attention": attention, "inputs": inputs, "gradient": gradient}
    measured = Timer("both_ways(attention, inputs, gradient)", globals=known)  # it waits for the device
    return float(measured.timeit(2).mean)


def _drawn(device: torch.device, shape: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
    """Draw q, k and v, and a gradient that is a narrowed view."""
    generator = torch.Generator(device).manual_seed(0)
    drawn = torch.randn(5, *shape, generator=generator, device=device, dtype=torch.bfloat16)
    return list(drawn[:3]), torch.cat([drawn[3], drawn[4]], dim=-1)[..., : shape[-1]]


def _both_ways(attention: Attention, inputs: list[Tensor], gradient: Tensor) -> list[Tensor]:
    leaves = [one.detach().requires_grad_() for one in inputs]
    output = attention(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, gradient)]


def _plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Compute attention as it is defined."""
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), value)


def _use(denoiser: nn.Module, name: AttentionBackendName) -> None:
    """Have one denoiser use a backend: diffusers makes it that of every model that has none of its own, too."""
    everyones = _AttentionBackendRegistry._active_backend
    with library_silenced():
        denoiser.set_attention_backend(name.value)  # type: ignore[operator]
    _AttentionBackendRegistry.set_active_backend(everyones)
