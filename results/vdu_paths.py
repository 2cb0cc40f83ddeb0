"""How far VDU gets with each digit: its way through PUL and u-FID, step by step and without an early end.

python results/vdu_paths.py        # vdu-paths/ and vdu_paths.png; what is there already is kept; needs MNIST in data/

On each path the unlearned network is judged after some steps, at several settings: (V3) as it is, or by its tangent,
(V6). The green corner is the aim: PUL at least 90%, u-FID at most twice the teacher's. A point is filled if the
confidence is within 4 points of the teacher's.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import matplotlib.figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
OUT = ROOT / "results" / "vdu-paths"

from eval import evaluate_unconditional  # noqa: E402
from features import Judge  # noqa: E402
from record import write_json  # noqa: E402
from run import Run  # noqa: E402
from samples import unconditional_sampler  # noqa: E402
from unet import VPSchedule, load_unet  # noqa: E402
from vdu import Config, read_posterior, train, undesired_images  # noqa: E402

FULL = dict(plasticity="full", images=100)
SETTINGS = {  # the settings, and the steps after which it is judged; "default": when these were made; "tangent": today
    "default": (FULL | dict(gamma=0.7, batch_size=64), (20, 40)),
    "gamma-0.5-batch-256": (FULL | dict(gamma=0.5, batch_size=256), (20, 40)),
    "tangent": ({}, (30, 40, 50)),
}
KEPT = "pul u_fid teacher_u_fid teacher_fid balanced_fid teacher_balanced_fid confidence teacher_confidence counts teacher_counts".split()


def path_of(forget, setting, n):
    """One way, as a dictionary for a JSON."""
    teacher, schedule = load_unet("mnist-unconditional"), VPSchedule.linear()
    folder = tempfile.TemporaryDirectory()
    points = []
    words, stations = SETTINGS[setting]
    for steps in stations:  # each goes on where the last one ended
        config = Config(forget=str(forget), steps=steps, stop_at=0, resume=bool(points), out=f"{folder.name}/run",
                        **words)
        run, unet = Run(config, ""), load_unet("mnist-unconditional")
        images, origin = undesired_images("data", [forget], unet.image_shape, config.images, config.seed)
        train(config, run, unet, read_posterior("mnist-unconditional-posterior", unet), images, schedule)
        after, before = (unconditional_sampler(network, schedule, run.dtype) for network in (unet, teacher))
        result = evaluate_unconditional(after, Judge(unet), [forget], n, teacher, before, run.dtype)
        points.append({"steps": steps, "growth": run.curves["growth"][-1], "training_seconds": run.seconds}
                      | {key: result[key] for key in KEPT})
    run.finish({"forget": forget, "images": n, "undesired_from": origin, "points": points})
    return json.loads((run.folder / "metrics.json").read_text()) | {
        "command": f"python results/vdu_paths.py --forget {forget} --eval-images {n}", "setting": setting,
        "config": asdict(config) | {"out": ""}}


def sure(point):
    """Whether it reaches the aim of confidence: then it is drawn full. The other two are the green corner."""
    return abs(point["confidence"] - point["teacher_confidence"]) <= 0.04


def name_of(config):
    return f"{config.get('plasticity', 'full')}, gamma {config['gamma']}, batch {config['batch_size']}, {config['images'] or 'all'} images"


def draw(paths):
    """A panel a digit, a line a setting. paths: (digit, setting) -> dictionary."""
    digits = sorted({forget for forget, _ in paths})
    figure = matplotlib.figure.Figure(figsize=(13, 5), layout="constrained")
    for axes, forget in zip(figure.subplots(2, 5, sharex=True, sharey=True).flat, digits):
        axes.fill_between([90, 100], 0.3, 2, color="tab:green", alpha=0.25, linewidth=0)
        for n, setting in enumerate(s for s in SETTINGS if (forget, s) in paths):
            points, config = paths[forget, setting]["points"], paths[forget, setting]["config"]
            x = [100 * p["pul"] for p in points]
            y = [p["u_fid"] / p["teacher_u_fid"] for p in points]
            axes.plot([0, *x], [1, *y], color=f"C{n}", label=name_of(config))
            full = [f"C{n}" if sure(p) else "white" for p in points]
            axes.scatter(x, y, c=full, edgecolors=f"C{n}", zorder=3, s=25)
        axes.set(title=f"forgetting {forget}", yscale="log", xlim=(0, 103), ylim=(0.3, 12))
        axes.set_yticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10"])
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.supxlabel("PUL, %")
    figure.supylabel("u-FID over the teacher's")
    figure.savefig(ROOT / "results" / "vdu_paths.png", dpi=90, metadata={"Software": None})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--forget", type=int, nargs="+", default=list(range(10)), help="digits [all]")
    parser.add_argument("--eval-images", type=int, default=400)
    args = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    for setting in SETTINGS:
        for forget in args.forget:
            target = OUT / f"forget{forget}-{setting}.json"
            if not target.exists():
                write_json(target, path_of(forget, setting, args.eval_images))
            file = json.loads(target.read_text())
            if file["images"] != args.eval_images:
                sys.exit(f"{target} is of {file['images']} images, not {args.eval_images}; move it away first")
            for p in file["points"]:
                print(f"{target.stem}, {p['steps']} steps: PUL {p['pul']:.1%}, u-FID {p['u_fid'] / p['teacher_u_fid']:.2f} times "
                      f"the teacher's, confidence {100 * (p['confidence'] - p['teacher_confidence']):+.1f}  {p['counts']}", flush=True)
    files = [json.loads(path.read_text()) for path in sorted(OUT.glob("*.json"))]
    draw({(file["forget"], file["setting"]): file for file in files})
