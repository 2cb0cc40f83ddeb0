"""Seconds a training step of ddpm_sfd.py, against the loop one would write first.

    python benchmarks/step_time.py mnist            # the shipped teacher's network, 32 + 8 images
    python benchmarks/step_time.py cifar10          # the official CIFAR-10 network, 4 + 4 images (--batch-size changes it)

Both loops run here in turn, a step of one and a step of the other, in one process, so that they see the same machine.
`plain`: float32; retained and forgotten images go through each network in a pass of their own, and each update draws
its own images from the generator. `ours`: what ddpm_sfd.py does. Peak memory is measured in a process of its own each.
"""

import argparse
import copy
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from ddpm_sfd import draw_labels, fake_score_loss, generator_loss, one_step, total  # noqa: E402
from pretrain import TEACHER  # noqa: E402
from run import choose_amp, choose_device, commit, machine, write_json  # noqa: E402
from unet import UNet, VPSchedule  # noqa: E402

NETWORKS = {"mnist": (TEACHER, 32, 8), "cifar10": (dict(num_classes=10), 4, 4)}


class Loop:
    """Three copies of one random network, their optimizers, and one step in either style."""

    def __init__(self, config, n_retained, n_forgotten, device, dtype):
        torch.manual_seed(0)
        self.teacher = UNet(**config).to(device).eval().requires_grad_(False)
        torch.nn.init.normal_(self.teacher.conv_out.weight, std=0.02)
        self.psi, self.theta = (copy.deepcopy(self.teacher).requires_grad_(True) for _ in range(2))
        self.optimizers = [
            torch.optim.Adam(n.parameters(), lr=1e-5, betas=(0.0, 0.999)) for n in (self.psi, self.theta)
        ]
        self.schedule, self.sizes, self.device, self.dtype = (
            VPSchedule.linear().to(device),
            (n_retained, n_forgotten),
            device,
            dtype,
        )
        self.classes = [torch.tensor(x, device=device) for x in ([1, 2, 3, 4, 5, 6, 7, 8, 9], [0], [1])]

    def autocast(self, on):
        return torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=on and self.dtype is not None)

    def draw(self, c):
        return torch.randn(len(c), *self.teacher.image_shape, device=self.device)

    def t_and_noise(self, x):
        return torch.randint(20, 712, (len(x),), device=self.device), torch.randn_like(x)

    def update(self, loss, network, optimizer):
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_value_(network.parameters(), 1.0)
        optimizer.step()

    def ours(self):
        c, c_teacher = draw_labels(*self.classes, *self.sizes)
        with self.autocast(True):
            x_g = one_step(self.theta.train(), self.draw(c), c, self.schedule, 440)
        self.psi.train().requires_grad_(True)
        t, noise = self.t_and_noise(x_g)
        with self.autocast(True):
            loss = total(fake_score_loss(self.psi, x_g.detach(), t, c, noise, self.schedule), self.sizes[0], 0.1)
        self.update(loss, self.psi, self.optimizers[0])
        self.psi.eval().requires_grad_(False)
        t, noise = self.t_and_noise(x_g)
        with self.autocast(True):
            loss = total(
                generator_loss(self.teacher, self.psi, x_g, t, c_teacher, c, noise, self.schedule, 1.0),
                self.sizes[0],
                0.1,
            )
        self.update(loss, self.theta, self.optimizers[1])

    def plain(self):
        c, c_teacher = draw_labels(*self.classes, *self.sizes)
        parts = list(zip((1.0, 0.1), c.split(self.sizes), c_teacher.split(self.sizes)))
        self.psi.train().requires_grad_(True)
        loss = 0
        for weight, c, _ in parts:
            with torch.no_grad():
                x_g = one_step(self.theta.train(), self.draw(c), c, self.schedule, 440)
            t, noise = self.t_and_noise(x_g)
            loss = loss + weight * fake_score_loss(self.psi, x_g, t, c, noise, self.schedule).mean()
        self.update(loss, self.psi, self.optimizers[0])
        self.psi.eval().requires_grad_(False)
        loss = 0
        for weight, c, c_teacher in parts:
            x_g = one_step(self.theta, self.draw(c), c, self.schedule, 440)
            t, noise = self.t_and_noise(x_g)
            loss = (
                loss
                + weight
                * generator_loss(self.teacher, self.psi, x_g, t, c_teacher, c, noise, self.schedule, 1.0).mean()
            )
        self.update(loss, self.theta, self.optimizers[1])


def peak_resident_bytes():
    """The largest resident set of this process. Linux's ru_maxrss would be the parent's, where that was larger."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--batch-size", type=int, nargs=2, metavar=("RETAINED", "FORGOTTEN"))
    parser.add_argument("--steps", type=int, default=10, help="timed steps of each loop, after two that warm up [10]")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument(
        "--memory-of", choices=["ours", "plain"], help=argparse.SUPPRESS
    )  # this process measures one loop's memory
    args = parser.parse_args()
    device = choose_device(args.device)
    dtype = choose_amp("auto", device)
    config, *sizes = NETWORKS[args.network]
    sizes = args.batch_size or sizes
    cuda = device.type == "cuda"

    loop = Loop(config, *sizes, device, dtype)
    if args.memory_of:
        for _ in range(2):
            getattr(loop, args.memory_of)()
        return print(torch.cuda.max_memory_allocated() if cuda else peak_resident_bytes())

    seconds = {"plain": [], "ours": []}
    for i in range(args.steps + 2):
        for name, times in seconds.items():
            clock = time.perf_counter()
            getattr(loop, name)()
            torch.cuda.synchronize() if cuda else None
            if i >= 2:
                times.append(time.perf_counter() - clock)
    memory = {
        name: int(
            subprocess.run(
                [
                    sys.executable,
                    __file__,
                    args.network,
                    "--memory-of",
                    name,
                    "--device",
                    args.device,
                    "--batch-size",
                    *map(str, sizes),
                ],
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        )
        for name in seconds
    }
    median = {name: statistics.median(times) for name, times in seconds.items()}
    result = {
        "network": args.network,
        "batch": list(sizes),
        "precision": str(dtype or torch.float32),
        "seconds": seconds,
        "median": median,
        "speedup": median["plain"] / median["ours"],
        "peak_memory_bytes": memory,
        "memory_is": "allocated on the GPU" if cuda else "resident set of the process, torch included",
        "command": " ".join(["python", "benchmarks/step_time.py", *sys.argv[1:]]),
        "machine": machine(device),
        "commit": commit(),
    }
    print(f"{args.network}, {sizes[0]} + {sizes[1]} images, {machine(device)}")
    for name in seconds:
        print(
            f"  {name:>6}  {median[name]:.3f} s a step (from {min(seconds[name]):.3f} to {max(seconds[name]):.3f}),  peak {memory[name] / 2**20:,.0f} MiB"
        )
    print(f"  ours is {result['speedup']:.2f} times as fast")
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
