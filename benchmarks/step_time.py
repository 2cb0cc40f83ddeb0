"""Seconds a training step of ddpm_sfd.py, against the loop one would write first.

    python benchmarks/step_time.py mnist            # the shipped teacher's network, 32 + 8 images
    python benchmarks/step_time.py cifar10          # the official CIFAR-10 network, 4 + 4 images; 128 + 128 on a GPU
    python benchmarks/step_time.py cifar10 --compile --out results/step_time-cifar10-cuda.json    # a GPU's row of the table

Both loops run here in turn, a step of one and a step of the other, in one process, so that they see the same machine.
`plain`: float32; retained and forgotten images go through each network in a pass of their own, and each update draws
its own images from the generator. `ours`: what ddpm_sfd.py does, except guidance, clipped images, the weight
average, the decay of rates and the check for NaN. Peak memory is measured in a separate process each (not on Windows).

Floating-point operations are those of the matrix products and convolutions of one step of `ours`, forward and backward,
as torch counts them; the share of the chip's peak is their number per second, divided by the vendor's figure for dense
16-bit products. That figure is known for some GPUs; give it with --peak-tflops for others.
"""

import argparse
import copy
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from ddpm_sfd import draw_labels, fake_score_loss, generator_loss, one_step, total  # noqa: E402
from pretrain import MNIST  # noqa: E402
from record import check_out, commit, machine, write_json  # noqa: E402
from run import Run, choose_amp, choose_device, number, refusing  # noqa: E402
from unet import UNet, VPSchedule  # noqa: E402

NETWORKS = {"mnist": (MNIST | dict(num_classes=10), (32, 8), (32, 8)), "cifar10": (dict(num_classes=10), (4, 4), (128, 128))}
PEAK_TFLOPS = {  # part of the GPU's name -> dense bf16 (T4, V100: fp16) by its data sheet; the first that fits
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362, "L40": 181, "L4": 121,
    "A10G": 70, "A10": 125, "RTX 4090": 165, "RTX 3090": 71, "A6000": 155, "V100": 125, "T4": 65,
}


class Loop:
    """Three copies of one random network, their optimizers, and one step in either style."""

    autocast = Run.autocast  # as ddpm_sfd.py does it; for `plain`, dtype is None

    def __init__(self, config, sizes, device, dtype=None, compile=False, prepare=Run.prepare):
        torch.manual_seed(0)
        self.config, self.device, self.dtype, self.sizes = argparse.Namespace(compile=compile), device, dtype, sizes
        self.teacher = prepare(self, UNet(**config).to(device).eval().requires_grad_(False))
        torch.nn.init.normal_(self.teacher.conv_out.weight, std=0.02)
        self.psi, self.theta = (prepare(self, copy.deepcopy(self.teacher).requires_grad_(True)) for _ in range(2))
        settings = dict(lr=1e-5, betas=(0.0, 0.999), fused=True if device.type == "cuda" and dtype is not None else None)
        self.optimizers = [torch.optim.Adam(n.parameters(), **settings) for n in (self.psi, self.theta)]
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.schedule = VPSchedule.linear().to(device)
        self.classes = [torch.tensor(x, device=device) for x in ([1, 2, 3, 4, 5, 6, 7, 8, 9], [0], [1])]

    def draw(self, c):
        return torch.randn(len(c), *self.teacher.image_shape, device=self.device)

    def t_and_noise(self, x):
        return torch.randint(20, 712, (len(x),), device=self.device), torch.randn_like(x)

    def update(self, loss, network, optimizer):
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_value_(network.parameters(), 1.0)
        self.scaler.step(optimizer)
        self.scaler.update()

    def ours(self):
        c, c_teacher = draw_labels(*self.classes, *self.sizes)
        with self.autocast():
            x_g = one_step(self.theta.train(), self.draw(c), c, self.schedule, 440)
        self.psi.train().requires_grad_(True)
        t, noise = self.t_and_noise(x_g)
        with self.autocast():
            loss = fake_score_loss(self.psi, x_g.detach(), t, c, noise, self.schedule)
        loss = total(loss, self.sizes[0], 0.1)
        self.update(loss, self.psi, self.optimizers[0])
        self.psi.eval().requires_grad_(False)
        t, noise = self.t_and_noise(x_g)
        with self.autocast():
            loss = generator_loss(self.teacher, self.psi, x_g, t, c_teacher, c, noise, self.schedule, 1.0)
        loss = total(loss, self.sizes[0], 0.1)
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
            part = generator_loss(self.teacher, self.psi, x_g, t, c_teacher, c, noise, self.schedule, 1.0)
            loss = loss + weight * part.mean()
        self.update(loss, self.theta, self.optimizers[1])


def peak_resident_bytes():
    """The largest resident set of this process. Linux's ru_maxrss would be the parent's, where that was larger; macOS
    does not count what it has compressed."""
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    import resource  # here, since Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_memory(name, args, sizes):
    """Bytes that two steps of the loop `name` need at their worst, in a process of its own."""
    words = [args.network, "--memory-of", name, "--device", args.device, "--batch-size", *map(str, sizes)]
    words += ["--compile"] if args.compile else []
    return int(subprocess.run([sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True).stdout)


def measured_memory(loop, name, cuda):
    for _ in range(2):
        getattr(loop, name)()
    return torch.cuda.max_memory_allocated() if cuda else peak_resident_bytes()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=NETWORKS)
    parser.add_argument("--batch-size", type=number(int, 1), nargs=2, metavar=("RETAINED", "FORGOTTEN"))
    parser.add_argument("--steps", type=number(int, 1), default=10, help="timed steps of each loop, after two that warm up [10]")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--compile", action="store_true", help="torch.compile the networks of `ours`")
    parser.add_argument("--peak-tflops", type=number(float, 0.001), help="the chip's peak, for its share")
    parser.add_argument("--out", help="JSON file to write")
    parser.add_argument("--memory-of", choices=["ours", "plain"], help=argparse.SUPPRESS)  # for `peak_memory`
    args = parser.parse_args()
    with refusing():
        check_out(args.out)
    device = choose_device(args.device)
    dtype, cuda = choose_amp("auto", device), device.type == "cuda"
    config, on_cpu, on_gpu = NETWORKS[args.network]
    sizes = args.batch_size or (on_gpu if cuda else on_cpu)

    def make(name):
        if name == "plain":
            return Loop(config, sizes, device, prepare=lambda loop, network: network)
        return Loop(config, sizes, device, dtype, args.compile)

    if args.memory_of:
        return print(measured_memory(make(args.memory_of), args.memory_of, cuda))
    peaks = {name: peak_memory(name, args, sizes) for name in ("plain", "ours")}  # while this process holds nothing yet
    counter = FlopCounterMode(display=False)
    with counter:  # before anything is compiled: the counter does not see into compiled code
        Loop(config, sizes, device, dtype).ours()
    flops, seconds = counter.get_total_flops(), {"plain": [], "ours": []}
    loops = {name: make(name) for name in seconds}
    for i in range(args.steps + 2):
        for name, times in seconds.items():
            torch.cuda.synchronize() if cuda else None
            clock = time.perf_counter()
            getattr(loops[name], name)()
            torch.cuda.synchronize() if cuda else None
            if i >= 2:
                times.append(time.perf_counter() - clock)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    known = [peak for part, peak in PEAK_TFLOPS.items() if cuda and part in torch.cuda.get_device_name(device)]
    peak = args.peak_tflops or next(iter(known), None)
    result = {
        "network": args.network,
        "batch": list(sizes),
        "precision": str(dtype or torch.float32),
        "compiled": args.compile,
        "seconds": seconds,
        "median": median,
        "speedup": median["plain"] / median["ours"],
        "images_per_second": {name: sum(sizes) / median[name] for name in seconds},
        "flops_a_step": flops,
        "peak_tflops": peak,
        "share_of_peak": peak and flops / median["ours"] / (peak * 1e12),
        "peak_memory_bytes": peaks,
        "memory_is": "allocated on the GPU" if cuda else "resident set of the process, torch included",
        "command": " ".join(["python", "benchmarks/step_time.py", *sys.argv[1:]]),
        "machine": machine(device),
        "commit": commit(),
    }
    print(f"{args.network}, {sizes[0]} + {sizes[1]} images, {machine(device)}")
    for name in seconds:
        print(f"  {name:>6}  {median[name]:.3f} s a step (from {min(seconds[name]):.3f} to {max(seconds[name]):.3f}),  "
              f"{result['images_per_second'][name]:,.1f} images a second,  peak {result['peak_memory_bytes'][name] / 2**20:,.0f} MiB")
    print(f"  ours is {result['speedup']:.2f} times as fast; {flops / 1e9:,.0f} GFLOP a step, "
          f"{flops / median['ours'] / 1e12:,.2f} TFLOP/s" + (f", {result['share_of_peak']:.1%} of the peak" if peak else ""))
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
