"""What is stored of a posterior: a draw depends on its key alone."""

import pytest
import torch

from families.protocol import Posterior
from prep.posterior import chosen
from schemas.keys import seed_of

KEYS = ["a", "b", "c"]


@pytest.fixture
def posterior() -> Posterior:
    generator = torch.Generator().manual_seed(1)
    mean, std = torch.randn(3, 4, 6, 8, generator=generator), torch.rand(3, 4, 6, 8, generator=generator)
    return Posterior(mean, std)


def test_the_mode_is_the_mean_itself_and_moments_are_both(posterior: Posterior) -> None:
    assert chosen(posterior, KEYS, "mode") is posterior.mean
    moments = chosen(posterior, KEYS, "moments")
    assert moments.shape == (3, 8, 6, 8)
    assert torch.equal(moments[:, :4], posterior.mean) and torch.equal(moments[:, 4:], posterior.std)


def test_a_draw_is_seeded_by_its_key(posterior: Posterior) -> None:
    drawn = chosen(posterior, KEYS, "sample")
    for place, key in enumerate(KEYS):
        noise = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(seed_of("posterior", key)))
        assert torch.equal(drawn[place], posterior.mean[place] + posterior.std[place] * noise)


def test_neither_batch_nor_order_nor_the_global_generator_matters(posterior: Posterior) -> None:
    drawn = chosen(posterior, KEYS, "sample")
    torch.manual_seed(5)
    turned = Posterior(posterior.mean.flip(0), posterior.std.flip(0))
    assert torch.equal(chosen(turned, KEYS[::-1], "sample").flip(0), drawn)
    alone = Posterior(posterior.mean[1:2], posterior.std[1:2])
    assert torch.equal(chosen(alone, ["b"], "sample")[0], drawn[1])


def test_a_draw_in_half_precision_is_made_in_float32(posterior: Posterior) -> None:
    half = Posterior(posterior.mean.bfloat16(), posterior.std.bfloat16())
    drawn = chosen(half, KEYS, "sample")
    assert drawn.dtype == torch.float32
    assert torch.equal(drawn, chosen(Posterior(half.mean.float(), half.std.float()), KEYS, "sample"))
