"""TREAD on small FLUX.1 transformers: what is skipped, by which tokens, and that gradients know of it."""

from collections.abc import Sequence

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from families import flux
from families.protocol import Block, TextEmbeds
from families.routing import Routing, spans
from schemas.errors import UserError
from schemas.trainer import Route, TrainerConfig
from train.memory import checkpoint_blocks

CPU = torch.device("cpu")
TEXT = 6
SIZE = (8, 12)  # of the target's latents: 24 tokens
PLACES = 24


def _transformer(singles: int = 3) -> FluxTransformer2DModel:
    torch.manual_seed(5)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=2,
        num_single_layers=singles,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
    ).train()


def _inputs(batch: int, references: Sequence[tuple[int, int]]) -> tuple[Tensor, list[Tensor], TextEmbeds]:
    generator = torch.Generator().manual_seed(batch)
    noisy = torch.randn(batch, 16, *SIZE, generator=generator)
    others = [torch.randn(batch, 16, *size, generator=generator) for size in references]
    text = torch.randn(batch, TEXT, 24, generator=generator), torch.randn(batch, 8, generator=generator)
    return noisy, others, TextEmbeds(*text, (TEXT,) * batch)


def _velocity(model: nn.Module, inputs: tuple[Tensor, list[Tensor], TextEmbeds]) -> Tensor:
    noisy, references, text = inputs
    return flux.velocity(model, noisy, references, text, torch.full((len(noisy),), 0.5), None)


def _route(ratio: float, start: int, end: int) -> Route:
    return Route(selection_ratio=ratio, start_layer_idx=start, end_layer_idx=end)


def _watched(model: nn.Module) -> list[dict[str, Tensor]]:
    """Return a list that every block writes to: its images, text and positions as it computes with them."""
    seen: list[dict[str, Tensor]] = []
    for block in flux.blocks(model):

        def note(*args: object, inner: object = block.module.forward, **kwargs: object) -> object:
            names = ("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb")
            seen.append(dict(zip(names, args, strict=False)) | kwargs)
            return inner(*args, **kwargs)

        block.module.forward = note
    return seen


def _by_hand(
    model: FluxTransformer2DModel,
    inputs: tuple[Tensor, list[Tensor], TextEmbeds],
    routes: list[tuple[int, int, Tensor]],
) -> Tensor:
    """Run the transformer block by block; from first to last of a route only the kept target tokens take part."""
    noisy, references, text = inputs
    images = model.x_embedder(torch.cat([flux.pack(one) for one in (noisy, *references)], 1))
    words = model.context_embedder(text.embed)
    temb = model.time_text_embed(torch.full((len(noisy),), 500.0), text.pooled)
    ids = torch.cat([torch.zeros(TEXT, 3), flux.target_ids(noisy), *flux.reference_ids(references)])
    cos, sin = model.pos_embed(ids)
    for number, block in enumerate((*model.transformer_blocks, *model.single_transformer_blocks)):
        rows = torch.arange(len(cos))
        for first, last, kept in routes:
            if first <= number <= last:
                rows = torch.cat([torch.arange(TEXT), TEXT + kept, torch.arange(TEXT + PLACES, len(cos))])
            if number == first:
                whole, images = images, images[:, rows[TEXT:] - TEXT]
        words, images = block(
            hidden_states=images, encoder_hidden_states=words, temb=temb, image_rotary_emb=(cos[rows], sin[rows])
        )
        for _, last, kept in routes:
            if number == last:
                target = whole[:, :PLACES].clone()
                target[:, kept] = images[:, : len(kept)]
                images = torch.cat([target, images[:, len(kept) :]], 1)
    predicted = model.proj_out(model.norm_out(images, temb))
    return flux.unpack(predicted[:, :PLACES], *SIZE)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("references", [(), ((12, 8),), ((12, 8), (8, 8))])
@pytest.mark.parametrize("routes", [((0.5, 1, 3),), ((0.25, 0, 0), (0.7, 2, -1)), ((0.4, -4, -2),)])
def test_routes_equal_a_pass_written_by_hand_to_the_bit(
    routes: tuple[tuple[float, int, int], ...], references: tuple[tuple[int, int], ...], batch: int
) -> None:
    model, inputs = _transformer(), _inputs(batch, references)
    plain = _velocity(model, inputs)
    routing = Routing(flux.blocks(model), [_route(*one) for one in routes])
    routing.choose(11, PLACES, TEXT, CPU)
    found = _velocity(model, inputs)
    kept = [span.now.kept for span in routing._spans]
    resolved = [(start % 5, end % 5, one) for (_, start, end), one in zip(routes, kept, strict=True)]
    assert [len(one) for one in kept] == [PLACES - int(PLACES * ratio) for ratio, _, _ in routes]
    expected = _by_hand(_transformer(), inputs, resolved)
    assert torch.equal(found, expected)
    assert not torch.equal(found, plain)


def test_text_and_references_never_skip_and_positions_go_with_their_tokens() -> None:
    model, inputs = _transformer(), _inputs(2, ((12, 8), (8, 8)))
    whole = _watched(model)
    _velocity(model, inputs)
    routed = _transformer()
    seen = _watched(routed)
    routing = Routing(flux.blocks(routed), [_route(0.5, 0, 3)])
    routing.choose(3, PLACES, TEXT, CPU)
    _velocity(routed, inputs)
    kept = routing._spans[0].now.kept
    first, usual = seen[0], whole[0]
    assert torch.equal(first["encoder_hidden_states"], usual["encoder_hidden_states"])
    assert torch.equal(first["hidden_states"][:, 12:], usual["hidden_states"][:, PLACES:])
    assert torch.equal(first["hidden_states"][:, :12], usual["hidden_states"][:, kept])
    for short, full in zip(first["image_rotary_emb"], usual["image_rotary_emb"], strict=True):
        assert torch.equal(short, torch.cat([full[:TEXT], full[TEXT + kept], full[TEXT + PLACES :]]))
    assert [one["hidden_states"].shape[1] for one in seen] == [12 + 24 + 16] * 4 + [PLACES + 24 + 16]


@pytest.mark.parametrize("interval", [1, 2])
def test_gradients_are_those_without_checkpointing(interval: int) -> None:
    def gradients(interval: int) -> dict[str, Tensor]:
        model, inputs = _transformer(), _inputs(2, ((12, 8),))
        routing = Routing(flux.blocks(model), [_route(0.5, 0, 1), _route(0.3, 2, 4)])
        if interval:
            checkpoint_blocks(flux, model, TrainerConfig(gradient_checkpointing_interval=interval))
        routing.choose(9, PLACES, TEXT, CPU)
        _velocity(model, inputs).square().mean().backward()
        return {name: one.grad for name, one in model.named_parameters()}

    expected, found = gradients(0), gradients(interval)
    assert all(one is not None and one.abs().sum() > 0 for name, one in found.items() if name.endswith("weight"))
    assert all(torch.equal(found[name], one) for name, one in expected.items())


def test_routes_rest_without_gradients_in_evaluation_and_where_no_token_skips() -> None:
    plain, inputs = _velocity(_transformer(), _inputs(1, ())), _inputs(1, ())
    model = _transformer()
    routing = Routing(flux.blocks(model), [_route(0.5, 1, 2)])
    assert torch.equal(_velocity(model, inputs), plain)  # nothing is chosen yet
    routing.choose(1, PLACES, TEXT, CPU)
    with torch.no_grad():
        assert torch.equal(_velocity(model, inputs), plain)
    assert torch.equal(_velocity(model.eval(), inputs), plain)
    assert not torch.equal(_velocity(model.train(), inputs), plain)
    idle = _transformer()
    Routing(flux.blocks(idle), [_route(0.0, 1, 2)]).choose(1, PLACES, TEXT, CPU)
    assert torch.equal(_velocity(idle, inputs), plain)


def test_the_choice_follows_from_the_seed_and_differs_between_routes() -> None:
    routing = Routing(flux.blocks(_transformer()), [_route(0.5, 0, 1), _route(0.5, 2, 3)])

    def kept(seed: int) -> list[list[int]]:
        routing.choose(seed, PLACES, TEXT, CPU)
        return [span.now.kept.tolist() for span in routing._spans]

    assert kept(4) == kept(4) != kept(5)
    first, second = kept(4)
    assert first != second


class _Joined(nn.Module):
    """A block that takes text and images in one tensor, and gives them back as one."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: None, image_rotary_emb: tuple[Tensor, Tensor]) -> Tensor:  # fmt: skip
        cos, sin = image_rotary_emb
        return hidden_states * 2 + (cos + sin)


def test_blocks_may_hold_text_and_images_in_one_tensor() -> None:
    blocks = [Block(_Joined(), "hidden_states", "image_rotary_emb", joined=True, output=None) for _ in range(2)]
    routing = Routing(blocks, [_route(0.5, 0, 1)])
    tokens, rotary = torch.rand(2, 3 + 4 + 2, 1), (torch.arange(9.0)[:, None], torch.zeros(9, 1))
    routing.choose(0, 4, 3, CPU)
    kept = routing._spans[0].now.kept.tolist()
    found = tokens
    for block in blocks:
        found = block.module(found, None, image_rotary_emb=rotary)
    expected = (tokens * 2 + rotary[0]) * 2 + rotary[0]
    dropped = [3 + one for one in range(4) if one not in kept]
    expected[:, dropped] = tokens[:, dropped]
    assert len(dropped) == 2
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("routes", "told"),
    [
        ([(3, 2)], "route 0 spans layers 3 to 2; the model has 5 blocks, 0 to 4"),
        ([(0, 5)], "route 0 spans layers 0 to 5; the model has 5 blocks"),
        ([(-6, 2)], "route 0 spans layers -6 to 2; the model has 5 blocks"),
        ([(3, 4), (0, -2)], "route 1 spans layers 0 to -2; of the model's 5 blocks, route 0 has 3 to 4 already"),
    ],
)
def test_a_span_that_does_not_fit_is_refused_with_the_number_of_blocks(
    routes: list[tuple[int, int]], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        spans([_route(0.5, *one) for one in routes], 5)
