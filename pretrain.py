"""Trains what ships in weights/.

    python pretrain.py mnist-classifier    # the classifier that the metrics use
    python pretrain.py mnist               # the class-conditional teacher

Each leaves its weights and a card (how it was made, what it scores) in runs/pretrain-<what>/, from where they are
copied to weights/. MNIST is read from --data, and downloaded there by torchvision if it is not there yet.
"""
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.datasets import MNIST

from eval import Classifier
from run import Run, commit, machine, option, parse, refusing, write_json
from unet import UNet, VPSchedule, save_unet

TEACHER = dict(image_size=28, in_channels=1, channels=16, multipliers=(1, 2, 4), blocks=1, attention_at=(7,),
               num_classes=10, dropout=0.0, groups=8)

# ---------------------------------------------------------------------------- config

PRESETS = {
    "mnist": dict(steps=14_000, batch_size=64, lr=1.5e-3),
    "mnist-classifier": dict(steps=5_600, batch_size=128, lr=4e-3),
}


@dataclass
class Config:
    what: str = option("mnist", "what to train", choices=list(PRESETS))
    data: str = option("data", "folder in which torchvision's MNIST lies, or goes")
    steps: int = option(20_000, "optimizer steps", low=1)
    batch_size: int = option(64, "images a step, over all processes", low=1)
    lr: float = option(1.5e-3, "peak learning rate of Adam", low=0)
    ema: float = option(0.999, "decay of the weight average that is kept; teachers only", low=0, high=1)
    label_dropout: float = option(0.1, "share of labels replaced by 'none', for guidance; teachers only", low=0, high=1)
    min_snr: float = option(5.0, "loss weight min(SNR, this) / SNR (Hang et al. 2023, 'Min-SNR'); teachers only", low=0)
    amp: str = option("auto", "mixed precision", choices=["auto", "bf16", "fp16", "off"])
    device: str = option("auto", "where to compute", choices=["auto", "cpu", "cuda"])
    seed: int = option(0, "seed of everything random", low=0)
    out: str = option("", "run folder, runs/pretrain-<what> if not given")
    resume: bool = option(False, "go on from the checkpoint in the run folder")
    save_every: int = option(1000, "steps between checkpoints", low=1)
    snapshot_every: int = option(2500, "steps between teachers kept on the side, to see when training stops helping", low=1)


def mnist(folder, train):
    """Images (N, 1, 28, 28) in [-1, 1], float32, and labels (N,). Downloads what is not in `folder`; OSError, RuntimeError
    when it can't."""
    try:
        data = MNIST(folder, train=train, download=False)
    except RuntimeError:
        data = MNIST(folder, train=train, download=True)
    return data.data[:, None] / 127.5 - 1, data.targets


def card(path, run, **scores):
    """The card beside the weights: what they are, how they were made, what they score, their checksum."""
    facts = {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size,
             "parameters": scores.pop("parameters"), "data": "MNIST, 60,000 training images", "machine": machine(run.device),
             "commit": commit(), "seconds": round(run.seconds), "seed": run.config.seed, "scores": scores,
             "config": run.settings}
    write_json(path.with_suffix(".json"), facts)
    print(json.dumps({k: facts[k] for k in ("file", "bytes", "seconds", "scores")}))


# ---------------------------------------------------------------------------- the class-conditional teacher


def train_teacher(config, run):
    images, labels = mnist(config.data, train=True)
    images, labels = images.to(run.device), labels.to(run.device)
    schedule = VPSchedule.linear().to(run.device)
    unet = UNet(**TEACHER).to(run.device).train()
    ema = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    optimizer = torch.optim.Adam(unet.parameters(), lr=config.lr, betas=(0.9, 0.99), eps=1e-8)
    lr = torch.optim.lr_scheduler.LambdaLR(  # 500 steps up, constant, down to 0 over the last 40%
        optimizer, lambda step: min((step + 1) / 500, 1.0, (config.steps - step) / (0.4 * config.steps)))
    network, batch = run.parallel(unet), config.batch_size // run.world

    for step in run.loop({"unet": unet, "ema": ema, "optimizer": optimizer, "lr": lr}, label="teacher"):
        pick = torch.randint(len(images), (batch,), device=run.device)
        x0, c = images[pick], labels[pick]
        c = torch.where(torch.rand(batch, device=run.device) < config.label_dropout, unet.null_label, c)
        t = torch.randint(schedule.T, (batch,), device=run.device)
        noise = torch.randn_like(x0)
        with run.autocast():
            eps = network(schedule.add_noise(x0, noise, t), t, c)  # (D1)
        snr = schedule.alphas_cumprod[t] / (1 - schedule.alphas_cumprod[t])
        weight = (config.min_snr / snr).clamp(max=1)
        loss = (weight * (eps - noise).square().mean(dim=(1, 2, 3))).mean()
        run.update(loss, unet, optimizer)
        lr.step()
        ema.update_parameters(unet)
        if step % 10 == 0:
            run.log(loss=loss)
        if run.rank == 0 and (step + 1) % config.snapshot_every == 0:
            save_unet(ema.module, run.folder / f"mnist-{step + 1}.safetensors", steps=step + 1)

    if run.rank == 0:
        path = run.folder / "mnist.safetensors"
        save_unet(ema.module, path, what="class-conditional MNIST teacher", command="python pretrain.py mnist")
        card(path, run, parameters=sum(p.numel() for p in unet.parameters()))


# ---------------------------------------------------------------------------- the classifier


def jitter(images, degrees=10, scale=0.1, shift=0.1):
    """Each image turned, scaled and shifted a little, at random: (B, 1, H, W) -> the same."""
    B, device = len(images), images.device
    angle = (torch.rand(B, device=device) * 2 - 1) * math.radians(degrees)
    zoom = 1 + (torch.rand(B, device=device) * 2 - 1) * scale
    move = (torch.rand(B, 2, device=device) * 2 - 1) * shift
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    affine = torch.stack([torch.stack([cos, -sin, move[:, 0]], 1), torch.stack([sin, cos, move[:, 1]], 1)], 1)  # (B, 2, 3)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # outside the image is black, -1


def train_classifier(config, run):
    images, labels = mnist(config.data, train=True)
    images, labels = images.to(run.device), labels.to(run.device)
    classifier = Classifier().to(run.device).train()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=config.lr, weight_decay=0.02)
    lr = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=config.steps)
    for step in run.loop({"classifier": classifier, "optimizer": optimizer, "lr": lr}, label="classifier"):
        pick = torch.randint(len(images), (config.batch_size,), device=run.device)
        with run.autocast():
            logits = classifier(jitter(images[pick]))
        loss = F.cross_entropy(logits.float(), labels[pick], label_smoothing=0.05)
        run.update(loss, classifier, optimizer)
        lr.step()
        if step % 10 == 0:
            run.log(loss=loss)

    classifier.eval()
    test_images, test_labels = mnist(config.data, train=False)
    with torch.no_grad():
        right = sum((classifier(x.to(run.device)).argmax(1).cpu() == y).sum().item()
                    for x, y in zip(test_images.split(500), test_labels.split(500)))
    path = run.folder / "mnist-classifier.safetensors"
    save_file({k: v.cpu().contiguous() for k, v in classifier.state_dict().items()}, path,
              {"config": json.dumps(classifier.config), "kind": "classifier"})
    card(path, run, parameters=sum(p.numel() for p in classifier.parameters()), test_accuracy=right / len(test_labels))


if __name__ == "__main__":
    config = parse(Config, __doc__, PRESETS, choose="what")
    run = Run(config, f"runs/pretrain-{config.what}")
    with refusing("--data: "):
        mnist(config.data, train=True)
    {"mnist": train_teacher, "mnist-classifier": train_classifier}[config.what](config, run)
    run.finish({})
