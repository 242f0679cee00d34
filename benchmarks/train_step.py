"""One LoRA step on a full-size model: pairline's beside the loop of diffusers' examples, in one run.

Run on a machine with a GPU: `python benchmarks/train_step.py [--model flux2-dev] [--variant pairline] [--pixels 1024]
[--batch 1] [--steps 6]`. Weights are random and made on the device, so nothing is downloaded; speed and memory do not
depend on them.
"""

import argparse
import json
import multiprocessing
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel
from peft import LoraConfig

from families import open_project
from families.protocol import TextEmbeds
from families.quantize import quantize_and_place
from families.runtime import family_of
from schemas.project import Project
from train.adapter import preset_of
from train.data import Batch
from train.network import make_network
from train.optimizer import make_optimizer
from train.step import step_loss

DEVICE = torch.device("cuda")


@dataclass(frozen=True)
class Model:
    """A full-size transformer, and the preset that is trained of it."""

    family: str
    flavour: str
    network: type[torch.nn.Module]
    config: dict[str, object]  # where it is not the class's default
    preset: str


def klein(flavour: str, heads: int, blocks: tuple[int, int], text_width: int) -> Model:
    """Describe a FLUX.2 klein by what sets it apart from dev."""
    config = {"num_layers": blocks[0], "num_single_layers": blocks[1], "num_attention_heads": heads}
    config |= {"joint_attention_dim": text_width, "guidance_embeds": False}
    return Model("flux2", flavour, Flux2Transformer2DModel, config, "all")


MODELS = {
    "kontext": Model("flux", "kontext", FluxTransformer2DModel, {"guidance_embeds": True}, "all+ffs"),
    "flux2-dev": Model("flux2", "dev", Flux2Transformer2DModel, {}, "all"),
    "klein-9b": klein("klein-9b", 32, (8, 24), 12288),
    "klein-4b": klein("klein-4b", 24, (5, 20), 7680),
}


def random_transformer(model: Model = MODELS["kontext"]) -> torch.nn.Module:
    """Make a full-size transformer of random bfloat16 weights on the device."""
    with torch.device("meta"):
        network = model.network(**model.config)
    network = network.to(torch.bfloat16).to_empty(device=DEVICE)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02)
            else:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return network.requires_grad_(False)


def random_batch(project: Project, pixels: int, count: int) -> Batch:
    """Make latents of a target and one reference of the same size, and text of the usual length."""
    family, side = project.family, pixels // project.family.latent_scale
    tokens = project.text_tokens
    embed = torch.randn(count, tokens, project.model.text_width.usual, device=DEVICE)
    pooled = torch.randn(count, family.pooled_width.usual, device=DEVICE) if family.pooled_width else None
    ids = tuple(str(number) for number in range(count))
    shape = (count, family.latent_channels.usual, side, side)
    latents, noise, reference = (torch.randn(shape, device=DEVICE) for _ in range(3))
    return Batch(ids, tuple(range(count)), latents, noise, (reference,), TextEmbeds(embed, pooled, (tokens,) * count))


def text_arguments(family: object, text: TextEmbeds) -> dict[str, torch.Tensor]:
    """Return what a transformer is told of its text: FLUX.1 a pooled embed too, FLUX.2 where its tokens are."""
    embed = text.embed.to(torch.bfloat16)
    if text.pooled is None:
        return {"encoder_hidden_states": embed, "txt_ids": family.text_ids(embed)}
    ids = torch.zeros(embed.shape[1], 3, device=DEVICE)
    return {"encoder_hidden_states": embed, "pooled_projections": text.pooled.to(torch.bfloat16), "txt_ids": ids}


def diffusers_step(
    model: torch.nn.Module, batch: Batch, project: Project, *, as_written: bool = False
) -> Callable[[], float]:
    """Return a step as diffusers' examples run it: bfloat16, autocast, gradient checkpointing.

    LoRA is in float32 and attention is flash, as in pairline, unless all is `as_written`: LoRA in the weights' own
    bfloat16, and whichever attention PyTorch prefers.
    """
    family, precision = family_of(project), project.trainer.base_model_precision
    model = quantize_and_place(model, precision, project.family.unquantised, DEVICE, "accelerator")
    model.enable_gradient_checkpointing()
    targets = project.family.lora_targets[preset_of(project)]
    model.add_adapter(LoraConfig(r=16, lora_alpha=16, init_lora_weights="gaussian", target_modules=targets))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not as_written:
        model.set_attention_backend("_native_flash")
        for parameter in parameters:
            parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    half = {"dtype": torch.bfloat16}
    latents, reference = family.pack(batch.latents).to(**half), family.pack(batch.references[0]).to(**half)
    ids = torch.cat([family.target_ids(batch.latents), *family.reference_ids(batch.references)])
    text, count = text_arguments(family, batch.text), latents.shape[0]
    guidance = torch.ones(count, device=DEVICE) if family.takes_guidance(model) else None

    def step() -> float:
        noise = torch.randn_like(latents)
        sigma = torch.sigmoid(torch.randn(count, device=DEVICE))
        noisy = ((1 - sigma.view(-1, 1, 1)) * latents + sigma.view(-1, 1, 1) * noise).to(**half)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            predicted = model(
                hidden_states=torch.cat([noisy, reference], 1),
                timestep=sigma,
                guidance=guidance,
                img_ids=ids,
                return_dict=False,
                **text,
            )[0][:, : latents.shape[1]]
            loss = (predicted.float() - (noise - latents).float()).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def pairline_step(model: torch.nn.Module, batch: Batch, project: Project) -> Callable[[], torch.Tensor]:
    """Return a step as `train run` takes it, which reads no number of a step before the next is launched."""
    network, family = make_network(project, model, DEVICE), family_of(project)
    optimizer = make_optimizer(network.parameters, project.trainer)

    def step() -> torch.Tensor:
        loss = step_loss(family, network.denoiser, batch, 1, project.trainer)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


INT8, FLOAT8 = {"base_model_precision": "int8-quanto"}, {"base_model_precision": "fp8-torchao"}
COMPILED = {"dynamo_backend": "inductor"}
TUNED = COMPILED | {"dynamo_mode": "max-autotune"}
KEPT = {"gradient_checkpointing": False}
SELECTED = {"gradient_checkpointing_keep": "attention"}
AWAY = {"gradient_checkpointing_backend": "unsloth"}
OFFLOADED = {"enable_group_offload": True, "group_offload_use_stream": True}
VARIANTS = {  # whose step, and options
    "diffusers": (diffusers_step, {}),
    "diffusers int8-quanto": (diffusers_step, INT8),
    "diffusers as written": (partial(diffusers_step, as_written=True), {}),
    "pairline": (pairline_step, {}),
    "pairline compiled": (pairline_step, COMPILED),
    "pairline compiled, attention kept": (pairline_step, COMPILED | SELECTED),
    "pairline compiled, all kept": (pairline_step, COMPILED | KEPT),
    "pairline tuned, all kept": (pairline_step, TUNED | KEPT),
    "pairline int8-quanto": (pairline_step, INT8),
    "pairline int8-quanto compiled": (pairline_step, COMPILED | INT8),
    "pairline int8-quanto compiled, attention kept": (pairline_step, COMPILED | SELECTED | INT8),
    "pairline int8-quanto compiled, all kept": (pairline_step, COMPILED | KEPT | INT8),
    "pairline fp8-torchao": (pairline_step, FLOAT8),
    "pairline fp8-torchao compiled": (pairline_step, COMPILED | FLOAT8),
    "pairline fp8-torchao compiled, attention kept": (pairline_step, COMPILED | SELECTED | FLOAT8),
    "pairline fp8-torchao compiled, all kept": (pairline_step, COMPILED | KEPT | FLOAT8),
    "pairline fp8-torchao tuned, all kept": (pairline_step, TUNED | KEPT | FLOAT8),
    "pairline compiled, attention kept away": (pairline_step, COMPILED | SELECTED | AWAY),
    "pairline fp8-torchao compiled, kept away": (pairline_step, COMPILED | AWAY | FLOAT8),
    "pairline fp8-quanto": (pairline_step, {"base_model_precision": "fp8-quanto"}),
    "pairline int4-quanto": (pairline_step, {"base_model_precision": "int4-quanto"}),
    "pairline group offload": (pairline_step, OFFLOADED),
    "pairline compiled, group offload": (pairline_step, COMPILED | OFFLOADED),
    "pairline fp8-torchao compiled, group offload": (pairline_step, COMPILED | OFFLOADED | FLOAT8),
}


def project_of(model: Model, chosen: dict[str, object]) -> Project:
    """Open a project that trains a model with some options."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"model_family": model.family, "model_flavour": model.flavour, "lora_rank": 16}
        options |= {"flux_lora_target": model.preset, **chosen}
        (Path(folder) / "config.json").write_text(json.dumps(options))
        (Path(folder) / "multidatabackend.json").write_text('[{"id": "none", "instance_data_dir": "."}]')
        return open_project(folder, workspace=Path(tempfile.gettempdir()) / "pairline-compiled")


def measure(variant: str, model: Model, size: tuple[int, int], steps: int, theirs: object) -> None:
    """Time one variant at pixels and samples, and print its row; `theirs` is what diffusers' loop took, 0 before."""
    prepare, chosen = VARIANTS[variant]
    project = project_of(model, chosen)
    network = random_transformer(model)
    step = prepare(network, random_batch(project, *size), project)
    for _ in range(2):
        step()
    torch.cuda.reset_peak_memory_stats()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    marks[0].record()
    for mark in marks[1:]:
        loss = float(step()) if mark is marks[-1] else step()
        mark.record()
    torch.cuda.synchronize()
    times = [begin.elapsed_time(end) / 1000 for begin, end in pairwise(marks)]
    trained = sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)
    peak = torch.cuda.max_memory_allocated() / 2**30
    median = sorted(times)[len(times) // 2]
    if variant == "diffusers":
        theirs.value = median
    ratio = f"{theirs.value / median:.2f}" if theirs.value else ""
    print(f"| {variant} | {median:.3f} | {ratio} | {peak:.1f} | {trained / 1e6:.1f} | {loss:.3f} |", flush=True)


def main() -> None:
    """Measure every variant in a process of its own and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="kontext")
    parser.add_argument("--variant", action="append", choices=VARIANTS, help="some of the loops; repeatable")
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    asked = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {asked.model}, {asked.pixels} px, "
          f"batch {asked.batch}")  # fmt: skip
    print("| loop | s/step | times diffusers' speed | peak GiB | million LoRA parameters | loss |\n" + "|---" * 6 + "|",
          flush=True)  # fmt: skip
    theirs = multiprocessing.get_context("spawn").Value("d", 0.0)
    for variant in asked.variant or VARIANTS:
        arguments = (variant, MODELS[asked.model], (asked.pixels, asked.batch), asked.steps, theirs)
        alone = multiprocessing.get_context("spawn").Process(target=measure, args=arguments)
        alone.start()
        alone.join()
        if alone.exitcode:
            print(f"| {variant} | failed | | | | |", flush=True)


if __name__ == "__main__":
    main()
