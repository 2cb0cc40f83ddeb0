"""The safety of a run: what is killed resumes to the same bits, what goes wrong says so, what is someone else's stays."""

import copy
import dataclasses
import importlib
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import ROOT, argv_of, inside, python, random_unet

import run as housekeeping
from run import Run, linear_decay, option, parse
from unet import load_unet, save_unet

SFD = "ddpm_sfd.py --preset mnist-one-stage --forget 1 --classifier none --batch-size 6 --forget-batch-size 2 --override random"


def one_thread():
    return os.environ | {"OMP_NUM_THREADS": "1"}


def start(command, cwd):
    return subprocess.Popen(argv_of(command), cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=120):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.02)


def test_resume_after_kill_and_after_interrupt_ends_in_the_same_bits(tmp_path, tiny_file, few_calls):
    command = f"{SFD} --teacher {tiny_file} --ema-fake-score 0.9 --steps 20 --save-every 4"
    whole = inside(f"{command} --out whole", tmp_path)
    assert whole.returncode == 0, whole.stderr

    process = start(f"{command} --out killed", tmp_path)
    wait_for(lambda: (tmp_path / "killed/checkpoint.pt").exists())
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert torch.load(tmp_path / "killed/checkpoint.pt", weights_only=True)["step"] < 20  # it was indeed killed on the way
    again = inside(f"{command} --out killed", tmp_path)
    assert again.returncode == 2 and "--resume" in again.stderr  # unfinished work is not overwritten

    before = (tmp_path / "killed/checkpoint.pt").stat().st_mtime_ns
    process = start(f"{command} --out killed --resume", tmp_path)
    wait_for(lambda: (tmp_path / "killed/checkpoint.pt").stat().st_mtime_ns != before)
    process.send_signal(signal.SIGINT)  # Ctrl-C
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130, out
    assert "--resume" in out and "ddpm_sfd.py" in out and int(re.search(r"stopped after step (\d+)", out)[1]) < 20
    done = inside(f"{command} --out killed --resume", tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("generator.safetensors", "samples_after.png"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name
    states = [torch.load(tmp_path / d / "checkpoint.pt", weights_only=True) for d in ("whole", "killed")]
    assert states[0]["curves"] == states[1]["curves"] and len(states[0]["curves"]["loss_psi"]) == 20
    assert torch.equal(states[0]["random"][0]["cpu"], states[1]["random"][0]["cpu"])


def test_nan_stops_the_run_and_names_the_loss_and_the_step(tmp_path, tiny_file):
    process = inside(f"{SFD} --teacher {tiny_file} --steps 30 --lr-fake-score 1e30 --out out", tmp_path)
    assert process.returncode == 1
    last = process.stderr.strip().splitlines()[-1]
    assert "not finite at step" in last and ("loss_" in last or "gradient" in last)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"config.json"}


def test_two_processes_train_one_network_and_one_writes(tmp_path, tiny_file):
    command = f"{SFD} --teacher {tiny_file} --amp off --out out"
    process = python(f"{command} --steps 3", tmp_path, processes=2, env=one_thread())
    assert process.returncode == 0, process.stderr
    assert json.loads((tmp_path / "out/metrics.json").read_text())["processes"] == 2
    saved = torch.load(tmp_path / "out/checkpoint.pt", weights_only=True)
    first, second = (state["cpu"] for state in saved["random"])
    assert not torch.equal(first, second)  # each process draws noise of its own
    resumed = python(f"{command} --steps 4 --resume", tmp_path, processes=2, env=one_thread())
    assert resumed.returncode == 0, resumed.stderr
    first, second = (state["cpu"] for state in torch.load(tmp_path / "out/checkpoint.pt", weights_only=True)["random"])
    assert not torch.equal(first, second)  # each went on from its own


GRADIENTS = """
import sys
import torch
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import ddpm_sfd
from conftest import random_unet
from ddpm_sfd import Config, one_step, read_classes, train
import run as housekeeping
from run import Run
from unet import VPSchedule

written, write = [], housekeeping.write_atomically
housekeeping.write_atomically = lambda path, function: (written.append(str(path)), write(path, function))
config = Config(steps=3, batch_size=8, forget_batch_size=4, amp="off", device={device!r}, out={out!r})
run = Run(config, "")
get_state, set_state = (torch.cuda.get_rng_state, torch.cuda.set_rng_state) if {device!r} == "cuda" else (torch.get_rng_state, torch.set_rng_state)
own_random_state = get_state()

# one step of plain gradient descent on a batch that is split over the processes
torch.manual_seed(0)
net = torch.nn.Linear(3, 1).to(run.device)
x = torch.arange(12.0, device=run.device).view(4, 3)[run.rank * 2:run.rank * 2 + 2]
parallel = run.parallel(net)
run.update("loss", parallel(x).square().mean(), net, torch.optim.SGD(net.parameters(), lr=0.1))
flags = [run.any_process(run.rank == 1), run.any_process(False)]

# three steps of SFD, each process with labels and noise of its own
teacher = random_unet(image_size=8, attention_at=(4,)).to(run.device)
set_state(own_random_state)
sizes = []


def counted(generator, z, c, *rest):
    sizes.append((len(c), int((c == 0).sum())))
    return one_step(generator, z, c, *rest)


ddpm_sfd.one_step = counted
train(config, run, teacher, VPSchedule.linear().to(run.device), read_classes(config, 10))
torch.save({{"linear": net.state_dict(), "random": get_state(), "sizes": sizes, "flags": flags, "written": written,
            **{{name: run.state[name].state_dict() for name in ("fake_score", "generator")}}}}, {out!r} + f"/rank{{run.rank}}.pt")
torch.distributed.destroy_process_group()
"""


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, two_gpus])])
def test_gradients_over_processes_are_those_of_the_whole_batch(tmp_path, device):
    """Over gloo on CPUs, over NCCL on GPUs."""
    script = tmp_path / "script.py"
    script.write_text(GRADIENTS.format(root=str(ROOT), out=str(tmp_path / "out"), device=device))
    process = python(str(script), tmp_path, processes=2, env=one_thread())
    assert process.returncode == 0, process.stderr
    torch.manual_seed(0)
    net = torch.nn.Linear(3, 1)
    net(torch.arange(12.0).view(4, 3)).square().mean().backward()
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    first, second = (torch.load(tmp_path / f"out/rank{rank}.pt", map_location="cpu", weights_only=True) for rank in (0, 1))
    for saved in (first, second):
        torch.testing.assert_close(saved["linear"]["weight"], net.weight.data)
        torch.testing.assert_close(saved["linear"]["bias"], net.bias.data)
    assert first["sizes"] == second["sizes"] == [(6, 2)] * 3  # 8 + 4 images, over two processes
    assert not torch.equal(first["random"], second["random"])
    for name in ("fake_score", "generator"):  # different batches, one network
        assert all(torch.equal(first[name][k], second[name][k]) for k in first[name]), name
    assert first["flags"] == second["flags"] == [True, False]  # what one process has seen, all know
    assert (len(first["written"]), len(second["written"])) == (1, 0)  # one checkpoint, by process 0


# ------------------------------------------------------------------ in this process


@dataclass
class Config:
    size: str = option("small", "preset", choices=["small", "large"])
    forget: str = option("0", "classes", nargs="+")
    lr: float = option(0.5, "learning rate", low=0)
    steps: int = option(3, "steps", low=0)
    compile: bool = option(False, "compile")
    resume: bool = option(False, "go on")
    device: str = option("cpu", "where")
    amp: str = option("off", "precision")
    seed: int = option(0, "seed", low=0)
    out: str = option("", "folder")
    save_every: int = option(100, "steps")


def test_flags_replace_the_preset_which_replaces_the_default():
    presets = {"small": {}, "large": {"lr": 0.1, "steps": 9}}
    assert parse(Config, "", presets, []) == Config()
    assert parse(Config, "", presets, ["--size", "large", "--steps", "7"]) == Config(size="large", lr=0.1, steps=7)
    assert parse(Config, "", presets, ["--forget", "1", "2", "--resume"]) == Config(forget="1,2", resume=True)


def test_help_shows_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as exit:
        parse(Config, "What it is.", {"small": {}, "large": {}}, ["--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0 and "What it is." in text and "learning rate [0.5]" in text and "--save-every" in text
    with pytest.raises(SystemExit):
        parse(Config, "What it is.", {"small": {}, "large": {"lr": 0.1}}, ["--size", "large", "--help"])
    assert "learning rate [0.1]" in capsys.readouterr().out  # with the preset, the default that a run would take


def test_a_folder_with_only_a_ds_store_counts_as_empty(tmp_path):
    (tmp_path / ".DS_Store").write_bytes(b"")
    Run(Config(out=str(tmp_path)), "")
    assert (tmp_path / "config.json").exists()


def test_a_finished_run_is_replaced_by_the_same_command_only(tmp_path, capsys):
    config = Config(out=str(tmp_path / "run"))
    first = Run(config, "")
    for step in first.loop({}):
        first.log(loss=step)
    first.finish({"ua": 1.0})
    for another, says in (dict(lr=0.25), "lr 0.5, not 0.25"), (dict(steps=2), "steps 3, not 2"):
        with pytest.raises(SystemExit):
            Run(Config(out=config.out, **another), "")
        assert says in capsys.readouterr().err
    assert json.loads((tmp_path / "run/metrics.json").read_text())["ua"] == 1.0  # untouched
    Run(config, "")  # the same again is made anew
    assert not (tmp_path / "run/metrics.json").exists() and not (tmp_path / "run/checkpoint.pt").exists()


def test_a_run_goes_on_to_more_steps_but_not_to_fewer(tmp_path, capsys):
    """The rate follows the steps that were asked for last, from the second step on."""
    weight = torch.nn.Parameter(torch.zeros(1))

    def rates(**words):
        config = Config(out=str(tmp_path / "run"), **words)
        optimizer = torch.optim.SGD([weight], lr=1.0)
        decay = linear_decay(optimizer, 0.5, config.steps)
        for _ in Run(config, "").loop({"optimizer": optimizer, "decay": decay}):
            yield optimizer.param_groups[0]["lr"]
            optimizer.step()
            decay.step()

    assert [*rates(steps=4)] == pytest.approx([1, 0.875, 0.75, 0.625])
    assert [*rates(steps=8, resume=True)] == pytest.approx([0.5, 0.6875, 0.625, 0.5625])
    with pytest.raises(SystemExit) as exit:
        [*rates(steps=6, resume=True)]
    assert exit.value.code == 2 and "already at step 8" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["ddpm_sfd", "sd_sfd", "vdu", "pretrain"])
def test_presets_set_what_there_is_to_set(name):
    """A setting that was renamed must not live on in a preset, where nobody would miss it."""
    module = importlib.import_module(name)
    fields = {field.name for field in dataclasses.fields(module.Config)}
    for preset, settings in module.PRESETS.items():
        assert settings.keys() <= fields, preset


@pytest.mark.parametrize("what, says", [
    ("fewer steps", "already at step 3"),
    ("half a checkpoint", "not a whole checkpoint of this run (RuntimeError"),
    ("a pickle of code", "not a whole checkpoint of this run (UnpicklingError)"),
    ("an empty checkpoint", "not a whole checkpoint of this run (EOFError)"),
    ("another network", "not a whole checkpoint of this run (RuntimeError"),
    ("two processes", "is of 2 process(es); go on with as many, not 1"),
    ("an older kind", "not a whole checkpoint of this run (KeyError: 'enough')"),
])
def test_a_resume_that_is_refused_leaves_the_finished_run_as_it_was(tmp_path, capsys, what, says):
    config, path = Config(out=str(tmp_path / "run")), tmp_path / "run/checkpoint.pt"
    run = Run(config, "")
    list(run.loop({"net": torch.nn.Linear(2, 2)}))
    run.finish({"ua": 1.0})
    if what == "half a checkpoint":
        path.write_bytes(path.read_bytes()[:300])
    elif what == "an empty checkpoint":
        path.write_bytes(b"")
    elif what == "a pickle of code":
        path.write_bytes(pickle.dumps(os.getcwd, protocol=2))
    elif what == "two processes":
        saved = torch.load(path, weights_only=True)
        torch.save(saved | {"random": saved["random"] * 2}, path)
    elif what == "an older kind":
        saved = torch.load(path, weights_only=True)
        del saved["enough"]
        torch.save(saved, path)
    before = {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()}
    capsys.readouterr()
    again = dataclasses.replace(config, resume=True, steps=2 if what == "fewer steps" else 5)
    with pytest.raises(SystemExit) as exit:
        list(Run(again, "").loop({"net": torch.nn.Linear(2, 3 if what == "another network" else 2)}))
    error = capsys.readouterr().err
    assert exit.value.code == 2 and says in error and error.count("\n") == 1 and "weights_only" not in error
    assert {p.name: p.read_bytes() for p in (tmp_path / "run").iterdir()} == before and "metrics.json" in before
    if what == "fewer steps":  # and one that is not refused goes on
        list(Run(dataclasses.replace(again, steps=5), "").loop({"net": torch.nn.Linear(2, 2)}))
        assert not (tmp_path / "run/metrics.json").exists()
        assert json.loads((tmp_path / "run/config.json").read_text())["steps"] == 5


@pytest.mark.parametrize("when, error, status", [
    ("afterwards", "KeyboardInterrupt", 130), ("afterwards", "LookupError", 1), ("while the last step is saved", "", 130)])
def test_ctrl_c_after_the_last_step_says_how_to_go_on(tmp_path, when, error, status):
    """While the run is being saved or judged; another error keeps its traceback."""
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import os
import signal
from ddpm_sfd import Config
from run import Run
run = Run(Config(steps=3, out="out", device="cpu"), "")
save = run.save
if {when != "afterwards"}:
    run.save = lambda path: (save(path), os.kill(os.getpid(), signal.SIGINT))
for step in run.loop({{}}):
    pass
raise {error or "SystemExit(0)"}
""")
    process = python(str(script), tmp_path)
    assert process.returncode == status, process.stderr
    assert ("stopped after step 3; to go on:" in process.stdout and "--resume" in process.stdout) == (status == 130)
    assert ("Traceback" in process.stderr) == (status == 1)


def test_time_before_a_resume_counts(tmp_path):
    first = Run(Config(out=str(tmp_path / "run")), "")
    for _ in first.loop({}):
        first.seconds = 1000.0
    again = Run(Config(out=str(tmp_path / "run"), resume=True), "")
    assert list(again.loop({})) == [] and again.elapsed() >= 1000


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_update_clips_each_gradient_entry(tmp_path, scale):
    """With fp16, too, the gradient itself and not the scaled one."""
    run = Run(Config(out=str(tmp_path / "run")), "")
    if scale:
        run.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    net = torch.nn.Linear(2, 1, bias=False)
    before = net.weight.data.clone()
    loss = (net.weight * torch.tensor([[0.25, -50.0]])).sum()
    run.update("loss", loss, net, torch.optim.SGD(net.parameters(), lr=1.0), clip_value=1.0)
    torch.testing.assert_close(before - net.weight.data, torch.tensor([[0.25, -1.0]]))


def test_the_parts_of_a_batch_are_one_step(tmp_path):
    """run.backward for each, then run.descend: the step down the sum of their losses."""
    config, nets = Config(out=str(tmp_path / "run")), [torch.nn.Linear(3, 1) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    run, x = Run(config, ""), torch.randn(4, 3)
    summed = sum(run.backward(nets[0](part).square().sum()) for part in x.split(1))
    run.descend("loss", summed, nets[0], torch.optim.SGD(nets[0].parameters(), lr=0.1))
    loss = nets[1](x).square().sum()
    run.update("loss", loss, nets[1], torch.optim.SGD(nets[1].parameters(), lr=0.1))
    torch.testing.assert_close(summed, loss.detach())
    torch.testing.assert_close(nets[0].weight, nets[1].weight)


@pytest.mark.parametrize("command, scale", [("ddpm_sfd.py --forget 0", 16), ("sd_sfd.py --forget three", 16), ("vdu.py --data teacher --images 2", 2**16)])
def test_fp16_begins_with_a_scale_that_fits_the_loss(tmp_path, monkeypatch, few_calls, command, scale):
    """SFD's losses are sums over pixels, VDU's a mean."""
    scales, module = [], importlib.import_module(command.split(".")[0])
    monkeypatch.setattr(housekeeping, "choose_amp", lambda *_: torch.float16)
    monkeypatch.setattr(module, "train", lambda config, run, *_: sys.exit(scales.append(run.scaler.get_scale())))
    assert inside(f"{command} --out run", tmp_path).returncode is None and scales == [scale]


class Root(torch.autograd.Function):
    """A finite value whose gradient is not."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


@pytest.mark.parametrize("what", ["loss_psi", "the gradient of loss_psi"])
def test_a_loss_or_gradient_that_is_not_finite_stops_the_run_before_the_step(tmp_path, capsys, what):
    run = Run(Config(out=str(tmp_path / "run")), "")
    net = torch.nn.Linear(2, 1)
    before = net.weight.data.clone()
    steps = run.loop({})
    next(steps)
    loss = net.weight.sum() * float("nan") if what == "loss_psi" else Root.apply(net.weight).sum()
    with pytest.raises(SystemExit) as exit:
        run.update("loss_psi", loss, net, torch.optim.SGD(net.parameters(), lr=1.0), clip_value=1.0)
    assert exit.value.code == 1 and f"error: {what} is not finite at step 0" in capsys.readouterr().err
    assert torch.equal(before, net.weight.data)


def test_a_loss_that_is_not_finite_in_another_process_stops_this_one_too(tmp_path, capsys, monkeypatch):
    """With fp16 this one would take it for an overflow, go on, and wait for the other."""
    run, net = Run(Config(out=str(tmp_path / "run")), ""), torch.nn.Linear(2, 1)
    next(run.loop({}))
    monkeypatch.setattr(run, "any_process", lambda flag: True)
    with pytest.raises(SystemExit):
        run.update("loss_psi", net.weight.sum(), net, torch.optim.SGD(net.parameters(), lr=1.0))
    assert "error: loss_psi is not finite at step 0" in capsys.readouterr().err


@pytest.mark.parametrize("scale, stops", [(65536.0, False), (0.5, False), (2.0**-11, True)])
def test_with_fp16_an_overflow_is_skipped_but_a_gradient_that_is_never_finite_stops_the_run(tmp_path, scale, stops):
    run = Run(Config(out=str(tmp_path / "run")), "")
    run.scaler = torch.amp.GradScaler("cpu", init_scale=scale)  # which halves its scale at each overflow
    net = torch.nn.Linear(2, 1)
    before, steps = net.weight.data.clone(), run.loop({})
    next(steps)

    def update():
        run.update("loss", Root.apply(net.weight).sum(), net, torch.optim.SGD(net.parameters(), lr=1.0))

    if stops:
        with pytest.raises(SystemExit):
            update()
    else:
        update()
        assert run.scaler.get_scale() == scale / 2
    assert torch.equal(before, net.weight.data)


def test_a_resume_with_other_settings_is_refused(tmp_path, capsys):
    config = Config(out=str(tmp_path / "run"))
    list(Run(config, "").loop({}))
    for another, fixed, says in ((dict(lr=0.25), False, "lr 0.5, not 0.25"), (dict(seed=1), False, "seed 0, not 1"),
                                 (dict(steps=5), True, "steps 3, not 5")):
        with pytest.raises(SystemExit) as leaving:
            Run(dataclasses.replace(config, resume=True, **another), "", fixed_steps=fixed)
        assert leaving.value.code == 2 and says in capsys.readouterr().err
    Run(dataclasses.replace(config, resume=True, steps=5), "")  # where steps are not fixed, more of them are welcome


def test_a_checkpoint_that_breaks_off_leaves_the_one_before(tmp_path, monkeypatch):
    run, path = Run(Config(out=str(tmp_path / "run")), ""), tmp_path / "run/checkpoint.pt"
    list(run.loop({"net": torch.nn.Linear(2, 2)}))
    before = path.read_bytes()

    def half(content, file):
        Path(file).write_bytes(before[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(KeyboardInterrupt):
        run.save(path)
    assert path.read_bytes() == before and {p.name for p in path.parent.iterdir()} == {"checkpoint.pt", "config.json"}


def test_a_logged_number_that_is_not_finite_stops_the_run(tmp_path, capsys):
    run = Run(Config(out=str(tmp_path / "run")), "")
    next(run.loop({}))
    with pytest.raises(SystemExit) as leaving:
        run.log(loss=1.0, growth=float("inf"))
    assert leaving.value.code == 1 and "error: growth is not finite at step 0" in capsys.readouterr().err


def test_a_checkpoint_of_another_device_is_refused(tmp_path, capsys):
    """There Adam's state has another kind and another layout; taken over as it is it would be wrong, without a word."""
    config = Config(out=str(tmp_path / "run"))
    list(Run(config, "").loop({"net": torch.nn.Linear(2, 2)}))
    path = tmp_path / "run/checkpoint.pt"
    saved = torch.load(path, weights_only=True)
    saved["random"][0]["cuda"] = torch.zeros(16, dtype=torch.uint8)
    torch.save(saved, path)
    before = path.read_bytes()
    with pytest.raises(SystemExit) as leaving:
        list(Run(Config(out=config.out, resume=True), "").loop({"net": torch.nn.Linear(2, 2)}))
    assert leaving.value.code == 2 and "was written with --device cuda; go on there, not with cpu" in capsys.readouterr().err
    assert path.read_bytes() == before


def test_what_a_killed_run_left_half_written_goes_when_the_folder_is_used_again(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/abc.tmp").write_bytes(b"half a checkpoint")
    Run(Config(out=str(tmp_path / "run")), "")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"config.json"}


def test_processes_that_cannot_share_are_refused_before_a_folder_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    config = Config(out=str(tmp_path / "run"))
    config.batch_size, config.accumulate = 32, 2
    with pytest.raises(SystemExit) as leaving:
        Run(config, "")
    assert leaving.value.code == 2 and "--batch-size 32 must be a multiple of 6" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for rank, fits in (("0", True), ("1", False)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        if fits:
            assert housekeeping.choose_device("auto") == torch.device("cuda", 0)
        else:
            with pytest.raises(SystemExit) as leaving:
                housekeeping.choose_device("auto")
            assert leaving.value.code == 2 and "process 2 has no GPU of its own" in capsys.readouterr().err


def test_precision_is_detected_not_assumed(monkeypatch):
    cpu = torch.device("cpu")
    for avx, amx, expected in ((0, 0, None), (1, 0, torch.bfloat16), (0, 1, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: bool(avx), raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: bool(amx), raising=False)
        assert housekeeping.choose_amp("auto", cpu) is expected
    for native, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        assert housekeeping.choose_amp("auto", torch.device("cuda")) is expected
    assert housekeeping.choose_amp("off", cpu) is None and housekeeping.choose_amp("bf16", cpu) is torch.bfloat16


@pytest.mark.parametrize("groups, dtype, expected", [(1, torch.bfloat16, True), (2, torch.bfloat16, False), (1, None, True)])
def test_on_a_cpu_channels_are_last_where_all_groups_are_wide(tmp_path, groups, dtype, expected):
    """In either precision, with no GroupNorm of fewer than 16 channels a group."""
    run, unet = Run(Config(out=str(tmp_path / "run")), ""), random_unet(channels=16, groups=groups)
    run.dtype = dtype
    assert run.prepare(unet).middle[0].conv1.weight.is_contiguous(memory_format=torch.channels_last) is expected


def test_prepare_changes_no_name_and_no_number(tmp_path, tiny):
    """Channels last and compiled, as on a GPU; what is saved is what it was, and copies are not compiled."""
    run = Run(Config(out=str(tmp_path / "run")), "")
    assert run.prepare(tiny) is tiny and tiny._compiled_call_impl is None and run.fused is None  # a CPU, without --compile
    run.device, run.dtype, run.config.compile = torch.device("cuda"), torch.bfloat16, True
    before = copy.deepcopy(tiny)
    after = run.prepare(tiny)
    assert after is tiny and after._compiled_call_impl is not None
    assert after.middle[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert [*after.state_dict()] == [*before.state_dict()]
    assert copy.deepcopy(after)._compiled_call_impl is None
    save_unet(before, tmp_path / "before.safetensors")
    save_unet(after, tmp_path / "after.safetensors")
    assert (tmp_path / "before.safetensors").read_bytes() == (tmp_path / "after.safetensors").read_bytes()
    loaded = load_unet(tmp_path / "after.safetensors").state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in before.state_dict().items())


# ------------------------------------------------------------------ on a GPU


@pytest.mark.cuda
@pytest.mark.parametrize("words", ["--amp off", "--amp bf16", "--amp fp16", "--amp bf16 --compile", "--amp fp16 --compile"])
def test_cuda_precisions_train_to_finite_losses(tmp_path, tiny_file, words):
    process = python(f"{SFD} --teacher {tiny_file} --steps 20 {words} --device cuda --out out", tmp_path)
    assert process.returncode == 0, process.stderr  # a loss that is not finite stops the run
    assert json.loads((tmp_path / "out/metrics.json").read_text())["machine"].startswith("NVIDIA")
    saved = torch.load(tmp_path / "out/checkpoint.pt", map_location="cpu", weights_only=True)
    assert len(saved["curves"]["loss_psi"]) == 20
    names = load_unet(tiny_file).state_dict().keys()
    for network in ("generator", "fake_score"):
        assert saved["state"][network].keys() == names
        assert all(v.isfinite().all() for v in saved["state"][network].values())
        assert load_unet(tmp_path / f"out/{network}.safetensors").state_dict().keys() == names


@pytest.mark.cuda
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("command", [
    "vdu.py --data teacher --images 8 --batch-size 8 --classifier none --plasticity tangent",
    "vdu.py --data teacher --images 8 --batch-size 8 --classifier none --plasticity full --optimizer adam --lr 1e-5",
    "sd_sfd.py --forget three --batch-size 6 --forget-batch-size 2 --eval-images 0",
])
def test_cuda_the_other_methods_train_to_finite_losses(tmp_path, command, amp):
    process = python(f"{command} --steps 6 --amp {amp} --device cuda --out out", tmp_path)
    assert process.returncode == 0, process.stderr  # a loss that is not finite stops the run
    saved = torch.load(tmp_path / "out/checkpoint.pt", map_location="cpu", weights_only=True)
    assert all(v.isfinite().all() for network in saved["state"].values() if isinstance(network, dict)
               for v in network.values() if torch.is_tensor(v))


ON_DEVICE = """
import sys
import torch
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from conftest import random_unet
from ddpm_sfd import Config, read_classes, train
from run import Run
from unet import VPSchedule

torch.use_deterministic_algorithms(True)
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def sfd(name, init_scale=2.0 ** 16, **words):
    constant = dict(lr_end=1.0, lambda_end=1.0)  # else they depend on the number of steps
    settings = constant | dict(batch_size=8, forget_batch_size=4, save_every=3)
    config = Config(device={device!r}, out={out!r} + "/" + name, **settings, **words)
    run = Run(config, "")
    run.scaler = torch.amp.GradScaler(run.device.type, init_scale=init_scale, enabled=run.scaler.is_enabled())
    teacher = random_unet(image_size=8, attention_at=(4,), dropout=0.0).to(run.device)
    torch.manual_seed(1)
    schedule = VPSchedule.linear().to(run.device)
    generator, fake_score = train(config, run, teacher, schedule, read_classes(config, 10))
    return run.curves, [*generator.state_dict().values(), *fake_score.state_dict().values()]

"""
RESUME = """
for amp in {amps!r}:
    curves, whole = sfd(amp, amp=amp, steps=6)
    sfd(amp + "-half", amp=amp, steps=3)
    again, resumed = sfd(amp + "-half", amp=amp, steps=6, resume=True)
    assert curves == again and all(torch.equal(a, b) for a, b in zip(whole, resumed)), amp
"""
TOLERANCE = """
exact, _ = sfd("off", amp="off", steps=6)
for words in {variants!r}:
    name = "-".join(map(str, ["variant", *words.values()]))
    curves, _ = sfd(name, steps=6, init_scale=2.0 ** 8, **words)  # low enough for no fp16 step to overflow and be skipped
    for a, b in zip(exact["loss_psi"], curves["loss_psi"]):
        assert abs(a - b) < 0.02 * abs(a), (name, a, b)
    assert curves["loss_psi"] != exact["loss_psi"], name
"""


def on_device(tmp_path, device, script, **words):
    (tmp_path / "script.py").write_text((ON_DEVICE + script).format(root=str(ROOT), out=str(tmp_path), device=device, **words))
    process = python(str(tmp_path / "script.py"), tmp_path, env=one_thread() | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"})
    assert process.returncode == 0, process.stderr


@pytest.mark.cuda
def test_cuda_resume_is_exact(tmp_path):
    """Of deterministic kernels, in each precision; with fp16 the scaler's state is a part of it."""
    on_device(tmp_path, "cuda", RESUME, amps=["off", "bf16", "fp16"])


@pytest.mark.cuda
@pytest.mark.parametrize("words", [dict(amp="bf16"), dict(amp="fp16"), dict(amp="off", compile=True), dict(amp="bf16", compile=True)])
def test_cuda_precisions_and_compilation_agree_with_float32(tmp_path, words):
    on_device(tmp_path, "cuda", TOLERANCE, variants=[words])


def test_bfloat16_agrees_with_float32_and_resumes(tmp_path):
    """The same on a CPU, where it is always run."""
    on_device(tmp_path, "cpu", RESUME + TOLERANCE, amps=["bf16"], variants=[dict(amp="bf16")])
