"""One stage or two on MNIST, with the same number of steps in all: SFD for N steps, against N / 2 steps of plain
distillation (SiD, --forget none), then N / 2 of SFD that starts from its generator and its fake score.

    python results/two_stage.py --out runs/two-stage --picture runs/two_stage.png               # three seeds
    python results/two_stage.py --out runs/8 --picture runs/8.png --forget 8 --steps 300 --jobs 2   # two runs at a time

Runs that lie in --out already are kept; give another for other settings. What ships, results/two-stage/ and the picture
results/two_stage.png, was made with 270 steps and earlier settings: results/README.md has the command.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean

import matplotlib.figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ddpm_sfd import Config  # noqa: E402
from record import write_json  # noqa: E402
from run import number, refuse  # noqa: E402

SHOWN = {"ua": "UA, %", "retained_accuracy": "retained accuracy, %", "fid": "FID on retained classes"}


def sfd(forget, steps, folder, more, env, seed):
    """One run of ddpm_sfd.py, into `folder`: its metrics, with the command as one would type it."""
    words = ["--preset", "mnist-one-stage", "--forget", str(forget), "--steps", str(steps), "--seed", str(seed), *more]
    command = [sys.executable, str(ROOT / "ddpm_sfd.py"), *words, "--out", str(folder)]
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    metrics = json.loads((folder / "metrics.json").read_text())
    typed = " ".join(["python ddpm_sfd.py", *words]).replace(str(folder.parent) + "/", "")
    return metrics | {"command": typed, "config": metrics["config"] | {"out": ""}}


def one_stage(args, seed, folder, env):
    metrics = sfd(args.forget, args.steps, folder / "sfd", [*args.more], env, seed)
    return metrics | {"stages": [{"command": metrics["command"], "training_seconds": metrics["training_seconds"]}]}


def two_stages(args, seed, folder, env):
    """The second stage's metrics. The first one's seed differs, so that the second does not draw its noise again."""
    half, more = args.steps // 2, [*args.more]
    first = sfd("none", half, folder / "sid", more + ["--classifier", "none"], env, seed + 1000)
    files = [word for name in ("generator", "fake_score")
             for word in (f"--init-{name.replace('_', '-')}", str(folder / "sid" / f"{name}.safetensors"))]
    second = sfd(args.forget, args.steps - half, folder / "sfd", more + files, env, seed)
    for metrics in (first, second):
        metrics["config"] |= {name: Path(metrics["config"][name]).name for name in ("init_generator", "init_fake_score")}
    return second | {
        "training_seconds": first["training_seconds"] + second["training_seconds"],
        "stages": [{"command": m["command"], "training_seconds": m["training_seconds"]} for m in (first, second)],
    }


WAYS = {"one-stage": one_stage, "two-stage": two_stages}


def make(args, way, seed, env):
    """The metrics of one way under one seed: from its file, or made and written there."""
    target = args.out / f"{way}-forget{args.forget}-seed{seed}.json"
    if not target.exists():
        with tempfile.TemporaryDirectory() as folder:
            metrics = WAYS[way](args, seed, Path(folder), env)
        write_json(target, metrics | {"way": way, "total_steps": args.steps})
    metrics = json.loads(target.read_text())
    if metrics["total_steps"] != args.steps:
        refuse(f"{target} is of {metrics['total_steps']} steps, not {args.steps}; move it away, or give another --out")
    print(f"{way}, seed {seed}: ", *(f"{name} {metrics[name]:.4g}" for name in (*SHOWN, "training_seconds")), flush=True)
    return metrics


def draw(args, results):
    """One panel a number: a dot a seed, a line at the mean, and the teacher's where it has one."""
    figure = matplotlib.figure.Figure(figsize=(10, 3.4), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(SHOWN)), SHOWN.items()):
        scale = 1 if name == "fid" else 100
        for x, way in enumerate(WAYS):
            values = [scale * metrics[name] for metrics in results[way]]
            axes.plot([x] * len(values), values, "o", alpha=0.7)
            axes.plot([x - 0.2, x + 0.2], [mean(values)] * 2, color="black")
        its = [scale * m[f"teacher_{name}"] for way in WAYS for m in results[way] if f"teacher_{name}" in m]
        if its:
            axes.axhline(mean(its), color="0.6", linestyle=":", label="teacher, 50 calls")
            axes.legend(fontsize=8)
        halves = args.steps // 2, args.steps - args.steps // 2
        axes.set_xticks(range(2), [f"one stage\n{args.steps} steps", f"two stages\n{halves[0]} + {halves[1]} steps"])
        axes.set(title=title, xlim=(-0.6, 1.6))
    figure.suptitle(f"MNIST without {args.forget}, {len(args.seeds)} seeds")
    figure.savefig(args.picture, dpi=100, metadata={"Software": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forget", type=number(int, 0, 9), default=0)
    parser.add_argument("--steps", type=number(int, 2), default=Config.steps, help=f"of each way [{Config.steps}]")
    parser.add_argument("--seeds", type=number(int, 0), nargs="+", default=[1, 2, 3])
    parser.add_argument("--jobs", type=number(int, 1), default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "two-stage")
    parser.add_argument("--picture", type=Path, default=ROOT / "results" / "two_stage.png")
    parser.add_argument("more", nargs="*", help="after --, more words for ddpm_sfd.py in every run")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    env = os.environ | ({"OMP_NUM_THREADS": str(max(1, os.cpu_count() // args.jobs))} if args.jobs > 1 else {})
    jobs = [(way, seed) for seed in args.seeds for way in WAYS]
    with ThreadPoolExecutor(args.jobs) as pool:
        made = list(pool.map(lambda job: make(args, *job, env), jobs))
    draw(args, {way: [m for (w, _), m in zip(jobs, made) if w == way] for way in WAYS})


if __name__ == "__main__":
    main()
