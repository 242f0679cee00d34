"""Loss curves of float8 products over those of bfloat16: the same model, samples, noise, times and first weights.

Run on a machine with a GPU: `python benchmarks/curves.py [--model klein-4b] [--steps 200] [--pixels 512]`. Weights of
the network are random, and so are the samples; what is compared is how two LoRAs learn them.
"""

import argparse
from dataclasses import replace
from statistics import fmean

import torch
from train_step import DEVICE, MODELS, project_of, random_batch, random_transformer

from families.runtime import family_of
from train.network import make_network
from train.optimizer import make_optimizer
from train.step import step_loss

SAMPLES = 8
SHOWN = 10  # parts of a curve


def curve(model, precision, pixels, steps):
    """Train and return the losses."""
    options = {"dynamo_backend": "inductor", "gradient_checkpointing": False, "learning_rate": 1e-3}
    project = project_of(model, options | {"base_model_precision": precision})
    torch.manual_seed(1)
    batches = [random_batch(project, pixels, 1) for _ in range(SAMPLES)]
    network, family = make_network(project, random_transformer(model), DEVICE), family_of(project)
    optimizer, losses = make_optimizer(network.parameters, project.trainer), []
    for step in range(steps):
        batch = replace(batches[step % SAMPLES], seeds=(step,))  # of the time
        loss = step_loss(family, network.denoiser, batch, 1, project.trainer)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def main():
    """Print both curves, in parts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="klein-4b")
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--steps", type=int, default=200)
    asked = parser.parse_args()
    curves = [curve(MODELS[asked.model], one, asked.pixels, asked.steps) for one in ("no_change", "fp8-torchao")]
    size = asked.steps // SHOWN
    print(f"{asked.model}, {asked.pixels} px\n| steps | bf16 | fp8-torchao | difference |\n|---|---|---|---|")
    for start in range(0, size * SHOWN, size):
        plain, quick = (fmean(one[start : start + size]) for one in curves)
        print(f"| {start + 1} to {start + size} | {plain:.4f} | {quick:.4f} | {quick / plain - 1:+.2%} |")
    apart = [abs(quick - plain) / plain for plain, quick in zip(*curves, strict=True)]
    print(f"\nsingle steps differ by {fmean(apart):.2%} on average, {max(apart):.2%} at most")


if __name__ == "__main__":
    main()
