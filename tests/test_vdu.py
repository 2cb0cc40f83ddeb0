"""VDU's formulas against independent oracles, its loop, the images that it may see, and its main job whole."""

import copy
import functools
import json
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL_TEXT, column, inside, python, random_unet, write_cifar10, write_mnist
from test_convert import CIFAR10, peer
from torchvision.io import write_png

import convert
import vdu
from concepts import ConceptJudge
from data import read_picture
from features import load_classifier, look
from record import checksum
from run import Run, parse
from samples import unconditional_sampler
from stable_diffusion import load_stable_diffusion
from unet import VPSchedule, load_unet, save_unet, write_tensors
from vdu import (
    Config,
    plasticity_inducer,
    posterior,
    read_posterior,
    stability_regularizer,
    tangent,
    train,
    undesired_images,
)

SCHEDULE = VPSchedule.linear()
BETA = np.linspace(1e-4, 0.02, 1000)
ABAR = np.cumprod(1 - BETA)


def network(x, t):
    return 0.3 * x + 0.1 * (t / 1000)[:, None, None, None]


def case(seed=0, B=5):
    g = np.random.default_rng(seed)
    return *g.normal(size=(2, B, 2, 3, 3)), g.integers(1, 1000, B)


def test_plasticity_is_minus_the_kl_terms_of_the_ddpm_bound():  # (V3)
    """The bound's term at t is |posterior mean - model mean|^2 / (2 sigma^2): computed from the two means themselves."""
    x0, noise, t = case()
    beta, alpha, abar, before = (column(v) for v in (BETA[t], 1 - BETA[t], ABAR[t], ABAR[t - 1]))
    x_t = np.sqrt(abar) * x0 + np.sqrt(1 - abar) * noise
    posterior_mean = (np.sqrt(before) * beta * x0 + np.sqrt(alpha) * (1 - before) * x_t) / (1 - abar)
    x0_hat = (x_t - np.sqrt(1 - abar) * network(x_t, t)) / np.sqrt(abar)
    model_mean = (np.sqrt(before) * beta * x0_hat + np.sqrt(alpha) * (1 - before) * x_t) / (1 - abar)
    bound = ((posterior_mean - model_mean) ** 2 / (2 * beta)).sum((1, 2, 3))
    ours = plasticity_inducer(network, *(torch.from_numpy(a) for a in (x0, t, noise)), SCHEDULE)
    assert ours.shape == (5,)
    np.testing.assert_allclose(ours.numpy(), -bound, rtol=2e-3)  # the schedule is in float32


def test_plasticity_without_weights_is_minus_the_squared_error():  # (V3), w_t = 1
    x0, noise, t = case(1)
    x_t = column(np.sqrt(ABAR[t])) * x0 + column(np.sqrt(1 - ABAR[t])) * noise
    expected = -((noise - network(x_t, t)) ** 2).sum((1, 2, 3))
    ours = plasticity_inducer(network, *(torch.from_numpy(a) for a in (x0, t, noise)), SCHEDULE, weighting="simple")
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-4)


def test_plasticity_hands_the_condition_on():
    unet = random_unet(image_size=8, attention_at=(4,))
    x0, t, noise = torch.randn(2, 1, 8, 8), torch.tensor([5, 500]), torch.randn(2, 1, 8, 8)
    values = [plasticity_inducer(unet, x0, t, noise, SCHEDULE, torch.full((2,), k)) for k in (0, 1)]
    assert not torch.allclose(*values)


def test_stability_is_half_the_squared_distance_in_sigmas():  # (V4)
    net = torch.nn.Linear(3, 2)
    mean = {k: torch.randn_like(p) for k, p in net.named_parameters()}
    variance = {k: torch.rand_like(p) + 0.1 for k, p in net.named_parameters()}
    pairs = [(p.detach().double().numpy(), mean[k].double().numpy(), variance[k].double().numpy())
             for k, p in net.named_parameters()]
    expected = sum((((p - m) / np.sqrt(v)) ** 2).sum() / 2 for p, m, v in pairs)
    B = stability_regularizer(net, mean, variance)
    assert B.shape == () and B.item() == pytest.approx(expected, rel=1e-5)
    B.backward()
    torch.testing.assert_close(net.weight.grad, (net.weight.data - mean["weight"]) / variance["weight"])


def test_stability_and_its_gradient_are_zero_at_the_mean():
    net = torch.nn.Linear(3, 2)
    mean = {k: p.detach().clone() for k, p in net.named_parameters()}
    B = stability_regularizer(net, mean, {k: torch.full_like(p, 1e-8) for k, p in net.named_parameters()})
    B.backward()
    assert B.item() == 0 and not net.weight.grad.any() and not net.bias.grad.any()


class Small(torch.nn.Module):
    """A curved network in float64, as U-Nets compute their time embedding in float32."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(65, 20), torch.nn.Tanh(), torch.nn.Linear(20, 64)).double()

    def forward(self, x, t):
        return self.layers(torch.cat([x.flatten(1), t[:, None] / 1000], dim=1)).view_as(x)


def moved_from(at, seed=1, far=0.1):
    """A copy of `at` whose weights lie a little beside its own, and `at`'s as name -> tensor."""
    torch.manual_seed(seed)
    unet, mean = copy.deepcopy(at), {name: p.detach().clone() for name, p in at.named_parameters()}
    with torch.no_grad():
        for p in unet.parameters():
            p += far * torch.randn_like(p)
    return unet, mean


def undesired_batch():
    """x0, t and noise, always the same."""
    x0, noise = torch.randn(2, 4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return x0, torch.tensor([50, 300, 600, 900]), noise


def test_tangent_is_value_and_slope_at_the_mean():  # (V6)
    """Against the slope by finite differences, from values at mu* and beside it alone."""
    at = Small()
    unet, mean = moved_from(at)

    def value(share):  # (V3) on the way from mu* to theta
        between = copy.deepcopy(at)
        with torch.no_grad():
            for p, theta, name in zip(between.parameters(), unet.parameters(), mean):
                p.copy_(mean[name] + share * (theta - mean[name]))
            return plasticity_inducer(between, *undesired_batch(), SCHEDULE).mean().item()

    slope = (value(1e-4) - value(-1e-4)) / 2e-4
    A = tangent(plasticity_inducer(at, *undesired_batch(), SCHEDULE), at, unet, mean)
    assert A.shape == () and A.item() == pytest.approx(value(0) + slope, rel=1e-6)
    assert abs(slope) > 1e-3 * abs(value(0)) and value(1) != pytest.approx(A.item(), rel=1e-3)  # it is no straight line


def test_with_the_tangent_the_loss_has_its_minimum_where_algebra_says():  # (V6) in (V5)
    """Where (1 - gamma) grad A(mu*) + gamma (theta - mu*) / sigma*^2 is nothing: a network of weights there is not moved."""
    at, gamma = Small(), 0.3
    unet, mean = moved_from(at)
    variance = {name: torch.rand_like(p) * 1e-6 for name, p in mean.items()}
    plasticity_inducer(at, *undesired_batch(), SCHEDULE, weighting="simple").mean().backward()
    with torch.no_grad():
        for (name, theta), p in zip(unet.named_parameters(), at.parameters()):
            theta.copy_(mean[name] - (1 - gamma) / gamma * variance[name] * p.grad)

    def gradients(part):
        unet.zero_grad()
        A = tangent(plasticity_inducer(at, *undesired_batch(), SCHEDULE, weighting="simple"), at, unet, mean)
        B = stability_regularizer(unet, mean, variance)
        {"A": A, "loss": (1 - gamma) * A + gamma * B}[part].backward()
        return torch.cat([p.grad.flatten() for p in unet.parameters()])

    assert gradients("loss").norm() < 1e-9 * gradients("A").norm()


def test_posterior_is_mean_and_unbiased_variance():
    draws = np.random.default_rng(0).normal(size=(6, 4, 3))
    mean, variance = posterior([{"w": torch.from_numpy(w).float()} for w in draws])
    np.testing.assert_allclose(mean["w"].numpy(), draws.mean(0), rtol=1e-5)
    np.testing.assert_allclose(variance["w"].numpy(), draws.var(0, ddof=1), rtol=1e-4)
    assert mean["w"].dtype == variance["w"].dtype == torch.float32


def test_posterior_of_identical_checkpoints_has_no_width():
    state = torch.nn.Linear(3, 2).state_dict()
    mean, variance = posterior([state] * 5)
    assert all(torch.equal(mean[k], state[k]) and not variance[k].any() for k in state)


def test_posterior_refuses_what_is_not_one_network():
    small, large = torch.nn.Linear(3, 2).state_dict(), torch.nn.Linear(3, 4).state_dict()
    with pytest.raises(ValueError, match="at least 2"):
        posterior([small])
    with pytest.raises(ValueError, match="not of one network"):
        posterior([small, large])


# ------------------------------------------------------------------ the loop


def tiny_unconditional(seed=0):
    return random_unet(seed, image_size=8, attention_at=(4,), num_classes=None)


def run_of(tmp_path, name, variance=1e-4, **words):
    """A short VDU of a tiny network on six images: the run, the network before and after."""
    words = {"steps": 6, "lr": 1e-3, "optimizer": "adam", "t_min": 0, "t_max": 1000, "stop_at": 0.0, "gamma": 0.7,
             "plasticity": "full"} | words
    config = Config(out=str(tmp_path / name), amp="off", batch_size=32, **words)
    unet = tiny_unconditional()
    run = Run(config, "")  # seeds what follows
    images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    before = copy.deepcopy(unet)
    after = train(config, run, unet, {k: torch.full_like(p, variance) for k, p in unet.named_parameters()}, images, SCHEDULE)
    return run, before, after


def error(unet):
    """The simple loss on the six images, at every tenth step."""
    images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.manual_seed(9)
    t = torch.arange(0, 1000, 10)
    x0 = images[torch.arange(len(t)) % 6]
    return -plasticity_inducer(unet, x0, t, torch.randn_like(x0), SCHEDULE, weighting="simple").mean().item()


def far(before, after):
    return sum((p - q).square().sum() for p, q in zip(before.parameters(), after.parameters())).item()


def same_bits(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))


def test_zero_steps_or_nothing_but_stability_change_no_bit(tmp_path):
    for name, words in (("a", {"steps": 0}), ("b", {"gamma": 1.0})):
        _, before, after = run_of(tmp_path, name, **words)
        assert same_bits(before, after), name


def test_plasticity_alone_raises_the_error_on_the_undesired_images(tmp_path):
    run, before, after = run_of(tmp_path, "run", gamma=0.0)
    assert error(after) > 1.05 * error(before)
    assert len(run.curves["plasticity"]) == 6 and run.curves["stability"][0] == 0 < run.curves["stability"][-1]


def test_the_tangent_takes_the_first_step_of_the_whole_and_then_its_own_way(tmp_path):
    """The slope is the same at mu* alone. And a tangent's run resumes in the same bits."""
    words = {"optimizer": "natural", "lr": 0.3, "gamma": 0.0}
    for steps, same in ((1, True), (4, False)):
        (_, _, full), (_, _, straight) = (run_of(tmp_path, f"{kind}{steps}", plasticity=kind, steps=steps, **words)
                                          for kind in ("full", "tangent"))
        close = [torch.allclose(p, q, rtol=1e-4, atol=1e-8) for p, q in zip(full.parameters(), straight.parameters())]
        assert all(close) == same
    run, _, whole = run_of(tmp_path, "whole", plasticity="tangent", **words)
    run_of(tmp_path, "halves", plasticity="tangent", **words | {"steps": 3})
    _, _, resumed = run_of(tmp_path, "halves", plasticity="tangent", resume=True, **words)
    assert same_bits(whole, resumed) and run.curves["growth"][-1] > 1.01


@pytest.mark.parametrize("variance, expected", [(1e-8, 1e-6), (1e-4, 1e-4)])
def test_no_sigma_is_below_its_floor(tmp_path, monkeypatch, variance, expected):
    """--sigma-floor is a sigma, not a variance."""
    given, natural = [], vdu.NaturalGradient
    monkeypatch.setattr(vdu, "NaturalGradient", lambda theta, v, lr: given.extend(v) or natural(theta, v, lr))
    run_of(tmp_path, "run", variance=variance, sigma_floor=1e-3, optimizer="natural", steps=0)
    assert given and all(v.unique().tolist() == pytest.approx([expected], rel=1e-5) for v in given)


def test_the_loss_of_a_step_lies_between_both_terms_as_gamma_says(tmp_path, monkeypatch):  # (V5), as means
    drawn, losses, inducer, update = [], [], vdu.plasticity_inducer, Run.update

    def spy(unet, x0, t, noise, *rest):
        if torch.is_grad_enabled():
            drawn.append((x0, t, noise, copy.deepcopy(unet)))
        return inducer(unet, x0, t, noise, *rest)

    monkeypatch.setattr(vdu, "plasticity_inducer", spy)
    monkeypatch.setattr(Run, "update", lambda run, name, loss, *rest: losses.append(loss.item()) or update(run, name, loss, *rest))
    _, before, _ = run_of(tmp_path, "run", gamma=0.3, variance=1e-6, steps=2)
    for (x0, t, noise, unet), loss in zip(drawn, losses, strict=True):
        with torch.no_grad():
            A = -(noise - unet(SCHEDULE.add_noise(x0, noise, t), t)).square().mean()
            moved = torch.cat([(p - q).flatten() for p, q in zip(unet.parameters(), before.parameters())])
            B = (moved.square() / 2e-6).mean()
        assert loss == pytest.approx((0.7 * A + 0.3 * B).item(), rel=1e-4)
    assert B > 0.1  # in the second step


def test_gamma_and_narrow_sigmas_hold_the_weights(tmp_path):
    free = far(*run_of(tmp_path, "a", gamma=0.0, steps=12)[1:])
    held = far(*run_of(tmp_path, "b", gamma=0.999, steps=12)[1:])
    narrow = far(*run_of(tmp_path, "c", gamma=0.5, variance=1e-9, sigma_floor=0.0, steps=12)[1:])
    assert held < 0.5 * free and narrow < 0.5 * free
    floored = run_of(tmp_path, "d", gamma=0.5, variance=0.0, sigma_floor=1e3, steps=12)  # else it would divide by 0
    assert far(*floored[1:]) == pytest.approx(free, rel=0.05)


@pytest.mark.parametrize("t_min, t_max", [(0, 1000), (300, 600)])
def test_sums_and_means_are_the_same_formula_in_other_units(tmp_path, t_min, t_max):
    """(V5) with sums: the mean over t times how many there are, and no division by pixels and weights."""
    words = dict(steps=2, gamma=0.5, t_min=t_min, t_max=t_max)
    runs = [run_of(tmp_path, name, reduction=name, **words)[0].curves for name in ("mean", "sum")]
    weights = sum(p.numel() for p in tiny_unconditional().parameters())
    assert runs[1]["plasticity"][0] == pytest.approx(runs[0]["plasticity"][0] * 64 * (t_max - t_min), rel=1e-4)
    assert runs[1]["stability"][1] == pytest.approx(runs[0]["stability"][1] * weights, rel=0.02)


def test_natural_gradient_moves_weights_as_their_width_allows():
    """One step: along sigma^2 times the gradient, and as long as asked for, in sigmas."""
    theta, variance = torch.nn.Parameter(torch.zeros(3)), torch.tensor([1.0, 4.0, 0.25])
    gradient = torch.tensor([3.0, -1.0, 2.0])
    optimizer = vdu.NaturalGradient([theta], [variance], lr=0.5)
    for length in (0.5, 1.0):  # with a constant gradient its running mean points the same way, and steps add up
        theta.grad = gradient.clone()
        optimizer.step()
        moved = theta.detach()
        assert (moved.square() / variance).sum().sqrt().item() == pytest.approx(length, rel=1e-5)
        torch.testing.assert_close(moved / moved[0], variance * gradient / (variance * gradient)[0])
        assert moved[0] < 0 < moved[1]  # downhill
    theta.grad = torch.zeros(3)
    fresh = vdu.NaturalGradient([theta], [variance], lr=0.5)
    before = theta.detach().clone()
    fresh.step()
    assert torch.equal(theta, before)  # no gradient, no step, no 0 / 0


def test_it_ends_when_the_error_has_grown_enough(tmp_path):
    """At the first step that reaches the factor, and a resumption neither misses the end nor goes beyond it."""
    run, _, whole = run_of(tmp_path, "whole", gamma=0.0, steps=12)
    factor = run.curves["growth"][9]
    assert factor > max(run.curves["growth"][:9])  # it grows all the way
    run, _, stopped = run_of(tmp_path, "stopped", gamma=0.0, steps=40, stop_at=factor)
    assert run.step == 10 and len(run.curves["growth"]) == 10 and not same_bits(stopped, whole)
    run_of(tmp_path, "halves", gamma=0.0, steps=5, stop_at=factor)
    for _ in range(2):  # on the way, and at the end
        run, _, resumed = run_of(tmp_path, "halves", gamma=0.0, steps=40, stop_at=factor, resume=True)
        assert run.step == 10 and same_bits(stopped, resumed)


def test_the_end_is_judged_on_the_same_images_at_steps_from_the_whole_range(tmp_path, monkeypatch):
    probes, original = [], vdu.plasticity_inducer

    def spy(unet, x0, t, noise, *rest):
        if not torch.is_grad_enabled():
            probes.append((x0, t, noise))
        return original(unet, x0, t, noise, *rest)

    monkeypatch.setattr(vdu, "plasticity_inducer", spy)
    run_of(tmp_path, "run", steps=3, t_min=200, t_max=701)
    assert len(probes) == 4 * 128 / 32  # before, and after each step: 128 images, never more at a time than in a batch
    assert all(torch.equal(a, b) for n, part in enumerate(probes) for a, b in zip(part, probes[n % 4]))
    t = torch.cat([t for _, t, _ in probes[:4]])
    assert t.min() == 200 and t.max() == 700 and t.diff().max() <= 4


def test_same_seed_same_bits_and_resume_ends_in_them(tmp_path):
    _, _, whole = run_of(tmp_path, "whole", gamma=0.5)
    _, _, again = run_of(tmp_path, "again", gamma=0.5)
    assert same_bits(whole, again)
    _, _, half = run_of(tmp_path, "halves", gamma=0.5, steps=3)
    _, _, resumed = run_of(tmp_path, "halves", gamma=0.5, steps=6, resume=True)
    assert not same_bits(half, resumed) and same_bits(whole, resumed)
    _, _, other = run_of(tmp_path, "other", gamma=0.5, seed=1)
    assert not same_bits(whole, other)


# ------------------------------------------------------------------ several processes, and the compiler

IN_PARALLEL = """
import sys
import torch
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import vdu
from conftest import random_unet
from run import Run
from unet import VPSchedule

drawn, original = [], vdu.plasticity_inducer


def spy(unet, x0, t, noise, *rest):
    if torch.is_grad_enabled():  # a training step; not the probe, which each process draws for itself
        drawn.append((x0, t, noise))
    return original(unet, x0, t, noise, *rest)


vdu.plasticity_inducer = spy
config = vdu.Config(steps=2, batch_size=4, lr=0.3, gamma=0.5, stop_at=0.0, t_min=0, t_max=1000, amp="off", out={out!r}, plasticity={plasticity!r})
run = Run(config, "")
own_random_state = torch.get_rng_state()
unet = random_unet(image_size=8, attention_at=(4,), num_classes=None)
images = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
torch.set_rng_state(own_random_state)
variance = {{k: torch.full_like(p, 1e-4) for k, p in unet.named_parameters()}}
vdu.train(config, run, unet, variance, images, VPSchedule.linear())
torch.save({{"unet": unet.state_dict(), "drawn": drawn}}, {out!r} + f"/rank{{run.rank}}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("plasticity", ["full", "tangent"])
def test_two_processes_step_down_the_gradient_of_both_batches(tmp_path, monkeypatch, plasticity):
    """The same bits in both processes and in a second run, and those of one process, up to rounding, when it is given
    the images, steps and noise that the two have drawn."""
    saved = {}
    for name in ("first", "second"):
        script = tmp_path / f"{name}.py"
        script.write_text(IN_PARALLEL.format(root=str(ROOT), out=str(tmp_path / name), plasticity=plasticity))
        process = python(str(script), tmp_path, processes=2, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert process.returncode == 0, process.stderr
        saved |= {(name, rank): torch.load(tmp_path / name / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)}
    a, b = saved["first", 0], saved["first", 1]
    for other in (b, saved["second", 0], saved["second", 1]):
        assert all(torch.equal(a["unet"][k], other["unet"][k]) for k in a["unet"])
    assert len(a["drawn"]) == 2 and a["drawn"][0][0].shape == (2, 1, 8, 8) and not torch.equal(a["drawn"][0][2], b["drawn"][0][2])

    both = [[torch.cat(parts) for parts in zip(*steps)] for steps in zip(a["drawn"], b["drawn"])]
    original = vdu.plasticity_inducer

    def replay(unet, x0, t, noise, *rest):
        return original(unet, *(both.pop(0) if torch.is_grad_enabled() else (x0, t, noise)), *rest)

    monkeypatch.setattr(vdu, "plasticity_inducer", replay)
    _, before, alone = run_of(tmp_path, "alone", steps=2, lr=0.3, gamma=0.5, optimizer="natural", plasticity=plasticity)
    assert not both and not same_bits(before, alone)
    for name, weight in alone.state_dict().items():
        moved = (weight - before.state_dict()[name]).abs().max()
        assert (weight - a["unet"][name]).abs().max() <= 1e-3 * moved + 1e-7, name


@pytest.mark.slow
def test_compiled_it_takes_nearly_the_same_steps(tmp_path, monkeypatch):
    """Traced and differentiated by the compiler; without its last part, which writes C++ for minutes."""
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    smallest = {"multipliers": (1,), "attention_at": ()}
    monkeypatch.setattr("test_vdu.tiny_unconditional", lambda: random_unet(image_size=8, num_classes=None, **smallest))
    eager, _, plain = run_of(tmp_path, "eager", steps=2)
    compiled, before, after = run_of(tmp_path, "compiled", steps=2, compile=True)
    for name in ("plasticity", "stability", "growth"):
        assert compiled.curves[name] == pytest.approx(eager.curves[name], rel=1e-3), name
    assert [*after.state_dict()] == [*plain.state_dict()] and not same_bits(before, after)
    assert after._compiled_call_impl is not None and plain._compiled_call_impl is None
    torch._dynamo.reset()


# ------------------------------------------------------------------ the images that it may see


def test_no_pixel_of_another_class_of_mnist_matters(tmp_path):
    g = np.random.default_rng(0)
    images, labels = g.integers(0, 255, (60, 28, 28)).astype(np.uint8), (np.arange(60) % 10).astype(np.uint8)
    write_mnist(tmp_path / "a", images, labels)
    images[labels != 3] = g.integers(0, 255, (54, 28, 28))
    write_mnist(tmp_path / "b", images, labels)
    a, b = (undesired_images(tmp_path / name, [3], (1, 28, 28))[0] for name in "ab")
    assert torch.equal(a, b) and a.shape == (6, 1, 28, 28)
    expected = {image.tobytes() for image in images[labels == 3]}
    assert {((x + 1) * 127.5).round().to(torch.uint8).numpy().tobytes() for x in a} == expected
    few, origin = undesired_images(tmp_path / "a", [3, 4], (1, 28, 28), n=5)
    assert len(few) == 5 and "5 images" in origin
    write_png(torch.zeros(3, 40, 40, dtype=torch.uint8), str(tmp_path / "a/screenshot.png"))  # it is none of the data set
    assert torch.equal(undesired_images(tmp_path / "a", [3], (1, 28, 28))[0], a)


def test_tiny_imagenet_opens_no_picture_of_another_class(tmp_path):
    (tmp_path / "wnids.txt").write_text("n02\nn01\n")
    for k, name in enumerate(("n02", "n01")):
        folder = tmp_path / "train" / name / "images"
        folder.mkdir(parents=True)
        for i in range(3):
            if k == 1:
                write_png(torch.full((3, 64, 64), 100 + 10 * i, dtype=torch.uint8), str(folder / f"{name}_{i}.png"))
            else:
                (folder / f"{name}_{i}.png").write_bytes(b"whoever opens me fails")
    images, _ = undesired_images(tmp_path, [1], (3, 32, 32))
    assert sorted(((x + 1) * 127.5).mean().round().item() for x in images) == [100, 110, 120]
    with pytest.raises(ValueError, match="no readable picture"):
        undesired_images(tmp_path, [0], (3, 32, 32))
    with pytest.raises(ValueError, match="classes 0..1"):
        undesired_images(tmp_path, [2], (3, 32, 32))


def test_a_photograph_is_upright_and_a_scan_of_16_bits_is_as_bright(tmp_path):
    image = pytest.importorskip("PIL.Image")
    picture = np.tile(np.arange(16, dtype=np.uint8) * 16, (16, 1))  # dark to the left, bright to the right
    image.fromarray(picture.astype(np.uint16) * 257).save(tmp_path / "scan.png")
    turned, exif = image.fromarray(np.rot90(picture).copy()), image.Exif()
    exif[0x0112] = 6  # the camera was held so that a viewer has to turn it by a quarter, clockwise
    turned.save(tmp_path / "photo.jpg", exif=exif, quality=100)
    for name, wrong in (("scan.png", 0), ("photo.jpg", 3)):
        read = read_picture(tmp_path / name, (1, 16, 16))[0]
        assert (read.int() - torch.from_numpy(picture).int()).abs().max() <= wrong, name


def test_a_folder_of_pictures_is_cut_to_the_size_of_the_network(tmp_path):
    picture = torch.zeros(3, 40, 80, dtype=torch.uint8)
    picture[:, :, 20:60] = 200  # the middle square
    write_png(picture, str(tmp_path / "wide.png"))
    (tmp_path / "._wide.png").write_bytes(b"what a Mac writes beside a picture on a USB stick")
    images, _ = undesired_images(tmp_path, [0], (1, 28, 28))
    assert images.shape == (1, 1, 28, 28) and ((images + 1) * 127.5)[..., 2:-2].mean().round() == 200


def test_the_shape_says_which_data_set_is_looked_for(tmp_path, monkeypatch):
    labels, asked = torch.arange(10), []
    monkeypatch.setattr("data.cifar10", lambda folder, train: (asked.append(str(folder)), (torch.ones(10, 3, 32, 32), labels))[1])
    monkeypatch.setattr("data.mnist", lambda *_, **__: pytest.fail("MNIST is not of this shape"))
    assert len(undesired_images("data", [3, 4], (3, 32, 32))[0]) == 2 and asked == ["data"]  # there, or downloaded there
    with pytest.raises(ValueError, match="data set of .3, 64, 64"):
        undesired_images("data", [3], (3, 64, 64))


def test_a_folder_without_pictures_is_no_place_to_download_to(tmp_path):
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(ValueError, match="holds no pictures"):
        undesired_images(tmp_path, [0], (1, 28, 28))
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match="draws the classes 0..9"):
        undesired_images("teacher", [0], (3, 32, 32))


def test_images_of_another_shape_are_refused(tmp_path):
    write_mnist(tmp_path / "a", np.zeros((10, 28, 28), np.uint8), np.arange(10, dtype=np.uint8))
    with pytest.raises(ValueError, match=r"no pictures .* or data set of \(3, 32, 32\)"):
        undesired_images(tmp_path / "a", [1], (3, 32, 32))
    with pytest.raises(ValueError, match="no image of class"):
        undesired_images(tmp_path / "a", [12], (1, 28, 28))


def test_without_data_and_network_the_images_are_drawn_and_said_to_be(tmp_path, monkeypatch):
    from torchvision.datasets import MNIST

    def no_network(self):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(MNIST, "download", no_network)
    images, origin = undesired_images("auto", [7], (1, 28, 28), n=4)
    assert images.shape == (4, 1, 28, 28) and "drawn from the class-conditional teacher" in origin
    assert "could not be downloaded (Error downloading train-images-idx3-ubyte.gz)" in origin  # and why
    classifier = load_classifier()
    assert (look(classifier, images)[1].argmax(1) == 7).float().mean() >= 0.75
    write_mnist(tmp_path / "data", np.full((10, 28, 28), 9, np.uint8), np.arange(10, dtype=np.uint8))
    images, origin = undesired_images("auto", [7], (1, 28, 28), n=4)
    assert len(images) == 1 and origin == "1 images from data"


# ------------------------------------------------------------------ the posterior on disk


@pytest.fixture
def files(tmp_path):
    """Two unconditional networks of one shape, one of another, and the posterior of the first."""
    save_unet(tiny_unconditional(0), tmp_path / "a.safetensors")
    save_unet(tiny_unconditional(1), tmp_path / "b.safetensors")
    save_unet(random_unet(image_size=8, attention_at=(), num_classes=None, channels=16), tmp_path / "c.safetensors")
    variance = {k: torch.ones_like(p) for k, p in tiny_unconditional().named_parameters()}
    digits = checksum(tmp_path / "a.safetensors")
    write_tensors(tmp_path / "a-posterior.safetensors", "posterior", variance, mean_sha256=digits)
    return tmp_path


def test_a_posterior_must_fit_its_network(files):
    a, b, c = (load_unet(files / f"{name}.safetensors") for name in "abc")
    words = str(files / "a-posterior.safetensors")
    assert read_posterior(words, a).keys() == a.state_dict().keys()
    with pytest.raises(ValueError, match="other weights"):
        read_posterior(words, b)
    with pytest.raises(ValueError, match="another network"):
        read_posterior(words, c)
    with pytest.raises(ValueError, match="holds no minUnlearn posterior"):
        read_posterior(str(files / "a.safetensors"), a)
    variance = {k: torch.ones_like(p) for k, p in a.state_dict().items()}
    for wrong in (float("nan"), float("inf"), -1.0):
        broken = variance | {"conv_in.bias": torch.full_like(a.conv_in.bias, wrong)}
        write_tensors(files / "broken.safetensors", "posterior", broken)
        with pytest.raises(ValueError, match="variance of conv_in.bias is not everywhere finite"):
            read_posterior(str(files / "broken.safetensors"), a)


def test_a_posterior_of_several_teachers_moves_the_network_to_their_mean(files):
    a, b = (load_unet(files / f"{name}.safetensors") for name in "ab")
    middle = {k: (p + b.state_dict()[k]) / 2 for k, p in a.state_dict().items()}
    unet = load_unet(files / "a.safetensors")
    variance = read_posterior(f"{files}/a.safetensors,{files}/b.safetensors", unet)
    torch.testing.assert_close(dict(unet.state_dict()), middle)
    half_squared = {k: (p - b.state_dict()[k]).square() / 2 for k, p in a.state_dict().items()}
    torch.testing.assert_close(variance, half_squared)


# ------------------------------------------------------------------ the command


@pytest.mark.parametrize("size, layout", [(32, "CIFAR-10"), pytest.param(64, "tiny ImageNet", marks=pytest.mark.slow)])
def test_networks_of_the_hub_unlearn_at_their_size(size, layout, tmp_path, monkeypatch):
    """Two networks in the shape of google/ddpm-cifar10-32, only narrower, by convert.py; what they agree on is kept."""
    narrow = CIFAR10 | {"block_out_channels": [16] * 4, "layers_per_block": 1, "norm_num_groups": 8, "sample_size": size}
    for i, name in enumerate("ab"):
        peer(narrow, seed=i).save_pretrained(tmp_path / name)
        convert.main(parse(convert.Config, "", argv=[str(tmp_path / name), str(tmp_path / f"{name}.safetensors")]))
    data = tmp_path / "data"
    if layout == "CIFAR-10":
        write_cifar10(data, monkeypatch)
    else:
        (data / "train/n01/images").mkdir(parents=True)
        (data / "wnids.txt").write_text("n02\nn01\n")
        for i in range(3):
            write_png(torch.full((3, 64, 64), 50 * i, dtype=torch.uint8), str(data / f"train/n01/images/n01_{i}.png"))
    some = vdu.generate  # two pictures in place of a hundred
    monkeypatch.setattr(vdu, "generate", lambda sample, n, *rest: some(sample, 2, *rest))
    a, b, out = (str(tmp_path / name) for name in ("a.safetensors", "b.safetensors", "out"))
    vdu.main(parse(Config, "", vdu.PRESETS, ["--teacher", a, "--posterior", a, b, "--data", str(data), "--forget", "1",
                                             "--steps", "1", "--batch-size", "32", "--classifier", "none", "--out", out]))
    before, after = load_unet(a), load_unet(tmp_path / "out/unlearned.safetensors")
    assert after.image_shape == (3, size, size) and after.num_classes is None and not same_bits(before, after)
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["undesired_images"] == 3 and (tmp_path / "out/samples_after.png").is_file()


def test_the_main_job_leaves_what_it_promises(tmp_path, few_calls):
    command = "vdu.py --forget 1 --data teacher --images 2 --steps 2 --batch-size 32 --eval-images 100 --out run"
    process = inside(command, tmp_path)
    assert process.returncode == 0, process.stderr
    folder = tmp_path / "run"
    assert {p.name for p in folder.iterdir()} == {
        "config.json", "metrics.json", "samples_before.png", "samples_after.png", "curves.png", "checkpoint.pt",
        "unlearned.safetensors"}
    numbers = json.loads((folder / "metrics.json").read_text())
    assert {"pul", "u_fid", "teacher_fid", "seconds", "confidence", "reference", "images"} <= numbers.keys()
    assert sum(numbers["counts"]) == sum(numbers["teacher_counts"]) == 100
    assert "PUL" in process.stdout and "2 images of class [1] drawn" in process.stdout
    assert load_unet(folder / "unlearned.safetensors").card["forget"] == [1]
    judged = inside("eval.py run/unlearned.safetensors --images 100 --out judged.json", tmp_path)
    assert judged.returncode == 0, judged.stderr
    again = json.loads((tmp_path / "judged.json").read_text())
    assert all(again[k] == pytest.approx(numbers[k], abs=1e-6) for k in ("pul", "u_fid", "teacher_fid", "counts"))


@pytest.mark.parametrize("flags, says", [
    ("--teacher mnist", "class-conditional"),
    ("--forget none", "nothing to do"),
    ("--forget 10", "the classes are 0..9"),
    ("--forget 0 1 2 3 4 5 6 7 8 9", "leave at least one"),
    ("--forget one", "--forget one"),
    ("--data nowhere", "no folder"),
    ("--posterior mnist", "holds no minUnlearn posterior"),
    ("--t-min 500 --t-max 400", "must be below"),
    ("--gamma 1.5", "at most 1"),
    ("--optimizer adam", "Adam wants a rate"),
    ("--stop-at 1", "--stop-at 1 must be above 1"),
    ("--images -1", "at least 0"),
])
def test_bad_input_is_one_line_and_status_2(flags, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["vdu.py", *flags.split()])
    with pytest.raises(SystemExit) as exit:
        vdu.main(vdu.parse(Config, vdu.__doc__, vdu.PRESETS))
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and says in error
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------- features of a text-to-image model


def test_a_feature_is_forgotten_from_a_folder_of_pictures(sd_folder, tmp_path, few_calls):
    """From pictures and a prompt: the U-Net moves, and D_f's error grows under that prompt."""
    sd = load_stable_diffusion(sd_folder)
    variance = {name: torch.full_like(p, 1e-4) for name, p in sd.unet.state_dict().items()}
    write_tensors(tmp_path / "posterior.safetensors", "posterior", variance)
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        write_png(torch.randint(0, 256, (3, 20, 18), dtype=torch.uint8), str(tmp_path / "pictures" / f"{i}.png"))
    done = inside(f"vdu.py --preset tiny-sd --sd {sd_folder} --forget red --data pictures --posterior posterior.safetensors --steps 4 "
                  "--stop-at 0 --batch-size 8 --device cpu --amp off --out out", tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["forget"] == "red" and metrics["undesired_images"] == 3 and metrics["steps_taken"] == 4
    unlearned = load_unet(tmp_path / "out/unlearned.safetensors")
    assert unlearned.text_dim == 12 and (tmp_path / "out/samples_after.png").exists()
    pictures, names, _ = vdu.undesired_pictures(
        Config(sd=str(sd_folder), data=str(tmp_path / "pictures")), sd, "red")
    assert pictures.shape == (3, 3, 16, 16) and names == ["red"] * 3
    with torch.no_grad():
        x0, c = sd.vae.latents(pictures).repeat(50, 1, 1, 1), sd.embed(["red"]).repeat(150, 1, 1)
        t, noise = torch.randint(300, 600, (150,)), torch.randn(150, 4, 4, 4)
        before, after = (-vdu.plasticity_inducer(unet, x0, t, noise, sd.schedule, c, "simple").mean()
                         for unet in (sd.unet, unlearned))
    assert after > before


@pytest.mark.parametrize("words, message", [
    ("--preset tiny-sd --sd {sd} --forget red --posterior mnist-unconditional-posterior", "is of another network"),
    ("--preset tiny-sd --sd nowhere --forget red", "no folder 'nowhere'"),
    ("--preset tiny-sd --sd {sd} --forget red --t-min 900", "--t-min 900 must be below"),
    ("--preset tiny-sd --forget none", "there is nothing to do"),
    ("--preset tiny-sd --data data", "--data data holds no pictures"),
    ("--sd {sd} --forget red", "give that too"),
    ("--preset tiny-sd --sd {sd} --forget red", "--posterior: name the variance"),
    ("--preset tiny-sd --sd {sd} --forget red --posterior tiny-sd/posterior", "is of another network"),
    ("--preset tiny-sd --teacher mine.safetensors", "--teacher changes nothing with --sd"),
    ("--preset tiny-sd --eval-images 100", "--eval-images changes nothing"),
    ("--preset tiny-sd --classifier mine", "with --sd it is mnist-classifier or none"),
])
def test_features_bad_input_gets_one_line(sd_folder, tmp_path, monkeypatch, words, message):
    monkeypatch.setattr("data.cifar10", lambda *_, **__: pytest.fail("a word is no class of a data set"))
    done = inside("vdu.py " + words.format(sd=sd_folder), tmp_path)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_without_a_classifier_the_tiny_model_is_unlearned_and_not_judged(tmp_path, monkeypatch, few_calls):
    monkeypatch.setattr(vdu, "guided_sampler", lambda *_: lambda z, c, noise=None: torch.zeros(len(z), 3, 32, 32))
    monkeypatch.setattr(vdu, "ConceptJudge", lambda: pytest.fail("nobody asked"))
    done = inside("vdu.py --preset tiny-sd --classifier none --steps 0 --images 2 --device cpu --out out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "pul" not in json.loads((tmp_path / "out/metrics.json").read_text()) and (tmp_path / "out/samples_after.png").exists()


def test_a_mean_that_no_file_holds_is_judged_as_the_teacher_that_it_is(tmp_path, monkeypatch):
    """From the files of K U-Nets: after no step, the teacher's numbers are those of what was "unlearned"."""
    unet = load_stable_diffusion("tiny-sd").unet
    for name, factor in (("a", 0.9), ("b", 1.2)):
        state = {k: factor * v for k, v in unet.state_dict().items()}
        write_tensors(tmp_path / f"{name}.safetensors", "U-Net", state, config=unet.config)

    def cheap(sd, network, *_):  # a picture that tells the network's weights
        return lambda z, c, noise=None: network.conv_in.bias.mean() + z.repeat(1, 1, 4, 4)[:, :3, :32, :32].tanh()

    monkeypatch.setattr(vdu, "guided_sampler", cheap)
    done = inside("vdu.py --preset tiny-sd --posterior a.safetensors b.safetensors --steps 0 --images 2 --device cpu --out out", tmp_path)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert metrics["teacher_fid"] == pytest.approx(metrics["fid"], rel=1e-9)
    assert metrics["teacher_retained_accuracy"] == metrics["retained_accuracy"]


def test_features_are_drawn_by_the_model_itself_where_nobody_brings_pictures():
    sd = load_stable_diffusion("tiny-sd")
    pictures, names, origin = vdu.undesired_pictures(Config(sd="tiny-sd", images=3), sd, "red")
    assert pictures.shape == (3, 3, 32, 32) and all("red" in name.split() for name in names) and "itself" in origin
    assert len(set(names)) == 3
    _, _, colours = ConceptJudge()(pictures)
    assert colours.tolist() == [0, 0, 0]  # red


def test_the_pictures_are_before_and_after_from_the_same_noise(tmp_path, monkeypatch, few_calls):
    shown, draw = {}, vdu.generate
    monkeypatch.setattr(vdu, "image_grid", lambda images, labels, path, *rest: shown.update({path.stem: images}))
    monkeypatch.setattr(vdu, "generate", lambda sample, n, *rest: draw(sample, 4, *rest))  # in place of a hundred
    write_mnist(tmp_path / "data", np.full((10, 28, 28), 9, np.uint8), np.arange(10, dtype=np.uint8))
    done = inside("vdu.py --forget 1 --data data --steps 2 --lr 20 --batch-size 32 --classifier none --amp off "
                  "--device cpu --out run", tmp_path)
    assert done.returncode == 0, done.stderr
    for name, file in (("before", "mnist-unconditional"), ("after", tmp_path / "run/unlearned.safetensors")):
        expected, _ = draw(unconditional_sampler(load_unet(file), SCHEDULE), 4, (1, 28, 28), 0, "cpu")
        assert torch.equal(shown[f"samples_{name}"], expected), name
    assert not torch.equal(*shown.values())


def test_what_the_loop_draws_and_what_it_is_weighed_with(tmp_path, monkeypatch):
    """Each latent goes with its own text, t lies in its range; --covariance identity: one width, the mean, for all."""
    drawn, widths, inducer, natural = [], [], vdu.plasticity_inducer, vdu.NaturalGradient

    def spy(unet, x0, t, noise, schedule, c, *rest):
        drawn.append((x0[:, 0, 0, 0], c[:, 0, 0], t if torch.is_grad_enabled() else t[:0]))
        return inducer(unet, x0, t, noise, schedule, c, *rest)

    monkeypatch.setattr(vdu, "plasticity_inducer", spy)
    monkeypatch.setattr(vdu, "NaturalGradient", lambda theta, v, lr: widths.extend(v) or natural(theta, v, lr))
    unet, n = random_unet(**SMALL_TEXT), torch.arange(6.0)
    variance = {k: torch.rand_like(p) for k, p in unet.named_parameters()}
    config = Config(steps=1, t_min=300, t_max=303, stop_at=0.0, covariance="identity", amp="off", device="cpu",
                    plasticity="full", batch_size=64, out=str(tmp_path / "run"))
    latents, texts = n.view(6, 1, 1, 1).expand(6, 4, 4, 4), n.view(6, 1, 1).expand(6, 5, 12)
    train(config, Run(config, ""), unet, variance, latents, SCHEDULE, texts)
    assert all(torch.equal(x, c) for x, c, _ in drawn)
    assert set(torch.cat([t for *_, t in drawn]).tolist()) == {300, 301, 302}
    mean = torch.cat([v.flatten() for v in variance.values()]).mean()
    assert widths and all(torch.allclose(v, mean) for v in widths)


def test_when_another_process_has_enough_this_one_ends_too(tmp_path, monkeypatch):
    asked, any_process = [], Run.any_process

    def another_has_enough(run, flag):
        if not torch.is_tensor(flag):  # the run's own questions, whether there was a NaN, or a Ctrl-C
            return any_process(run, flag)
        asked.append(bool(flag))
        return True

    monkeypatch.setattr(Run, "any_process", another_has_enough)
    run, _, _ = run_of(tmp_path, "run", gamma=0.0, stop_at=100.0)
    assert run.step == 1 and asked == [False]


def test_the_latents_that_are_unlearned_are_scaled(sd_folder, tmp_path, monkeypatch):
    shutil.copytree(sd_folder, tmp_path / "sd")
    file, given = tmp_path / "sd/vae/config.json", []
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scaling_factor": 0.5}))
    sd, pictures = load_stable_diffusion(tmp_path / "sd"), torch.rand(2, 3, 16, 16) * 2 - 1
    variance = {k: torch.ones_like(p) for k, p in sd.unet.state_dict().items()}
    write_tensors(tmp_path / "p.safetensors", "posterior", variance)
    monkeypatch.setattr(vdu, "undesired_pictures", lambda *_: (pictures, ["red", "a red three"], "here"))
    monkeypatch.setattr(vdu, "train", lambda *args: given.append(args[4:]) or train(*args))
    done = inside("vdu.py --preset tiny-sd --sd sd --forget red --posterior p.safetensors --steps 0 --device cpu --amp off --out out", tmp_path)
    assert done.returncode == 0, done.stderr
    [(latents, schedule, texts)] = given
    torch.testing.assert_close(latents, sd.vae.latents(pictures).detach())
    torch.testing.assert_close(texts, sd.embed(["red", "a red three"]).detach())
    assert torch.equal(schedule.betas, sd.schedule.betas)


def test_natural_gradient_goes_along_the_running_mean_of_the_gradients():
    theta, places = torch.nn.Parameter(torch.zeros(2)), []
    optimizer = vdu.NaturalGradient([theta], [torch.ones(2)], lr=1.0)
    for gradient in ([1.0, 0.0], [0.0, 1.0]):
        theta.grad = torch.tensor(gradient)
        optimizer.step()
        places.append(theta.detach().clone())
    mean = torch.tensor([0.09, 0.1])  # 0.9 times a tenth of the first, and a tenth of the second
    torch.testing.assert_close(places[1] - places[0], -mean / mean.norm())


def test_the_unlearned_network_is_the_one_that_is_shown_and_judged(tmp_path, monkeypatch):
    asked, shown, judged = [], {}, []

    def blank(sd, network, *_):
        asked.append(network)
        return lambda z, c, noise=None: torch.zeros(len(z), 3, 32, 32)

    monkeypatch.setattr(vdu, "guided_sampler", blank)
    monkeypatch.setattr(vdu, "evaluate_concept", lambda *_, **__: judged.append(asked[-1]) or {})
    monkeypatch.setattr(vdu, "prompt_grid", lambda pictures, rows, path, *_: shown.update({path.stem: asked[-1]}))
    monkeypatch.setattr(vdu, "table", str)
    done = inside("vdu.py --preset tiny-sd --steps 1 --images 2 --batch-size 2 --device cpu --out out", tmp_path)
    assert done.returncode == 0, done.stderr
    saved, shipped = load_unet(tmp_path / "out/unlearned.safetensors"), load_stable_diffusion("tiny-sd").unet
    assert not same_bits(saved, shipped) and same_bits(shown["samples_before"], shipped)
    assert same_bits(shown["samples_after"], saved) and same_bits(judged[0], saved)
