"""Rollout on models whose velocity is known, so that where a sample ends is too."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from families.protocol import TextEmbeds
from schemas.trainer import TrainerConfig
from train import flow, rollout
from train.data import Batch
from train.step import step_loss


def _config(**options: Any) -> TrainerConfig:
    names = {name: f"scheduled_sampling_{name}" for name in options}
    return TrainerConfig(mixed_precision="no", **{names[name]: value for name, value in options.items()})


def _drawn(count: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(count, 16, 4, 6, generator=generator) for _ in range(2))


def _starts(times: Tensor, step: int = 1, **options: Any) -> Tensor | None:
    return rollout.starts(times, range(len(times)), step, _config(**options))


def test_a_model_without_error_is_brought_to_where_it_would_have_started() -> None:
    latents, noise = _drawn()
    times, later = torch.tensor([0.3, 0.5, 0.7, 0.9]), torch.tensor([0.4, 0.55, 1.0, 0.9])
    noisy, velocity = rollout.rolled_out(latents, noise, times, later, lambda x, t: noise - latents)
    torch.testing.assert_close(noisy, flow.noised(latents, noise, times))
    torch.testing.assert_close(velocity, noise - latents, rtol=1e-5, atol=1e-5)


def test_one_step_of_the_models_error_is_kept_and_the_target_leads_to_the_picture() -> None:
    latents, noise = _drawn()
    times, later = torch.tensor([0.3, 0.5, 0.7, 0.9]), torch.tensor([0.4, 0.55, 1.0, 0.9])
    asked: list[Tensor] = []

    def off(noisy: Tensor, at: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        torch.testing.assert_close(noisy, flow.noised(latents, noise, later))
        asked.append(at)
        return noise - latents + 0.25

    noisy, velocity = rollout.rolled_out(latents, noise, times, later, off)
    assert len(asked) == 1 and torch.equal(asked[0], later)
    drift = noisy - flow.noised(latents, noise, times)
    for number, expected in enumerate((-0.1 * 0.25, -0.05 * 0.25, -0.3 * 0.25)):
        torch.testing.assert_close(drift[number], torch.full_like(drift[number], expected), rtol=1e-4, atol=1e-6)
    arrived = noisy - flow.per_sample(times) * velocity
    torch.testing.assert_close(arrived, latents, rtol=1e-4, atol=1e-5)
    assert torch.equal(noisy[3], flow.noised(latents, noise, times)[3])
    assert torch.equal(velocity[3], (noise - latents)[3])


@pytest.mark.parametrize(("strategy", "mean"), [("uniform", 0.5), ("biased_early", 1 / 3), ("biased_late", 2 / 3)])
def test_offsets_are_whole_thousandths_up_to_the_largest(strategy: str, mean: float) -> None:
    times = torch.full((4000,), 0.25, dtype=torch.float64)
    later = _starts(times, probability=0.5, max_step_offset=200, strategy=strategy)
    assert later is not None
    offsets = ((later - times) * 1000).round()
    torch.testing.assert_close(times + offsets / 1000, later, rtol=0, atol=1e-6)
    rolled = offsets[offsets > 0]
    assert len(rolled) / len(times) == pytest.approx(0.5, abs=0.03)
    assert 1 <= rolled.min() <= 20 and 180 <= rolled.max() <= 200
    assert rolled.mean() == pytest.approx(200 * mean, abs=5)


def test_no_sample_starts_before_pure_noise_or_where_times_are_too_small() -> None:
    times = torch.tensor([0.01, 0.95, 1.0, 0.5])
    later = _starts(times, probability=1.0, max_step_offset=900)
    assert later is not None
    assert later[0] == times[0] and later[2] == 1.0
    assert 0.95 < later[1] <= 1.0 and later[3] > 0.5
    assert _starts(torch.tensor([0.01, 1.0]), probability=1.0, max_step_offset=900) is None


def test_the_share_follows_its_ramp() -> None:
    def share(step: int, **options: Any) -> float:
        return rollout._share(step, _config(**options))

    assert [share(step, probability=0.3, start_step=5) for step in (4, 5, 900)] == [0.0, 0.3, 0.3]
    ramp = {"prob_start": 0.1, "prob_end": 0.5, "ramp_steps": 100, "start_step": 10}
    assert [share(step, **ramp) for step in (9, 10, 35, 60, 110, 500)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.5, 0.5])
    ramp["ramp_shape"] = "cosine"
    quarter = 0.1 + 0.4 * (1 - 2**-0.5) / 2
    assert [share(step, **ramp) for step in (10, 35, 60, 110)] == pytest.approx([0.1, quarter, 0.3, 0.5])


class _Shifted(nn.Module):
    """A model whose error is one trainable number."""

    def __init__(self) -> None:
        super().__init__()
        self.error = nn.Parameter(torch.tensor(0.25))


class _Family:
    """Calls `_Shifted`, and notes whether gradients were taken."""

    def __init__(self, velocity: Tensor) -> None:
        self.right, self.calls = velocity, []

    def num_tokens(self, latent_shape: object) -> int:
        return 6

    def takes_guidance(self, denoiser: nn.Module) -> bool:
        return False

    def velocity(self, denoiser: _Shifted, *_: object) -> Tensor:
        self.calls.append(torch.is_grad_enabled())
        return self.right + denoiser.error


@pytest.mark.parametrize(("share", "calls"), [(0.0, [True]), (1.0, [False, True])])
def test_a_step_takes_one_pass_more_only_if_a_sample_is_rolled_out(share: float, calls: list[bool]) -> None:
    latents, noise = _drawn()
    text = TextEmbeds(torch.zeros(4, 1, 1), None, (1,) * 4)
    batch = Batch(tuple("abcd"), (1, 2, 3, 4), latents, noise, (), text)
    family, model = _Family(noise - latents), _Shifted()
    loss = step_loss(family, model, batch, 1, _config(probability=share, max_step_offset=100))
    loss.backward()
    assert family.calls == calls
    assert model.error.grad is not None and model.error.grad > 0
    # The error drives samples off; their target then differs from the usual by error × (start - time) / time.
    assert (loss.item() == pytest.approx(0.25**2)) is (share == 0.0)
