"""Images a second: the one-step generator against its teacher at 50 DDIM and at 1,000 ancestral steps.

    python benchmarks/sampling.py runs/ddpm_sfd-mnist-forget0/generator.safetensors
    python benchmarks/sampling.py generator.safetensors --teacher teacher.safetensors --batch-size 100 --out results/sampling-cifar10.json

All three draw in batches of one size, in float32, in turn and in one process, so that they see the same machine; a first
round, which warms up, is not counted. The slower a sampler, the fewer images it draws.
"""

import argparse
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from record import check_out, commit, machine, write_json  # noqa: E402
from run import choose_device, number, refusing  # noqa: E402
from samples import balanced_labels, generate, sampler_of  # noqa: E402
from unet import VPSchedule, load_unet  # noqa: E402

BATCHES = {"generator, 1 call": 50, "teacher, 50 DDIM steps": 5, "teacher, 1,000 ancestral steps": 1}  # of a round


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("generator", help="file that ddpm_sfd.py wrote")
    parser.add_argument("--teacher", default="mnist", help="its teacher, a shipped name or a file [mnist]")
    parser.add_argument("--batch-size", type=number(int, 1), default=20, help="images drawn at once [20]")
    parser.add_argument("--repeats", type=number(int, 1), default=3, help="rounds that are timed [3]")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--out", help="JSON file to write")
    args = parser.parse_args()
    device = choose_device(args.device)
    with refusing():
        check_out(args.out)
        generator, teacher = load_unet(args.generator).to(device), load_unet(args.teacher).to(device)
        if "t_init" not in generator.card or generator.config != teacher.config:
            raise ValueError(f"{args.generator} is no one-step generator of {args.teacher}'s configuration")
    schedule = VPSchedule.linear().to(device)
    one_step, ddim = sampler_of(generator, schedule, "one-step"), sampler_of(teacher, schedule, "ddim", 50)
    samplers = dict(zip(BATCHES, (one_step, ddim, sampler_of(teacher, schedule, "ancestral"))))
    labels = balanced_labels(teacher.num_classes or 1, max(BATCHES.values()) * args.batch_size)
    seconds = {name: [] for name in samplers}
    for seed in range(args.repeats + 1):
        for name, (sample, _) in samplers.items():
            N = BATCHES[name] * args.batch_size
            c = labels[:N] if teacher.num_classes else N
            # noise of the sampler's own, on the device: what `generate` hands on is drawn image by image on the CPU
            draw = lambda z, c, _, sample=sample: sample(z, c, None)
            seconds[name].append(generate(draw, c, teacher.image_shape, seed, device, args.batch_size, bar=name)[1])
    rows = {}
    for name, (_, calls) in samplers.items():
        images, times = BATCHES[name] * args.batch_size, seconds[name][1:]
        rows[name] = {"network_calls": calls, "images": images, "seconds": times,
                      "images_per_second": images / statistics.median(times)}
        print(f"{name:>32}  {rows[name]['images_per_second']:10,.1f} images a second "
              f"(from {images / max(times):,.1f} to {images / min(times):,.1f})")
    if args.out:
        write_json(args.out, {"rows": rows, "batch": args.batch_size, "precision": "float32",
                              "command": " ".join(["python", "benchmarks/sampling.py", *sys.argv[1:]]),
                              "machine": machine(device), "commit": commit()})


if __name__ == "__main__":
    main()
