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

_MOST_NUMBERS = 1024  # of a token that a warp computes


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
    tile = triton.next_power_of_2(heads)
    warps = min(max(tile * width // _MOST_NUMBERS, 1), 16)
    return {"heads": heads, "tile": tile, "width": width, "num_warps": warps}


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
    cos_left, cos_right = tl.split(tl.reshape(tl.load(cos + token * width + column), (1, width // 2, 2)))
    sin_left, sin_right = tl.split(tl.reshape(tl.load(sin + token * width + column), (1, width // 2, 2)))
    turned = tl.join(left * cos_left - right * sin_left, right * cos_right + left * sin_right)
    place = batch * out_batch_step + token * out_token_step + head * width + column
    tl.store(out + place, tl.reshape(turned, (tile, width)).to(out.dtype.element_ty), mask=head < heads)


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
    left, right = tl.split(tl.reshape(turned, (tile, width // 2, 2)))
    cos_left, cos_right = tl.split(tl.reshape(tl.load(cos + token * width + column), (1, width // 2, 2)))
    sin_left, sin_right = tl.split(tl.reshape(tl.load(sin + token * width + column), (1, width // 2, 2)))
    back = tl.join(left * cos_left + right * sin_right, right * cos_right - left * sin_left)
    normed = tl.reshape(back, (tile, width))
    normed *= tl.load(weight + column).to(tl.float32)
    scale = tl.rsqrt(tl.sum(exact * exact, axis=1) / width + eps)[:, None]
    unit = exact * scale
    found = scale * (normed - unit * (tl.sum(normed * unit, axis=1) / width)[:, None])
    place = batch * out_batch_step + token * out_token_step + head * width + column
    tl.store(out + place, found.to(out.dtype.element_ty), mask=head < heads)
