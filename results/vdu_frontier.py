"""What each term of VDU is for: u-FID over PUL, as gamma moves, as the covariance goes, as the undesired images go.

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
from run import choose_amp, commit, machine  # noqa: E402
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


def points(forget, images):
    """Pairs: a name, and the function that makes its JSON. The name says the curve, then the place on it."""
    common = f"--forget {forget} --eval-images {images}"
    for n in (1, 10, 100, 0):
        yield f"images-{n or 'all'}", lambda n=n: vdu(f"{common} --images {n}")
    for steps in (10, 20, 30):
        yield f"plasticity-steps{steps}", lambda steps=steps: vdu(f"{common} --gamma 0 --stop-at 0 --steps {steps}")
    full = f"{common} --stop-at 0 --steps 30"  # no early end: gamma alone decides how far it goes
    for gamma in args.gammas:
        yield f"posterior-gamma{gamma}", lambda gamma=gamma: vdu(f"{full} --gamma {gamma}")
    for lr in (0.01, 0.02, 0.05, 1.0):  # with one width for all weights a step of one sigma is far too long
        yield f"identity-lr{lr}", lambda lr=lr: vdu(f"{full} --gamma 0.8 --covariance identity --lr {lr}")
    for steps in (50, 150):
        yield f"finetune-steps{steps}", lambda steps=steps: fine_tune(forget, steps, images)


def make(name, function):
    target = OUT / f"forget{args.forget}-{name}.json"
    if not target.exists():
        target.write_text(json.dumps(function(), indent=2) + "\n")
    result = json.loads(target.read_text())
    if result["images"] != args.eval_images:
        sys.exit(f"{target} is of {result['images']} images; move it away")
    ratio = result["u_fid"] / result["teacher_fid"]
    print(f"{name}: PUL {result['pul']:.1%}, u-FID {ratio:.2f} times the teacher's", flush=True)
    return name, result["pul"], ratio


def draw(rows):
    figure = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained")
    frontier, sweep = figure.subplots(1, 2)
    curves = {"posterior": "VDU, gamma moves", "identity": "identity covariance, length of a step moves",
              "plasticity": "plasticity alone (gamma 0), steps move", "finetune": "fine-tuning on all retained images"}
    for curve, label in curves.items():
        mine = [(pul, ratio, name) for name, pul, ratio in rows if name.startswith(curve)]
        frontier.plot([100 * p for p, _, _ in mine], [r for _, r, _ in mine], "o-", label=label)
        for p, r, name in mine:
            frontier.annotate(name.split("-")[1].removeprefix("gamma").removeprefix("steps").removeprefix("lr"), (100 * p, r), fontsize=7)
    frontier.set(xlabel="PUL, %", ylabel="u-FID over the teacher's", yscale="log", title=f"forgetting {args.forget}")
    frontier.legend(fontsize=8)
    mine = [(name.removeprefix("images-"), pul, ratio) for name, pul, ratio in rows if name.startswith("images-")]
    places = range(len(mine))
    sweep.bar([i - 0.2 for i in places], [100 * p for _, p, _ in mine], 0.4, label="PUL, %", color="tab:blue")
    sweep.set_xticks(places, [name for name, _, _ in mine])
    sweep.set(xlabel="undesired images at hand", ylabel="PUL, %", ylim=(0, 105), title="how few will do")
    other = sweep.twinx()
    other.bar([i + 0.2 for i in places], [r for _, _, r in mine], 0.4, color="tab:orange")
    other.set_ylabel("u-FID over the teacher's (orange)")
    figure.savefig(ROOT / "results" / "vdu_frontier.png", dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forget", type=int, default=1)
    parser.add_argument("--eval-images", type=int, default=500)
    parser.add_argument("--gammas", type=float, nargs="+", default=[0.5, 0.8, 0.85, 0.9, 0.95])
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    if args.jobs > 1:
        threads = max(1, os.cpu_count() // args.jobs)
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    with ThreadPoolExecutor(args.jobs) as pool:
        draw(list(pool.map(lambda job: make(*job), points(args.forget, args.eval_images))))
