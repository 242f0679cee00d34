"""Triton's kernels for what `families.rotary` computes: RMSNorm of every head, then rotation of its pairs of numbers.

A program computes all heads of one token, so that the token's cos and sin are read once. Inside all is float32.
"""

import subprocess

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

FAULTS = (RuntimeError, OSError, subprocess.SubprocessError, TritonError)  # of a machine where kernels do not compile

_WARPS = 8  # with fewer, a row of cos is laid out one number a thread, and all the rest after it, by shared memory


def forward(values: Tensor, weight: Tensor, rotary: tuple[Tensor, Tensor], eps: float, out: Tensor) -> None:
    """Write batch × tokens × heads × width, normed and turned; a head's numbers lie side by side in all tensors.

    cos and sin, tokens × width, are dense; in `out` a token's heads are.
    """
    batch, tokens, heads, width = values.shape
    with torch.cuda.device_of(values):
        _turn[(tokens, batch)](
            values,
            out,
            weight,
            *rotary,
            eps,
            *values.stride()[:3],
            *out.stride()[:2],
            **_shape(heads, width),
        )


def backward(
    gradient: Tensor, values: Tensor, weight: Tensor, rotary: tuple[Tensor, Tensor], eps: float, out: Tensor
) -> None:
    """Write the gradient of values, given that of what `forward` makes of them."""
    batch, tokens, heads, width = values.shape
    with torch.cuda.device_of(values):
        _turn_back[(tokens, batch)](
            gradient,
            values,
            out,
            weight,
            *rotary,
            eps,
            *gradient.stride()[:3],
            *values.stride()[:3],
            *out.stride()[:2],
            **_shape(heads, width),
        )


def _shape(heads: int, width: int) -> dict[str, int]:
    return {"heads": heads, "tile": triton.next_power_of_2(heads), "width": width, "num_warps": _WARPS}


@triton.jit
def _turn(
    values, out, weight, cos, sin, eps,
    batch_step, token_step, head_step, out_batch_step, out_token_step,
    heads: tl.constexpr, tile: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head, column = tl.arange(0, tile)[:, None], tl.arange(0, width)[None, :]
    place = batch * batch_step + token * token_step + head * head_step + column
    exact = tl.load(values + place, mask=head < heads, other=0.0).to(tl.float32)
    normed = exact * tl.rsqrt(tl.sum(exact * exact, axis=1) / width + eps)[:, None]
    normed *= tl.load(weight + column).to(tl.float32)
    left, right = tl.split(tl.reshape(normed, (tile, width // 2, 2)))
    across = tl.reshape(tl.join(-right, left), (tile, width))
    turned = normed * tl.load(cos + token * width + column) + across * tl.load(sin + token * width + column)
    place = batch * out_batch_step + token * out_token_step + head * width + column
    tl.store(out + place, turned.to(out.dtype.element_ty), mask=head < heads)


@triton.jit
def _turn_back(
    gradient, values, out, weight, cos, sin, eps,
    gradient_batch_step, gradient_token_step, gradient_head_step,
    batch_step, token_step, head_step, out_batch_step, out_token_step,
    heads: tl.constexpr, tile: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    head, column = tl.arange(0, tile)[:, None], tl.arange(0, width)[None, :]
    place = batch * gradient_batch_step + token * gradient_token_step + head * gradient_head_step + column
    turned = tl.load(gradient + place, mask=head < heads, other=0.0).to(tl.float32)
    place = batch * batch_step + token * token_step + head * head_step + column
    exact = tl.load(values + place, mask=head < heads, other=0.0).to(tl.float32)
    left, right = tl.split(tl.reshape(turned * tl.load(sin + token * width + column), (tile, width // 2, 2)))
    normed = turned * tl.load(cos + token * width + column) + tl.reshape(tl.join(right, -left), (tile, width))
    normed *= tl.load(weight + column).to(tl.float32)
    scale = tl.rsqrt(tl.sum(exact * exact, axis=1) / width + eps)[:, None]
    unit = exact * scale
    found = scale * (normed - unit * (tl.sum(normed * unit, axis=1) / width)[:, None])
    place = batch * out_batch_step + token * out_token_step + head * width + column
    tl.store(out + place, found.to(out.dtype.element_ty), mask=head < heads)
