"""The kernels of norm and rotary embedding, run on a CPU by Triton's interpreter: run by test_rotary.py.

Prints how far they are from plain operations at most, all in float32.
"""

import itertools
import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch
from torch import Tensor, nn

from families.rotary import kernels, normed_turned, plain

EPS = 1e-6


def _error(batch: int, lengths: tuple[int, ...], heads: int, width: int, weights: torch.dtype) -> float:
    generator = torch.Generator().manual_seed(batch + width)
    size = 3 * heads * width
    wide = [torch.randn(batch, one, size + 32, generator=generator).requires_grad_() for one in lengths]
    cut = [one[..., :size].chunk(3, dim=-1) for one in wide]
    values = [one[kind].unflatten(-1, (heads, width)) for kind in range(2) for one in cut]
    norms = [nn.RMSNorm(width, eps=EPS).requires_grad_(False) for _ in values]
    for norm in norms:
        norm.weight.copy_(1 + torch.randn(width, generator=generator) / 4)
        norm.to(weights)
    angles = torch.randn(sum(lengths), width, generator=generator)
    rotary = (angles.cos(), angles.sin())
    gradients = list(torch.randn(2, batch, heads, sum(lengths), width, generator=generator).transpose(2, 3))

    def both_ways(output: tuple[Tensor, Tensor]) -> list[Tensor]:
        return [*output, *torch.autograd.grad(output, wide, gradients, retain_graph=True)]

    found = both_ways(normed_turned(values, [one.weight for one in norms], *rotary, EPS))
    parts = list(zip(values, (norm.float() for norm in norms), strict=True))
    many = len(lengths)
    expected = both_ways((plain(parts[:many], rotary), plain(parts[many:], rotary)))
    pairs = zip(found, expected, strict=True)
    return max(float((one - other).detach().norm() / other.detach().norm()) for one, other in pairs)


if __name__ == "__main__":
    assert kernels is not None
    shapes = itertools.product((1, 2), ((13,), (5, 8)), ((3, 64), (2, 128)), (torch.float32, torch.bfloat16))
    errors = [_error(batch, lengths, *heads, weights) for batch, lengths, heads, weights in shapes]
    sys.stdout.write(f"{max(errors)}\n")
