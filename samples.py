"""Draws images from a network, with the same noise for the same seed and index, and shows them."""

import contextlib
import math
import time

import matplotlib.figure
import matplotlib.patches
import torch
from einops import rearrange
from tqdm import tqdm

from unet import ancestral_sample, ddim_sample, indexed_noise


def balanced_labels(classes, per_class):
    """0, 1, .., K-1, 0, 1, ..: any first part of it is balanced too. (classes * per_class,)"""
    return torch.arange(classes).repeat(per_class)


@torch.no_grad()
def generate(sample, labels, shape, seed, device, batch=250, bar=None):
    """N images in [-1, 1], on the CPU, rounded to 8 bits, one for each label; and the seconds they took.

    labels: (N,), or text embeddings (N, L, D), or a number N of unconditional images, for which `sample` is given
    c = None. shape: of one z, (C, H, W), and so of an image, unless the network draws latents.
    sample: function (z, c, noise) -> images. Image i starts from noise that depends only on (seed, i), and a stochastic
    sampler draws more of it from `noise`; so two networks judged with the same seed are paired.
    """
    images, seconds = [], 0.0
    N = labels if isinstance(labels, int) else len(labels)
    for index in tqdm(torch.arange(N).split(batch), desc=bar, leave=False, disable=bar is None):
        noise = indexed_noise(seed, index)
        z, c = noise(shape).to(device), None if isinstance(labels, int) else labels[index].to(device)
        clock = time.perf_counter()
        x = sample(z, c, noise).clamp(-1, 1).float().cpu()
        seconds += time.perf_counter() - clock
        images.append(((x + 1) * 127.5).round() / 127.5 - 1)
    return torch.cat(images), seconds


def sampler_of(unet, schedule, kind, steps=50, eta=0.0, guidance=1.0):
    """(function (z, c, noise) -> images, network calls an image) for the kinds one-step, ddim and ancestral."""
    calls = 1 if guidance == 1 or unet.num_classes is None else 2

    def one_step(z, c, noise):
        t = torch.full((len(z),), unet.card["t_init"], device=z.device)
        return schedule.predict_x0(schedule.s(t) * z, unet(schedule.s(t) * z, t, c), t)  # (S1), see ddpm_sfd.py

    if kind == "one-step":
        return one_step, 1
    if kind == "ancestral":
        return lambda z, c, noise: ancestral_sample(unet, schedule, z, c, guidance, noise=noise), calls * schedule.T
    return lambda z, c, noise: ddim_sample(unet, schedule, z, c, steps, eta, guidance, noise=noise), calls * steps


def unconditional_sampler(unet, schedule, dtype=None):
    """The sampler behind PUL and u-FID, for teacher and unlearned network alike: (z, c, noise) -> images, by 20 DDIM
    steps, under autocast to `dtype` if that is given (half the time on CPUs that have bfloat16)."""

    def sample(z, c=None, noise=None):
        with torch.autocast(z.device.type, dtype or torch.bfloat16, enabled=dtype is not None):
            return ddim_sample(unet, schedule, z, steps=20)

    return sample


def image_grid(images, labels, path, title, forget=(), seen=None):
    """Save images (N, C, H, W) in [-1, 1] as one picture. With balanced labels (N,): one row a class, forgotten ones
    in red. With None: a square, in which images that are `seen` (N,) as a class in `forget` have a red frame."""
    side = math.isqrt(len(images))
    rows = list(images[: side**2].split(side)) if labels is None else [images[labels == k] for k in labels.unique()]
    canvas = rearrange(rows, "k n c h w -> (k h) (n w) c").add(1).div(2).clamp(0, 1)
    figure = matplotlib.figure.Figure(figsize=(5, 5.3 * len(rows) / len(rows[0])), layout="constrained")
    axes = figure.add_subplot(title=title, xticks=[], yticks=[])
    axes.imshow(canvas.squeeze(-1), cmap="gray", vmin=0, vmax=1)
    height, width = images.shape[2:]
    if labels is not None:
        names = labels.unique().tolist()
        axes.set_yticks([height * (i + 0.5) for i in range(len(rows))], [f"{k}" for k in names])
        for k, tick in zip(names, axes.get_yticklabels()):
            tick.set(color="crimson" if k in forget else "black", fontweight="bold" if k in forget else "normal")
    elif seen is not None:
        for i in torch.isin(seen[: side**2], torch.as_tensor(forget)).nonzero().flatten().tolist():
            corner = (width * (i % side) - 0.5, height * (i // side) - 0.5)
            axes.add_patch(matplotlib.patches.Rectangle(corner, width, height, fill=False, edgecolor="crimson"))
    axes.tick_params(length=0)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def guided_sampler(sd, unet, autocast=contextlib.nullcontext, steps=50, guidance=4.5, eta=0.0):
    """The sampler of a text-to-image model with `unet` in place of its own: (z, c, noise) -> pictures, by DDIM."""
    with torch.no_grad():
        nothing = sd.embed([""])

    def sample(z, c, noise=None):
        with autocast():
            latents = ddim_sample(unet, sd.schedule, z, c, steps, eta, guidance, False, noise, nothing)
        return sd.vae.decode(latents.float())

    return sample
