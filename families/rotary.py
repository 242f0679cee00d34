"""Norm and rotary embedding of queries and keys in one kernel, forwards and backwards, text before images.

`turned` is what attention processors call; `fuse_rotary` gives a denoiser those of its family, if the kernels prove
right on this machine. What the kernels do not know goes through `plain`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from families.protocol import Family
from schemas.console import log
from schemas.errors import first_line

try:
    from families import rotary_kernels as kernels
except ImportError:  # Triton comes with PyTorch for CUDA
    kernels = None  # type: ignore[assignment]

Rotary = tuple[Tensor, Tensor]  # cos and sin, float32, tokens × width
Normed = tuple[Tensor, nn.RMSNorm]  # batch × tokens × heads × width, and the norm of their last dimension

_TRIED = (1, (7, 57))  # batch and tokens of text and images of a self-test; heads and their width are the model's
_TOLERANCE = 1e-2  # largest relative error of bfloat16 against float32, of outputs and gradients


def fuse_rotary(family: Family, denoiser: nn.Module, device: torch.device, *, half: bool) -> bool:
    """Have a denoiser norm and turn queries and keys by kernels of our own, where they pass a self-test; say if so.

    `half` says that it computes in bfloat16, which they are for. Attentions get other processors, which keep the
    backend that was chosen. What fails is told in one line.
    """
    if device.type != "cuda" or not half or kernels is None:
        return False
    heads, width = denoiser.config.num_attention_heads, denoiser.config.attention_head_dim  # type: ignore[union-attr]
    wrong = _tried(device, int(heads), int(width))  # type: ignore[arg-type]
    if wrong is not None:
        log.warning("rotary embedding by a kernel fails its self-test here (%s): PyTorch's own is used", wrong)
        return False
    use_turned(family, denoiser)
    return True


def use_turned(family: Family, denoiser: nn.Module) -> None:
    """Give attentions the processors that call `turned`."""
    for attention, processor in family.rotary_processors(denoiser):
        processor._attention_backend = attention.processor._attention_backend  # type: ignore[union-attr]
        attention.set_processor(processor)  # type: ignore[operator]


def turned(query: Sequence[Normed], key: Sequence[Normed], rotary: Rotary) -> tuple[Tensor, Tensor]:
    """Norm the parts of queries and of keys, each by its own norm, join them along tokens, and turn them."""
    if not _known([*query, *key], rotary):
        return plain(query, rotary), plain(key, rotary)
    values, norms = zip(*query, *key, strict=True)
    found: tuple[Tensor, Tensor] = normed_turned(values, [one.weight for one in norms], *rotary, norms[0].eps)
    return found


def plain(parts: Sequence[Normed], rotary: Rotary) -> Tensor:
    """Norm parts, join and turn them as diffusers does."""
    normed = [norm(values) for values, norm in parts]
    joined = torch.cat(normed, dim=1) if len(normed) > 1 else normed[0]
    values: Tensor = apply_rotary_emb(joined, rotary, sequence_dim=1)
    return values


def _known(parts: Sequence[Normed], rotary: Rotary) -> bool:
    """Tell whether the kernels compute this: bfloat16 on CUDA, norms alike and frozen, cos and sin in float32."""
    if kernels is None or any(one.dtype != torch.float32 or one.dim() != 2 for one in rotary):
        return False
    return all(
        values.is_cuda
        and values.dtype == torch.bfloat16
        and values.shape[-1].bit_count() == 1
        and type(norm) is nn.RMSNorm
        and norm.eps is not None
        and norm.eps == parts[0][1].eps
        and norm.weight is not None
        and not norm.weight.requires_grad
        for values, norm in parts
    )


@torch.library.custom_op("pairline::normed_turned", mutates_args=())
def normed_turned(
    values: Sequence[Tensor], weights: Sequence[Tensor], cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return queries and keys, normed and turned; `values` are the parts of queries, then those of keys.

    Parts are batch × tokens × heads × width; each has its norm's weight. Weights get no gradient.
    """
    many = len(values) // 2
    outputs = _outputs(values)
    for output, place in zip(outputs, (0, many), strict=True):
        parts = _narrowed(output, values[:many])
        for number, (out, rotary) in enumerate(zip(parts, _rows(cos, sin, values[:many]), strict=True), place):
            kernels.forward(_dense_heads(values[number]), weights[number], rotary, eps, out)
    return outputs


@normed_turned.register_fake
def _normed_turned_shape(
    values: Sequence[Tensor], weights: Sequence[Tensor], cos: Tensor, sin: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _outputs(values)


@torch.library.custom_op("pairline::normed_turned_backward", mutates_args=())
def normed_turned_backward(
    gradients: Sequence[Tensor],
    values: Sequence[Tensor],
    weights: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> list[Tensor]:
    """Return the gradients of all parts, given those of queries and keys."""
    many = len(values) // 2
    found = _dense(values)
    for gradient, place in zip(gradients, (0, many), strict=True):
        parts = _narrowed(_dense_heads(gradient), values[:many])
        for number, (part, rotary) in enumerate(zip(parts, _rows(cos, sin, values[:many]), strict=True), place):
            kernels.backward(part, _dense_heads(values[number]), weights[number], rotary, eps, found[number])
    return found


@normed_turned_backward.register_fake
def _normed_turned_backward_shape(
    gradients: Sequence[Tensor],
    values: Sequence[Tensor],
    weights: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> list[Tensor]:
    return _dense(values)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    values, weights, cos, sin, eps = inputs
    ctx.save_for_backward(*values, *weights, cos, sin)
    ctx.many, ctx.eps = len(values), eps


def _back(ctx: Any, *gradients: Tensor) -> tuple[list[Tensor], list[None], None, None, None]:
    *saved, cos, sin = ctx.saved_tensors
    values, weights = saved[: ctx.many], saved[ctx.many :]
    found = normed_turned_backward(gradients, values, weights, cos, sin, ctx.eps)
    return found, [None] * ctx.many, None, None, None


normed_turned.register_autograd(_back, setup_context=_keep_inputs)


def _outputs(values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    tokens = sum(one.shape[1] for one in values[: len(values) // 2])
    batch, _, heads, width = values[0].shape
    query, key = (values[0].new_empty(batch, tokens, heads, width) for _ in range(2))
    return query, key


def _dense(values: Sequence[Tensor]) -> list[Tensor]:
    return [one.new_empty(one.shape) for one in values]


def _narrowed(whole: Tensor, parts: Sequence[Tensor]) -> Sequence[Tensor]:
    return torch.split(whole, [one.shape[1] for one in parts], dim=1)


def _rows(cos: Tensor, sin: Tensor, parts: Sequence[Tensor]) -> list[Rotary]:
    """Return the rows of cos and sin that are each part's."""
    lengths = [one.shape[1] for one in parts]
    return list(zip(torch.split(cos.contiguous(), lengths), torch.split(sin.contiguous(), lengths), strict=True))


def _dense_heads(values: Tensor) -> Tensor:
    return values if values.stride(-1) == 1 else values.contiguous()


def _tried(device: torch.device, heads: int, width: int) -> str | None:
    """Run the kernels forwards and backwards on parts of wider tensors; say what is wrong, None if nothing is."""
    if width.bit_count() != 1:
        return f"heads are {width} numbers wide, no power of two"
    parts, norms, rotary, gradients = _drawn(device, heads, width)
    weights = [norm.weight for norm in norms]
    leaves = [one.detach().requires_grad_() for one in parts]
    try:
        outputs = normed_turned(leaves, weights, *rotary, norms[0].eps)
        found = [*outputs, *torch.autograd.grad(outputs, leaves, gradients)]
    except kernels.FAULTS as fault:
        return first_line(fault)
    exact = [one.detach().float().requires_grad_() for one in parts]
    many = len(parts) // 2
    normed = list(zip(exact, norms, strict=True))
    expected = [plain(normed[:many], rotary), plain(normed[many:], rotary)]
    wanted = [*expected, *torch.autograd.grad(expected, exact, [one.float() for one in gradients])]
    pairs = zip(found, wanted, strict=True)
    errors = [float((one.float() - other).detach().norm() / other.detach().norm()) for one, other in pairs]
    return None if max(errors) < _TOLERANCE else f"relative error {max(errors):.2g}"


def _drawn(device: torch.device, heads: int, width: int) -> tuple[list[Tensor], list[nn.RMSNorm], Rotary, list[Tensor]]:
    """Draw queries and keys of text and images, narrowed views all, their norms, cos and sin, and gradients."""
    generator = torch.Generator().manual_seed(0)
    batch, lengths = _TRIED
    wide = [torch.randn(batch, one, 3 * heads * width, generator=generator) for one in lengths]
    halves = [one.to(device, torch.bfloat16).chunk(3, dim=-1) for one in wide]
    parts = [one[kind].view(batch, -1, heads, width) for kind in range(2) for one in halves]
    norms = [nn.RMSNorm(width, eps=1e-6, device=device).requires_grad_(False) for _ in parts]
    for norm in norms:
        norm.weight.copy_(1 + torch.randn(width, generator=generator) / 4)
    angles = torch.randn(sum(lengths), width // 2, generator=generator).repeat_interleave(2, dim=1).to(device)
    drawn = torch.randn(2, batch, sum(lengths), heads, 2 * width, generator=generator).to(device, torch.bfloat16)
    return parts, norms, (angles.cos(), angles.sin()), list(drawn[..., :width])
