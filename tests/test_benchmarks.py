"""The benchmarks run, and count what they say that they count."""

import argparse
import importlib.util
import json
import sys

import pytest
import torch
from conftest import ROOT, random_unet

from unet import save_unet


def load(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SMALLEST = dict(image_size=8, in_channels=1, channels=4, multipliers=(1,), blocks=1, attention_at=(), groups=4, num_classes=10)


def test_step_time_reports_speed_and_share_of_the_peak(tmp_path, monkeypatch, capsys):
    benchmark = load("step_time")
    monkeypatch.setitem(benchmark.NETWORKS, "mnist", (SMALLEST, (2, 1), (2, 1)))
    monkeypatch.setattr(benchmark, "peak_memory", lambda name, args, sizes: 2**20)
    words = ["mnist", "--steps", "2", "--device", "cpu", "--peak-tflops", "0.5", "--out", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["step_time.py", *words])
    benchmark.main()
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["batch"] == [2, 1] and all(len(times) == 2 for times in result["seconds"].values())
    ours = result["median"]["ours"]
    assert result["images_per_second"]["ours"] == pytest.approx(3 / ours)
    assert result["share_of_peak"] == pytest.approx(result["flops_a_step"] / ours / 0.5e12)
    assert "GFLOP a step" in capsys.readouterr().out


def test_the_operations_of_a_step_are_those_of_its_passes():
    """Of one network, with its gradients and without, by hand: the step is four forward passes and as many backward."""
    benchmark = load("step_time")

    def count(function):
        with benchmark.FlopCounterMode(display=False) as counter:
            function()
        return counter.get_total_flops()

    loop = benchmark.Loop(SMALLEST, (2, 1), torch.device("cpu"))
    network, x, t, c = loop.theta.eval(), torch.randn(3, 1, 8, 8), torch.tensor([1, 2, 3]), torch.tensor([0, 1, 2])
    forward = count(lambda: network(x, t, c))
    to_weights = count(lambda: network(x, t, c).sum().backward()) - forward
    still = loop.teacher
    to_input = count(lambda: still(x.clone().requires_grad_(), t, c).sum().backward()) - forward
    assert forward > 0 and to_weights > forward > 0.5 * to_input
    expected = 4 * forward + 2 * to_weights + 2 * to_input
    assert count(loop.ours) == pytest.approx(expected, rel=0.05)  # the generator's first layer needs no gradient, say


@pytest.mark.slow
def test_memory_grows_with_the_batch():
    benchmark, args = load("step_time"), argparse.Namespace(network="mnist", device="cpu", compile=False)
    small, large = (benchmark.peak_memory("ours", args, sizes) for sizes in ((1, 1), (64, 16)))
    assert 10 * 2**20 < small < large < 64 * 2**30


def test_sampling_reports_images_a_second(tmp_path, monkeypatch, capsys):
    benchmark, drawn = load("sampling"), []
    unet = random_unet(image_size=8, attention_at=())
    save_unet(unet, tmp_path / "generator.safetensors", t_init=440)

    def fast(unet, schedule, kind, steps=1000):  # the samplers have tests of their own
        def sample(z, c, noise):
            drawn.append((kind, len(z)))
            return z

        return sample, 1 if kind == "one-step" else steps

    monkeypatch.setattr(benchmark, "sampler_of", fast)
    path, out = str(tmp_path / "generator.safetensors"), tmp_path / "out.json"
    words = [path, "--teacher", path, "--repeats", "2", "--batch-size", "10", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["sampling.py", *words])
    benchmark.main()
    one_round = [("one-step", 10)] * 50 + [("ddim", 10)] * 5 + [("ancestral", 10)]
    assert drawn == one_round * 3  # batches of one size, in turn, the first round not counted
    rows = json.loads(out.read_text())["rows"]
    assert [row["network_calls"] for row in rows.values()] == [1, 50, 1000]
    for row, images in zip(rows.values(), (500, 50, 10)):
        assert row["images"] == images and len(row["seconds"]) == 2
        assert row["images_per_second"] == pytest.approx(images / (sum(row["seconds"]) / 2))

    monkeypatch.setattr(sys, "argv", ["sampling.py", "mnist"])  # a teacher is no generator
    with pytest.raises(SystemExit) as stop:
        benchmark.main()
    assert stop.value.code == 2 and "no one-step generator" in capsys.readouterr().err
