"""Which attention a denoiser is trained with: the fastest that proves right on this machine.

Another one is a function that takes q, k and v, batch × tokens × heads × width, and a line in `_FASTER`.
"""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from families.runtime import library_silenced
from schemas.console import log
from schemas.errors import first_line

_TRIED = (1, 320, 2)  # batch, tokens and heads of a self-test; the width of a head is the model's
_TOLERANCE = 2e-2  # largest relative error of bfloat16 against float32, of outputs and gradients

_DEFAULT = "native"  # of diffusers: PyTorch chooses

Attention = Callable[..., Tensor]


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


# What is faster than flash attention, the fastest first.
_FASTER: tuple[tuple[AttentionBackendName, Attention], ...] = ((AttentionBackendName._NATIVE_CUDNN, _cudnn),)


def choose_attention(denoiser: nn.Module, device: torch.device, *, half: bool) -> str:
    """Have a denoiser compute attention in the fastest way that passes a self-test; returns its name.

    `half` says that it computes in bfloat16, which all that is faster needs. What fails is told in one line; PyTorch
    then chooses, but for cuDNN, which is right with a dense gradient alone.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    if device.type != "cuda" or not half:
        return _DEFAULT
    width: int = denoiser.config.attention_head_dim  # type: ignore[union-attr, assignment]
    for name, attention in _FASTER:
        wrong = _tried(attention, device, width)
        if wrong is None:
            _AttentionBackendRegistry.register(name)(attention)
            _use(denoiser, name)
            return str(name.value)
        log.warning("attention by %s fails its self-test here (%s): PyTorch's own choice is used", name.value, wrong)
    return _DEFAULT


def _tried(attention: Attention, device: torch.device, width: int) -> str | None:
    """Run an attention forwards and backwards, the gradient a narrowed view; say what is wrong, None if nothing is."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(*_TRIED, width, generator=generator).to(device, torch.bfloat16) for _ in range(4)]
    gradient = torch.cat([drawn[3], drawn[3]], dim=-1)[..., :width]
    try:
        found = _both_ways(attention, drawn[:3], gradient)
    except Exception as fault:  # noqa: BLE001 - kernels of others raise what they like; PyTorch's own does without
        return first_line(fault)
    exact = _both_ways(_plain, [one.float() for one in drawn[:3]], gradient.float())
    errors = [float((one.float() - wanted).norm() / wanted.norm()) for one, wanted in zip(found, exact, strict=True)]
    return None if max(errors) < _TOLERANCE else f"relative error {max(errors):.2g}"


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
