"""Latents at the speed of a GPU: `prep cache` from JPEG files to shards, diffusers' own loop, the encoder alone.

`python benchmarks/encode.py` on a machine with a GPU: it writes 2,400 JPEG files of 1024 px and a checkpoint with a VAE
of FLUX.1's size and random weights, runs the real commands as processes of their own (`prep cache` twice, so that the
second finds what the first compiled), then what diffusers' examples do, one picture after the other. The last table is
of the encoder alone, pixels on the GPU. `--part` leaves out the others, `--profile` adds the costliest kernels.

To try: `--batch N`; `--norm` with other ways to compute group norms; `--scores BITS`, how many scores of attention are
computed at once; `--inductor KEY=VALUE`, settings of the compiler. All of these are for the encoder alone, but for the
first `--batch`, which `prep cache` has as well. `--quick` is a smoke test that needs no GPU.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import torch
import torch._inductor.config  # its settings are written below
from diffusers import AutoencoderKL
from PIL import Image
from torch.autograd import DeviceType
from torch.nn.functional import group_norm
from torch.profiler import ProfilerActivity, profile

from families import fast_vae, flux
from families.fast_vae import FastEncoder
from families.runtime import default_device

PARTS = ("cache", "loop", "alone")
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "act_fn": "silu",
    "latent_channels": 16,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "force_upcast": False,
    "mid_block_add_attention": True,
}
SMALL = {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1}


# What is encoded


def drawn(folder, number, pixels):
    """Write a target that looks like a photograph, smooth with a little noise, and a darker reference that fits it."""
    cv2.setNumThreads(1)
    rng = np.random.default_rng(number)
    whole = np.zeros((pixels, pixels, 3), np.float32)
    for cells in (4, 16, 64):
        coarse = rng.random((cells, cells, 3), np.float32) * 160 / cells**0.5
        whole += cv2.resize(coarse, (pixels, pixels), interpolation=cv2.INTER_CUBIC)
    whole += rng.normal(20, 3, whole.shape).astype(np.float32)
    for kind, factor in (("targets", 1.0), ("references", 0.8)):
        picture = np.clip(whole * factor, 0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / kind / f"{number:05d}.jpg"), picture, [cv2.IMWRITE_JPEG_QUALITY, 90])


def project_in(folder, options):
    """Write pictures, a checkpoint and the two files of a project."""
    for kind in ("targets", "references"):
        (folder / kind).mkdir()
    count = options.images // 2
    with get_context("fork").Pool(os.cpu_count()) as pool:  # the GPU is not in use yet
        pool.starmap(drawn, [(folder, number, options.pixels) for number in range(count)], chunksize=4)
    checkpoint = folder / "checkpoint"
    flux.build_tiny(checkpoint, "kontext")
    shutil.rmtree(checkpoint / "vae")
    random_vae(options.quick).save_pretrained(checkpoint / "vae")
    trainer = {
        "model_family": "flux",
        "model_flavour": "kontext",
        "pretrained_model_name_or_path": str(checkpoint),
        "vae_batch_size": options.batch[0],
        "max_train_steps": 1,
    }
    (folder / "config.json").write_text(json.dumps(trainer))
    shared = {"resolution": options.pixels, "resolution_type": "pixel"}
    told = {"caption_strategy": "instanceprompt", "instance_prompt": "make it lighter"}
    sets = [
        {"id": "targets", "instance_data_dir": "targets", "conditioning_data": ["references"], **told, **shared},
        {"id": "references", "instance_data_dir": "references", "conditioning_type": "reference_strict", **shared},
    ]
    (folder / "multidatabackend.json").write_text(json.dumps(sets))


def random_vae(small):
    """Return FLUX.1's VAE with random weights in bfloat16."""
    torch.manual_seed(0)
    with torch.device(default_device()):
        vae = AutoencoderKL(**VAE | (SMALL if small else {})).to(torch.bfloat16)
    for name, one in vae.named_parameters():
        if one.ndim >= 2:
            one.data.normal_(0, 0.02)
        else:
            one.data.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return vae.eval().requires_grad_(False)


# The parts


def cached(folder, options):
    """Run the commands; the second `prep cache` starts with an empty store and what the first compiled."""
    for stage in ("scan", "pairs"):
        begin = time.perf_counter()
        command(stage, folder)
        print(f"prep {stage}: {time.perf_counter() - begin:.1f} s", flush=True)
    print("| prep cache | images/s | GPU busy | waited for pictures, disk s | compiling s | whole command s |")
    print("|---|---|---|---|---|---|")
    for name in ("first", "second"):
        shutil.rmtree(folder / "work" / "cache", ignore_errors=True)
        begin = time.perf_counter()
        told = command("cache", folder)
        seconds = time.perf_counter() - begin
        assert told["stores"][0]["encoded"] == options.images // 2 * 2, told
        used = told["accelerator"]
        if used is None:  # no GPU
            print(f"| {name} | {options.images / told['seconds']:.1f} | | | | {seconds:.1f} |", flush=True)
            continue
        rate, waited = used["images"] / used["seconds"], f"{used['pixels_s']:.1f}, {used['disk_s']:.1f}"
        compiling = f"{used['compiling_s']:.1f}"
        print(f"| {name} | {rate:.1f} | {used['busy']:.1%} | {waited} | {compiling} | {seconds:.1f} |", flush=True)


def command(stage, folder):
    """Run one of the commands; return what it tells."""
    ran = subprocess.run(
        [sys.executable, "-m", "prep.cli", stage, str(folder), "--json"], capture_output=True, text=True, check=False
    )
    if ran.returncode:
        raise SystemExit(f"prep {stage} failed:\n{ran.stderr[-4000:]}")
    for line in ran.stderr.splitlines():
        if "compil" in line:
            print(f"    {line}")
    return json.loads(ran.stdout)


@torch.no_grad()
def looped(folder, options):
    """Encode as diffusers' examples do: one picture after the other, each latent a file."""
    vae = AutoencoderKL.from_pretrained(folder / "checkpoint" / "vae", torch_dtype=torch.bfloat16).to(default_device())
    (folder / "loop").mkdir()
    files = sorted((folder / "targets").glob("*.jpg"))[: options.loop]
    for number, file in enumerate([files[0]] * 3 + files):
        if number == 3:
            synchronize()
            begin = time.perf_counter()
        pixels = torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1)[None]
        values = (pixels.float() / 127.5 - 1).to(vae.device, vae.dtype)
        latent = vae.encode(values).latent_dist.mode()
        torch.save(((latent - vae.config.shift_factor) * vae.config.scaling_factor).cpu(), folder / "loop" / file.stem)
    print("| a loop of diffusers, batches of 1 | images/s |\n|---|---|")
    print(f"| {len(files)} JPEG files to .pt files | {len(files) / (time.perf_counter() - begin):.1f} |", flush=True)


@torch.no_grad()
def alone(folder, options):
    """Time the encoder without anything around it."""
    device, vae = default_device(), random_vae(options.quick)
    fast_vae.normalise = NORMS[options.norm]
    fast_vae._MOST_SCORES = 1 << options.scores
    for setting in options.inductor:
        name, value = setting.split("=", 1)
        setattr(torch._inductor.config, name, json.loads(value))
    print("| the encoder alone | images/s | ms an image | peak GiB | compiling s | error of it, of plain |")
    print("|---|---|---|---|---|---|", flush=True)
    for size in sorted({1, options.batch[0]}):
        rate(f"plain, batches of {size}", vae.encoder, noise(size, options, device), options)
    reference = None
    if not options.quick:
        picture = noise(1, options, device)
        plain = vae.encoder(picture).float()
        exact = vae.encoder.float()(picture.float())
        reference = exact, float((plain - exact).norm() / exact.norm())
        vae.encoder.to(torch.bfloat16)
    fast = FastEncoder(vae.encoder, folder / "work" / "compiled", "eager" if options.quick else "inductor")
    for size in options.batch:
        values, before = noise(size, options, device), fast.seconds
        if not fast.prepare(values):
            print(f"| compiled, batches of {size}: failed | | | | |", flush=True)
            continue
        error = ""
        if reference is not None:
            exact, of_plain = reference
            found = vae.encoder(values)[:1].float()
            error = f"{float((found - exact).norm() / exact.norm()):.2e}, {of_plain:.2e}"
        rate(f"compiled, batches of {size}", vae.encoder, values, options, fast.seconds - before, error)


def noise(size, options, device):
    """Draw pictures; the first is always the same."""
    torch.manual_seed(1)
    shape = (1, options.pixels, options.pixels, 3)
    drawn_one_by_one = [torch.rand(shape, device=device) * 2 - 1 for _ in range(size)]
    return torch.cat(drawn_one_by_one).permute(0, 3, 1, 2).to(torch.bfloat16)  # as encode_images has it: channels last


def rate(name, encoder, values, options, compiling=0.0, error=""):
    """Print a row of the table, and the costliest kernels."""
    for _ in range(3):
        encoder(values)
    synchronize()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    begin, rounds = time.perf_counter(), 2 if options.quick else max(3, 48 // len(values))
    for _ in range(rounds):
        encoder(values)
    synchronize()
    each = (time.perf_counter() - begin) / rounds / len(values)
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0
    print(f"| {name} | {1 / each:.1f} | {each * 1e3:.2f} | {peak:.1f} | {compiling:.1f} | {error} |", flush=True)
    if options.profile:
        profiled(encoder, values)


def profiled(encoder, values):
    """Print the costliest kernels of one pass."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        encoder(values)
        synchronize()
    kernels = [one for one in seen.key_averages() if one.device_type == DeviceType.CUDA]
    total = sum(one.self_device_time_total for one in kernels)
    print(
        f"\n    {total / 1e3 / len(values):.2f} ms an image on the device, {sum(one.count for one in kernels)} kernels"
    )
    for one in sorted(kernels, key=lambda one: -one.self_device_time_total)[:15]:
        print(f"    {one.self_device_time_total / 1e3 / len(values):7.3f} ms {one.count:4d} calls  {one.key[:100]}")
    print(flush=True)


def synchronize():
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# Other ways to compute group norms


def whole(norm, states):
    """Sum over the whole of a map at once, split as the compiler likes."""
    batch, channels, height, width = states.shape
    values = states.permute(0, 2, 3, 1).float().view(batch, height * width, channels)
    parted = (batch, norm.num_groups, -1)
    count = height * width * channels // norm.num_groups
    mean = values.sum(1).view(parted).sum(2) / count
    square = values.square().sum(1).view(parted).sum(2) / count
    return shifted(norm, states, mean, square)


def tiled(norm, states):
    """Sum over pieces of 128 positions, then over those."""
    batch, channels, height, width = states.shape
    pieces = max(1, height * width // 128)
    values = states.permute(0, 2, 3, 1).float().reshape(batch, pieces, -1, channels)
    parted = (batch, pieces, norm.num_groups, -1)
    count = height * width * channels // norm.num_groups
    mean = values.sum(2).view(parted).sum((1, 3)) / count
    square = values.square().sum(2).view(parted).sum((1, 3)) / count
    return shifted(norm, states, mean, square)


def multiplied(norm, states):
    """Have group sums, and with them factors, come out of a small product, which the compiler does not inline."""
    batch, channels, height, width = states.shape
    values = states.permute(0, 2, 3, 1).float()
    each = channels // norm.num_groups
    same = torch.arange(channels, device=states.device) // each
    share = (same[:, None] == same[None]).float() / (height * width * each)
    sums = torch.cat([values.sum(2).sum(1), values.square().sum(2).sum(1)]) @ share
    mean, square = sums.split(batch)
    scale = torch.rsqrt((square - mean.square()).clamp(min=0) + norm.eps) * norm.weight.float()
    shift = norm.bias.float() - mean * scale
    return (values * scale[:, None, None] + shift[:, None, None]).permute(0, 3, 1, 2)


def shifted(norm, states, mean, square):
    """Apply mean and mean square, batch × groups."""
    batch, channels, _, _ = states.shape
    deviation = torch.rsqrt((square - mean.square()).clamp(min=0) + norm.eps)
    scale = deviation[:, :, None] * norm.weight.float().view(norm.num_groups, -1)
    shift = norm.bias.float().view(norm.num_groups, -1) - mean[:, :, None] * scale
    factors = (one.view(batch, channels, 1, 1) for one in (scale, shift))
    return states.float() * next(factors) + next(factors)


def native(norm, states):
    """Leave it to PyTorch."""
    return group_norm(states, norm.num_groups, norm.weight, norm.bias, norm.eps)


NORMS = {"rows": fast_vae.normalise, "whole": whole, "tiled": tiled, "multiplied": multiplied, "native": native}


def main():
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2400)
    parser.add_argument("--loop", type=int, default=60, help="images of diffusers' loop")
    parser.add_argument("--pixels", type=int, default=1024)
    parser.add_argument("--batch", type=int, action="append", help="images of a batch, repeatable; 4 and 8 by default")
    parser.add_argument("--part", action="append", choices=PARTS, help="some of the measurements; repeatable")
    parser.add_argument("--norm", choices=NORMS, default="rows")
    parser.add_argument("--scores", type=int, default=28)
    parser.add_argument(
        "--inductor", action="append", default=[], metavar="KEY=VALUE", help="repeatable; VALUE is JSON"
    )
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--quick", action="store_true", help="little of everything, on a CPU too: does it run?")
    options = parser.parse_args()
    options.batch = options.batch or [4, 8]
    if options.quick:
        options.images, options.loop, options.pixels = 8, 2, 64
    elif not torch.cuda.is_available():
        raise SystemExit("needs a GPU; --quick does without")
    parts = {"cache": cached, "loop": looped, "alone": alone}
    with tempfile.TemporaryDirectory() as folder:
        if options.part != ["alone"]:
            begin = time.perf_counter()
            project_in(Path(folder), options)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            print(f"pictures and checkpoint made in {time.perf_counter() - begin:.1f} s", flush=True)
        print(f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'CPU'}, torch {torch.__version__}, "
              f"{options.pixels} px, {len(os.sched_getaffinity(0))} cores", flush=True)  # fmt: skip
        for part in options.part or PARTS:
            parts[part](Path(folder), options)


if __name__ == "__main__":
    main()
