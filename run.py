"""What every run needs and no paper mentions.

A command line made from a dataclass, one-line refusals, the run folder, atomic checkpoints with exact resume, the
choice of device and precision, and several processes under torchrun. The same seed gives the same bits on one machine's
CPU; on a GPU, PyTorch computes some sums in no fixed order. Nothing here knows what is being trained, and a method
file can be read without opening this one. A method file calls:

    config = parse(Config, __doc__, PRESETS)     # the dataclass, filled from the command line
    run = Run(config, folder)                    # device, precision, processes, folder
    for step in run.loop(state):                 # bar, checkpoints, Ctrl-C, resume; state: name -> has a state_dict
        with run.autocast(): ...
        run.update("loss", loss, network, opt)   # run.backward, then run.descend: clipping and the optimizer's step
        run.log(loss=loss)                       # curves and bar; stops at NaN or infinity
    run.finish(metrics)
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import math
import os
import pickle
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.figure
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from record import command, commit, launcher, machine, precision, write_atomically, write_json

# ---------------------------------------------------------------------------- refusals


def refuse(message):
    """Say in one line what was wrong and what would be right, and leave with exit status 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def refusing(what=""):
    """Wrap the reading of what the user named: a ValueError or OSError becomes a refusal, not a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        refuse(what + " ".join(str(error).split()))


# ---------------------------------------------------------------------------- the command line


def option(default, help, **rules):
    """A field of a Config. rules: low and high (inclusive limits of a number); choices; nargs, and joint, what joins
    several words (a comma if not given); positional."""
    return dataclasses.field(default=default, metadata={"help": help, **rules})


class OneLineParser(argparse.ArgumentParser):
    def error(self, message):
        refuse(f"{message} (see --help)")


def number(kind, low=None, high=None):
    """A parser of whole numbers (kind int) or numbers (float) from `low` to `high`, for argparse."""
    def parse_number(text):
        value = kind(text)  # a ValueError here is argparse's to report
        if kind is float and not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"must be finite, not {text}")
        if low is not None and value < low:
            raise argparse.ArgumentTypeError(f"must be at least {low}, not {text}")
        if high is not None and value > high:
            raise argparse.ArgumentTypeError(f"must be at most {high}, not {text}")
        return value
    parse_number.__name__ = {int: "whole number", float: "number"}[kind]
    return parse_number


def add_flag(parser, field, default):
    """One field of a Config as one flag: its type, its limits, its default and its help."""
    rules, kind = field.metadata, {"int": int, "float": float}.get(getattr(field.type, "__name__", field.type))
    flag = field.name if rules.get("positional") else "--" + field.name.replace("_", "-")
    shown = f" [{default}]" if default != "" else ""
    words = {"help": (rules["help"] + shown).replace("%", "%%"), "default": default}
    if field.type in (bool, "bool"):
        words = {"help": rules["help"], "action": "store_true"}
    elif rules.get("choices"):
        words["choices"] = rules["choices"]
    elif kind:
        words |= {"type": number(kind, rules.get("low"), rules.get("high")), "metavar": {int: "N", float: "X"}[kind]}
    else:
        words["metavar"] = "TEXT"
    if rules.get("positional") or rules.get("nargs"):
        words["nargs"] = rules.get("nargs", "?")
    parser.add_argument(flag, **words)


def parse(Config, doc, presets=None, argv=None):
    """The dataclass `Config`, filled from the command line: one flag a field. Unknown flags are refused.

    presets: value of the first field -> {field: value}; these replace the defaults, and flags replace them in turn.
    """
    argv, fields, defaults = sys.argv[1:] if argv is None else argv, dataclasses.fields(Config), {}
    if presets:
        first = OneLineParser(allow_abbrev=False, add_help=False)
        for field in fields:
            add_flag(first, field, field.default)
        defaults = presets[getattr(first.parse_known_args(argv)[0], fields[0].name)]
    parser = OneLineParser(allow_abbrev=False, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields:
        add_flag(parser, field, defaults.get(field.name, field.default))
    values = vars(parser.parse_args(argv))
    joint = {field.name: field.metadata.get("joint", ",") for field in fields}
    return Config(**{k: joint[k].join(v) if isinstance(v, list) else v for k, v in values.items()})


# ---------------------------------------------------------------------------- machine


def choose_device(name):
    """auto | cpu | cuda -> torch.device; under torchrun each process takes its own GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        refuse("--device cuda: this machine shows no CUDA GPU; use --device cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    rank, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if rank >= gpus:
        refuse(f"process {rank + 1} has no GPU of its own, there are {gpus}; start as many, or use --device cpu")
    return torch.device("cuda", rank)


def choose_amp(name, device):
    """auto | bf16 | fp16 | off -> torch.bfloat16, torch.float16 or None (float32 throughout, except that
    PyTorch lets newer GPUs round it to TF32 inside convolutions).

    auto takes bf16 where the hardware multiplies it natively: GPUs from Ampere on, CPUs with AVX512-BF16 or Intel's
    AMX. Elsewhere it takes fp16 on GPUs and None on CPUs, including Arm's and Apple's.
    """
    cpu = any(getattr(torch.cpu, f, lambda: False)() for f in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        return torch.bfloat16 if cpu else None
    if name == "fp16" and device.type == "cpu":
        refuse("--amp fp16 needs a CUDA GPU; on a CPU use --amp bf16, off or auto")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[name]


# ---------------------------------------------------------------------------- a run

# settings that may differ when a run is resumed; whatever decays over `steps` then decays over the new number
MAY_CHANGE = {"steps", "resume", "out", "device", "save_every", "compile"}


def linear_decay(optimizer, end, steps):
    """A learning-rate schedule: from the optimizer's own rate to the share `end` of it, after `steps` times step()."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - (1 - end) * min(1, step / max(1, steps)))


def warm_up_and_down(steps, down, warm=None):
    """Step -> learning rate as a share of its peak: it rises over `warm` steps (default: a tenth of all, at most 500),
    stays constant, and falls to 0 over the last steps, the share `down` of all."""
    warm = warm or max(1, min(500, steps // 10))
    return lambda step: min((step + 1) / warm, 1.0, (steps - step) / max(1, down * steps) if down else 1.0)


def plot_curves(curves, path):
    """name -> list of numbers, one small panel each, with a running mean."""
    figure = matplotlib.figure.Figure(figsize=(4 * max(1, len(curves)), 3), layout="constrained")
    for i, (name, values) in enumerate(curves.items()):
        axes, values = figure.add_subplot(1, len(curves), i + 1, title=name, xlabel="logged step"), torch.tensor(values)
        width = max(1, len(values) // 30)
        axes.plot(values, color="0.8", linewidth=0.8)
        axes.plot(range(width - 1, len(values)), values.unfold(0, width, 1).mean(1), linewidth=1.5)
    figure.savefig(path, dpi=100, metadata={"Software": None})


class Run:
    """One run: where it writes, what it computes on, how far it is.

    config needs the fields device, amp, seed, out, resume, steps and save_every. Under torchrun every process makes a
    Run; only `rank` 0 writes. Exits with status 2 when this run must not write to the folder. fixed_steps: True if
    --resume must keep --steps. loss_scale: what fp16 first multiplies the loss by; it halves at each overflow, and
    that step is lost.
    """

    def __init__(self, config, folder, fixed_steps=False, loss_scale=2.0**16):
        self.clock = time.perf_counter()
        self.config, self.folder, self.fixed_steps = config, Path(config.out or folder), fixed_steps
        self.device = choose_device(config.device)
        self.dtype = choose_amp(config.amp, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, loss_scale, enabled=self.dtype == torch.float16)
        self.fused = True if self.device.type == "cuda" else None  # Adam's "fused"; None leaves it to torch
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.curves, self.seconds, self.bar, self.hook = {}, 0.0, None, sys.excepthook
        self.enough = False  # set it in the loop (in every process) to make the present step the last one
        self.settings = dataclasses.asdict(config)
        parts = self.world * getattr(config, "accumulate", 1)
        for name in ("batch_size", "forget_batch_size"):
            if getattr(config, name, 0) % parts:
                refuse(f"--{name.replace('_', '-')} {getattr(config, name)} must be a multiple of {parts}: processes, "
                       f"{self.world}, times the parts that each cuts it into, {parts // self.world}")
        if self.rank == 0:
            self.claim_folder()
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.world > 1:
            hour = datetime.timedelta(hours=1)  # for process 0 to write a large checkpoint while the others wait
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=hour)
        torch.manual_seed(config.seed * 1_000_003 + self.rank)

    # -- folder

    def claim_folder(self):
        """Make the folder, or make sure that what lies there may be replaced or, with --resume, continued."""
        folder, saved = self.folder, self.folder / "config.json"
        with refusing("--out: "):  # a name too long, a folder that may not be read
            if folder.exists() and not folder.is_dir():
                refuse(f"--out {folder} is a file; give a folder")
            there = {p.name for p in folder.iterdir() if not p.name.endswith(".tmp")} if folder.exists() else set()
        there.discard(".DS_Store")  # a Mac's doing
        if there and "config.json" not in there:  # the first file that a run writes
            refuse(f"{folder} holds files that are not a run's ({min(there)}); give another --out")
        if self.config.resume and "checkpoint.pt" not in there:
            refuse(f"--resume: {folder} holds no checkpoint.pt; run without --resume, or name the run's --out")
        if saved.exists():
            with refusing(f"{saved} is not a run's: "):
                before = json.loads(saved.read_text())
                if not isinstance(before, dict):
                    raise ValueError("it holds no settings")
            free = MAY_CHANGE if self.config.resume and not self.fixed_steps else MAY_CHANGE - {"steps"}
            changed = [k for k in self.settings if k not in free and before.get(k) != self.settings[k]]
            if changed:
                k = changed[0]
                refuse(f"{folder} holds a run with {k} {before.get(k)!r}, not {self.settings[k]!r}; give another --out")
        if not self.config.resume:
            if "checkpoint.pt" in there and "metrics.json" not in there:
                refuse(f"{folder} holds an unfinished run; add --resume to go on with it, or give another --out")
            self.begin()

    def begin(self):
        """Take over the folder for this run; with --resume, only once the checkpoint has been read."""
        with refusing("--out: "):
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "metrics.json").unlink(missing_ok=True)  # it is there when a run is done, and only then
            if not self.config.resume:
                (self.folder / "checkpoint.pt").unlink(missing_ok=True)
            for half in self.folder.glob("*.tmp"):  # left by a run that was killed while it wrote
                half.unlink()
            write_json(self.folder / "config.json", self.settings)

    # -- precision and processes

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def prepare(self, network):
        """The same network, sped up in place so that no name in its state changes: channels last and, with --compile,
        compiled. A copy of it, such as theta's average, is not compiled.

        Convolutions are faster with channels last: on tensor cores, and on CPUs (twice as fast in bfloat16, slightly in
        float32). But GroupNorm on a CPU is then ten times slower, unless its groups are at least 16 channels wide."""
        norms = [m for m in network.modules() if isinstance(m, torch.nn.GroupNorm)]
        wide = all(m.num_channels // m.num_groups >= 16 for m in norms)
        faster = wide if self.device.type == "cpu" else self.dtype is not None  # float32 on a GPU: not measured
        if faster:
            network.to(memory_format=torch.channels_last)
        if getattr(self.config, "compile", False):
            network.compile()
        return network

    def parallel(self, network):
        """The network to train with: under torchrun, wrapped to average its gradients over the processes."""
        if self.world == 1:
            return network
        return DistributedDataParallel(network, device_ids=[self.device.index] if self.device.type == "cuda" else None,
                                       gradient_as_bucket_view=True)  # one copy of the gradients, not two

    def update(self, name, loss, network, optimizer, clip_value=None):
        """One optimizer step down a loss: `backward` and `descend`."""
        self.descend(name, self.backward(loss), network, optimizer, clip_value)

    def backward(self, loss):
        """Add a loss's gradients to those already accumulated; returns its value. With fp16 the loss is scaled to avoid
        underflow."""
        self.scaler.scale(loss).backward()
        return loss.detach()

    def descend(self, name, loss, network, optimizer, clip_value=None):
        """One optimizer step with the accumulated gradients, clipped by value; loss: the loss they come from. With fp16
        a step whose scaled gradients overflow is skipped, as usual; any other NaN or infinity stops the run."""
        self.scaler.unscale_(optimizer)
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        loss_is_finite, *finite = torch.stack([loss, *torch._foreach_norm(gradients)]).isfinite().tolist()
        if self.any_process(not loss_is_finite):  # all stop, or none: the others would wait for this one
            self.stop(name)
        if not all(finite) and (not self.scaler.is_enabled() or self.scaler.get_scale() < 2**-10):  # no mere overflow
            self.stop(f"the gradient of {name}")
        if clip_value:
            torch.nn.utils.clip_grad_value_(network.parameters(), clip_value)
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad(set_to_none=True)  # now, so that only one network at a time has gradients in memory

    def any_process(self, flag):
        """Whether `flag` is true in any of the processes; all of them must ask."""
        if self.world == 1:
            return bool(flag)
        flag = torch.tensor(float(bool(flag)), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return flag.item() > 0

    # -- the loop

    def loop(self, state, label=""):
        """Yield the remaining steps of 0 .. config.steps - 1, with a checkpoint every `save_every` and after the last.
        Ctrl-C saves, prints the command that resumes and exits with status 130; a second Ctrl-C exits at once.
        Ctrl-C after the last step, during evaluation, also prints it and exits (not in a notebook)."""
        self.state, path = state, self.folder / "checkpoint.pt"
        self.step = self.restore(path) if self.config.resume else 0
        if self.step > self.config.steps:
            refuse(f"--steps {self.config.steps}: {path} is already at step {self.step}")
        if self.config.resume and self.rank == 0:
            self.begin()
        interrupted = []

        def remember(*_):
            interrupted.append(True)
            signal.signal(signal.SIGINT, previous)

        previous = signal.signal(signal.SIGINT, remember)
        self.bar = tqdm(total=self.config.steps, initial=self.step, desc=label, disable=self.rank > 0,
                        mininterval=0.5 if sys.stderr.isatty() else 20)  # a log file wants fewer lines
        while self.step < self.config.steps and not self.enough:
            yield self.step
            self.step += 1
            self.seconds, self.clock = self.seconds + time.perf_counter() - self.clock, time.perf_counter()
            self.bar.update()
            stop = self.any_process(interrupted)
            if stop or self.enough or self.step == self.config.steps or self.step % self.config.save_every == 0:
                self.save(path)
            if stop:
                self.leave()
        self.bar.close()
        signal.signal(signal.SIGINT, previous)
        self.hook, sys.excepthook = sys.excepthook, self.leave
        if self.any_process(interrupted):  # while the last step was being saved
            self.leave()

    def leave(self, kind=KeyboardInterrupt, *error):
        """After Ctrl-C: say how to resume from the checkpoint and exit with status 130. Also used as sys.excepthook."""
        if kind is not KeyboardInterrupt:
            return self.hook(kind, *error)
        self.bar.close()
        words = [w for w in sys.argv if w != "--resume"]
        words = subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)
        if self.rank == 0:
            print(f"\nstopped after step {self.step}; to go on:\n    {launcher()} {words} --resume")
        sys.exit(130)

    def log(self, **numbers):
        """Keep this step's numbers for the curves, show them on the bar, and stop at the first that is not finite."""
        numbers = {k: v.item() if torch.is_tensor(v) else float(v) for k, v in numbers.items()}
        for name, value in numbers.items():
            if not math.isfinite(value):
                self.stop(name)
            self.curves.setdefault(name, []).append(value)
        recent = {name: self.curves[name][-20:] for name in numbers}  # the bar shows their mean
        self.bar.set_postfix_str("  ".join(f"{k} {sum(v) / len(v):.4g}" for k, v in recent.items()), refresh=False)

    def stop(self, name):
        """NaN and infinity are never passed over: the run ends here, and the last checkpoint stays as it was."""
        self.bar.close()
        saved = f"; a checkpoint in {self.folder} is from before" if (self.folder / "checkpoint.pt").exists() else ""
        print(f"{Path(sys.argv[0]).name}: error: {name} is not finite at step {self.step}{saved}. Try a smaller "
              "learning rate, or --amp off, in another --out", file=sys.stderr)
        sys.exit(1)

    # -- checkpoints

    def save(self, path):
        """Save all that the next step needs, in one move: networks, optimizers, EMA, random state of every process."""
        cuda = self.device.type == "cuda"
        mine = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if cuda else None}
        random = [mine] * self.world
        if self.world > 1:
            dist.all_gather_object(random, mine)
        if self.rank == 0:
            content = {"step": self.step, "enough": self.enough, "seconds": self.seconds, "random": random,
                       "curves": self.curves, "scaler": self.scaler.state_dict(),
                       "state": {k: v.state_dict() for k, v in self.state.items()}}
            write_atomically(path, lambda temporary: torch.save(content, temporary))

    def restore(self, path):
        try:
            saved = torch.load(path, map_location="cpu", weights_only=True)
            for name, thing in self.state.items():
                thing.load_state_dict(saved["state"][name])
            random = saved["random"][self.rank % len(saved["random"])]
            scaler, step = saved["scaler"], saved["step"]
            self.curves, self.seconds, self.enough = saved["curves"], saved["seconds"], saved["enough"]
        except Exception as error:  # whatever a damaged or foreign pickle raises
            reason = type(error).__name__
            if str(error) and not isinstance(error, pickle.UnpicklingError):  # its message advises unsafe loading
                reason += f": {str(error).splitlines()[0]}"
            refuse(f"--resume: {path} is not a whole checkpoint of this run ({reason})")
        if len(saved["random"]) != self.world:
            refuse(f"--resume: {path} is of {len(saved['random'])} process(es); go on with as many, not {self.world}")
        device = "cpu" if random["cuda"] is None else "cuda"
        if device != self.device.type:  # Adam's state has the kind and the layout of where it was
            refuse(f"--resume: {path} was written with --device {device}; go on there, not with {self.device.type}")
        if scaler:  # empty but for fp16
            self.scaler.load_state_dict(scaler)
        torch.set_rng_state(random["cpu"])
        if device == "cuda":
            torch.cuda.set_rng_state(random["cuda"])
        return step

    def elapsed(self):
        """Seconds that this run has taken so far, its earlier parts before a resume included."""
        return self.seconds + time.perf_counter() - self.clock

    def finish(self, metrics):
        """Write curves.png, and metrics.json with how and where its numbers were made; leave the process group."""
        sys.excepthook = self.hook
        if self.rank == 0:
            plot_curves(self.curves, self.folder / "curves.png")
            write_json(self.folder / "metrics.json", metrics | {
                "seconds": self.elapsed(), "command": command(), "seed": self.config.seed, "processes": self.world,
                "amp": precision(self.dtype), "machine": machine(self.device),
                "commit": commit(), "config": self.settings})
        if self.world > 1:
            dist.destroy_process_group()
