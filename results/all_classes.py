"""Every class of MNIST forgotten in turn, or eight concepts of the tiny model, three seeds each; one JSON a run.

python results/all_classes.py ddpm_sfd                      # into results/ddpm_sfd-mnist/; what is there already is kept
python results/all_classes.py vdu --seeds 2 3 4 --jobs 2    # into results/vdu-mnist/; two runs at a time, one core each
python results/all_classes.py sd_sfd                        # into results/sd_sfd-tiny/: three digits, three colours, two pairs
python results/all_classes.py ddpm_sfd --into ddpm_sfd-mnist-one-stage --preset mnist-one-stage    # other flags are the method's own
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import shlex
import shutil
import sys
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from record import write_json  # noqa: E402
from run import parse  # noqa: E402

SHOWN = {  # the numbers of one run that are worth a line
    "ddpm_sfd": "ua retained_accuracy teacher_retained_accuracy fid teacher_fid seconds",
    "vdu": "pul u_fid teacher_fid confidence teacher_confidence training_seconds",
    "sd_sfd": "ua retained_accuracy teacher_retained_accuracy fid teacher_fid seconds",
}
CLASSES = [str(k) for k in range(10)]
CONCEPTS = ["zero", "three", "seven", "red", "blue", "yellow", "red three", "green seven"]


def one(job):
    """One run, in this process. The JSON is the run's own metrics.json, with the command as one would type it."""
    method, k, seed, more, out = job
    target = out / f"forget{k.replace(' ', '-')}-seed{seed}.json"
    if target.exists():
        return
    folder = Path(tempfile.mkdtemp()) / "run"
    words, module = ["--forget", k, "--seed", str(seed), *more], importlib.import_module(method)
    os.chdir(ROOT)  # where data/ may lie
    with contextlib.redirect_stdout(None):
        module.main(parse(module.Config, module.__doc__, module.PRESETS, [*words, "--out", str(folder)]))
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["command"] = shlex.join(["python", f"{method}.py", *words])  # as one would type it
    metrics["config"]["out"] = ""
    write_json(target, metrics)
    print(f"forget {k} seed {seed}: ", *(f"{name} {metrics[name]:.4g}" for name in SHOWN[method].split()), flush=True)
    shutil.rmtree(folder.parent)


def end_with_parent():
    """In a worker: when the parent is killed, what is queued is not begun."""
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=list(SHOWN))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--classes", nargs="+", help="classes, or concepts; all if not given")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--into", help="folder in results/; METHOD-mnist or METHOD-tiny if not given")
    args, more = parser.parse_known_args()
    tiny = args.method == "sd_sfd"
    classes = args.classes or (CONCEPTS if tiny else CLASSES)
    out = ROOT / "results" / (args.into or f"{args.method}-{'tiny' if tiny else 'mnist'}")
    if more and not args.into:
        parser.error(f"with {more[0]} these are other runs than those of {out.name}; say where they go: --into FOLDER")
    out.mkdir(parents=True, exist_ok=True)
    if args.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // args.jobs))  # of the processes to come
    kept = [json.loads(path.read_text())["commit"] for path in out.glob("*.json")]
    if kept:
        print(f"kept: {len(kept)} runs in {out.name}, of commit {', '.join(sorted(set(kept)))}")
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"), end_with_parent) as pool:
        list(pool.map(one, [(args.method, k, seed, more, out) for seed in args.seeds for k in classes]))


if __name__ == "__main__":
    main()
