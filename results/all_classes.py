"""Every class of MNIST forgotten in turn, three seeds each: thirty runs of ddpm_sfd.py, one JSON each.

python results/all_classes.py                      # into results/ddpm_sfd-mnist/; what is there already is kept
python results/all_classes.py --jobs 2             # two runs at a time, one core each
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

ROOT = Path(__file__).resolve().parent.parent


def one(job):
    k, seed, out, env = job
    target = out / f"forget{k}-seed{seed}.json"
    if target.exists():
        return
    folder = Path(tempfile.mkdtemp()) / "run"
    command = [sys.executable, str(ROOT / "ddpm_sfd.py"), "--forget", str(k), "--seed", str(seed), "--out", str(folder)]
    subprocess.run(command, env=env, check=True, capture_output=True)
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["command"], metrics["config"]["out"] = (
        f"python ddpm_sfd.py --forget {k} --seed {seed}",
        "",
    )  # as one would type it
    target.write_text(json.dumps(metrics, indent=2) + "\n")
    print(
        f"forget {k} seed {seed}: UA {metrics['ua']:.2%}  retained {metrics['retained_accuracy']:.2%} (teacher "
        f"{metrics['teacher_retained_accuracy']:.2%})  FID {metrics['fid']:.3f} (teacher {metrics['teacher_fid']:.3f})  {metrics['seconds']:.0f} s",
        flush=True,
    )
    shutil.rmtree(folder.parent)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--classes", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "ddpm_sfd-mnist")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    env = os.environ | ({"OMP_NUM_THREADS": str(max(1, os.cpu_count() // args.jobs))} if args.jobs > 1 else {})
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(one, [(k, seed, args.out, env) for seed in args.seeds for k in args.classes]))


if __name__ == "__main__":
    main()
