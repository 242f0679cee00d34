"""The step: how times are drawn, what the losses are, and that a sample's numbers are its own."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from torch import Tensor, nn

from families import flux, open_project
from families.protocol import TextEmbeds
from families.routing import Routing
from schemas.errors import ConfigError
from schemas.trainer import Route, TrainerConfig
from train import flow
from train.data import Batch
from train.step import drawn_guidance, drawn_times, sample_losses, step_loss

MakeProject = Callable[..., Path]


class Known:
    """A family whose model's velocity is known: as learnt, and `error` beside it."""

    def __init__(self, batch: Batch, error: float = 0.0) -> None:
        self.velocity_of, self.error, self.calls = batch.noise - batch.latents, error, 0

    def num_tokens(self, latent_shape: Sequence[int]) -> int:
        return flux.num_tokens(latent_shape)

    def takes_guidance(self, denoiser: nn.Module) -> bool:
        return False

    def velocity(self, denoiser: nn.Module, noisy: Tensor, *_: object) -> Tensor:
        self.calls += 1
        return self.velocity_of + self.error


def _batch(size: int, first_seed: int = 1) -> Batch:
    seeds = tuple(range(first_seed, first_seed + size))
    drawn = [torch.randn(2, 16, 8, 12, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    text = TextEmbeds(torch.zeros(size, 4, 64), torch.zeros(size, 32), (4,) * size)
    latents, noise = torch.stack(drawn).unbind(1)
    return Batch(tuple(map(str, seeds)), seeds, latents, noise, (), text)


def _config(**options: Any) -> TrainerConfig:
    return TrainerConfig(mixed_precision="no", **options)


def _times(count: int = 4000, **options: Any) -> np.ndarray:
    options = {"flow_schedule_auto_shift": False, "flow_schedule_shift": 1.0} | options
    batch = replace(_batch(1), seeds=tuple(range(count)))
    return drawn_times(batch, 24, _config(**options)).numpy()


def test_times_have_the_distribution_that_is_asked_for() -> None:
    normal = np.log(_times() / (1 - _times()))
    assert abs(normal.mean()) < 0.05 and normal.std() == pytest.approx(1, abs=0.05)
    scaled = _times(flow_sigmoid_scale=0.5)
    assert np.log(scaled / (1 - scaled)).std() == pytest.approx(0.5, abs=0.03)
    assert set(_times(count=50, flow_sigmoid_scale=1e300)) == {0.0, 1.0}
    uniform = _times(flow_use_uniform_schedule=True)
    assert uniform.mean() == pytest.approx(0.5, abs=0.02) and uniform.var() == pytest.approx(1 / 12, abs=0.005)
    beta = _times(flow_use_beta_schedule=True, flow_beta_schedule_alpha=4.0, flow_beta_schedule_beta=2.0)
    assert beta.mean() == pytest.approx(4 / 6, abs=0.01) and beta.var() == pytest.approx(8 / (36 * 7), abs=0.003)


def test_the_fast_schedule_draws_the_four_times_of_schnell_and_shifts_none() -> None:
    times = _times(flux_fast_schedule=True, flow_schedule_auto_shift=True)
    found, counts = np.unique(times, return_counts=True)
    assert found.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert counts / len(times) == pytest.approx([0.1, 0.1, 0.1, 0.7], abs=0.025)


def test_times_are_shifted_by_the_targets_tokens_or_by_a_fixed_shift() -> None:
    plain = _times(8)
    assert _times(8, flow_schedule_shift=0.0) == pytest.approx(plain)
    assert _times(8, flow_schedule_shift=3.0) == pytest.approx(3 * plain / (1 + 2 * plain))
    shift = flow.auto_shift(24)
    shifted = _times(8, flow_schedule_auto_shift=True, flow_schedule_shift=3.0)
    assert shifted == pytest.approx(shift * plain / (1 + (shift - 1) * plain))


def test_two_ways_to_draw_times_are_a_fault(make_project: MakeProject) -> None:
    folder = make_project(flow_use_beta_schedule=True, flux_fast_schedule=True, flow_use_uniform_schedule=True)
    with pytest.raises(ConfigError) as caught:
        open_project(folder)
    assert [one.key for one in caught.value.faults] == ["flow_use_beta_schedule", "flux_fast_schedule"]
    assert "flow_use_beta_schedule = true: contradicts flow_use_uniform_schedule" in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "near", "far"),
    [("l2", lambda e, c: e * e, lambda e, c: e * e),
     ("huber", lambda e, c: e * e, lambda e, c: 2 * c * (e - c)),
     ("smooth_l1", lambda e, c: e * e / c, lambda e, c: 2 * (e - c))],
)  # fmt: skip
def test_losses_are_square_near_zero_and_straight_far_from_it(
    kind: str, near: Callable[[float, float], float], far: Callable[[float, float], float]
) -> None:
    c, zero = 0.1, torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for error, expected in ((1e-2, near), (1e2, far)):
        found = flow.losses(zero + error, zero, kind, c).item()
        assert found == pytest.approx(expected(error, c), rel=5e-3)


def test_a_loss_is_the_mean_of_each_sample_then_of_the_batch() -> None:
    batch = _batch(3)
    config = _config(loss_type="huber", huber_c=0.3)
    found = step_loss(Known(batch, 0.5), nn.Identity(), batch, 1, config)
    assert found.item() == pytest.approx(2 * 0.3 * ((0.5**2 + 0.3**2) ** 0.5 - 0.3), rel=1e-5)
    squares = sample_losses(Known(batch, 0.5), nn.Identity(), batch, torch.full((3,), 0.4), None, config)
    assert squares.tolist() == pytest.approx([0.25] * 3, rel=1e-5)


def test_bfloat16_predictions_are_compared_in_float32() -> None:
    predicted, velocity = torch.full((1, 1, 1, 1), 1.0, dtype=torch.bfloat16), torch.full((1, 1, 1, 1), 1.001)
    assert flow.losses(predicted, velocity).item() == pytest.approx(1e-6, rel=1e-3)


def test_a_samples_loss_does_not_depend_on_its_batch(make_project: MakeProject) -> None:
    denoiser = _denoiser(make_project())
    config = _config(flux_guidance_mode="random-range", scheduled_sampling_max_step_offset=300,
                     scheduled_sampling_probability=0.5)  # fmt: skip
    with torch.no_grad():
        together = step_loss(flux, denoiser, _batch(4), 1, config).item()
        apart = [step_loss(flux, denoiser, _batch(1, seed), 1, config).item() for seed in range(1, 5)]
    assert together == pytest.approx(np.mean(apart), rel=1e-5)


def test_guidance_is_constant_or_drawn_from_a_range() -> None:
    batch = replace(_batch(1), seeds=tuple(range(2000)))
    assert drawn_guidance(batch, _config(flux_guidance_value=2.5)).unique().tolist() == [2.5]
    drawn = drawn_guidance(batch, _config(flux_guidance_mode="random-range", flux_guidance_min=1.0))
    assert drawn.min() >= 1 and drawn.max() <= 4
    assert drawn.mean() == pytest.approx(2.5, abs=0.06)


def test_evaluation_knows_neither_routes_nor_rollouts(make_project: MakeProject) -> None:
    denoiser, batch = _denoiser(make_project()).train(), _batch(2)
    times, guidance = torch.tensor([0.3, 0.8]), torch.ones(2)
    plain = sample_losses(flux, denoiser, batch, times, guidance, _config()).detach()
    routing = Routing(flux.blocks(denoiser), [Route(selection_ratio=0.5, start_layer_idx=0, end_layer_idx=-1)])
    config = _config(loss_type="smooth_l1", scheduled_sampling_max_step_offset=500, scheduled_sampling_probability=1.0)
    usual = step_loss(flux, denoiser, batch, 1, config).item()
    assert step_loss(flux, denoiser, batch, 1, config, routing).item() != usual
    with torch.no_grad():
        found = sample_losses(flux, denoiser, batch, times, guidance, config)
    assert torch.equal(found, plain)


def test_a_rollout_in_bfloat16_leaves_the_adapter_its_gradients(make_project: MakeProject) -> None:
    denoiser = _denoiser(make_project()).to(torch.bfloat16).requires_grad_(False).train()
    denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q", "proj_mlp"], init_lora_weights=False))
    for one in denoiser.parameters():
        one.data = one.data.float() if one.requires_grad else one.data
    rolled = TrainerConfig(scheduled_sampling_max_step_offset=300, scheduled_sampling_probability=1.0)
    step_loss(flux, denoiser, _batch(2), 1, rolled).backward()
    trained = [one for one in denoiser.parameters() if one.requires_grad]
    assert trained and all(one.grad is not None and one.grad.abs().sum() > 0 for one in trained)


def _denoiser(folder: Path) -> nn.Module:
    checkpoint = folder / "work" / "models" / "tiny-flux-kontext"
    return FluxTransformer2DModel.from_pretrained(checkpoint, subfolder="transformer")
