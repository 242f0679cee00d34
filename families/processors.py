"""Attention processors of FLUX.1 and FLUX.2: diffusers' own, but for how queries and keys are normed and turned.

Another network's is a class beside these that calls `families.rotary.turned`.
"""

from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers import transformer_flux, transformer_flux2
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_flux2 import Flux2AttnProcessor, Flux2ParallelSelfAttnProcessor
from torch import Tensor, nn

from families.rotary import Rotary, turned


class FluxTurned(FluxAttnProcessor):  # type: ignore[misc]
    """That of FLUX.1's blocks, double and single ones."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Any:
        """Attend from and to text and images; returns images, then text where it came apart."""
        if image_rotary_emb is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)
        projected = transformer_flux._get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        attended = _attended(self, attn, projected, attention_mask, image_rotary_emb)
        if encoder_hidden_states is None:
            return attended
        text, images = _apart(attended, encoder_hidden_states.shape[1])
        return attn.to_out[1](attn.to_out[0](images.contiguous())), attn.to_add_out(text.contiguous())


class Flux2Turned(Flux2AttnProcessor):  # type: ignore[misc]
    """That of FLUX.2's double blocks."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Any:
        """Attend from and to text and images; returns images, then text where it came apart."""
        if image_rotary_emb is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)
        projected = transformer_flux2._get_qkv_projections(attn, hidden_states, encoder_hidden_states)
        attended = _attended(self, attn, projected, attention_mask, image_rotary_emb)
        if encoder_hidden_states is None:
            return attn.to_out[1](attn.to_out[0](attended))
        text, images = _apart(attended, encoder_hidden_states.shape[1])
        text = attn.to_add_out(text)
        return attn.to_out[1](attn.to_out[0](images)), text


class Flux2ParallelTurned(Flux2ParallelSelfAttnProcessor):  # type: ignore[misc]
    """That of FLUX.2's single blocks, whose projections are one with those of their feed-forward part."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary | None = None,
    ) -> Any:
        """Attend from and to all tokens, and feed them forward."""
        if image_rotary_emb is None:
            return super().__call__(attn, hidden_states, attention_mask)
        wide = (3 * attn.inner_dim, attn.mlp_hidden_dim * attn.mlp_mult_factor)
        projections, forward = attn.to_qkv_mlp_proj(hidden_states).split(wide, dim=-1)
        projected = (*projections.chunk(3, dim=-1), None, None, None)
        attended = _attended(self, attn, projected, attention_mask, image_rotary_emb)
        return attn.to_out(torch.cat([attended, attn.mlp_act_fn(forward)], dim=-1))


def turning(denoiser: nn.Module) -> list[tuple[nn.Module, Any]]:
    """Return attentions that have diffusers' own processor, and that which takes its place."""
    instead = {
        FluxAttnProcessor: FluxTurned,
        Flux2AttnProcessor: Flux2Turned,
        Flux2ParallelSelfAttnProcessor: Flux2ParallelTurned,
    }
    found = ((one, instead.get(type(getattr(one, "processor", None)))) for one in denoiser.modules())
    return [(module, kind()) for module, kind in found if kind is not None]


def _attended(
    processor: Any, attn: Any, projected: tuple[Any, ...], mask: Tensor | None, rotary: Rotary
) -> Tensor:  # batch × tokens × heads · width, text first
    """Attend with q, k and v of images, and of text if it has projections of its own."""
    query, key, value = (one.unflatten(-1, (-1, attn.head_dim)) for one in projected[:3])
    queries, keys = [(query, attn.norm_q)], [(key, attn.norm_k)]
    if getattr(attn, "added_kv_proj_dim", None) is not None:
        text = [one.unflatten(-1, (-1, attn.head_dim)) for one in projected[3:]]
        queries.insert(0, (text[0], attn.norm_added_q))
        keys.insert(0, (text[1], attn.norm_added_k))
        value = torch.cat([text[2], value], dim=1)
    query, key = turned(queries, keys, rotary)
    backend, parallel = processor._attention_backend, processor._parallel_config
    output = dispatch_attention_fn(query, key, value, attn_mask=mask, backend=backend, parallel_config=parallel)
    attended: Tensor = output.flatten(2, 3).to(query.dtype)
    return attended


def _apart(tokens: Tensor, text: int) -> tuple[Tensor, Tensor]:
    """Split text tokens from those of images."""
    first, second = tokens.split_with_sizes([text, tokens.shape[1] - text], dim=1)
    return first, second
