"""Which attention is trained with, and the test that a faster one has to pass."""

import logging
from collections.abc import Callable

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from families import attention
from families.attention import Candidate, _DenseGradient, _quickest, _tried, choose_attention
from schemas import console

CPU = torch.device("cpu")


def _native(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    swapped = (one.transpose(1, 2) for one in (query, key, value))
    return scaled_dot_product_attention(*swapped).transpose(1, 2)


def _unscaled(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _native(1.1 * query, key, value)


def _no_gradient_of_values(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _native(query, key, value.detach() + 0 * value)


def _missing(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    raise RuntimeError("No available kernel. Aborting execution.\nand more")


def _raising(fault: Exception) -> Callable[..., Tensor]:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        raise fault

    return attention


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (RuntimeError(), "RuntimeError"),
        (RuntimeError("\n  no kernel image\nand more"), "no kernel image"),
        (AssertionError(), "AssertionError"),
        (TypeError("unexpected keyword argument"), "unexpected keyword argument"),
        (ImportError("libcudnn.so.9: cannot open"), "libcudnn.so.9: cannot open"),
        (ValueError("x" * 300), "x" * 120),
    ],
)
def test_whatever_a_kernel_raises_is_told_in_one_line(fault: Exception, said: str) -> None:
    assert _tried(_raising(fault), CPU, 64) == said


def test_an_attention_that_is_right_passes_and_others_say_why() -> None:
    assert _tried(_native, CPU, 64) is None
    assert "relative error" in str(_tried(_unscaled, CPU, 64))
    assert "relative error" in str(_tried(_no_gradient_of_values, CPU, 64))
    assert _tried(_missing, CPU, 64) == "No available kernel. Aborting execution."


def test_what_is_wrong_with_many_tokens_alone_fails_unless_there_is_no_memory_to_try_them() -> None:
    def wrong_when_long(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (_unscaled if query.shape[1] > 1024 else _native)(query, key, value)

    def full_when_long(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if query.shape[1] > 1024:
            raise torch.OutOfMemoryError
        return _native(query, key, value)

    assert "at 4352 tokens" in str(_tried(wrong_when_long, CPU, 16))
    assert _tried(full_when_long, CPU, 16) is None


def _mathematical(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return _native(query, key, value)


def _slow(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.stack([_mathematical(query, key, value) for _ in range(20)]).mean(0)


MATH, FLASH = AttentionBackendName._NATIVE_MATH, AttentionBackendName._NATIVE_FLASH


@pytest.mark.parametrize(
    ("candidates", "own", "expected"),
    [
        ([(MATH, _slow), (FLASH, _native)], _slow, FLASH),
        ([(FLASH, _native), (MATH, _slow)], _slow, FLASH),
        ([(MATH, _slow)], _native, None),
        ([], _native, None),
    ],
)
def test_the_quickest_forwards_and_backwards_is_taken(
    monkeypatch: pytest.MonkeyPatch,
    candidates: list[Candidate],
    own: Callable[..., Tensor],
    expected: AttentionBackendName | None,
) -> None:
    monkeypatch.setattr(attention, "_TIMED", (1, 128, 2))
    monkeypatch.setattr(attention, "_native", own)
    chosen = _quickest(candidates, CPU, 16)
    assert (chosen and chosen[0]) == expected


@pytest.mark.parametrize(
    ("took", "expected"),
    [((1.0, 0.97, 0.96), MATH), ((1.0, 0.9, 0.88), FLASH), ((1.0, 0.9, 0.8), None), ((1.0, 2.0, 0.97), MATH)],
)
def test_one_that_is_hardly_quicker_does_not_change_the_choice(
    monkeypatch: pytest.MonkeyPatch, took: tuple[float, ...], expected: AttentionBackendName | None
) -> None:
    ways = [_slow, _mathematical, attention._native]
    monkeypatch.setattr(attention, "_seconds", lambda one, *_: took[ways.index(one)])
    chosen = _quickest([(MATH, _slow), (FLASH, _mathematical)], CPU, 16)
    assert (chosen and chosen[0]) == expected


def test_without_memory_to_time_them_the_first_that_is_right_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> float:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(attention, "_seconds", full)
    assert _quickest([(MATH, _mathematical), (FLASH, _native)], CPU, 16) == (MATH, _mathematical)


def test_a_narrowed_gradient_becomes_dense_and_stays_the_same() -> None:
    seen: list[Tensor] = []
    values = torch.randn(2, 3, 4, requires_grad=True)
    inner = values * 1.0
    inner.register_hook(seen.append)
    joined = torch.cat([_DenseGradient.apply(inner), torch.ones(2, 3, 8)], dim=-1)
    weights = torch.randn(2, 3, 12)
    (joined * weights).sum().backward()
    assert seen[0].is_contiguous() and torch.equal(seen[0], weights[..., :4])


@pytest.fixture
def denoiser() -> nn.Module:
    return FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, num_attention_heads=1, attention_head_dim=16, axes_dims_rope=(4, 4, 8)
    )


def test_the_cpu_and_float32_leave_the_choice_to_pytorch(denoiser: nn.Module) -> None:
    assert choose_attention(denoiser, CPU, half=True) == "native"
    assert choose_attention(denoiser, torch.device("cuda"), half=False) == "native"
    assert {one.processor._attention_backend for one in _attentions(denoiser)} == {None}


def test_what_fails_is_told_in_one_line_and_not_used(
    denoiser: nn.Module, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(console.log, "propagate", True)
    monkeypatch.setattr(attention, "_tried", lambda *_: "relative error 3")
    with caplog.at_level(logging.WARNING):
        assert choose_attention(denoiser, torch.device("cuda"), half=True) == "native"
    assert [record.getMessage() for record in caplog.records] == [
        "attention by _native_cudnn fails its self-test here (relative error 3) and is not used"
    ]
    assert {one.processor._attention_backend for one in _attentions(denoiser)} == {None}


def test_what_passes_is_what_every_block_calls(denoiser: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        calls.append(query.shape[1])
        return _native(query, key, value)

    name = AttentionBackendName._NATIVE_MATH
    monkeypatch.setattr(attention, "_CANDIDATES", ((name, counted),))
    monkeypatch.setattr(attention, "_tried", lambda *_: None)
    monkeypatch.setattr(attention, "_seconds", lambda one, *_: 1.0 if one is counted else 2.0)
    registry = attention._AttentionBackendRegistry
    for kept in ("_backends", "_constraints", "_supported_arg_names"):
        monkeypatch.setattr(registry, kept, dict(getattr(registry, kept)))
    inputs = {
        "hidden_states": torch.randn(1, 6, 64), "encoder_hidden_states": torch.randn(1, 3, 4096),
        "pooled_projections": torch.randn(1, 768), "timestep": torch.ones(1), "img_ids": torch.zeros(6, 3),
        "txt_ids": torch.zeros(3, 3),
    }  # fmt: skip
    with torch.no_grad():
        before = denoiser(**inputs).sample
        assert choose_attention(denoiser, torch.device("cuda"), half=True) == "_native_math"
        after = denoiser(**inputs).sample
    assert registry._active_backend == AttentionBackendName.NATIVE  # of every other model
    assert calls == [9, 9] and torch.allclose(before, after, atol=1e-6)


def _attentions(denoiser: nn.Module) -> list[nn.Module]:
    return [module for name, module in denoiser.named_modules() if name.endswith(".attn")]
