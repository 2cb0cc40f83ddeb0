"""Images a second: the one-step generator against its teacher at 50 DDIM and at 1,000 ancestral steps.

python benchmarks/sampling.py runs/ddpm_sfd-mnist-forget0/generator.safetensors
"""

import argparse
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from run import choose_device, commit, machine, refusing, write_json  # noqa: E402
from samples import balanced_labels, generate, sampler_of  # noqa: E402
from unet import VPSchedule, load_unet  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("generator")
    parser.add_argument("--teacher", default="mnist")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    device = choose_device(args.device)
    with refusing():
        generator, teacher = load_unet(args.generator).to(device), load_unet(args.teacher).to(device)
    schedule = VPSchedule.linear().to(device)
    samplers = {
        "generator, 1 call": (*sampler_of(generator, schedule, "one-step"), 1000),
        "teacher, 50 DDIM steps": (*sampler_of(teacher, schedule, "ddim", 50), 100),
        "teacher, 1,000 ancestral steps": (*sampler_of(teacher, schedule, "ancestral"), 20),
    }
    rows = {}
    for name, (sample, nfe, images) in samplers.items():
        labels = balanced_labels(10, images // 10)
        seconds = [generate(sample, labels, teacher.image_shape, seed, device)[1] for seed in range(args.repeats)]
        rows[name] = {
            "network_calls": nfe,
            "images": images,
            "seconds": seconds,
            "images_per_second": images / statistics.median(seconds),
        }
        print(f"{name:>32}  {rows[name]['images_per_second']:10,.1f} images a second")
    if args.out:
        write_json(
            args.out,
            {
                "rows": rows,
                "precision": "float32",
                "command": " ".join(["python", "benchmarks/sampling.py", *sys.argv[1:]]),
                "machine": machine(device),
                "commit": commit(),
            },
        )


if __name__ == "__main__":
    main()
