"""Why forgetting one digit moves the others: the direction in which (V3) pushes the weights, digit against digit.

python results/vdu_gradients.py                # vdu_gradients.json and vdu_gradients.png; needs MNIST in data/

The gradient of (V3) at mu*, each weight's times sigma*, as the natural gradient measures lengths. Its cosine between two
digits says whether forgetting the one also forgets the other (1), leaves it alone (0) or brings more of it (-1). Between
two batches of one digit it says how much of a single step is noise.
"""

import argparse
import sys
from pathlib import Path
from statistics import mean, stdev

import matplotlib.figure
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import mnist  # noqa: E402
from record import commit, machine, write_json  # noqa: E402
from unet import VPSchedule, load_unet  # noqa: E402
from vdu import Config, plasticity_inducer, read_posterior  # noqa: E402


def pushes(unet, sigma, images, batch, parts=1):
    """sigma* times the gradient of (V3) on images of one digit, a sum over `parts` batches: (weights,)."""
    schedule, config = VPSchedule.linear(), Config()
    unet.zero_grad()
    for _ in range(parts):
        x0 = images[torch.randint(len(images), (batch,))]
        t = torch.randint(config.t_min, config.t_max, (batch,))
        plasticity_inducer(unet, x0, t, torch.randn_like(x0), schedule, weighting=config.weighting).mean().backward()
    return torch.cat([p.grad.flatten() for p in unet.parameters()]) * sigma


def cosines(directions):
    """(N, weights) -> (N, N)."""
    unit = directions / directions.norm(dim=1, keepdim=True)
    return unit @ unit.T


def draw(table, path):
    figure = matplotlib.figure.Figure(figsize=(4.6, 4), layout="constrained")
    axes = figure.add_subplot(title="(V3), digit against digit: cosine", xlabel="digit", ylabel="digit")
    image = axes.imshow(table, cmap="RdBu_r", vmin=-1, vmax=1)
    axes.set(xticks=range(10), yticks=range(10))
    for i, row in enumerate(table):
        for j, value in enumerate(row):
            axes.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=7)
    figure.colorbar(image)
    figure.savefig(path, dpi=90, metadata={"Software": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data", help="folder in which MNIST lies, or goes [data]")
    parser.add_argument("--images", type=int, default=100, help="images of each digit [100]")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    unet = load_unet("mnist-unconditional").requires_grad_(True)
    variance = read_posterior("mnist-unconditional-posterior", unet)
    sigma = torch.cat([variance[name].flatten() for name, _ in unet.named_parameters()]).sqrt()
    images, labels = mnist(args.data, train=True)
    digits = [images[labels == k][: args.images] for k in range(10)]

    between = cosines(torch.stack([pushes(unet, sigma, x, 64, parts=8) for x in digits]))
    noise = {}
    for batch in (64, 256):
        pairs = [cosines(torch.stack([pushes(unet, sigma, x, batch), pushes(unet, sigma, x, batch)]))[0, 1] for x in digits]
        noise[batch] = {"mean": mean(map(float, pairs)), "stdev": stdev(map(float, pairs))}
    out = Path(__file__).with_suffix("")
    table = [[round(value, 4) for value in row] for row in between.tolist()]
    draw(table, out.with_suffix(".png"))
    write_json(out.with_suffix(".json"), {
        "between_digits": table, "images_a_digit": args.images, "batch": 512, "between_two_batches": noise, "seed": args.seed,
        "command": f"python results/vdu_gradients.py --images {args.images} --seed {args.seed}", "machine": machine(), "commit": commit()})
    print(f"between two batches: {noise}")
