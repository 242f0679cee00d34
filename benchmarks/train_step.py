"""One LoRA step on full-size FLUX.1 Kontext: pairline's beside the loop of diffusers' examples, in one run.

Run on a machine with a GPU: `python benchmarks/train_step.py [--pixels 1024] [--batch 1] [--steps 6]`. Weights are
random and made on the device, so nothing is downloaded; speed and memory do not depend on them.
"""

import argparse
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig

from families import flux, open_project
from families.attention import choose_attention
from families.protocol import TextEmbeds
from families.quantize import quantize_and_place
from schemas.project import Project
from train.adapter import add_adapter
from train.data import Batch
from train.memory import checkpoint_blocks
from train.optimizer import make_optimizer
from train.step import step_loss

DEVICE = torch.device("cuda")
VARIANTS = (
    "diffusers", "pairline", "diffusers int8-quanto", "pairline int8-quanto", "pairline fp8-quanto",
    "pairline int4-quanto", "pairline int8-torchao", "pairline fp8-torchao",
)  # fmt: skip


def random_transformer() -> FluxTransformer2DModel:
    """Make a full-size transformer of random bfloat16 weights on the device."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    model = model.to(torch.bfloat16).to_empty(device=DEVICE)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.02)
            else:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return model.requires_grad_(False)


def random_batch(pixels: int, count: int) -> Batch:
    """Make latents of a target and one reference of the same size, and 512 text tokens."""
    shape = (count, 16, pixels // 8, pixels // 8)
    text = TextEmbeds(
        torch.randn(count, 512, 4096, device=DEVICE), torch.randn(count, 768, device=DEVICE), (512,) * count
    )
    ids = tuple(str(number) for number in range(count))
    latents, noise, reference = (torch.randn(shape, device=DEVICE) for _ in range(3))
    return Batch(ids, tuple(range(count)), latents, noise, (reference,), text)


def diffusers_step(model: FluxTransformer2DModel, batch: Batch, project: Project) -> Callable[[], float]:
    """Return a step as diffusers' Kontext example runs it: autocast, LoRA in float32, flash attention."""
    model.set_attention_backend("_native_flash")
    model.enable_gradient_checkpointing()
    targets = project.family.lora_targets["all+ffs"]
    model.add_adapter(LoraConfig(r=16, lora_alpha=16, init_lora_weights="gaussian", target_modules=targets))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    half = {"dtype": torch.bfloat16}
    latents, reference = flux.pack(batch.latents).to(**half), flux.pack(batch.references[0]).to(**half)
    ids = torch.cat([flux.target_ids(batch.latents), *flux.reference_ids(batch.references)])
    embed, pooled = batch.text.embed.to(**half), batch.text.pooled.to(**half)
    count = latents.shape[0]

    def step() -> float:
        noise = torch.randn_like(latents)
        sigma = torch.sigmoid(torch.randn(count, device=DEVICE))
        noisy = ((1 - sigma.view(-1, 1, 1)) * latents + sigma.view(-1, 1, 1) * noise).to(**half)
        with torch.autocast("cuda", torch.bfloat16):
            predicted = model(
                hidden_states=torch.cat([noisy, reference], 1),
                timestep=sigma,
                guidance=torch.ones(count, device=DEVICE),
                pooled_projections=pooled,
                encoder_hidden_states=embed,
                txt_ids=torch.zeros(512, 3, device=DEVICE),
                img_ids=ids,
                return_dict=False,
            )[0][:, : latents.shape[1]]
            loss = (predicted.float() - (noise - latents).float()).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def pairline_step(model: FluxTransformer2DModel, batch: Batch, project: Project) -> Callable[[], float]:
    """Return a step as `train run` takes it."""
    choose_attention(model, DEVICE, half=True)
    parameters = add_adapter(model, project)
    checkpoint_blocks(flux, model, 1)
    model.train()
    optimizer = make_optimizer(parameters, project.trainer)

    def step() -> float:
        loss = step_loss(flux, model, batch, 1, project.trainer)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def measure(variant: str, pixels: int, count: int, steps: int) -> None:
    """Time one variant and print its row: median seconds a step, peak memory."""
    with tempfile.TemporaryDirectory() as folder:
        side, _, precision = variant.partition(" ")
        options = {"flux_lora_target": "all+ffs", "base_model_precision": precision or "no_change"}
        (Path(folder) / "config.json").write_text(json.dumps(options))
        (Path(folder) / "multidatabackend.json").write_text('[{"id": "none", "instance_data_dir": "."}]')
        project = open_project(folder)
    model = random_transformer()
    model = quantize_and_place(model, precision or "no_change", project.family.unquantised, DEVICE, "accelerator")
    step = {"diffusers": diffusers_step, "pairline": pairline_step}[side](model, random_batch(pixels, count), project)
    for _ in range(2):
        step()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(steps):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        loss = step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(f"| {variant} | {sorted(times)[len(times) // 2]:.3f} | {peak:.1f} | {trained / 1e6:.1f} | {loss:.3f} |")
    gc.collect()


def main() -> None:
    """Measure every variant in a process of its own and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--variant", choices=VARIANTS)
    arguments = parser.parse_args()
    if arguments.variant:
        measure(arguments.variant, arguments.pixels, arguments.batch, arguments.steps)
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.pixels} px, batch {arguments.batch}")
    print("| loop | s/step | peak GiB | million LoRA parameters | loss |\n|---|---|---|---|---|", flush=True)
    for variant in VARIANTS:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--variant", variant], check=False)


if __name__ == "__main__":
    main()
