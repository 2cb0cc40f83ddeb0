"""SFD on Stable Diffusion: its formulas against those of ddpm_sfd.py and against numpy, its prompts, its loop."""

import copy
import json
import sys
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, column, inside, python, random_unet, tensors
from conftest import SMALL_TEXT as SMALL

import ddpm_sfd
import sd_sfd
from concepts import contains
from run import Run, parse
from samples import generate, guided_sampler
from sd_sfd import Config, fake_score_loss, generator_loss, one_step, read_concept, total, train
from stable_diffusion import load_stable_diffusion, save_stable_diffusion
from unet import UNet, VPSchedule, load_unet

SCHEDULE = VPSchedule.scaled_linear()
ABAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)

@pytest.fixture
def unet():
    return random_unet(**SMALL)


class Affine(torch.nn.Module):
    """A stand-in network that numpy can repeat: eps = p x + q mean(c) + r t / 1000."""

    def __init__(self, p, q, r):
        super().__init__()
        self.p, self.q, self.r = p, q, r

    def forward(self, x, t, c):
        return self.p * x + (self.q * c.mean((1, 2)) + self.r * t / 1000)[:, None, None, None]

    def guided(self, x, t, c, nothing, k):  # numpy
        def eps(c):
            return self.p * x + (self.q * c.mean((1, 2)) + self.r * t / 1000)[:, None, None, None]
        return eps(nothing) + k * (eps(c) - eps(nothing))


def case(seed=0, B=4):
    g = np.random.default_rng(seed)
    x, noise = g.normal(size=(2, B, 2, 3, 3))
    return x, noise, g.integers(20, 980, B), *g.normal(size=(3, B, 5, 6)), g.normal(size=(1, 5, 6))


def test_fake_score_loss_is_the_formula_of_the_guided_prediction():  # (S2), (L1)
    x, noise, t, c, _, _, nothing = case()
    network = Affine(0.3, 0.5, -0.2)
    x_t = column(np.sqrt(ABAR[t])) * x + column(np.sqrt(1 - ABAR[t])) * noise
    for k in (1.0, 4.5):
        expected = ((noise - network.guided(x_t, t, c, nothing, k)) ** 2).sum((1, 2, 3))
        ours = fake_score_loss(network, *tensors(x, t, c, nothing, noise), SCHEDULE, k)
        assert ours.shape == (4,)
        np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-4)


def test_generator_loss_and_its_gradient_are_the_formula():  # (S3), (S4), (L1) with another scale for each network
    x, noise, t, c, c_safe, negative, nothing = case()
    phi, psi, alpha, k4, k2 = Affine(0.3, 0.5, -0.2), Affine(0.25, 0.2, 0.1), 0.7, 4.5, 2.5
    s, a = column(np.sqrt(1 - ABAR[t])), column(np.sqrt(ABAR[t]))

    def f(x_g, network, c, nothing, k):
        x_t = a * x_g + s * noise
        return (x_t - s * network.guided(x_t, t, c, nothing, k)) / a

    w = 1 / np.abs(f(x, phi, c_safe, negative, k4) - x).mean((1, 2, 3))

    def L(x_g):
        f_phi, f_psi = f(x_g, phi, c_safe, negative, k4), f(x_g, psi, c, nothing, k2)
        return w * ((f_phi - f_psi) * (f_phi - x_g - alpha * (f_phi - f_psi))).sum((1, 2, 3))

    x_g, noise_t, t_t, *texts = tensors(x, noise, t, c, c_safe, negative, nothing)
    x_g.requires_grad_()
    c_t, safe_t, negative_t, nothing_t = texts
    ours = generator_loss(phi, psi, x_g, t_t, safe_t, c_t, negative_t, nothing_t, noise_t, SCHEDULE, alpha, k4, k2)
    np.testing.assert_allclose(ours.detach().numpy(), L(x), rtol=1e-3)
    ours.sum().backward()
    for index in [(0, 0, 0, 0), (1, 1, 2, 0), (3, 0, 1, 2)]:
        step = np.zeros_like(x)
        step[index] = 1e-5
        slope = (L(x + step).sum() - L(x - step).sum()) / 2e-5
        assert x_g.grad[index].item() == pytest.approx(slope, rel=1e-3)


def test_the_formulas_are_those_of_ddpm_sfd_but_for_the_guidance(unet):
    z, noise, c, safe, nothing = (torch.randn(3, *shape) for shape in [(4, 4, 4)] * 2 + [(6, 12)] * 3)
    t = torch.tensor([30, 500, 900])
    torch.testing.assert_close(one_step(unet, z, c, SCHEDULE, 625), ddpm_sfd.one_step(unet, z, c, SCHEDULE, 625))
    psi = random_unet(seed=1, **SMALL)
    torch.testing.assert_close(fake_score_loss(psi, z, t, c, nothing, noise, SCHEDULE, 1.0),
                               ddpm_sfd.fake_score_loss(psi, z, t, c, noise, SCHEDULE))
    torch.testing.assert_close(
        generator_loss(unet, psi, z, t, safe, c, nothing, nothing[:1], noise, SCHEDULE, 1.2, 1.0, 1.0),
        ddpm_sfd.generator_loss(unet, psi, z, t, safe, c, noise, SCHEDULE, 1.2))
    loss = torch.tensor([1.0, 3.0, 10.0, 20.0, 30.0])
    assert total(loss, 2, 0.5) == ddpm_sfd.total(loss, 2, 0.5) == 12


# ---------------------------------------------------------------------------- prompts


def test_neighbours_are_retained():
    retained, forget, safe, negative = read_concept(Config(forget="red,three"))  # as nargs gives it
    assert len(forget) == 12 and len(retained) == 708 and negative == ""
    assert "a red five" in retained and "a blue three" in retained and "the number three in red" in forget
    assert safe[forget.index("the number three in red")] == "the number four in red"
    retained, forget, safe, _ = read_concept(Config(forget="red", override="blue"))
    assert not any(contains(p, "red") for p in retained + safe) and all(contains(p, "blue") for p in safe)
    assert len(retained) == 600


def test_the_tiny_model_forgets_its_own_prompts_whatever_is_retained(tmp_path):
    (tmp_path / "keep.txt").write_text("my red three\nmy blue five\n")
    retained, forget, safe, _ = read_concept(Config(forget="three", override="eight", retain_prompts=str(tmp_path / "keep.txt")))
    assert retained == ["my blue five"]
    assert (forget, safe) == read_concept(Config(forget="three", override="eight"))[1:3]


def test_the_negative_prompt_takes_the_place_of_the_safe_one():
    _, forget, safe, negative = read_concept(Config(forget="three", mode="negative"))
    assert negative == "three" and len(safe) == len(forget) and not any(contains(p, "three") for p in safe)
    assert safe[forget.index("a photo of a red three")] == "a photo of a red"
    assert safe[forget.index("three, written in red")] == "written in red"


def test_an_accent_is_the_same_however_it_is_written(tmp_path):
    """In one code point, or in two, as files of a Mac often have it; CLIP's tokenizer makes no difference either."""
    (tmp_path / "keep.txt").write_text("a tree\na photo of Beyonce\u0301\n", encoding="utf-8")
    for spelling in ("Beyonc\u00e9", "Beyonce\u0301"):
        retained, forget, safe, _ = read_concept(Config(
            forget=spelling, override="a singer", sd="folder", retain_prompts=str(tmp_path / "keep.txt")))
        assert (retained, len(forget), safe) == (["a tree"], 1, ["a photo of a singer"])
        (tmp_path / "forget.txt").write_text("a song of {}\n")
        words = dict(forget=spelling, sd="folder", retain_prompts=str(tmp_path / "keep.txt"), forget_prompts=str(tmp_path / "forget.txt"))
        assert read_concept(Config(**words, override="Adele"))[2] == ["a song of Adele"]
        assert read_concept(Config(**words, mode="negative"))[2] == ["a song of"]


def test_a_concept_behind_the_last_token_that_is_read_is_refused(tmp_path, capsys):
    (tmp_path / "long.txt").write_text("a very very long and careful photograph of a digit, namely three\n")
    with pytest.raises(SystemExit) as leaving:
        sd_sfd.main(Config(forget="three", forget_prompts=str(tmp_path / "long.txt"), out=str(tmp_path / "run")))
    assert leaving.value.code == 2 and "only the first 14 tokens" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_tiny_models_settings_are_not_for_a_model_of_real_size(monkeypatch, sd_folder, tmp_path, capsys):
    unet = types.SimpleNamespace(image_shape=(4, 64, 64))
    monkeypatch.setattr(sd_sfd, "load_stable_diffusion", lambda folder: types.SimpleNamespace(unet=unet))
    with pytest.raises(SystemExit) as leaving:
        sd_sfd.main(Config(sd="sd15", retain_prompts=str(sd_folder.parent / "prompts.txt"), override="eight",
                           out=str(tmp_path / "run")))
    assert leaving.value.code == 2 and "--sd sd15 goes with --preset sd15" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_subjects_are_joined_with_each_forbidden_word(tmp_path):
    (tmp_path / "keep.txt").write_text("a tree\na nude tree\n")
    (tmp_path / "people.txt").write_text("a woman\na {} man\na naked tree\n")
    retained, forget, safe, negative = read_concept(Config(
        forget="nude,naked", mode="negative", sd="folder", retain_prompts=str(tmp_path / "keep.txt"),
        forget_prompts=str(tmp_path / "people.txt")))
    assert retained == ["a tree"] and negative == "nude, naked"
    assert forget == ["a woman, nude", "a woman, naked", "a nude man", "a naked man", "a naked tree"]
    assert safe == ["a woman", "a woman", "a man", "a man", "a tree"]


def test_prompts_from_files(tmp_path):
    (tmp_path / "keep.txt").write_text("a tree\na photo of Brad Pitt in a boat\n")
    (tmp_path / "forget.txt").write_text("a photo of {}\n{}, smiling\n")
    words = dict(sd=str(tmp_path), retain_prompts=str(tmp_path / "keep.txt"), forget_prompts=str(tmp_path / "forget.txt"))
    retained, forget, safe, _ = read_concept(Config(forget="Brad,Pitt", override="a middle aged man", **words))
    assert retained == ["a tree"] and forget == ["a photo of Brad Pitt", "Brad Pitt, smiling"]
    assert safe == ["a photo of a middle aged man", "a middle aged man, smiling"]


@pytest.mark.parametrize("words, message", [
    ("--forget eleven", "the tiny model draws a digit (three)"),
    ("--sd folder --forget eleven --retain-prompts {prompts}", "stands in none of the prompts"),
    ("--forget three --override three", "contains what is to be forgotten"),
    ("--forget red three --override eight", "as many words"),
    ("--forget three --override eigth", "--override 'eigth': the tiny model draws"),
    ("--forget three --override blue", "of another kind than 'three'"),
    ("--sd folder --forget three --retain-prompts {prompts}", "name what is safe in place of 'three'"),
    ("--forget three --override eight --mode negative", "--mode negative has none"),
    ("--forget none --override eight", "--forget none has none"),
    ("--forget none --mode negative", "--mode negative changes nothing"),
    ("--forget none --forget-prompts {prompts}", "--forget-prompts changes nothing"),
    ("--forget three --forget-prompts {prompts}", "is without 'three'"),
    ("--forget three --mode negative --k-teacher 1", "--k-teacher 1 must be above 1"),
    ("--sd nowhere", "--retain-prompts"),
    ("--sd nowhere --retain-prompts {prompts} --override eight", "no folder 'nowhere'"),
    ("--forget-prompts missing.txt", "missing.txt"),
    ("--t-min 500 --t-max 400", "--t-min 500 must be below"),
    ("--k-train -1", "at least 0"),
    ("--mode gentle", "invalid choice"),
    ("--weights bf16", "--weights bf16 needs --amp bf16"),
    ("--batch-size 24 --accumulate 16", "--batch-size 24 must be a multiple of 16"),
    ("--mode negative --sd folder --forget red green blue yellow pink white --retain-prompts {prompts}", "leave some"),
    ("--init-generator mnist --init-fake-score mnist", "no network of the teacher's configuration"),
])
def test_bad_input_gets_one_line_and_status_2(words, message, sd_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = words.format(prompts=sd_folder.parent / "prompts.txt")
    if "--sd" not in words and "--init" in words:
        words += f" --sd {sd_folder} --retain-prompts {sd_folder.parent / 'prompts.txt'} --override eight"
    monkeypatch.setattr(sys, "argv", ["sd_sfd.py", *words.split()])
    with pytest.raises(SystemExit) as leaving:
        sd_sfd.main(parse(Config, "", sd_sfd.PRESETS))
    said = capsys.readouterr().err
    assert leaving.value.code == 2 and message in said and len(said.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_the_preset_carries_the_official_settings():
    official = {"k_train": 4.5, "k_fake": 4.5, "k_teacher": 4.5, "prompt_dropout": 0.1, "alpha": 1.0, "t_init": 625,
                "t_min": 20, "t_max": 980, "batch_size": 8, "lr_fake_score": 3e-6, "lr_generator": 1e-6, "lr_end": 1.0,
                "ema": 0.0, "lambda_generator": 1.0, "lambda_fake_score": 1.0, "amp": "fp16", "adam_eps": 1e-6,
                "max_weight": 0.0}
    sd15 = vars(parse(Config, "", sd_sfd.PRESETS, ["--preset", "sd15"]))
    assert official.items() <= sd15.items() and sd15["steps"] * sd15["batch_size"] == 1000


# ---------------------------------------------------------------------------- the loop


def go(tmp_path, unet, **words):
    config = Config(**dict(batch_size=4, forget_batch_size=2, steps=2, amp="off", out=str(tmp_path / "run"), device="cpu")
                    | words)
    run = Run(config, "")
    g = torch.Generator().manual_seed(1)
    prompts = [torch.randn(n, 6, 12, generator=g) for n in (5, 3, 3, 1, 1)]
    return train(config, run, unet, SCHEDULE, prompts), run


def test_a_run_trains_what_it_must_and_nothing_else(tmp_path, unet):
    before = copy.deepcopy(unet.state_dict())
    (generator, fake_score), run = go(tmp_path, unet)
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())  # the teacher stays
    for network in (generator, fake_score):
        assert all(not torch.equal(v, before[k]) for k, v in network.state_dict().items() if v.ndim > 1)
    assert set(run.curves) == {"loss_psi", "loss_theta"}


@pytest.mark.parametrize("max_weight, expected", [(0.0, 2.0), (12.0, 2.0), (1.0, 3 / 5)])
def test_a_few_forgotten_prompts_weigh_no_more_than_they_may(tmp_path, unet, monkeypatch, max_weight, expected):
    """Of three against five retained ones: at lambda 2 each weighs 10 / 3 times as much as one of those."""
    lambdas = []
    monkeypatch.setattr(sd_sfd, "total", lambda *args: lambdas.append(args[2]) or total(*args))
    go(tmp_path, unet, steps=1, lambda_generator=2.0, lambda_fake_score=1.0, max_weight=max_weight)
    assert lambdas == pytest.approx([1.0, expected])  # psi's is as it was said


def test_zero_steps_change_no_bit(tmp_path, unet):
    (generator, fake_score), _ = go(tmp_path, unet, steps=0)
    for network in (generator, fake_score):
        assert all(torch.equal(v, unet.state_dict()[k]) for k, v in network.state_dict().items())


def test_without_an_average_the_result_is_theta_itself(tmp_path, unet):
    (averaged, _), run = go(tmp_path / "a", unet)
    (itself, _), _ = go(tmp_path / "b", unet, ema=0.0)
    theta = run.state["generator"].state_dict()
    assert all(torch.equal(v, theta[k]) for k, v in itself.state_dict().items())
    assert any(not torch.equal(v, theta[k]) for k, v in averaged.state_dict().items())


def test_checkpointing_and_parts_of_a_batch_change_cost_not_the_method(tmp_path, unet):
    """With checkpointing the same numbers; in two parts, other draws, but as many pictures a step."""
    (plain, _), run = go(tmp_path / "a", unet)
    (again, _), checkpointed = go(tmp_path / "b", unet, gradient_checkpointing=True)
    assert all(checkpointed.state[name].gradient_checkpointing for name in ("generator", "fake_score"))
    assert not run.state["generator"].gradient_checkpointing
    for k, v in plain.state_dict().items():
        torch.testing.assert_close(again.state_dict()[k], v, rtol=1e-3, atol=1e-5)
    seen = []
    unet.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    go(tmp_path / "c", unet, accumulate=2, steps=1)
    assert seen == [3, 6] * 2 + [3, 6, 6] * 2  # guidance doubles 2 + 1 pictures for the teacher and the fake score


def test_the_teacher_alone_is_told_the_safe_prompt_and_the_negative_one(tmp_path, unet, monkeypatch):
    told = []

    def spy(teacher, fake_score, x_g, t, c_teacher, c_fake, nothing_teacher, nothing, *rest):
        told.append((c_teacher, c_fake, nothing_teacher, nothing))
        return generator_loss(teacher, fake_score, x_g, t, c_teacher, c_fake, nothing_teacher, nothing, *rest)

    monkeypatch.setattr(sd_sfd, "generator_loss", spy)
    go(tmp_path, unet, steps=1)
    [(c_teacher, c_fake, nothing_teacher, nothing)] = told
    g = torch.Generator().manual_seed(1)
    retained, forget, safe, negative, empty = (torch.randn(n, 6, 12, generator=g) for n in (5, 3, 3, 1, 1))
    assert torch.equal(c_teacher[:4], c_fake[:4]) and all(any(torch.equal(c, r) for r in retained) for c in c_fake[:4])
    for asked, safely in zip(c_fake[4:], c_teacher[4:]):
        [i] = [i for i in range(3) if torch.equal(asked, forget[i])]
        assert torch.equal(safely, safe[i])
    assert torch.equal(nothing, empty) and torch.equal(nothing_teacher[:4], empty.repeat(4, 1, 1))
    assert torch.equal(nothing_teacher[4:], negative.repeat(2, 1, 1))


def test_a_tenth_of_the_prompts_is_dropped_in_the_fake_scores_training_alone(tmp_path, unet, monkeypatch):
    dropped, kept = [], []

    def spy(fake_score, x_g, t, c, nothing, *rest):
        dropped.append((c == nothing).all(dim=(1, 2)).float().mean().item())
        return x_g.sum((1, 2, 3)) * 0 + fake_score(x_g, t, c).sum()

    def spy_on_the_other(teacher, psi, x_g, t, c_teacher, c, nothing_teacher, nothing, *rest):
        kept.append(not (c == nothing).all(dim=(1, 2)).any() and psi.training is False)
        return x_g.sum((1, 2, 3))

    monkeypatch.setattr(sd_sfd, "fake_score_loss", spy)
    monkeypatch.setattr(sd_sfd, "generator_loss", spy_on_the_other)
    go(tmp_path, unet, batch_size=1500, forget_batch_size=500, steps=1, prompt_dropout=0.1)
    assert 0.07 < dropped[0] < 0.13
    go(tmp_path / "none", unet, batch_size=100, steps=1, prompt_dropout=0.0)
    assert dropped[1] == 0 and kept == [True, True]


def test_weight_is_clamped_where_the_teacher_agrees_with_the_latent():  # (S4)
    x, noise, t, c, _, _, nothing = tensors(*case())
    psi, x_t = Affine(0.25, 0.2, 0.1), SCHEDULE.add_noise(x, noise, t)
    apart = x - SCHEDULE.predict_x0(x_t, psi(x_t, t, c), t)
    loss = generator_loss(lambda x_t, t, c: noise, psi, x, t, c, c, nothing, nothing, noise, SCHEDULE, 1.0, 1.0, 1.0)
    torch.testing.assert_close(loss, -1e5 * apart.square().sum(dim=(1, 2, 3)), rtol=1e-3, atol=0)


def test_each_network_is_in_training_mode_in_its_own_update_alone(tmp_path, unet, monkeypatch):
    seen = []

    def watch(name, networks):
        original = getattr(sd_sfd, name)
        monkeypatch.setattr(sd_sfd, name, lambda *args: seen.append((name, *(n.training for n in args[:networks]))) or original(*args))

    for name, networks in (("one_step", 1), ("fake_score_loss", 1), ("generator_loss", 2)):
        watch(name, networks)
    go(tmp_path, unet.train(), steps=1)
    assert seen == [("one_step", False), ("fake_score_loss", True), ("one_step", True), ("generator_loss", False, False)]


def words_for(sd_folder, out, more=""):
    return (f"sd_sfd.py --sd {sd_folder} --retain-prompts {sd_folder.parent / 'prompts.txt'} --forget three --override eight "
            f"--batch-size 4 --forget-batch-size 2 --steps 4 --eval-images 0 --device cpu --out {out} {more}")


def test_a_run_from_a_folder_leaves_its_pictures(sd_folder, tmp_path, few_calls):
    done = inside(words_for(sd_folder, "whole", "--save-every 2"), tmp_path)
    assert done.returncode == 0, done.stderr
    whole = tmp_path / "whole"
    assert {p.name for p in whole.iterdir()} == {"config.json", "metrics.json", "samples_before.png", "samples_after.png",
                                                 "curves.png", "generator.safetensors", "fake_score.safetensors",
                                                 "checkpoint.pt"}
    assert json.loads((whole / "metrics.json").read_text())["forget"] == "three"
    generator = load_unet(whole / "generator.safetensors")
    assert generator.card["t_init"] == 625 and generator.text_dim == 12


def test_resuming_ends_in_the_same_bits(sd_folder, tmp_path, monkeypatch, few_calls):
    monkeypatch.chdir(tmp_path)
    save = Run.save

    def save_and_die(run, path):
        save(run, path)
        if run.step == 2:
            raise KeyboardInterrupt

    def main(out, more=""):
        monkeypatch.setattr(sys, "argv", words_for(sd_folder, out, f"--save-every 2 {more}").split())
        sd_sfd.main(parse(Config, "", sd_sfd.PRESETS))
        return load_unet(tmp_path / out / "generator.safetensors").state_dict()

    whole = main("whole")
    monkeypatch.setattr(Run, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        main("part")
    assert not (tmp_path / "part" / "metrics.json").exists()
    again = main("part", "--resume")
    assert all(torch.equal(again[k], v) for k, v in whole.items())


IN_PARALLEL = """
import sys
import torch
sys.path.insert(0, {root!r})
import sd_sfd

drawn, one_step, train = [], sd_sfd.one_step, sd_sfd.train


def spy(generator, z, *rest):
    drawn.append(z.detach())
    return one_step(generator, z, *rest)


def keep(config, run, *rest):
    networks = train(config, run, *rest)
    weights = [run.state[name].state_dict() for name in ("fake_score", "generator")]
    torch.save((weights, drawn[0]), f"rank{{run.rank}}.pt")
    return networks


sd_sfd.one_step, sd_sfd.train = spy, keep
sd_sfd.main(sd_sfd.parse(sd_sfd.Config, "", sd_sfd.PRESETS))
"""


@pytest.mark.slow
def test_two_processes_train_one_network(sd_folder, tmp_path):
    """From draws of their own both processes come to the same bits, since they share their gradients."""
    (tmp_path / "script.py").write_text(IN_PARALLEL.format(root=str(ROOT)))
    words = words_for(sd_folder, "ddp").replace("sd_sfd.py", str(tmp_path / "script.py"))
    done = python(words, tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "ddp" / "metrics.json").read_text())["processes"] == 2
    (first, z), (second, other) = (torch.load(tmp_path / f"rank{i}.pt", weights_only=True) for i in (0, 1))
    assert not torch.equal(z, other) and len(first) == 2
    for a, b in zip(first, second):  # the fake score's weights, and the generator's
        assert a and all(torch.equal(a[k], b[k]) for k in a)


def test_bf16_weights_stay_bf16_numbers(sd_folder, tmp_path, few_calls):
    words = words_for(sd_folder, "bf16", "--weights bf16 --amp bf16").replace("--override eight", "--mode negative")
    done = inside(words, tmp_path)
    assert done.returncode == 0, done.stderr
    for name, tensor in load_unet(tmp_path / "bf16" / "generator.safetensors").state_dict().items():
        assert torch.equal(tensor, tensor.bfloat16().float()), name


@pytest.mark.slow
def test_a_step_at_stable_diffusions_size_fits_into_24_gib(tmp_path, request):
    """Both networks, both terms, at the real shapes with random weights: three U-Nets of 860 million parameters."""
    if request.config.getoption("markexpr") != "slow":
        pytest.skip("16 GiB of memory and minutes: run it with -m slow")
    resource = pytest.importorskip("resource")
    with torch.device("meta"):
        unet = UNet(image_size=64, in_channels=4, channels=320, multipliers=(1, 2, 4, 4), blocks=2,
                           attention_at=(64, 32, 16), text_dim=768, heads=8, dropout=0.0)
    unet = unet.to(torch.bfloat16).to_empty(device="cpu")
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964  # Stable Diffusion 1.5's
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.02)
    unet.image_shape = (4, 8, 8)  # small latents: the weights are what takes the memory
    config = Config(steps=1, batch_size=1, forget_batch_size=1, amp="bf16", weights="bf16", ema=0.0, k_train=4.5,
                    gradient_checkpointing=True, out=str(tmp_path / "run"), device="cpu")
    run = Run(config, "")
    run.save = lambda path: None  # 14 GiB of checkpoint are not what is tested here
    prompts = [torch.randn(1, 77, 768) for _ in range(5)]
    train(config, run, unet, SCHEDULE, prompts)
    assert all(np.isfinite(run.curves[name]).all() for name in ("loss_psi", "loss_theta"))
    unit = 1 if sys.platform == "darwin" else 1024
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit < 24 * 2**30


def test_what_each_update_is_given(tmp_path, unet, monkeypatch):
    psi, theta = [], []
    monkeypatch.setattr(sd_sfd, "fake_score_loss", lambda *args: psi.append(args) or fake_score_loss(*args))
    monkeypatch.setattr(sd_sfd, "generator_loss", lambda *args: theta.append(args) or generator_loss(*args))
    go(tmp_path, unet, steps=1, batch_size=40, forget_batch_size=20, t_min=300, t_max=303, alpha=1.3,
       k_train=1.25, k_fake=2.0, k_teacher=3.0)
    [(_, x_psi, t_psi, _, _, _, _, k1)], [(_, _, x_g, t, *_, alpha, k4, k2)] = psi, theta
    assert x_g.requires_grad and not x_psi.requires_grad
    assert set(t.tolist()) == set(t_psi.tolist()) == {300, 301, 302}
    assert (k1, k2, k4, alpha) == (1.25, 2.0, 3.0, 1.3)


def test_rates_clipping_and_the_weight_average(tmp_path, unet, monkeypatch):
    thetas, clips, log, descend = [], [], Run.log, Run.descend

    def spy_on_log(run, **numbers):
        thetas.append(copy.deepcopy(run.state["generator"].state_dict()))
        log(run, **numbers)

    monkeypatch.setattr(Run, "log", spy_on_log)
    monkeypatch.setattr(Run, "descend", lambda run, name, *rest: clips.append((name, rest[-1])) or descend(run, name, *rest))
    words = dict(lr_generator=1e-3, lr_fake_score=4e-3, lr_end=0.5, adam_eps=1e-6, clip_value=0.7, ema=0.75)
    (average, _), run = go(tmp_path, unet, **words)
    assert clips == [("loss_psi", 0.7), ("loss_theta", 0.7)] * 2
    for name, lr in (("psi", 4e-3), ("theta", 1e-3)):
        [group] = run.state[f"optimizer_{name}"].param_groups
        assert (group["initial_lr"], group["lr"], group["eps"]) == pytest.approx((lr, lr / 2, 1e-6))
        assert group["betas"] == (0.0, 0.999)
    for k, v in average.state_dict().items():
        torch.testing.assert_close(v, 0.75 * thetas[0][k] + 0.25 * thetas[1][k], rtol=0, atol=1e-6)


def test_processes_and_parts_share_a_step(tmp_path, unet, monkeypatch):
    """Two processes of which this is one, two parts each: sizes of batches, and losses that add up to a mean."""
    calls, make = [], Run.__init__

    class Parallel(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x, t, c):
            calls.append((self.network, len(x)))
            return self.network(x, t, c)

    monkeypatch.setattr(Run, "__init__", lambda run, *rest: make(run, *rest) or setattr(run, "world", 2))
    monkeypatch.setattr(Run, "parallel", lambda run, network: Parallel(network))
    monkeypatch.setattr(Run, "any_process", lambda run, flag: bool(flag))
    monkeypatch.setattr(Run, "save", lambda run, path: None)
    monkeypatch.setattr(sd_sfd, "total", lambda loss, *rest: 0 * total(loss, *rest) + 3)
    _, run = go(tmp_path, unet, steps=1, batch_size=8, forget_batch_size=4, accumulate=2)
    assert run.curves == {"loss_psi": [3.0], "loss_theta": [3.0]}
    assert calls == [(run.state["fake_score"], 6)] * 2 + [(run.state["generator"], 3)] * 2  # guidance doubles psi's


@torch.no_grad()
def test_the_command_hands_every_prompt_to_its_place(sd_folder, tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(sd_sfd, "train", torch.enable_grad()(lambda *args: given.append(args[4]) or train(*args)))
    words = words_for(sd_folder, "out", "--steps 0").replace("--override eight", "--mode negative")
    assert inside(words, tmp_path).returncode == 0
    sd, file = load_stable_diffusion(sd_folder), str(sd_folder.parent / "prompts.txt")
    concept = read_concept(Config(sd=str(sd_folder), retain_prompts=file, forget="three", mode="negative"))
    retained, forget, safe, negative = concept
    for ours, texts in zip(given[0], (retained, forget, safe, [negative], [""])):
        torch.testing.assert_close(ours, sd.embed(texts))


def test_the_pictures_are_before_and_after_from_the_same_noise(sd_folder, tmp_path, monkeypatch, few_calls):
    shown, sd = {}, load_stable_diffusion(sd_folder)
    monkeypatch.setattr(sd_sfd, "prompt_grid", lambda pictures, rows, path, *_: shown.update({path.stem: (pictures, rows)}))
    done = inside(words_for(sd_folder, "out", "--seed 3"), tmp_path)
    assert done.returncode == 0, done.stderr
    generator = load_unet(tmp_path / "out/generator.safetensors")
    with torch.no_grad():
        c = sd.embed(shown["samples_before"][1]).repeat_interleave(2, dim=0)
    after = lambda z, c, noise: sd.vae.decode(one_step(generator, z, c, sd.schedule, 625))
    for name, draw in (("samples_before", guided_sampler(sd, sd.unet)), ("samples_after", after)):
        with torch.no_grad():
            expected, _ = generate(draw, c, (4, 4, 4), 3, "cpu", 10)
        assert torch.equal(shown[name][0], expected), name


def test_the_main_job_is_judged_as_eval_judges_its_file(tmp_path, monkeypatch, few_calls):
    """The tiny model, and no data: what metrics.json says, eval.py says of the file that was written."""
    monkeypatch.setattr("data.open_dataset", lambda *_, **__: pytest.fail("SFD reads no data"))
    done = inside("sd_sfd.py --forget three --steps 3 --ema 0 --batch-size 4 --forget-batch-size 4 --eval-images 1 --device cpu --out out", tmp_path)
    assert done.returncode == 0 and "UA (concept gone)" in done.stdout, done.stderr
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert (metrics["forget"], metrics["nfe"], metrics["ua_images"]) == ("three", 1, 6)
    judged = inside("eval.py out/generator.safetensors --per-pair 1 --device cpu --out again.json", tmp_path)
    assert judged.returncode == 0, judged.stderr
    again = json.loads((tmp_path / "again.json").read_text())
    for name in ("ua", "became", "retained_accuracy", "far", "teacher_ua"):
        assert again[name] == metrics[name], name
    assert again["fid"] == pytest.approx(metrics["fid"], rel=1e-4)


def test_the_live_ua_is_of_the_forgotten_pictures_just_drawn(tmp_path, monkeypatch, few_calls):
    def judge(self, pictures):
        assert len(pictures) == 4  # not the three retained ones
        return None, torch.tensor([3, 8, 8, 8]), torch.zeros(4, dtype=torch.long)

    monkeypatch.setattr(sd_sfd.ConceptJudge, "__call__", judge)
    done = inside("sd_sfd.py --forget three --steps 1 --batch-size 3 --forget-batch-size 4 --eval-images 0 --device cpu --out out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert torch.load(tmp_path / "out/checkpoint.pt", weights_only=True)["curves"]["ua"] == [0.75]


def test_two_stages_start_from_the_files_of_plain_distillation(sd_folder, tmp_path, few_calls):
    done = inside(words_for(sd_folder, "first").replace("--forget three --override eight", "--forget none"), tmp_path)
    assert done.returncode == 0, done.stderr
    init = "--steps 0 --init-generator first/generator.safetensors --init-fake-score first/fake_score.safetensors"
    done = inside(words_for(sd_folder, "second", init), tmp_path)
    assert done.returncode == 0, done.stderr
    saved = torch.load(tmp_path / "first/checkpoint.pt", weights_only=True)["state"]
    for name, key in (("generator", "ema"), ("fake_score", "fake_score")):
        weights = {k.removeprefix("module."): v for k, v in saved[key].items()}
        first, second = (load_unet(tmp_path / d / f"{name}.safetensors").state_dict() for d in ("first", "second"))
        assert all(torch.equal(weights[k], v) for k, v in first.items()), name  # each file holds its own network
        assert all(torch.equal(first[k], v) for k, v in second.items()), name
    other = load_stable_diffusion(sd_folder)
    torch.nn.init.ones_(other.unet.conv_in.bias)
    save_stable_diffusion(other, tmp_path / "other")
    words = words_for(sd_folder, "third", init).replace(str(sd_folder), str(tmp_path / "other"), 1)
    done = inside(words, tmp_path)
    assert done.returncode == 2 and "another teacher" in done.stderr and not (tmp_path / "third").exists()
