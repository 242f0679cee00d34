"""What is trained: where it is added, what it starts from, and the files it comes to."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import FluxKontextPipeline, FluxTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from families import flux, open_project
from families.checkpoints import locate
from families.protocol import TextEmbeds
from families.quantize import quantize_and_place
from schemas.errors import UserError
from schemas.project import Project
from train.adapter import (
    LORA_NAME,
    adapter_layers,
    add_adapter,
    check_gradients,
    load_adapter,
    save_adapter,
    start_from_file,
)
from train.checkpoint import same_layers
from train.data import Batch
from train.fusing import fuse
from train.step import base_dtype, step_loss

CPU = torch.device("cpu")
Open = Callable[..., Project]


@pytest.fixture
def opened(make_project: Callable[..., Path]) -> Open:
    """Open one project under other and other options."""
    folder = make_project(photos=1, mixed_precision="no")
    return lambda **options: open_project(folder, overrides=[f"{name}={value}" for name, value in options.items()])


def _network(project: Project) -> nn.Module:
    denoiser = flux.load_denoiser(locate(project, project.family.denoiser), base_dtype(project.trainer))
    if project.trainer.fuse_qkv_projections:
        fuse(denoiser)
    precision, spared = project.trainer.base_model_precision, project.family.unquantised
    return quantize_and_place(denoiser.requires_grad_(False), precision, spared, CPU, "cpu")


def _adapted(project: Project) -> nn.Module:
    denoiser = _network(project)
    add_adapter(denoiser, project)
    return denoiser


def _batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    latents, noise, reference = (torch.randn(1, 16, 4, 6, generator=generator) for _ in range(3))
    text = torch.randn(1, 8, 64, generator=generator), torch.randn(1, 32, generator=generator)
    return Batch(("a",), (1,), latents, noise, (reference,), TextEmbeds(*text, (5,)))


def _trained(project: Project, steps: int = 3) -> nn.Module:
    denoiser = _network(project)
    optimizer = torch.optim.AdamW(add_adapter(denoiser, project), lr=1e-2)
    for step in range(steps):
        step_loss(flux, denoiser, _batch(), step + 1, project.trainer).backward()
        optimizer.step()
        optimizer.zero_grad()
    return denoiser.eval()


def _output(denoiser: nn.Module) -> torch.Tensor:
    batch = _batch()
    with torch.no_grad():
        return flux.velocity(
            denoiser.eval(), batch.noise, batch.references, batch.text, torch.tensor([0.5]), torch.ones(1)
        )


def _equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def _saved(folder: Path, project: Project, denoiser: nn.Module) -> Path:
    return save_adapter(folder, project, denoiser, adapter_layers(denoiser), {"config": {"seed": 42}})


# Adding


@pytest.mark.parametrize("kind", ["standard", "lycoris"])
@pytest.mark.parametrize("preset", ["tiny", "nano"])
def test_a_preset_that_wraps_nothing_is_an_error(opened: Open, preset: str, kind: str) -> None:
    project = opened(flux_lora_target=preset, lora_type=kind)
    with pytest.raises(UserError, match=f"flux_lora_target: '{preset}' wraps no layer of this model; presets: mmdit"):
        add_adapter(_network(project), project)


@pytest.mark.parametrize("kind", ["standard", "lycoris"])
def test_first_weights_depend_on_the_seed_and_the_layer_alone(opened: Open, kind: str) -> None:
    layers = adapter_layers(_adapted(opened(lora_type=kind)))
    torch.manual_seed(99)
    half = opened(lora_type=kind, mixed_precision="bf16", base_model_precision="int8-quanto")
    assert _equal(layers, adapter_layers(_adapted(half)))
    wider = adapter_layers(_adapted(opened(lora_type=kind, flux_lora_target="all+ffs")))
    assert layers.keys() < wider.keys()
    assert _equal(layers, {name: wider[name] for name in layers})
    other = adapter_layers(_adapted(opened(lora_type=kind, seed=43)))
    drawn = [name for name in layers if layers[name].any()]
    assert len(drawn) == len(layers) / 2
    assert not any(torch.equal(layers[name], other[name]) for name in drawn)


@pytest.mark.parametrize("kind", ["standard", "lycoris"])
def test_a_fresh_adapter_changes_nothing(opened: Open, kind: str) -> None:
    project = opened(lora_type=kind, flux_lora_target="all+ffs")
    assert torch.equal(_output(_adapted(project)), _output(_network(project)))


def test_adding_an_adapter_leaves_the_random_numbers_of_others_alone(opened: Open) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    _adapted(opened())
    assert torch.equal(torch.rand(3), expected)


# Gradients


class _ForwardsAlone(nn.Linear):
    """A layer whose product has no backward pass, as kernels for inference have none."""

    def forward(self, values: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(values)


def test_layers_that_lose_their_gradient_in_silence_are_an_error_that_names_precision_and_preset(opened: Open) -> None:
    project, spared = opened(base_model_precision="int8-torchao"), ("proj_out", "x_embedder", "context_embedder")
    denoiser = flux.load_denoiser(locate(project, project.family.denoiser), torch.float32).requires_grad_(False)
    for name, layer in denoiser.named_modules():
        if isinstance(layer, nn.Linear) and name not in spared:
            layer.__class__ = _ForwardsAlone
    add_adapter(denoiser, project)
    loss = step_loss(flux, denoiser, _batch(), 1, project.trainer)
    loss.backward()
    assert torch.isfinite(loss)
    with pytest.raises(UserError, match=r"12 of 28 trained tensors receive no gradient.*'int8-torchao'.*'all'"):
        check_gradients(denoiser.named_parameters(), project)


# Files


def test_a_file_says_what_made_it_and_equal_tensors_make_equal_files(opened: Open, tmp_path: Path) -> None:
    project = opened(lora_alpha=4)
    denoiser = _trained(project)
    path = _saved(tmp_path / "one", project, denoiser)
    assert path == tmp_path / "one" / LORA_NAME
    with safe_open(path, "pt") as file:
        header = file.metadata()
    assert json.loads(header["pairline"]) == {"config": {"seed": 42}}
    assert json.loads(header["lora_adapter_metadata"])["transformer.lora_alpha"] == 4
    assert _equal(load_file(path), {f"transformer.{name}": one for name, one in adapter_layers(denoiser).items()})
    assert path.read_bytes() == _saved(tmp_path / "other", project, denoiser).read_bytes()
    assert same_layers(path, adapter_layers(denoiser))
    assert [file.name for file in path.parent.iterdir()] == [LORA_NAME]


def test_a_write_that_fails_leaves_the_file_before_it(
    opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = opened()
    denoiser = _adapted(project)
    path = _saved(tmp_path, project, denoiser)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(flux, "save_lora", full)
        with pytest.raises(UserError, match="No space left"):
            _saved(tmp_path, project, _trained(project))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.glob("*safetensors*")] == [LORA_NAME]


def test_weights_of_another_rank_preset_or_kind_are_an_error_that_names_the_first_difference(opened: Open) -> None:
    denoiser = _adapted(opened(lora_rank=8))
    for options, message in (
        ({"lora_rank": 4}, r"lora_A.weight is \(4, 64\) in it, \(8, 64\) here \(it holds LoRA of rank 4 .* of rank 8"),
        ({"flux_lora_target": "mmdit"}, r"add_k_proj.* is not in it \(it holds LoRA of rank 8 on 10 layers"),
        ({"flux_lora_target": "all+ffs", "lora_rank": 8}, r"proj_out.* is not trained by this configuration"),
        ({"lora_type": "lycoris"}, r"it holds LoKr of whole matrices on 14 layers, .* trains LoRA of rank 8 on 14"),
    ):
        with pytest.raises(UserError, match=message):
            load_adapter(denoiser, adapter_layers(_adapted(opened(**options))))


# init_lora


@pytest.mark.parametrize("kind", ["standard", "lycoris"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_starts_from_a_file(opened: Open, tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    source = opened(lora_type=kind)
    denoiser = _trained(source)
    path = _saved(tmp_path / "lora", source, denoiser)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file({name: one.to(dtype) for name, one in load_file(path).items()}, path, header)
    for named in (path, path.parent):
        project = opened(lora_type=kind, seed=5, init_lora=named)
        started = _adapted(project)
        start_from_file(started, project)
        expected = {name: one.to(dtype).float() for name, one in adapter_layers(denoiser).items()}
        assert _equal(adapter_layers(started), expected)


def test_what_init_lora_cannot_start_from_is_told(opened: Open, tmp_path: Path) -> None:
    source = opened(lora_rank=8)
    path = _saved(tmp_path, source, _trained(source))
    bare, foreign, broken = tmp_path / "bare.safetensors", tmp_path / "foreign.safetensors", tmp_path / "broken"
    stored = load_file(path)
    save_file(stored, bare)
    save_file({f"lora_unet_{name}": one for name, one in stored.items()}, foreign)
    broken.write_bytes(b"no such thing")

    def started(named: Path, **options: object) -> None:
        project = opened(init_lora=named, **options)
        start_from_file(_adapted(project), project)

    started(bare, lora_rank=8)  # no metadata: alpha is the rank
    for named, options, message in (
        (path, {"lora_rank": 4}, r"init_lora: .*lora_A.weight is \(8, 64\) in it, \(4, 64\) here"),
        (path, {"lora_rank": 8, "lora_alpha": 16}, "strength, alpha / rank, is 1, here it is 2"),
        (bare, {"lora_rank": 8, "lora_alpha": 4}, "strength, alpha / rank, is 1, here it is 0.5"),
        (path, {"lora_type": "lycoris"}, "it holds LoRA of rank 8 .* trains LoKr"),
        (foreign, {"lora_rank": 8}, "not in the format of diffusers.*lora_unet_"),
        (broken, {}, "cannot be read"),
        (tmp_path / "nothing", {}, "cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            started(named, **options)


# LoKr


def _lycoris(folder: Path, **options: object) -> Path:
    path = folder / "lycoris.json"
    path.write_text(json.dumps({"algo": "lokr", **options}))
    return path


def test_lokr_has_the_factor_of_its_file_and_the_strength_of_lycoris(opened: Open, tmp_path: Path) -> None:
    whole = _lycoris(tmp_path, linear_dim=10000, linear_alpha=1, factor=4)
    project = opened(lora_type="lycoris", lycoris_config=whole, flux_lora_target="all+ffs")
    denoiser = _adapted(project)
    layer = denoiser.get_submodule("transformer_blocks.0.attn.to_q")
    assert (layer.lokr_w1["default"].shape, layer.lokr_w2["default"].shape) == ((4, 4), (16, 16))
    assert {one.scaling["default"] for one in denoiser.modules() if hasattr(one, "lokr_w1")} == {1.0}

    low = _lycoris(tmp_path, linear_dim=16, linear_alpha=4, factor=4)
    project = opened(lora_type="lycoris", lycoris_config=low, flux_lora_target="all+ffs")
    denoiser = _trained(project)
    small, large = (denoiser.get_submodule(f"transformer_blocks.0.{name}") for name in ("attn.to_q", "ff.net.2"))
    assert (small.scaling["default"], large.scaling["default"]) == (1.0, 0.25)
    assert large.lokr_w2_a["default"].shape == (16, 16)
    path = _saved(tmp_path, project, denoiser)
    fresh = _network(project)
    fresh.load_lora_adapter(path.parent, weight_name=path.name, prefix="transformer")
    assert torch.equal(_output(fresh), _output(denoiser))


def test_diffusers_loads_lokr_into_the_transformer_and_not_into_the_pipeline(opened: Open, tmp_path: Path) -> None:
    project = opened(lora_type="lycoris")
    denoiser = _trained(project)
    path = _saved(tmp_path, project, denoiser)
    pipeline = FluxKontextPipeline.from_pretrained(locate(project, project.family.denoiser))
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        pipeline.load_lora_weights(tmp_path)
    pipeline.transformer.load_lora_adapter(path.parent, weight_name=path.name, prefix="transformer")
    assert torch.equal(_output(pipeline.transformer), _output(denoiser))


# Fused projections


@pytest.mark.parametrize("precision", ["no_change", "int8-quanto", "fp8-torchao"])
def test_the_lora_of_fused_layers_acts_the_same_on_single_ones(opened: Open, tmp_path: Path, precision: str) -> None:
    project = opened(fuse_qkv_projections="true", base_model_precision=precision, flux_lora_target="all+ffs")
    denoiser = _trained(project)
    names = [name for name, _ in denoiser.named_modules()]
    assert any(name.endswith("attn.to_qkv") for name in names)
    assert not any(name.endswith(("attn.to_q", "attn.to_v", "add_k_proj")) for name in names)
    path = _saved(tmp_path, project, denoiser)
    single = opened(base_model_precision=precision, flux_lora_target="all+ffs")
    assert load_file(path).keys() == {f"transformer.{name}" for name in adapter_layers(_adapted(single))}
    fresh = _network(single)
    fresh.load_lora_adapter(path.parent, weight_name=path.name, prefix="transformer")
    assert torch.equal(_output(fresh), _output(denoiser))
    assert same_layers(path, adapter_layers(denoiser))

    started = _adapted(opened(fuse_qkv_projections="true", init_lora=path, flux_lora_target="all+ffs"))
    start_from_file(started, opened(init_lora=path))
    assert _equal(adapter_layers(started), adapter_layers(denoiser))


def test_layers_trained_apart_cannot_be_fused(opened: Open) -> None:
    fused = _adapted(opened(fuse_qkv_projections="true"))
    with pytest.raises(UserError, match=r"to_q\.lora_A\.weight .* trained apart.*fuse_qkv_projections"):
        load_adapter(fused, adapter_layers(_trained(opened())))


# All weights


def test_all_weights_are_trained_and_saved_as_the_checkpoints_component(opened: Open, tmp_path: Path) -> None:
    project = opened(model_type="full")
    base = adapter_layers(_network(project))
    denoiser = _network(project)
    parameters = add_adapter(denoiser, project)
    assert len(parameters) == len(list(denoiser.parameters()))
    step_loss(flux, denoiser, _batch(), 1, project.trainer).backward()
    check_gradients(denoiser.named_parameters(), project)
    torch.optim.AdamW(parameters, lr=1e-3).step()
    for _ in range(2):  # the second replaces the first
        path = _saved(tmp_path, project, denoiser)
    assert path == tmp_path / "transformer"
    assert json.loads((path / "pairline.json").read_text()) == {"config": {"seed": 42}}
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path, subfolder="transformer")
    assert torch.equal(_output(loaded), _output(denoiser))
    assert not _equal(adapter_layers(loaded), base)
    assert [one.name for one in tmp_path.glob("transformer*")] == ["transformer"]
    fresh = _adapted(project)
    load_adapter(fresh, adapter_layers(denoiser))
    assert torch.equal(_output(fresh), _output(denoiser))
