"""What each term of VDU is for, on an easy digit; how far each setting gets, on it and on a hard one: u-FID over PUL. And
how few undesired images will do.

python results/vdu_frontier.py --jobs 2      # into results/vdu-frontier/; what is there already is kept; needs MNIST in data/
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.figure
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
OUT = ROOT / "results" / "vdu-frontier"

from data import mnist  # noqa: E402
from eval import evaluate_unconditional  # noqa: E402
from features import Judge  # noqa: E402
from record import commit, machine  # noqa: E402
from run import choose_amp  # noqa: E402
from samples import unconditional_sampler  # noqa: E402
from unet import VPSchedule, load_unet  # noqa: E402


def fine_tune(forget, steps, images, seed=0, lr=1e-4, batch=64):
    """The reference that needs more data: DDPM's loss on retained real images, from the same teacher."""
    source = torch.Generator().manual_seed(seed)
    teacher, unet, schedule = load_unet("mnist-unconditional"), load_unet("mnist-unconditional"), VPSchedule.linear()
    x, labels = mnist(ROOT / "data", train=True)
    x = x[labels != forget]
    optimizer = torch.optim.Adam(unet.parameters(), lr=lr)
    for _ in range(steps):
        x0 = x[torch.randint(len(x), (batch,), generator=source)]
        t, noise = torch.randint(schedule.T, (batch,), generator=source), torch.randn(x0.shape, generator=source)
        loss = (noise - unet(schedule.add_noise(x0, noise, t), t)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    dtype = choose_amp("auto", torch.device("cpu"))
    samplers = [unconditional_sampler(network, schedule, dtype) for network in (unet, teacher)]
    result = evaluate_unconditional(samplers[0], Judge(unet), [forget], images, teacher, samplers[1], dtype)
    return result | {"command": f"fine_tune({forget}, steps={steps}, lr={lr}) of results/vdu_frontier.py", "seed": seed,
                     "machine": machine(), "commit": commit()}


def vdu(words):
    folder = Path(tempfile.mkdtemp()) / "run"
    command = ["vdu.py", *words.split()]
    subprocess.run([sys.executable, str(ROOT / command[0]), *command[1:], "--out", str(folder)], check=True,
                   capture_output=True, cwd=ROOT)
    result = json.loads((folder / "metrics.json").read_text())
    shutil.rmtree(folder.parent)
    result["command"], result["config"]["out"] = " ".join(["python", *command]), ""
    return result


START = "--plasticity full --images 100 --gamma 0.7 --batch-size 64 --stop-at 1.25"  # the preset before (V6): each point says what it changes
TANGENT = "--plasticity tangent --images 0 --gamma 0.3 --batch-size 256"  # the preset now, but for its end
# what varies along a curve -> the curve's name, and its points: (the label beside it, the flags of vdu.py)
TERMS = {
    "gamma": ("gamma moves, 30 steps", [(g, f"--stop-at 0 --steps 30 --gamma {g}") for g in (0.5, 0.8, 0.85, 0.9, 0.95)]),
    "plasticity": ("plasticity alone (gamma 0), steps move", [(n, f"--stop-at 0 --gamma 0 --steps {n}") for n in (10, 20, 30)]),
    "identity": ("identity covariance, length of a step moves",
                 [(lr, f"--stop-at 0 --steps 30 --gamma 0.8 --covariance identity --lr {lr}") for lr in (0.01, 0.02, 0.05, 1.0)]),
    "tangent": ("(V6): (V3) by its tangent, gamma moves, 30 steps", [(g, f"{TANGENT} --stop-at 0 --steps 30 --gamma {g}") for g in (0.3, 0.8, 0.9)]),
    "tangent-stop": ("(V6): the preset, its early end moves", [(end, f"{TANGENT} --stop-at {end} --steps 80") for end in (1.1, 1.2, 1.4)]),
    "finetune": ("fine-tuning on all retained images, steps move", [(n, n) for n in (50, 150)]),
}
SETTINGS = {
    "stop": ("gamma 0.7, early end moves", [(end, f"--stop-at {end}") for end in (1.1, 1.25, 1.5)]),
    "range": ("the same on other steps t", [(f"{a}-{b}", f"--t-min {a} --t-max {b}") for a, b in ((100, 300), (200, 450), (450, 750))]),
    "bound": ("weights of the DDPM bound, all t", [("all", "--weighting bound --t-min 0 --t-max 1000")]),
    "adam": ("Adam, its rate moves", [(lr, f"--optimizer adam --lr {lr}") for lr in ("1e-5", "1e-4")]),
    "held": ("the same at another gamma", [(g, f"--gamma {g}") for g in (0.5, 0.9)]),
    "tangent-stop": ("(V6): the preset, its early end moves", [(end, f"{TANGENT} --stop-at {end} --steps 80") for end in (1.1, 1.2, 1.3)]),
}
FEW = (1, 10, 100, 0)  # undesired images at hand; 0: all


def point(forget, name, flags):
    """The JSON of one run, from disk if it is there."""
    target = OUT / f"forget{forget}-{name}.json"
    if not target.exists():
        common = f"--forget {forget} --eval-images {args.eval_images} {START}"
        result = fine_tune(forget, flags, args.eval_images) if "finetune" in name else vdu(f"{common} {flags}")
        target.write_text(json.dumps(result, indent=2) + "\n")
    result = json.loads(target.read_text())
    if result["images"] != args.eval_images:
        sys.exit(f"{target} is of {result['images']} images; move it away")
    print(f"{target.stem}: PUL {result['pul']:.1%}, u-FID {result['u_fid']:.2f} (teacher {result['teacher_u_fid']:.2f}, "
          f"without the digit {result['teacher_fid']:.2f}), confidence {result['confidence']:.1%}", flush=True)
    return result


def frontier(axes, forget, curves, results, title):
    for n, (curve, (name, places)) in enumerate(curves.items()):
        mine = [(label, results[forget, f"{curve}-{label}"]) for label, _ in places]
        x, y = [100 * r["pul"] for _, r in mine], [r["u_fid"] for _, r in mine]
        axes.plot(x, y, "D" if curve == "range" else "o-", markersize=5, color=f"C{n}", label=name)
        for k, ((label, _), *at) in enumerate(zip(mine, x, y)):
            if curve == "range" or k in (0, len(mine) - 1):  # of a curve its ends
                axes.annotate(label, at, xytext=(4, 4), textcoords="offset points", fontsize=9, color=f"C{n}")
    for key, name, style in (("teacher_u_fid", "the teacher's images", "--"), ("teacher_fid", "the same without the digit", ":")):
        axes.axhline(mine[0][1][key], color="0.3", linewidth=1, linestyle=style, label=name)
    axes.set(xlabel="PUL, %", ylabel="u-FID", yscale="log", title=title)
    axes.set_yticks([0.5, 1, 2, 5, 10, 20, 50, 100], "0.5 1 2 5 10 20 50 100".split())
    axes.minorticks_off()
    axes.margins(0.1)  # room for what is written beside the points
    highest = max(results[forget, f"{curve}-{label}"]["u_fid"] for curve, (_, places) in curves.items() for label, _ in places)
    axes.set_ylim(0.7 * mine[0][1]["teacher_fid"], 1.5 * highest)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2, fontsize=9, columnspacing=1, handlelength=1)


def draw(results):
    """What each term is for; other settings, one panel a digit; how few images. results: (digit, name) -> dict."""
    easy, *hard = args.forget
    figure = matplotlib.figure.Figure(figsize=(6.5 * (1 + len(hard)) + 4, 6), layout="constrained")
    terms, *settings, sweep = figure.subplots(1, 2 + len(hard), width_ratios=[6.5] * (1 + len(hard)) + [4])
    frontier(terms, easy, TERMS, results, f"forgetting {easy}: what each term is for")
    for axes, forget in zip(settings, hard):
        frontier(axes, forget, SETTINGS, results, f"forgetting {forget}: how far other settings get")
    few = [results[easy, f"images-{n or 'all'}"] for n in FEW]
    places = range(len(few))
    sweep.bar([i - 0.2 for i in places], [100 * r["pul"] for r in few], 0.4, color="tab:blue")
    sweep.set_xticks(places, [n or "all" for n in FEW])
    sweep.set(xlabel="undesired images at hand", ylabel="PUL, %, blue", ylim=(0, 105), title=f"forgetting {easy}: how few will do")
    other = sweep.twinx()
    other.bar([i + 0.2 for i in places], [r["u_fid"] for r in few], 0.4, color="tab:orange")
    other.set_ylabel("u-FID, orange")
    figure.savefig(ROOT / "results" / "vdu_frontier.png", dpi=90, metadata={"Software": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forget", type=int, nargs="+", default=[1, 9], help="digits: the first for the terms and the sweep, the others for the settings")
    parser.add_argument("--eval-images", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    if args.jobs > 1:
        threads = max(1, os.cpu_count() // args.jobs)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    jobs = [(args.forget[0], f"images-{n or 'all'}", f"{TANGENT} --stop-at 1.2 --images {n}") for n in FEW]
    for forget in args.forget:
        for curve, (_, places) in (TERMS if forget == args.forget[0] else SETTINGS).items():
            jobs += [(forget, f"{curve}-{label}", flags) for label, flags in places]
    with ThreadPoolExecutor(args.jobs) as pool:
        draw({job[:2]: result for job, result in zip(jobs, pool.map(lambda job: point(*job), jobs))})
