"""SFD's formulas against an independent oracle, its loop against what must and must not move, its main job whole."""

import copy
import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, column, inside, python, random_unet, tensors, write_mnist

import ddpm_sfd
from ddpm_sfd import Config, draw_labels, fake_score_loss, generator_loss, one_step, read_classes, total, train
from features import Judge
from run import Run, parse
from samples import balanced_labels, generate
from teachers import read_pair
from unet import VPSchedule, ddim_sample, load_unet, save_unet

SCHEDULE = VPSchedule.linear()
ABAR = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))


class Affine(torch.nn.Module):
    """A stand-in network whose output a few lines of numpy can repeat: eps = p x + q c + r t / 1000."""

    def __init__(self, p, q, r):
        super().__init__()
        self.p, self.q, self.r = (torch.nn.Parameter(torch.tensor(v, dtype=torch.float64)) for v in (p, q, r))

    def forward(self, x, t, c):
        return self.p * x + (self.q * c + self.r * t / 1000)[:, None, None, None]

    def numpy(self, x, t, c):
        p, q, r = self.p.item(), self.q.item(), self.r.item()
        return p * x + (q * c + r * t / 1000)[:, None, None, None]


def case(seed=0, B=4):
    g = np.random.default_rng(seed)
    x, noise = g.normal(size=(2, B, 2, 3, 3))
    t, c, c_safe = g.integers(20, 712, B), g.integers(0, 10, B), g.integers(0, 10, B)
    return x, noise, t, c, c_safe


def test_one_step_is_the_formula():  # (S1)
    z, _, _, c, _ = case()
    network, s, a = Affine(0.3, 0.05, -0.2), np.sqrt(1 - ABAR[440]), np.sqrt(ABAR[440])
    expected = (s * z - s * network.numpy(s * z, np.full(4, 440), c)) / a
    ours = one_step(network, *tensors(z, c), SCHEDULE, 440)
    np.testing.assert_allclose(ours.detach().numpy(), expected, rtol=1e-4)


def test_fake_score_loss_is_the_formula():  # (S2)
    x, noise, t, c, _ = case()
    network = Affine(0.3, 0.05, -0.2)
    x_t = column(np.sqrt(ABAR[t])) * x + column(np.sqrt(1 - ABAR[t])) * noise
    expected = ((noise - network.numpy(x_t, t, c)) ** 2).sum((1, 2, 3))
    ours = fake_score_loss(network, *tensors(x, t, c, noise), SCHEDULE)
    assert ours.shape == (4,)
    np.testing.assert_allclose(ours.detach().numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
def test_generator_loss_and_its_gradient_are_the_formula(alpha):  # (S3), (S4)
    x, noise, t, c, c_safe = case()
    phi, psi = Affine(0.3, 0.05, -0.2), Affine(0.25, 0.02, 0.1)
    s, a = column(np.sqrt(1 - ABAR[t])), column(np.sqrt(ABAR[t]))

    def f(x_g, network, label):
        x_t = a * x_g + s * noise
        return (x_t - s * network.numpy(x_t, t, label)) / a

    w = 1 / np.abs(f(x, phi, c_safe) - x).mean((1, 2, 3))  # a constant for the gradient

    def L(x_g):
        d = f(x_g, phi, c_safe) - f(x_g, psi, c)
        return w * (d * (f(x_g, phi, c_safe) - x_g - alpha * d)).sum((1, 2, 3))

    x_g, noise_t, t_t, c_t, c_safe_t = tensors(x, noise, t, c, c_safe)
    x_g.requires_grad_()
    ours = generator_loss(phi, psi, x_g, t_t, c_safe_t, c_t, noise_t, SCHEDULE, alpha)
    assert ours.shape == (4,)
    np.testing.assert_allclose(ours.detach().numpy(), L(x), rtol=1e-3)
    ours.sum().backward()
    for index in [(0, 0, 0, 0), (1, 1, 2, 0), (3, 0, 1, 2)]:  # central differences through both networks' inputs
        step = np.zeros_like(x)
        step[index] = 1e-5
        slope = (L(x + step).sum() - L(x - step).sum()) / 2e-5
        assert x_g.grad[index].item() == pytest.approx(slope, rel=1e-3)


def test_generator_loss_is_still_where_the_scores_agree(tiny):
    """Equal networks and labels: nothing to gain, and no push on the image. Another label for the teacher: a push."""
    x_g = torch.randn(3, 1, 28, 28, requires_grad=True)
    t, c, noise = torch.tensor([30, 300, 600]), torch.tensor([1, 2, 3]), torch.randn(3, 1, 28, 28)
    for c_teacher, moves in ((c, False), (c + 1, True)):
        loss = generator_loss(tiny, copy.deepcopy(tiny), x_g, t, c_teacher, c, noise, SCHEDULE, alpha=1.2)
        [gradient] = torch.autograd.grad(loss.sum(), x_g)
        assert (gradient.abs().max() > 1e-3) == moves


def test_both_forms_of_the_divergence_are_equal_on_average_where_the_fake_score_is_exact():  # (S3)
    """x_g is Gaussian, of mean 0.3 and deviation 0.5, so that its best denoiser is known; the teacher's data lie elsewhere."""
    def exact(mean, deviation):
        def predict(x_t, t, c):
            a, s = SCHEDULE.a(t), SCHEDULE.s(t)
            return s * (x_t - a * mean) / (a**2 * deviation**2 + s**2)
        return predict

    x_g, noise = 0.3 + 0.5 * torch.randn(2000, 1, 16, 16), torch.randn(2000, 1, 16, 16)
    t, c = torch.randint(100, 712, (2000,)), torch.zeros(2000, dtype=torch.long)
    first, both = (generator_loss(exact(-0.2, 0.7), exact(0.3, 0.5), x_g, t, c, c, noise, SCHEDULE, alpha).mean()
                   for alpha in (0.0, 1.0))
    assert first > 10 and both.abs() < 0.02 * first
    wrong = generator_loss(exact(-0.2, 0.7), exact(0.2, 0.5), x_g, t, c, c, noise, SCHEDULE, 1.0).mean()
    assert wrong.abs() > 0.1 * first


def test_weight_is_clamped_where_the_teacher_agrees_with_the_image():  # (S4)
    x, noise, t, c, _ = tensors(*case())

    def oracle(x_t, t, c):  # predicts exactly the noise in it: f_phi = x_g, so 1 / 0 but for the clamp
        return noise

    psi = Affine(0.25, 0.02, 0.1)
    x_t = SCHEDULE.add_noise(x, noise, t)
    apart = x - SCHEDULE.predict_x0(x_t, psi(x_t, t, c), t)  # f_phi - f_psi; at alpha = 1 the factors are it and minus it
    loss = generator_loss(oracle, psi, x, t, c, c, noise, SCHEDULE, alpha=1.0)
    torch.testing.assert_close(loss, -1e5 * apart.square().sum(dim=(1, 2, 3)), rtol=1e-3, atol=0)


def test_total_weighs_the_two_means():  # (S5)
    loss = torch.tensor([1.0, 3.0, 10.0, 20.0, 30.0])
    assert total(loss, 2, 0.5).item() == 2 + 0.5 * 20
    assert total(loss[:2], 2, 0.5).item() == 2  # no forgotten class: SiD


def classes_for(**words):
    return [None if x is None else x.tolist() for x in read_classes(Config(**words), 10)]


def test_classes_and_override():
    assert classes_for(forget="0") == [list(range(1, 10)), [0], [1]]
    assert classes_for(forget="9") == [list(range(9)), [9], [0]]
    assert classes_for(forget="3,4,9") == [[0, 1, 2, 5, 6, 7, 8], [3, 4, 9], [5, 5, 0]]
    assert classes_for(forget="3,4", override="8")[2] == [8, 8]
    assert classes_for(forget="3", override="random")[2] is None
    assert classes_for(forget="none") == [list(range(10)), [], []]


def test_labels_of_a_step():
    retained, forget, override = read_classes(Config(forget="3,4"), 10)
    c, c_teacher = draw_labels(retained, forget, override, 400, 100)
    assert c.shape == c_teacher.shape == (500,)
    assert set(c[:400].tolist()) == {0, 1, 2, 5, 6, 7, 8, 9} and torch.equal(c[:400], c_teacher[:400])
    assert set(c[400:].tolist()) == {3, 4} and set(c_teacher[400:].tolist()) == {5}
    c, c_teacher = draw_labels(
        retained, forget, None, 400, 300
    )  # random: over all retained ones, never a forgotten one
    assert set(c_teacher[400:].tolist()) == {0, 1, 2, 5, 6, 7, 8, 9}
    c, c_teacher = draw_labels(*read_classes(Config(forget="3,4,9"), 10), 10, 300)  # each has a safe class of its own
    assert set(zip(c[10:].tolist(), c_teacher[10:].tolist())) == {(3, 5), (4, 5), (9, 0)}
    c, c_teacher = draw_labels(torch.arange(10), torch.tensor([], dtype=torch.long), None, 40, 0)
    assert len(c) == 40 and torch.equal(c, c_teacher)


def small(tmp_path, **words):
    return Config(
        **(
            {
                "steps": 2,
                "batch_size": 4,
                "forget_batch_size": 2,
                "out": str(tmp_path / "run"),
                "amp": "off",
                "save_every": 100,
            }
            | words
        )
    )


def trained(config, teacher):
    run = Run(config, "unused")
    generator, _ = train(config, run, teacher, SCHEDULE, read_classes(config, 10))
    return run, generator


def test_a_run_trains_what_it_must_and_nothing_else(tmp_path, tiny):
    before = copy.deepcopy(tiny.state_dict())
    run, generator = trained(small(tmp_path, ema=0.0), tiny)
    assert all(torch.equal(before[k], v) for k, v in tiny.state_dict().items())  # the teacher stands still
    psi, theta = run.state["fake_score"], run.state["generator"]
    for network, name in ((psi, "psi"), (theta, "theta")):
        moved = [not torch.equal(before[k], v) for k, v in network.state_dict().items()]
        assert sum(moved) > 0.9 * len(moved), name
        assert all(p.isfinite().all() for p in network.parameters())
    assert not torch.equal(psi.conv_in.weight, theta.conv_in.weight)
    assert all(
        torch.equal(a, b) for a, b in zip(generator.parameters(), theta.parameters())
    )  # EMA with decay 0 is the last one
    assert [o.defaults["betas"] for o in (run.state["optimizer_psi"], run.state["optimizer_theta"])] == [
        (0.0, 0.999)
    ] * 2


def test_fake_score_is_still_while_the_generator_moves(tmp_path, tiny, monkeypatch):
    """In the generator's update neither the fake score nor the teacher collects a gradient or runs dropout."""
    seen = []
    original = generator_loss

    def spy(guided_teacher, fake_score, x_g, *rest):
        [teacher] = guided_teacher.args
        seen.append(
            (
                teacher.training,
                fake_score.training,
                any(p.requires_grad for n in (teacher, fake_score) for p in n.parameters()),
                x_g.requires_grad,
            )
        )
        return original(guided_teacher, fake_score, x_g, *rest)

    monkeypatch.setattr(ddpm_sfd, "generator_loss", spy)
    trained(small(tmp_path), tiny.train())
    assert seen == [(False, False, False, True)] * 2


def test_with_compile_every_network_that_is_called_is_compiled(tmp_path, tiny, monkeypatch):
    called, compiled = set(), []

    def spy(guided_teacher, fake_score, *rest):
        called.update((*guided_teacher.args, fake_score, run.state["fake_score"], run.state["generator"]))
        return generator_loss(guided_teacher, fake_score, *rest)

    monkeypatch.setattr(ddpm_sfd, "generator_loss", spy)
    monkeypatch.setattr(torch.nn.Module, "compile", lambda network: compiled.append(network))
    run = Run(small(tmp_path, compile=True), "unused")
    train(run.config, run, tiny, SCHEDULE, read_classes(run.config, 10))
    assert len(called) == 4 and called == set(compiled)


def test_what_each_update_is_given(tmp_path, tiny, monkeypatch):
    """One batch of images, with dropout in the network that is trained; steps t in their range, and noise, drawn anew
    for the second update."""
    seen = {}

    def spy(f):
        def called(network, *rest):
            seen[f.__name__] = [getattr(network, "training", None), *rest]
            return f(network, *rest)

        monkeypatch.setattr(ddpm_sfd, f.__name__, called)

    for f in (one_step, fake_score_loss, generator_loss):
        spy(f)
    trained(small(tmp_path, steps=1, batch_size=20, forget_batch_size=10, t_init=300, t_min=300, t_max=303), tiny)
    theta_trains, _, c, _, t_init = seen["one_step"]
    psi_trains, x_psi, t_psi, c_psi, noise_psi, _ = seen["fake_score_loss"]
    _, _, x_g, t, c_teacher, c_fake, noise, *_ = seen["generator_loss"]
    assert theta_trains and psi_trains and t_init == 300
    assert set(t.tolist()) == set(t_psi.tolist()) == {300, 301, 302}
    assert not torch.equal(t, t_psi) and not torch.equal(noise, noise_psi)
    assert torch.equal(x_psi, x_g) and x_g.requires_grad and not x_psi.requires_grad
    assert torch.equal(c_psi, c) and torch.equal(c_fake, c)
    assert torch.equal(c_teacher[:20], c[:20]) and (c[20:] == 0).all() and (c_teacher[20:] == 1).all()


def test_each_network_has_its_own_rate_and_lambda_and_both_are_clipped(tmp_path, tiny, monkeypatch):
    lambdas, clips, update = [], [], Run.update

    def spy_on_total(loss, *rest):
        lambdas.append(rest)
        return total(loss, *rest)

    def spy_on_update(run, name, *rest):
        clips.append((name, rest[-1]))
        return update(run, name, *rest)

    monkeypatch.setattr(ddpm_sfd, "total", spy_on_total)
    monkeypatch.setattr(Run, "update", spy_on_update)
    words = dict(lr_generator=1e-3, class_rate=3.0, lr_fake_score=4e-3, lr_end=0.5, clip_value=0.7)
    run, _ = trained(small(tmp_path, lambda_generator=3.0, lambda_fake_score=2.0, lambda_end=0.25, **words), tiny)
    assert lambdas == [(4, 2.0), (4, 3.0), (4, 1.0), (4, 1.5)]  # the second of two steps is half way down to a quarter
    assert clips == [("loss_psi", 0.7), ("loss_theta", 0.7)] * 2
    groups = [*run.state["optimizer_psi"].param_groups, *run.state["optimizer_theta"].param_groups]
    assert [(g["initial_lr"], g["lr"]) for g in groups] == [pytest.approx((lr, lr / 2)) for lr in (4e-3, 1e-3, 3e-3)]


def test_only_what_reads_the_class_learns_at_the_class_rate(tmp_path, tiny):
    """At a class rate of 0 exactly these weights stand still: the label table, its dense layers, each block's reader."""
    before = copy.deepcopy(tiny.state_dict())
    run, generator = trained(small(tmp_path, class_rate=0.0), tiny)
    still = {k for k, v in generator.state_dict().items() if torch.equal(v, before[k])}
    class_path = {k for k in before if k.startswith("class_") or ".emb_proj." in k}
    assert still == class_path and len(class_path) > 6


def test_the_result_is_the_weight_average_of_theta(tmp_path, tiny, monkeypatch):
    thetas, log = [], Run.log

    def spy(run, **numbers):
        thetas.append(copy.deepcopy(run.state["generator"].state_dict()))
        log(run, **numbers)

    monkeypatch.setattr(Run, "log", spy)
    _, generator = trained(small(tmp_path, steps=3, ema=0.75), tiny)
    for k, v in generator.state_dict().items():
        expected = 0.75 * (0.75 * thetas[0][k] + 0.25 * thetas[1][k]) + 0.25 * thetas[2][k]
        torch.testing.assert_close(v, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("decay", [0.75, 0.0])
def test_the_generator_asks_the_weight_average_of_psi(tmp_path, tiny, monkeypatch, decay):
    """With decay 0 that is psi itself. What a run returns, and saves, is psi, not its average."""
    asked, psi = [], []

    def spy(guided_teacher, fake_score, *rest):
        asked.append({k.removeprefix("module."): v.clone() for k, v in fake_score.state_dict().items()})
        psi.append(copy.deepcopy(run.state["fake_score"].state_dict()))
        return generator_loss(guided_teacher, fake_score, *rest)

    monkeypatch.setattr(ddpm_sfd, "generator_loss", spy)
    run = Run(small(tmp_path, steps=3, ema_fake_score=decay), "unused")
    _, fake_score = train(run.config, run, tiny, SCHEDULE, read_classes(run.config, 10))
    for k, v in fake_score.state_dict().items():
        expected = decay * (decay * psi[0][k] + (1 - decay) * psi[1][k]) + (1 - decay) * psi[2][k]
        torch.testing.assert_close(asked[2][k], expected, rtol=0, atol=1e-6 if decay else 0)
        assert torch.equal(v, psi[2][k])


def test_the_live_ua_is_of_the_forgotten_images_just_drawn(tmp_path, tiny):
    class Judge:
        def live_ua(self, images, labels):
            return ((labels == 0).all() & (images.shape == (2, 1, 28, 28))).float()

    run = Run(small(tmp_path), "")
    train(run.config, run, tiny, SCHEDULE, read_classes(run.config, 10), Judge())
    assert run.curves["ua"] == [1.0, 1.0]


@pytest.mark.parametrize("amp, calls", [("off", 50), ("bf16", 4)])
def test_the_pictures_are_before_and_after_from_the_same_noise(tmp_path, tiny_file, monkeypatch, request, amp, calls):
    """And drawn in the precision of the run."""
    if calls == 4:
        request.getfixturevalue("few_calls")
    shown, teacher = {}, load_unet(tiny_file)
    monkeypatch.setattr(ddpm_sfd, "image_grid", lambda images, labels, path, *rest: shown.update({path.stem: images}))
    words = f"--preset mnist-one-stage --teacher {tiny_file} --classifier none --steps 0 --seed 3 --device cpu --amp {amp}"
    assert inside(f"ddpm_sfd.py --forget 0 {words}", tmp_path).returncode == 0
    for name, sample in (("samples_before", lambda z, c, noise: ddim_sample(teacher, SCHEDULE, z, c, steps=calls)),
                         ("samples_after", lambda z, c, noise: one_step(teacher, z, c, SCHEDULE, 440))):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp == "bf16"):
            expected, _ = generate(sample, balanced_labels(10, 10), teacher.image_shape, 3, "cpu")
        assert torch.equal(shown[name], expected), name


@pytest.mark.parametrize("guidance, safe", [(1.0, 1.0), (1.25, 1.25), (1.0, 2.0), (1.25, 2.0)])
def test_the_teacher_is_asked_with_guidance_and_the_fake_score_without(tmp_path, tiny, monkeypatch, guidance, safe):
    """The loss of a step against (S3) written out from both networks' plain answers, the null label's among them."""
    seen, k = [], column(torch.tensor([guidance] * 4 + [safe] * 2))  # (L1)

    def spy(guided_teacher, fake_score, x_g, t, c_teacher, c_fake, noise, schedule, alpha):
        loss = generator_loss(guided_teacher, fake_score, x_g, t, c_teacher, c_fake, noise, schedule, alpha)
        with torch.no_grad():
            a, s = schedule.a(t), schedule.s(t)
            x_t = a * x_g + s * noise
            cond, null = tiny(x_t, t, c_teacher), tiny(x_t, t, torch.full_like(c_teacher, 10))
            f_phi = (x_t - s * (k * cond - (k - 1) * null)) / a
            f_psi = (x_t - s * fake_score(x_t, t, c_fake)) / a
            d, w = f_phi - f_psi, 1 / (f_phi - x_g).abs().mean((1, 2, 3))
            seen.append((loss.detach(), w * (d * (f_phi - x_g - alpha * d)).sum((1, 2, 3))))
        return loss

    monkeypatch.setattr(ddpm_sfd, "generator_loss", spy)
    trained(small(tmp_path, guidance=guidance, guidance_safe=safe, steps=1), tiny)
    [(ours, expected)] = seen
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("clip", ["on", "off"])
def test_the_scores_see_clipped_images_and_clipped_pixels_feel_no_push(tmp_path, tiny, monkeypatch, clip):
    seen = []

    def spy(teacher, fake_score, x_g, *rest):
        seen.append(x_g)
        x_g.retain_grad()
        return generator_loss(teacher, fake_score, x_g, *rest)

    drawn = []

    def spy_on_drawing(*args):
        drawn.append(one_step(*args))
        drawn[-1].retain_grad()
        return drawn[-1]

    monkeypatch.setattr(ddpm_sfd, "one_step", spy_on_drawing)
    monkeypatch.setattr(ddpm_sfd, "generator_loss", spy)
    config = Config(steps=1, batch_size=4, forget_batch_size=2, amp="off", device="cpu", out=str(tmp_path / "run"),
                    clip_images=clip)
    train(config, Run(config, ""), tiny, SCHEDULE, read_classes(config, 10))
    [raw], [x_g] = drawn, seen
    assert raw.abs().max() > 1  # an untrained generator's
    assert torch.equal(x_g, raw.clamp(-1, 1) if clip == "on" else raw)
    beyond = raw.detach().abs() > 1
    assert (raw.grad[~beyond] != 0).any()
    assert (raw.grad[beyond] == 0).all() == (clip == "on")


def test_zero_steps_change_no_bit(tmp_path, tiny):
    _, generator = trained(small(tmp_path, steps=0), tiny)
    assert all(torch.equal(a, b) for a, b in zip(generator.state_dict().values(), tiny.state_dict().values()))


def test_each_network_is_called_once_for_retained_and_forgotten_together(tmp_path, tiny):
    batches = []
    tiny.register_forward_hook(
        lambda module, args, out: batches.append(len(args[0]))
    )  # copies of it carry the hook along
    trained(small(tmp_path, steps=1, batch_size=5, forget_batch_size=3), tiny)
    assert batches == [8, 8, 16, 8]  # generator, fake score; teacher, with and without labels, fake score


def test_the_same_seed_gives_the_same_bits(tmp_path, tiny):
    a, b, c = (
        trained(small(tmp_path / str(i), seed=seed, override="random"), tiny)[1] for i, seed in enumerate((1, 1, 2))
    )
    same = [torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters())]
    other = [torch.equal(x, y) for x, y in zip(a.parameters(), c.parameters())]
    assert all(same) and not all(other)


def test_two_stages_start_from_the_files_of_the_first(tmp_path, tiny_file, few_calls):
    """No step of the second stage: its networks are those of the first. And what does not fit is refused."""
    first = f"ddpm_sfd.py --preset mnist-one-stage --forget none --teacher {tiny_file} --classifier none --steps 2 --batch-size 4 --out first"
    assert inside(first, tmp_path).returncode == 0
    second = f"ddpm_sfd.py --forget 0 --teacher {tiny_file} --classifier none --steps 0 --init-generator {{}} --out second"
    init = "first/generator.safetensors --init-fake-score first/fake_score.safetensors"
    process = inside(second.format(init), tmp_path)
    assert process.returncode == 0, process.stderr
    saved = torch.load(tmp_path / "first/checkpoint.pt", weights_only=True)["state"]
    for name, key in (("generator", "ema"), ("fake_score", "fake_score")):
        weights = {k.removeprefix("module."): v for k, v in saved[key].items()}
        files = [load_unet(tmp_path / d / f"{name}.safetensors").state_dict() for d in ("first", "second")]
        assert all(torch.equal(weights[k], v) for k, v in files[0].items()), name  # each file holds its own network
        assert all(torch.equal(files[0][k], files[1][k]) for k in files[0]), name
        assert not all(torch.equal(v, files[0][k]) for k, v in load_unet(tiny_file).state_dict().items()), name
    assert inside(first.replace("--out first", "--seed 1 --out other"), tmp_path).returncode == 0
    save_unet(random_unet(1, image_size=8, attention_at=(4,)), tmp_path / "another.safetensors")
    swapped = "first/fake_score.safetensors --init-fake-score first/generator.safetensors"
    for words, says in ((f"{init} --t-init 300", "was made for --t-init 440"), ("mnist", "configuration"),
                        ("none", "give the two files of one run; --preset mnist-one-stage begins with the teacher"),
                        (init.replace("fake-score first", "fake-score other"), "are not of one run, by their cards"),
                        (f"{init} --teacher another.safetensors", "was distilled from"),
                        (swapped, "--init-generator first/fake_score.safetensors is no generator"),
                        (init.replace("fake_score.", "generator."), "generator.safetensors is a generator")):
        process = inside(second.format(words).replace("--out second", "--out third"), tmp_path)
        assert process.returncode == 2 and says in process.stderr and not (tmp_path / "third").exists()


def test_the_pair_that_ships_is_a_distilled_generator_and_its_score():
    """Ten images of each class in one call are read as what was asked for, as the teacher's in one call are not; and on
    them the fake score's (S2) is below the teacher's. Both begin the second stage as they are."""
    preset = parse(Config, "", ddpm_sfd.PRESETS, [])
    teacher = load_unet(preset.teacher)
    generator, fake_score = read_pair(preset, teacher)
    c, right, images = balanced_labels(10, 10), {}, {}
    for network in (teacher, generator):
        images[network], _ = generate(lambda z, c, noise: one_step(network, z, c, SCHEDULE, preset.t_init), c,
                                      teacher.image_shape, 0, "cpu")
        right[network] = 1 - Judge(teacher).live_ua(images[network], c)
    assert right[generator] > 0.95 > right[teacher] + 0.1

    torch.manual_seed(0)
    x_g = images[generator].clamp(-1, 1)
    t, noise = torch.randint(preset.t_min, preset.t_max, (len(c),)), torch.randn_like(x_g)
    with torch.no_grad():
        psi, phi = (fake_score_loss(network, x_g, t, c, noise, SCHEDULE).mean() for network in (fake_score, teacher))
    assert psi < phi


def test_presets_carry_the_official_settings():
    """Those of the official code's CIFAR-10 run, and where its STL-10 run differs."""
    official = {"steps": 50_000, "batch_size": 128, "t_init": 440, "t_min": 38, "t_max": 712, "alpha": 1.2, "ema": 0.9999}
    official |= {"lambda_generator": 0.01, "lambda_fake_score": 0.01, "lr_generator": 1e-5, "lr_fake_score": 1e-5}
    official |= {"class_rate": 1.0, "forget_batch_size": 128, "clip_value": 1.0, "guidance": 1.0, "guidance_safe": 1.0}
    official |= {"lr_end": 1.0, "lambda_end": 1.0, "clip_images": "off", "classifier": "none", "init_generator": "none", "init_fake_score": "none"}
    cifar10 = vars(parse(Config, "", ddpm_sfd.PRESETS, ["--preset", "cifar10"]))
    assert official.items() <= cifar10.items()
    stl10 = vars(parse(Config, "", ddpm_sfd.PRESETS, ["--preset", "stl10"]))
    assert (official | {"batch_size": 64, "forget_batch_size": 64, "lr_fake_score": 3e-5}).items() <= stl10.items()


WATCHED = """
import runpy
import sys
log = open({log!r}, "a")
sys.addaudithook(lambda event, args: event == "open" and isinstance(args[0], str) and log.write(args[0] + chr(10)) and None)
sys.path.insert(0, {root!r})
import unet
whole = unet.ddim_sample
unet.ddim_sample = lambda *args, steps: whole(*args, steps=4)  # the picture of before takes 50, half the time of this test
runpy.run_path({root!r} + "/ddpm_sfd.py", run_name="__main__")
"""


def test_the_main_job_forgets_and_opens_no_data(tmp_path):
    """A short run of the README's command, with an audit hook that writes down every file that Python opens."""
    write_mnist(tmp_path / "data", np.zeros((10, 28, 28), np.uint8), np.arange(10, dtype=np.uint8))  # it lies there
    script = tmp_path / "watched.py"
    script.write_text(WATCHED.format(log=str(tmp_path / "opened"), root=str(ROOT)))
    command = f"{script} --forget 3 --override 5 --steps 12 --batch-size 8 --forget-batch-size 8 --lambda-generator 4 --lr-generator 1.5e-3 --class-rate 8 --lr-end 0.3 --ema 0.7 --eval-images 20 --out out"
    process = python(command, tmp_path)
    assert process.returncode == 0, process.stderr
    out = tmp_path / "out"
    assert {p.name for p in out.iterdir()} == {
        "config.json",
        "metrics.json",
        "samples_before.png",
        "samples_after.png",
        "curves.png",
        "checkpoint.pt",
        "generator.safetensors",
        "fake_score.safetensors",
    }
    metrics = json.loads((out / "metrics.json").read_text())
    assert {
        "ua",
        "retained_accuracy",
        "fid",
        "teacher_fid",
        "nfe",
        "seconds",
        "command",
        "seed",
        "machine",
        "commit",
    } <= set(metrics)
    assert metrics["ua"] > 0.6 and metrics["ua_images"] == 20  # the teacher's UA is about 0.02
    assert np.argmax(metrics["became"]["3"]) == 5 and metrics["nfe"] == 1
    assert metrics["retained_accuracy"] > 0.7
    assert "UA (forgotten class gone)" in process.stdout
    generator = load_unet(out / "generator.safetensors")
    assert generator.card["t_init"] == 440 and generator.card["forget"] == [3]
    opened = (tmp_path / "opened").read_text().splitlines()
    assert any(name.endswith("weights/mnist.safetensors") for name in opened)  # the hook sees what is read
    assert not [name for name in opened if "idx3" in name or "MNIST" in name or "torchvision/datasets" in name]

    # the same checkpoint, judged by the command, gives the same numbers
    judged = inside("eval.py out/generator.safetensors --per-class 20 --out again.json", tmp_path)
    assert judged.returncode == 0, judged.stderr
    again = json.loads((tmp_path / "again.json").read_text())
    assert again["ua"] == metrics["ua"] and again["fid"] == pytest.approx(metrics["fid"], rel=1e-4)  # another layout
    assert again["command"] == "python eval.py out/generator.safetensors --per-class 20 --out again.json"


def test_plain_distillation_runs_without_a_forgotten_class(tmp_path, tiny_file, few_calls):
    process = inside(
        f"ddpm_sfd.py --preset mnist-one-stage --forget none --teacher {tiny_file} --classifier none --steps 2 --batch-size 4", tmp_path
    )
    assert process.returncode == 0, process.stderr
    metrics = json.loads((tmp_path / "runs/ddpm_sfd-mnist-one-stage-forgetnone/metrics.json").read_text())
    assert "ua" not in metrics and metrics["forget"] == []
    assert load_unet(tmp_path / "runs/ddpm_sfd-mnist-one-stage-forgetnone/generator.safetensors").card["forget"] == []


BAD = [
    (["--forget", "10"], "the classes are 0..9"),
    (["--forget", "-1"], "the classes are 0..9"),
    (["--forget", "zero"], "the classes are 0..9"),
    (["--forget", "0", "--override", "0"], "no retained class"),
    (["--forget", "0", "--override", "12"], "the classes are 0..9"),
    (["--forget", "0", "--override", "1,2"], "no retained class"),
    (["--forget", "none", "--override", "3"], "leave it out"),
    (["--forget", *map(str, range(10))], "every class"),
    (["--teacher", "nobody"], "shipped name"),
    (["--teacher", "mnist-classifier"], "no minUnlearn U-Net"),
    (["--teacher", "damaged.safetensors"], "no sound safetensors"),
    (["--teacher", "unconditional.safetensors"], "class-conditional teacher"),
    (["--teacher", "rgb.safetensors", "--preset", "mnist-one-stage"], "--classifier none"),
    (["--teacher", "rgb.safetensors"], "--preset mnist-one-stage begins with the teacher itself"),
    (["--teacher", "another/mnist.safetensors"], "was distilled from mnist as it was then, another teacher; --preset"),
    (["--teacher", "mnist-distilled"], "is a one-step generator, no teacher"),
    (["--steps", "-3"], "at least 0"),
    (["--batch-size", "0"], "at least 1"),
    (["--batch-size", "many"], "invalid whole number"),
    (["--lr-generator", "nan"], "finite"),
    (["--t-min", "700", "--t-max", "600"], "below --t-max"),
    (["--device", "tpu"], "invalid choice"),
    (["--amp", "fp16"], "needs a CUDA GPU"),
    (["--device", "cuda"], "no CUDA GPU"),
    (["--no-such-flag", "1"], "unrecognized arguments"),
    (["--preset", "imagenet"], "invalid choice"),
    (["--resume"], "no checkpoint.pt"),
    (["--out", "foreign"], "files that are not a run's"),
    (["--out", "copies"], "files that are not a run's (generator.safetensors)"),
    (["--out", "x" * 300], "--out: "),
    (["--teacher", "foreign"], "foreign: a folder must hold"),
    (["--teacher", "file.txt"], "file.txt: neither safetensors nor"),
    (["--out", "file.txt"], "is a file"),
]


@pytest.mark.parametrize("words, message", BAD, ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_bad_input_gets_one_line_and_status_2(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(ROOT / "ddpm_sfd.py"), *words])
    (tmp_path / "damaged.safetensors").write_bytes((ROOT / "weights/mnist.safetensors").read_bytes()[:5000])
    save_unet(random_unet(num_classes=None), tmp_path / "unconditional.safetensors")
    save_unet(random_unet(in_channels=3), tmp_path / "rgb.safetensors")
    (tmp_path / "another").mkdir()
    save_unet(load_unet("mnist"), tmp_path / "another/mnist.safetensors")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("dear diary")
    (tmp_path / "copies").mkdir()
    for name in ("generator.safetensors", "metrics.json"):  # a run's names, but no run
        (tmp_path / "copies" / name).write_text("mine")
    (tmp_path / "file.txt").write_text("x")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(SystemExit) as exit:
        ddpm_sfd.main(ddpm_sfd.parse(Config, ddpm_sfd.__doc__, ddpm_sfd.PRESETS))
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert error.count("\n") == 1 and error.startswith("ddpm_sfd.py: error: ") and message in error
    assert {
        p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()
    } == before  # nothing written, nothing overwritten
