"""Training FLUX.2: every precision, kind of adapter and way of computing; and files that its pipelines load."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from families import FAMILIES, flux2, open_project
from families.checkpoints import locate
from families.protocol import TextEmbeds
from families.quantize import quantize_and_place
from families.routing import Routing
from families.runtime import family_of
from schemas.project import Project
from schemas.trainer import BasePrecision, Route, TrainerConfig
from train.adapter import adapter_layers, add_adapter, check_gradients, save_adapter, start_from_file
from train.data import Batch, Image, Sample
from train.fusing import fuse
from train.memory import checkpoint_blocks
from train.order import epoch_batches
from train.step import base_dtype, step_loss

Open = Callable[..., Project]
Pipelines = dict[str, Flux2Pipeline | Flux2KleinPipeline]

CPU = torch.device("cpu")
PRESETS = tuple(FAMILIES["flux2"].lora_targets)
LAYERS = {"all": 2 * 12 + 6 * 2, "attention": 2 * 8 + 6 * 2, "mlp": 2 * 4, "tiny": 2 * 3, "diffusers": 2 * 4 + 6 * 2}
LOKR = {
    "4": {"factor": 4, "full_matrix": True},
    "auto": {"factor": -1, "full_matrix": True},
    "low": {"factor": 4, "linear_dim": 4, "linear_alpha": 2},
}
ADAPTERS = (
    {"lora_rank": 4, "lora_alpha": 2},
    *({"lora_type": "lycoris", "lycoris_config": f"{one}.json"} for one in LOKR),
)


@pytest.fixture(scope="module")
def opened(copy_demo: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory, tiny_flux2: Path) -> Open:
    """Open one project under other and other options, of dev unless another flavour is named."""
    folder = copy_demo(tmp_path_factory.mktemp("flux2"), photos=1, model_family="flux2", learning_rate=1e-2)
    for name, values in LOKR.items():
        (folder / f"{name}.json").write_text(json.dumps({"algo": "lokr", **values}))

    def opened(flavour: str = "dev", **options: object) -> Project:
        asked = {
            "model_flavour": flavour, "pretrained_model_name_or_path": tiny_flux2 / flavour, "mixed_precision": "no",
        }  # fmt: skip
        return open_project(folder, overrides=[f"{name}={value}" for name, value in (asked | options).items()])

    return opened


def _network(project: Project) -> nn.Module:
    config = project.trainer
    checkpoint = locate(project, project.family.denoiser)
    denoiser = family_of(project).load_denoiser(checkpoint, base_dtype(config)).requires_grad_(False)
    if config.fuse_qkv_projections:
        fuse(denoiser)
    return quantize_and_place(denoiser, config.base_model_precision, project.family.unquantised, CPU, "cpu")


def _batch(denoiser: nn.Module, *references: tuple[int, int], size: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(size, *shape, generator=generator)

    text = TextEmbeds(draw(8, denoiser.config.joint_attention_dim), None, (5,) * size)
    seeds = tuple(range(1, size + 1))
    return Batch(
        tuple(map(str, seeds)),
        seeds,
        draw(128, 4, 6),
        draw(128, 4, 6),
        tuple(draw(128, *one) for one in references),
        text,
    )


ONE = ((6, 4),)
TWO = ((6, 4), (3, 5))


def _output(denoiser: nn.Module) -> Tensor:
    batch, guidance = _batch(denoiser, *TWO), torch.ones(1) if flux2.takes_guidance(denoiser) else None
    with torch.no_grad():
        return flux2.velocity(denoiser.eval(), batch.noise, batch.references, batch.text, torch.tensor([0.5]), guidance)


def _random(denoiser: nn.Module, project: Project) -> nn.Module:
    """Add an adapter that changes much."""
    generator = torch.Generator().manual_seed(3)
    for parameter in add_adapter(denoiser, project):
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=generator)
    return denoiser


def _losses(
    denoiser: nn.Module, project: Project, batch: Batch, steps: int, routing: Routing | None = None
) -> list[float]:
    """Train for some steps, at the same times and noise; every trained tensor must have a gradient each time."""
    parameters = [one for one in denoiser.parameters() if one.requires_grad] or add_adapter(denoiser, project)
    optimizer = torch.optim.AdamW(parameters, lr=project.trainer.learning_rate)
    losses = []
    for _ in range(steps):
        loss = step_loss(flux2, denoiser.train(), batch, 1, project.trainer, routing)
        loss.backward()
        check_gradients(denoiser.named_parameters(), project)
        losses.append(loss.item())
        optimizer.step()
        if len(losses) > 1:  # in the first step LoRA's A has a gradient of zero, B being zero
            assert all(one.grad is not None and one.grad.any() for one in parameters)
        optimizer.zero_grad()
    assert all(map(math.isfinite, losses))
    return losses


# Precisions


QUANTISED = get_args(BasePrecision)[1:]


@pytest.mark.parametrize("kind", ["standard", "lycoris"])
@pytest.mark.parametrize(
    ("precision", "mixed", "default"),
    [("no_change", "bf16", "fp32")]  # of what is quantised, that is "no"
    + [(precision, mixed, "bf16") for precision in ("no_change", *QUANTISED) for mixed in ("bf16", "no")],
)
def test_every_precision_trains_every_adapter(
    opened: Open, precision: str, kind: str, mixed: str, default: str
) -> None:
    project = opened(
        base_model_precision=precision, lora_type=kind, mixed_precision=mixed, base_model_default_dtype=default
    )
    denoiser = _network(project)
    assert denoiser.x_embedder.weight.dtype == (
        torch.bfloat16 if (mixed, default) == ("bf16", "bf16") else torch.float32
    )
    parameters = add_adapter(denoiser, project)
    assert len(parameters) == 2 * LAYERS["all"] and {one.dtype for one in parameters} == {torch.float32}
    losses = _losses(denoiser, project, _batch(denoiser, *ONE), 2)
    assert losses[1] < 0.9995 * losses[0], losses


def test_gradients_of_every_kind_of_block_are_the_same_when_blocks_are_recomputed(opened: Open) -> None:
    def gradients(interval: int) -> dict[str, Tensor]:
        project = opened(lora_dropout=0.5)
        denoiser = _random(_network(project), project).train()
        if interval:
            options = TrainerConfig(gradient_checkpointing_interval=interval, lora_dropout=0.5)
            checkpoint_blocks(flux2, denoiser, options)
        routing = Routing(flux2.blocks(denoiser), [Route(selection_ratio=0.5, start_layer_idx=1, end_layer_idx=4)])
        torch.manual_seed(1)
        step_loss(flux2, denoiser, _batch(denoiser, *TWO, size=2), 1, project.trainer, routing).backward()
        return {name: one.grad for name, one in denoiser.named_parameters() if one.requires_grad}

    plain = gradients(0)
    assert len(plain) == 2 * LAYERS["all"] and all(one.any() for one in plain.values())
    for interval in (1, 2):
        found = gradients(interval)
        assert all(torch.equal(found[name], one) for name, one in plain.items())


# Routes and rollouts


def _by_hand(model: Flux2Transformer2DModel, batch: Batch, span: tuple[int, int], kept: Tensor) -> Tensor:
    """Run the transformer block by block; from first to last of a span only the kept target tokens take part."""
    rows_of_text, target = batch.text.embed.shape[1], 24
    images = model.x_embedder(torch.cat([flux2.pack(one) for one in (batch.noise, *batch.references)], 1))
    words = model.context_embedder(batch.text.embed)
    told = torch.full((len(images),), 1000.0)
    temb = model.time_guidance_embed(0.5 * told, told)
    mods = model.double_stream_modulation_img(temb), model.double_stream_modulation_txt(temb)
    ids = [flux2.text_ids(words), flux2.target_ids(batch.noise), *flux2.reference_ids(batch.references)]
    cos, sin = model.pos_embed(torch.cat(ids))
    whole = images
    for number, block in enumerate((*model.transformer_blocks, *model.single_transformer_blocks)):
        rows = torch.arange(len(cos))
        if span[0] <= number <= span[1]:
            rows = torch.cat([rows[:rows_of_text], rows_of_text + kept, rows[rows_of_text + target :]])
        if number == span[0]:
            whole, images = images, images[:, rows[rows_of_text:] - rows_of_text]
        rotary = (cos[rows], sin[rows])
        if number < 2:
            words, images = block(
                hidden_states=images, encoder_hidden_states=words, temb_mod_img=mods[0], temb_mod_txt=mods[1],
                image_rotary_emb=rotary,
            )  # fmt: skip
        else:
            joined = torch.cat([words, images], 1)
            joined = block(joined, None, model.single_stream_modulation(temb), rotary)
            words, images = joined[:, :rows_of_text], joined[:, rows_of_text:]
        if number == span[1]:
            filled = whole[:, :target].clone()
            filled[:, kept] = images[:, : len(kept)]
            images = torch.cat([filled, images[:, len(kept) :]], 1)
    return flux2.unpack(model.proj_out(model.norm_out(images, temb))[:, :target], 4, 6)


@pytest.mark.parametrize("references", [(), ONE, TWO], ids=len)
@pytest.mark.parametrize(("start", "end"), [(2, -2), (4, -4), (0, 1), (1, -1)])
def test_routes_equal_a_pass_written_by_hand_to_the_bit(
    opened: Open, start: int, end: int, references: tuple[tuple[int, int], ...]
) -> None:
    denoiser = _network(opened()).requires_grad_(True).train()
    batch, ones = _batch(denoiser, *references, size=2), torch.ones(2)
    routing = Routing(flux2.blocks(denoiser), [Route(selection_ratio=0.5, start_layer_idx=start, end_layer_idx=end)])

    def velocity() -> Tensor:
        return flux2.velocity(denoiser, batch.noise, batch.references, batch.text, 0.5 * ones, ones)

    plain = velocity()
    routing.choose(11, 24, 8, CPU)
    kept = routing._spans[0].now.kept
    found = velocity()
    assert len(kept) == 12 and not torch.equal(found, plain)
    expected = _by_hand(_network(opened()).requires_grad_(True).train(), batch, (start, end % 8), kept)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("flavour", ["dev", "klein-9b"])
@pytest.mark.parametrize(
    "options", [{"start_layer_idx": 2, "end_layer_idx": -2}, {"start_layer_idx": 4, "end_layer_idx": -4}, None]
)
def test_routes_and_rollouts_train(opened: Open, flavour: str, options: dict[str, int] | None) -> None:
    rollout = {} if options else {"scheduled_sampling_max_step_offset": 300, "scheduled_sampling_probability": 1.0}
    project = opened(flavour, mixed_precision="bf16", **rollout)
    denoiser = _network(project)
    routing = Routing(flux2.blocks(denoiser), [Route(selection_ratio=0.5, **options)]) if options else None
    losses = _losses(denoiser, project, _batch(denoiser, *ONE, size=2), 3, routing)
    assert losses[-1] < losses[0]


# Batches


@pytest.mark.parametrize("flavour", ["dev", "klein-4b"])
def test_a_sample_of_a_batch_with_references_of_unlike_sizes_is_what_it_is_alone(opened: Open, flavour: str) -> None:
    project = opened(flavour, flux_guidance_mode="random-range")
    denoiser = _network(project)
    batch = _batch(denoiser, *TWO, size=3)
    with torch.no_grad():
        together = step_loss(flux2, denoiser, batch, 1, project.trainer).item()
        apart = [step_loss(flux2, denoiser, _one_of(batch, place), 1, project.trainer).item() for place in range(3)]
    assert together == pytest.approx(sum(apart) / 3, rel=1e-5) and len(set(apart)) == 3


def _one_of(batch: Batch, place: int) -> Batch:
    def cut(tensor: Tensor) -> Tensor:
        return tensor[place : place + 1]

    return Batch(
        batch.sample_ids[place : place + 1], batch.seeds[place : place + 1], cut(batch.latents), cut(batch.noise),
        tuple(map(cut, batch.references)), TextEmbeds(cut(batch.text.embed), None, (5,)),
    )  # fmt: skip


def test_references_of_different_count_never_share_a_batch(opened: Open) -> None:
    project = opened(
        train_batch_size=3, conditioning_multidataset_sampling="combined", conditioning_dropout_probability=0.3
    )
    [dataset] = project.targets
    image = Image("store", "encoder", "key")
    samples = [
        Sample(f"s{number}", image, ((image, ()),) * (number % 3), ("p",), 0, dataset.id) for number in range(60)
    ]
    shelf = SimpleNamespace(
        samples=samples, shapes=lambda one: ((128, 4, 6), (512, 120), *(((128, 6, 4),) * len(one.references)))
    )
    batches = epoch_batches(project, shelf, 0)
    assert all(len({len(one.references) for one in batch}) == 1 for batch in batches)
    assert {len(batch[0].references) for batch in batches} == {0, 1, 2}
    assert sorted(one.sample_id for batch in batches for one in batch) == sorted(one.sample_id for one in samples)


# Files


@pytest.fixture(scope="module")
def pipelines(tiny_flux2: Path) -> Pipelines:
    kinds = {"dev": Flux2Pipeline, "klein-9b": Flux2KleinPipeline}
    return {flavour: kind.from_pretrained(tiny_flux2 / flavour) for flavour, kind in kinds.items()}


@pytest.mark.parametrize(("flavour", "kinds"), [("dev", ADAPTERS), ("klein-9b", ADAPTERS[:2])])
@pytest.mark.parametrize("preset", PRESETS)
def test_files_of_every_preset_do_in_the_pipelines_what_they_did_here(
    opened: Open, tmp_path: Path, pipelines: Pipelines, preset: str, flavour: str, kinds: Sequence[dict[str, object]]
) -> None:
    pipeline = pipelines[flavour]
    plain = _output(_network(opened(flavour)))
    for number, kind in enumerate(kinds):
        project = opened(flavour, flux_lora_target=preset, **kind)
        denoiser = _random(_network(project), project)
        path = save_adapter(tmp_path / str(number), project, denoiser, adapter_layers(denoiser), {})
        names = {name.rpartition(".lo")[0] for name in load_file(path)}
        assert len(names) == LAYERS[preset] and all(name.startswith("transformer.") for name in names)
        pipeline.transformer = _network(opened(flavour))
        pipeline.load_lora_weights(path.parent)
        expected = _output(denoiser)
        assert torch.equal(_output(pipeline.transformer), expected)
        assert not torch.allclose(expected, plain, atol=1e-3)
        if preset == "diffusers":
            own = _network(opened(flavour))
            assert flux2.load_adapter(own, path, 1.0) == LAYERS[preset]
            assert torch.equal(_output(own), expected)


@pytest.mark.parametrize("precision", ["no_change", "int8-quanto"])
@pytest.mark.parametrize("flavour", ["dev", "klein-9b"])
def test_files_of_fused_layers_have_q_k_and_v_apart_and_do_the_same(
    opened: Open, tmp_path: Path, pipelines: Pipelines, flavour: str, precision: str
) -> None:
    project = opened(flavour, fuse_qkv_projections="true", base_model_precision=precision, lora_rank=4, lora_alpha=2)
    denoiser = _random(_network(project), project)
    wrapped = {name.rpartition(".lora_A")[0] for name, _ in denoiser.named_modules() if name.endswith("lora_A.default")}
    assert len(wrapped) == LAYERS["all"] - 2 * 4  # of each double block two of three are gone, twice
    assert sum(name.endswith(("to_qkv", "to_added_qkv")) for name in wrapped) == 4
    path = save_adapter(tmp_path, project, denoiser, adapter_layers(denoiser), {})
    names = {name.rpartition(".lora_")[0] for name in load_file(path)}
    assert len(names) == LAYERS["all"] and not any(name.endswith(("to_qkv", "to_added_qkv")) for name in names)
    pipeline = pipelines[flavour]
    pipeline.transformer = _network(opened(flavour, base_model_precision=precision))
    if precision == "no_change":
        pipeline.load_lora_weights(path.parent)
    else:
        flux2.load_adapter(pipeline.transformer, path, 1.0)
    assert torch.equal(_output(pipeline.transformer), _output(denoiser))
    started = _network(project)
    add_adapter(started, project)
    start_from_file(started, opened(flavour, init_lora=path, lora_rank=4, lora_alpha=2))
    assert torch.equal(_output(started), _output(denoiser))


@pytest.mark.parametrize(("mixed", "flavour"), [("no", "dev"), ("bf16", "dev"), ("bf16", "klein-9b")])
def test_all_weights_are_trained_and_saved(opened: Open, tmp_path: Path, mixed: str, flavour: str) -> None:
    project = opened(
        flavour, model_type="full", mixed_precision=mixed, base_model_default_dtype="fp32", learning_rate=1e-3
    )
    denoiser = _network(project)
    assert len(add_adapter(denoiser, project)) == len(list(denoiser.parameters()))
    before = _output(denoiser)
    losses = _losses(denoiser, project, _batch(denoiser, *ONE), 4)
    assert losses[-1] < losses[0]
    path = save_adapter(tmp_path, project, denoiser, adapter_layers(denoiser), {})
    loaded = Flux2Transformer2DModel.from_pretrained(path)
    assert torch.equal(_output(loaded), _output(denoiser)) and not torch.equal(_output(loaded), before)
