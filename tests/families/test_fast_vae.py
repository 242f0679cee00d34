"""The encoder that is compiled: the numbers of the plain one, one graph a shape, and what becomes of faults."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2
from torch import Tensor, nn

from families import fast_vae, flux, flux2
from families.fast_vae import FastEncoder, attend, encode, is_known, normalise, speed_up
from schemas import console

Backend = Callable[..., Callable[..., object]]


@pytest.fixture(autouse=True)
def nothing_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "elsewhere"))  # what a test sets instead is undone
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def _wide() -> AutoencoderKL:
    """A VAE whose channels change from block to block, with several groups and channels of a group."""
    torch.manual_seed(3)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
    )


KINDS: dict[str, Callable[[], AutoencoderKL | AutoencoderKLFlux2]] = {
    "flux": flux._tiny_vae,
    "flux2": flux2._tiny_vae,
    "wide": _wide,
}


@pytest.fixture(params=KINDS)
def vae(request: pytest.FixtureRequest) -> AutoencoderKL | AutoencoderKLFlux2:
    return KINDS[request.param]().eval().requires_grad_(False)


def _drawn(*shape: int, seed: int = 0) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.contiguous(memory_format=torch.channels_last)


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.detach() - exact.detach()).norm() / exact.detach().norm())


@pytest.mark.parametrize("mean", [0.0, 20.0])
@pytest.mark.parametrize("shape", [(1, 8, 5, 7), (3, 32, 16, 16), (2, 32, 64, 24)])
def test_a_group_norm_is_pytorchs(shape: tuple[int, ...], mean: float) -> None:
    norm = nn.GroupNorm(8, shape[1], eps=1e-6)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    values = _drawn(*shape) * torch.linspace(0.5, 3, shape[1])[:, None, None] + mean
    exact = norm.double()(values.double())
    assert _error(normalise(norm.float(), values), exact) < (1e-6 if mean == 0 else 1e-4)


def test_a_group_norm_of_equal_values_is_its_bias() -> None:
    norm = nn.GroupNorm(2, 4)
    nn.init.normal_(norm.bias)
    values = torch.full((1, 4, 8, 8), 0.3)
    assert torch.allclose(normalise(norm, values), norm.bias.view(1, 4, 1, 1).expand(1, 4, 8, 8), atol=1e-4)


@pytest.mark.parametrize("most", [1 << 28, 600, 1])
def test_attention_in_parts_is_that_of_diffusers(
    vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(fast_vae, "_MOST_SCORES", most)
    [attention] = vae.encoder.mid_block.attentions
    states = 3 * _drawn(2, vae.config.block_out_channels[-1], 6, 10)
    assert _error(attend(attention, states) - states, attention(states) - states) < 1e-5


def test_an_encoder_computes_what_diffusers_own_does(vae: AutoencoderKL) -> None:
    values = _drawn(2, 3, 64, 96)
    assert is_known(vae.encoder)
    assert _error(encode(vae.encoder, values), vae.encoder(values)) < 1e-5


def test_in_bfloat16_it_is_as_near_to_float32_as_the_plain_one(vae: AutoencoderKL) -> None:
    values = _drawn(2, 3, 64, 96).bfloat16()
    exact = vae.encoder(values.float())
    vae.to(torch.bfloat16)
    plain, ours = vae.encoder(values), encode(vae.encoder, values)
    assert ours.dtype == torch.bfloat16
    assert _error(ours.float(), exact) < 1.5 * _error(plain.float(), exact)


@torch._dynamo.config.patch(recompile_limit=2)  # fewer than there are
@pytest.mark.parametrize(("kind", "shapes"), [("flux", 3), ("flux2", 2), ("wide", 2)])
def test_every_shape_is_one_graph_and_only_shapes_that_were_prepared_are_compiled(
    tmp_path: Path, kind: str, shapes: int
) -> None:
    graphs = []

    def counting(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    vae = KINDS[kind]().eval().requires_grad_(False)
    sizes = range(16, 16 + 16 * shapes, 16)
    plain = {size: vae.encode(_drawn(2, 3, 16, size)).latent_dist.mode() for size in sizes}
    fast = FastEncoder(vae.encoder, tmp_path, counting)
    for number, size in enumerate(plain):
        assert len(graphs) == number
        assert fast.prepare(_drawn(2, 3, 16, size)) and fast.prepare(_drawn(2, 3, 16, size))
    for size, expected in plain.items():
        with torch.no_grad():
            found = vae.encode(_drawn(2, 3, 16, size)).latent_dist.mode()
        assert 0 < _error(found, expected) < 1e-5
    vae.encode(_drawn(1, 3, 16, 16))  # another number of pictures is another shape
    assert len(graphs) == shapes and fast.seconds > 0


def test_what_compilers_make_is_kept_in_the_workspace_unless_one_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FastEncoder(flux._tiny_vae().encoder, tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "elsewhere")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    FastEncoder(flux._tiny_vae().encoder, tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)


def test_decoding_stays_as_it_is(vae: AutoencoderKL, tmp_path: Path) -> None:
    latents = _drawn(1, vae.config.latent_channels, 4, 4)
    expected = vae.decode(latents).sample
    FastEncoder(vae.encoder, tmp_path, "eager").prepare(_drawn(1, 3, 32, 32))
    assert torch.equal(vae.decode(latents).sample, expected)


def _wrong(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
    return lambda *inputs: [1.2 * one for one in graph.forward(*inputs)]


def _not_finite(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
    return lambda *inputs: [one * float("nan") for one in graph.forward(*inputs)]


def _no_compiler(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
    raise RuntimeError("Failed to find C compiler.\nPlease specify via CC.")


@pytest.mark.parametrize(
    ("backend", "told"),
    [
        (_wrong, "relative difference 0.2"),
        (_not_finite, "relative difference nan"),
        (_no_compiler, "Failed to find C compiler"),
    ],
)
def test_what_fails_is_told_once_and_the_plain_encoder_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, backend: Backend, told: str
) -> None:
    monkeypatch.setattr(console.log, "propagate", True)
    vae = flux._tiny_vae().requires_grad_(False)
    values, other = _drawn(2, 3, 32, 32), _drawn(2, 3, 32, 64)
    expected = vae.encoder(values)
    fast = FastEncoder(vae.encoder, tmp_path, backend)  # type: ignore[arg-type]
    assert not fast.prepare(values) and not fast.prepare(values) and not fast.prepare(other)
    warnings = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert len(warnings) == 1 and told in warnings[0] and "the plain one is used" in warnings[0]
    assert _error(vae.encoder(values), expected) < 1e-6


def test_memory_that_runs_out_while_compiling_is_the_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = FastEncoder(flux._tiny_vae().requires_grad_(False).encoder, tmp_path, "eager")

    def full(*_: object) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(fast, "_compiled", full)
        with pytest.raises(torch.OutOfMemoryError):
            fast.prepare(_drawn(2, 3, 32, 32))
    assert fast.prepare(_drawn(1, 3, 32, 32))


def test_more_shapes_than_are_kept_apart_stay_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_vae, "_MOST_SHAPES", 2)
    fast = FastEncoder(flux._tiny_vae().requires_grad_(False).encoder, tmp_path, "eager")
    assert [fast.prepare(_drawn(1, 3, 32, width)) for width in (32, 48, 64, 32)] == [True, True, False, True]


def test_a_cpu_has_the_plain_encoder(vae: AutoencoderKL, tmp_path: Path) -> None:
    assert speed_up(vae, tmp_path) is None
    assert speed_up(vae.to(torch.bfloat16), tmp_path) is None


def test_an_encoder_of_other_parts_is_not_known() -> None:
    vae = _wide()
    vae.encoder.down_blocks[1].resnets[0].nonlinearity = nn.GELU()
    assert not is_known(vae.encoder)
    vae = _wide()
    vae.encoder.mid_block.attentions[0].heads = 2
    assert not is_known(vae.encoder)
