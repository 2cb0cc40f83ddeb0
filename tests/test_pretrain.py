"""The commands that make weights/, on a data set of forty images that look like MNIST on disk."""

import importlib
import json
import shlex
import sys
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import ROOT, inside, python, random_unet

import ddpm_sfd
import pretrain
from data import mnist, stl10
from features import load_classifier, load_statistics, look
from pretrain import jitter, warm_up_and_down, without_classes
from record import checksum
from run import Run, parse
from unet import UNet, VPSchedule, load_unet, save_unet, write_tensors
from vdu import read_posterior


def test_the_test_split_is_another_set_of_images(data, monkeypatch):
    path = data / "MNIST/raw/t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:16] + bytes(20 * 784))
    assert mnist(str(data), train=False)[0].max() == -1 and mnist(str(data), train=True)[0].max() == 1

    class Fake:
        def __init__(self, folder, split, download):
            self.data, self.labels = np.zeros((2, 3, 96, 96), np.uint8), np.array([3, 9], np.uint8)
            self.data[:, int(split == "test"), :, :48] = 255  # the left half: red in training images, green in test images

    monkeypatch.setattr("torchvision.datasets.STL10", Fake)
    for train in (True, False):
        images, labels = stl10("x", train)
        assert images.shape == (2, 3, 64, 64) and labels.tolist() == [3, 9] and labels.dtype == torch.int64
        assert (images[:, int(not train), :, :28] == 1).all() and (images[..., 36:] == -1).all()


def test_mnist_is_read_into_minus_one_to_one(data):
    images, labels = mnist(str(data), train=True)
    assert images.shape == (40, 1, 28, 28) and images.min() == -1 and images.max() == 1
    assert images[3, 0, 0, 10] == 1 and labels[3] == 3  # the bar of class 3


def test_jitter_moves_the_image_within_black(data):
    torch.manual_seed(0)
    images = torch.full((64, 1, 28, 28), -1.0)
    images[:, :, 12:16, 12:16] = 1
    out = jitter(images)
    assert out.shape == images.shape and out.min() >= -1.001 and out.max() <= 1.001
    assert torch.equal(out[:, :, 0, 0], torch.full((64, 1), -1.0))  # no grey border
    mass = (out + 1).sum((1, 2, 3)) / (images + 1).sum((1, 2, 3))
    assert 0.75 < mass.min() and mass.max() < 1.3  # 10% of scale is 20% of area
    centre = ((out + 1) * torch.arange(28)).sum((1, 2, 3)) / (out + 1).sum((1, 2, 3))
    assert centre.std() > 0.3 and (centre - 13.5).abs().max() < 2


CARDS = sorted(path for path in (ROOT / "weights").rglob("*.json") if "sha256" in path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_the_command_on_a_shipped_card_still_means_the_settings_on_it(path):
    """Where a default or a preset has changed since, the command needs a flag."""
    card = json.loads(path.read_text(encoding="utf-8"))
    words = shlex.split(card["command"].split("&&")[-1])
    module = importlib.import_module(words[1].removesuffix(".py"))
    config = asdict(parse(module.Config, module.__doc__, module.PRESETS, words[2:]))
    of_no_weight = {"save_every", "snapshot_every", "eval_images"} | ({"per_class"} if path.stem != "mnist-statistics" else set())
    changed = {name for name, value in card["config"].items() if config.get(name) != value}
    assert changed <= of_no_weight, changed


def test_the_teacher_command_leaves_weights_and_a_card(tmp_path, data):
    whole = python(f"pretrain.py mnist --data {data} --batch-size 8 --steps 4 --out whole", tmp_path)
    assert whole.returncode == 0, whole.stderr
    path = tmp_path / "whole/mnist.safetensors"
    card = json.loads(path.with_suffix(".json").read_text())
    assert card["sha256"] == checksum(path) and card["bytes"] == path.stat().st_size and card["steps"] == 4
    assert str(tmp_path) not in path.with_suffix(".json").read_text()
    unet = load_unet(path)
    assert (
        unet.num_classes == 10
        and unet.image_shape == (1, 28, 28)
        and sum(p.numel() for p in unet.parameters()) == card["parameters"]
    )


def test_the_unconditional_network_inside_a_conditional_one_is_the_null_label():
    conditional = random_unet(image_size=8, attention_at=(4,))
    alone = without_classes(conditional).eval()
    x, t = torch.randn(4, 1, 8, 8), torch.tensor([0, 10, 500, 999])
    null = torch.full((4,), conditional.null_label)
    torch.testing.assert_close(alone(x, t), conditional(x, t, null), rtol=1e-4, atol=1e-5)
    assert alone.num_classes is None and not torch.allclose(alone(x, t), conditional(x, t, torch.zeros_like(null)))


def posterior_run(out, data, **words):
    config = dict(what="mnist-posterior", init="mnist", data=str(data), batch_size=8, checkpoints=2, steps=4, amp="off")
    config = pretrain.Config(out=str(out), save_every=3, **config, **words)
    run = Run(config, "")
    pretrain.train_posterior(config, run)
    run.finish({})
    return torch.load(out / "checkpoint.pt", weights_only=True)["state"]["finished"]


def test_the_teachers_loss_is_min_snr_times_the_error_of_the_noise():
    torch.manual_seed(0)
    schedule, x0, seen = VPSchedule.linear(), torch.rand(64, 1, 4, 4) * 2 - 1, []
    network = lambda x, t, c: seen.append((x, t)) or 0.3 * x
    loss = pretrain.weighted_denoising_loss(network, x0, None, schedule, 5.0)
    [(x_t, t)] = seen
    a, s = schedule.a(t), schedule.s(t)
    weight = (5 * (s / a) ** 2).clamp(max=1)  # min(SNR, 5) / SNR
    expected = (weight * (0.3 * x_t - (x_t - a * x0) / s) ** 2).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-4)


def test_each_network_of_a_posterior_is_trained_as_if_it_were_the_only_one(tmp_path, data):
    finished = posterior_run(tmp_path / "run", data)
    images, schedule = mnist(str(data), train=True)[0], VPSchedule.linear()
    for k in (0, 1):
        net = without_classes(load_unet("mnist")).train()
        optimizer = torch.optim.Adam(net.parameters(), betas=(0.9, 0.99))
        torch.manual_seed(k * 1_000_003)
        for i in range(2):
            optimizer.param_groups[0]["lr"] = 1.5e-3 * warm_up_and_down(2, 0.4)(i)
            x0 = images[torch.randint(40, (8,))]
            optimizer.zero_grad()
            pretrain.weighted_denoising_loss(net, x0, None, schedule, 5.0).backward()
            optimizer.step()
        for name, w in net.state_dict().items():
            torch.testing.assert_close(finished[f"{k}.{name}"], w, rtol=0, atol=1e-4)  # a step is 1.5e-3


def test_no_network_of_a_posterior_is_that_of_another_seed(tmp_path, data):
    ends = [w for seed in (0, 1) for name, w in posterior_run(tmp_path / str(seed), data, seed=seed).items()
            if name.endswith(".conv_out.weight")]
    assert len(ends) == 4 and not any(torch.equal(ends[i], ends[j]) for i in range(4) for j in range(i))


@pytest.mark.parametrize("words", ["mnist --init nothere", "mnist-posterior --init nothere", "mnist --init mnist-unconditional",
                                   "tiny-sd --init nothere"])
def test_what_a_run_begins_with_is_read_before_anything_is_written(words, tmp_path, data, capsys):
    with pytest.raises(SystemExit) as leaving:
        pretrain.main(parse(pretrain.Config, "", pretrain.PRESETS, [*words.split(), "--data", str(data), "--out", str(tmp_path / "out")]))
    said = capsys.readouterr().err
    assert leaving.value.code == 2 and words.split()[-1] in said and len(said.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_beginning_with_other_classes_is_refused(tmp_path):
    save_unet(UNet(**pretrain.MNIST | {"num_classes": 5}), tmp_path / "five.safetensors")
    with pytest.raises(ValueError, match="draws 5 classes; mnist needs a start that draws 10"):
        pretrain.start(pretrain.Config(what="mnist", init=str(tmp_path / "five.safetensors")))


def test_the_posterior_is_of_networks_trained_apart_from_a_common_beginning(tmp_path, data, monkeypatch):
    """Two networks, two steps each. Their mean and variance are what is written; a resumed run writes the same bits."""
    finished = posterior_run(tmp_path / "whole", data)
    a, b = ({k[2:]: v for k, v in finished.items() if k.startswith(f"{i}.")} for i in (0, 1))
    beginning = without_classes(load_unet("mnist")).state_dict()
    name = "conv_out.weight"
    assert not any(torch.equal(x, y) for x, y in ((a[name], b[name]), (a[name], beginning[name])))
    mean = load_unet(tmp_path / "whole/mnist-unconditional.safetensors")
    torch.testing.assert_close(mean.state_dict()[name], (a[name] + b[name]) / 2)
    variance = read_posterior(str(tmp_path / "whole/mnist-unconditional-posterior.safetensors"), mean)
    torch.testing.assert_close(variance[name], (a[name] - b[name]).square() / 2, rtol=1e-3, atol=1e-12)
    for kind in ("", "-posterior"):
        path = tmp_path / f"whole/mnist-unconditional{kind}.safetensors"
        assert json.loads(path.with_suffix(".json").read_text())["sha256"] == checksum(path)

    calls = []

    def power_cut(*words):  # in the second network, after the checkpoint at step 3
        calls.append(1)
        if len(calls) == 4:
            raise SystemError
        return loss(*words)

    loss = pretrain.weighted_denoising_loss
    monkeypatch.setattr(pretrain, "weighted_denoising_loss", power_cut)
    with pytest.raises(SystemError):
        posterior_run(tmp_path / "cut", data)
    monkeypatch.undo()
    posterior_run(tmp_path / "cut", data, resume=True)
    for file in ("mnist-unconditional.safetensors", "mnist-unconditional-posterior.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes()


def test_the_learning_rate_goes_up_and_down():
    for steps, down in ((1000, 0.4), (1000, 0.0), (3, 0.4), (0, 0.4)):
        rate = [warm_up_and_down(steps, down)(step) for step in range(max(1, steps))]
        assert max(rate) <= 1 and min(rate) >= 0
        assert steps < 1000 or rate[0] == 0.01 and rate[500] == 1 and rate[-1] == pytest.approx(1 / 400 if down else 1)


def test_the_classifier_command_learns(tmp_path, data):
    process = inside(f"pretrain.py mnist-classifier --data {data} --batch-size 40 --steps 60 --out out", tmp_path)
    assert process.returncode == 0, process.stderr
    card = json.loads((tmp_path / "out/mnist-classifier.json").read_text())
    assert card["scores"]["test_images"] == 20 and card["scores"]["test_accuracy"] > 0.5  # chance is 0.1
    assert load_classifier(tmp_path / "out/mnist-classifier.safetensors").config["classes"] == 10


def test_the_statistics_command_describes_the_real_images_and_the_teacher(tmp_path, data, few_calls):
    process = inside(f"pretrain.py mnist-statistics --data {data} --per-class 2 --images 100 --out out", tmp_path)
    assert process.returncode == 0, process.stderr
    statistics, facts = load_statistics(tmp_path / "out/mnist-statistics.safetensors")
    images, labels = mnist(str(data), train=True)
    features, _ = look(load_classifier(), images)
    torch.testing.assert_close(statistics["train"][0][7], features[labels == 7].double().mean(0), rtol=1e-4, atol=1e-5)
    assert statistics["train"][2].tolist() == [4] * 10 and statistics["unconditional"][2].sum() == 100
    assert statistics["test"][2].tolist() == [2] * 10
    assert facts["unconditional"]["images"] == 100 and 0.5 < facts["unconditional"]["confidence"] <= 1
    assert facts["teacher"]["images"] == 20 and len(facts["teacher"]["class_accuracy"]) == 10


def test_missing_data_is_one_line(tmp_path):
    process = inside("pretrain.py mnist --data /dev/null", tmp_path)
    assert process.returncode == 2 and process.stderr.strip().count("\n") == 0 and "error: --data" in process.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_shipped_cards_tell_the_truth(path):
    card = json.loads(path.read_text(encoding="utf-8"))
    files = [file for file in path.parent.rglob(card["file"]) if checksum(file) == card["sha256"]]
    assert files and card["bytes"] == files[0].stat().st_size
    assert {"command", "data", "seconds", "machine", "commit", "what"} <= set(card)


@pytest.mark.parametrize("words, fixed", [("mnist-posterior --init mnist", True), ("mnist-classifier", True), ("mnist", False)])
def test_what_divides_or_counts_its_steps_cannot_be_extended(words, fixed, tmp_path, data, monkeypatch):
    made = []
    monkeypatch.setattr(pretrain, "Run", lambda config, folder, fixed_steps=False: sys.exit(made.append(fixed_steps)))
    inside(f"pretrain.py {words} --data {data}", tmp_path)
    assert made == [fixed]


def test_a_card_names_the_flags_that_made_it(tmp_path):
    config = pretrain.Config(**{"what": "mnist"} | pretrain.PRESETS["mnist"] | {"steps": 7, "compile": True, "init": "my teacher", "out": str(tmp_path / "run"), "device": "cpu", "amp": "bf16"})
    (tmp_path / "x").write_bytes(b"1")
    card = pretrain.make_card(Run(config, ""), tmp_path / "x")
    assert card["command"] == "python pretrain.py mnist --steps 7 --init 'my teacher' --amp bf16 --compile"
    assert card["data"] == "MNIST" and card["amp"] == "bfloat16"


@pytest.mark.parametrize("words, processes, message", [
    ("mnist-classifier", 2, "is made in one process"),
    ("mnist-posterior --steps 3", 1, "--steps 3: --checkpoints 5 networks share them"),
    ("--steps -1 mnist-classifier", 1, "must be at least 0"),  # flags may come first
    *((f"{what} {flags}", 1, f"{flags.split()[0]} changes nothing for {what}; leave it out") for what, flags in [
        ("mnist-classifier", "--init mnist"), ("mnist-classifier", "--lr-down 0.1"), ("mnist-statistics", "--steps 5"),
        ("mnist-unconditional", "--label-dropout 0.5"), ("mnist-posterior", "--flip 0.5"), ("tiny-sd", "--compile"),
        ("tiny-sd-posterior", "--init mnist"), ("tiny-sd-autoencoder", "--ema 0.9"),
        ("mnist", "--checkpoints 3"), ("cifar10", "--per-pair 3"), ("tiny-sd", "--min-snr 9")]),
])
def test_what_cannot_be_made_so_or_changes_nothing_is_refused_before_anything_is_read(words, processes, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    with pytest.raises(SystemExit) as leaving:
        pretrain.main(parse(pretrain.Config, "", pretrain.PRESETS, [*words.split(), "--data", str(tmp_path)]))
    said = capsys.readouterr().err
    assert leaving.value.code == 2 and message in said and len(said.strip().splitlines()) == 1
    assert not any(tmp_path.iterdir())


def test_a_posteriors_networks_share_a_beginning_and_large_seeds_are_seeds(tmp_path, data):
    asked = inside(f"pretrain.py mnist-posterior --init '' --data {data} --out out", tmp_path)
    assert asked.returncode == 2 and "--init: name the network" in asked.stderr and not (tmp_path / "out").exists()
    save_unet(random_unet(num_classes=None), tmp_path / "small.safetensors")
    done = inside(f"pretrain.py mnist-posterior --init small.safetensors --data {data} --seed 1000000000000 --checkpoints 20 "
                  "--steps 20 --batch-size 2 --out out", tmp_path)
    assert done.returncode == 0, done.stderr


def test_images_are_moved_in_full_precision(tmp_path, data, monkeypatch):
    """Under autocast to bfloat16 the grid of places would be rounded to a tenth of a pixel."""
    seen = []
    spy = lambda images: seen.append(torch.is_autocast_enabled("cpu")) or jitter(images)
    monkeypatch.setitem(pretrain.CLASSIFIERS, "mnist-classifier", (*pretrain.CLASSIFIERS["mnist-classifier"][:2], spy, "test"))
    done = inside(f"pretrain.py mnist-classifier --data {data} --steps 1 --batch-size 2 --amp bf16 --out out", tmp_path)
    assert done.returncode == 0 and seen == [False], done.stderr


def test_a_file_that_is_no_autoencoder_is_refused_before_anything_is_written(tmp_path, data):
    for name, facts in (("other", {"config": {"sample_size": 32}}), ("bare", {})):
        write_tensors(tmp_path / f"{name}.safetensors", "autoencoder", {"x": torch.zeros(1)}, **facts)
        refused = inside(f"pretrain.py tiny-sd --init {name}.safetensors --data {data} --out out", tmp_path)
        assert refused.returncode == 2 and "does not hold the autoencoder that it says" in refused.stderr
        assert refused.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_damaged_data_set_is_one_line(data):
    path = data / "MNIST/raw/train-images-idx3-ubyte"
    whole = path.read_bytes()
    for length in (0, 3, 10, 500):
        path.write_bytes(whole[:length])
        with pytest.raises(OSError, match="does not lie whole"):
            mnist(str(data), train=True)


def test_shipped_weights_are_small_and_good_enough():
    names = {"mnist", "mnist-classifier", "mnist-statistics", "mnist-unconditional", "mnist-unconditional-posterior",
             "mnist-distilled", "mnist-distilled-fake-score"}
    read = {path.stem: json.loads(path.read_text()) for path in CARDS if path.parent.name == "weights"}
    assert set(read) == names
    assert read["mnist"]["bytes"] <= 3_000_000 and read["mnist-classifier"]["bytes"] <= 2_000_000
    assert sum(read[f"mnist-distilled{part}"]["bytes"] for part in ("", "-fake-score")) <= 6_000_000
    assert sum(read[f"mnist-unconditional{part}"]["bytes"] for part in ("", "-posterior")) <= 8_000_000
    assert read["mnist-classifier"]["scores"]["test_accuracy"] >= 0.994
    assert read["mnist-statistics"]["scores"]["teacher"]["accuracy"] >= 0.98
    assert read["mnist-statistics"]["scores"]["teacher"]["images"] >= 2000


def test_metrics_look_at_as_many_images_as_the_shipped_teacher_was_judged_by():
    """FIDs compare only at equal numbers, so the defaults go together."""
    images = json.loads((ROOT / "weights/mnist-statistics.json").read_text())["scores"]["teacher"]["images"]
    assert images == 10 * ddpm_sfd.Config().eval_images == 10 * pretrain.Config(what="mnist-statistics").per_class


def test_a_colour_teacher_trains_with_flips_and_a_constant_rate(tmp_path, monkeypatch):
    """The path of CIFAR-10 and STL-10, on eight images of a tiny size."""
    settings = {"image_size": 8, "in_channels": 3, "channels": 8, "multipliers": (1,), "blocks": 1, "attention_at": (),
                "groups": 4, "num_classes": 10}
    images = torch.linspace(-1, 1, 8 * 3 * 8 * 8).view(8, 3, 8, 8)  # grows from left to right: a flip shows
    monkeypatch.setitem(pretrain.TEACHERS, "cifar10", (settings, lambda folder: (images, torch.arange(8))))
    seen, loss = [], pretrain.weighted_denoising_loss
    monkeypatch.setattr(pretrain, "weighted_denoising_loss", lambda net, x0, c, *rest: seen.append((x0, c)) or loss(net, x0, c, *rest))
    words = ["cifar10", "--steps", "6", "--batch-size", "16", "--out", str(tmp_path / "run"), "--amp", "off"]
    config = pretrain.parse(pretrain.Config, "", pretrain.PRESETS, words)
    assert (config.label_dropout, config.flip, config.ema, config.lr_down) == (0.1, 0.5, 0.9999, 0.0)
    run = Run(config, "")
    pretrain.train_teacher(config, run)
    mirrored = torch.cat([x0[..., 0] > x0[..., -1] for x0, _ in seen]).float().mean()
    assert 0.3 < mirrored < 0.7
    assert {10} < set(torch.cat([c for _, c in seen]).tolist())  # labels, and "none"
    assert run.state["optimizer"].param_groups[0]["lr"] == config.lr
    x0, c = (torch.cat(parts) for parts in zip(*seen))
    index = ((x0.mean((1, 2, 3)) + 1) * 4).long()  # which of the eight; a flip leaves the mean
    assert torch.equal(c[c != 10], index[c != 10]) and (c == 10).float().mean() < 0.3
    saved = load_unet(tmp_path / "run/cifar10.safetensors").state_dict()
    assert all(torch.equal(saved[k], v) for k, v in run.state["ema"].module.state_dict().items())
    assert not all(torch.equal(saved[k], v) for k, v in run.state["unet"].state_dict().items())
    assert run.state["lr"].last_epoch == 6
    card = json.loads((tmp_path / "run/cifar10.json").read_text())
    assert card["data"] == "CIFAR-10" and load_unet(tmp_path / "run/cifar10.safetensors").num_classes == 10


def test_of_several_processes_none_downloads(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("torchvision.datasets.MNIST.download", lambda self: asked.append(self.root))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(OSError, match="let a single one do it first"):
        mnist(tmp_path / "data", train=True)
    assert not asked
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(OSError, match="could not be downloaded"):  # it was asked for, and did not come
        mnist(tmp_path / "data", train=True)
    assert asked == [tmp_path / "data"]
