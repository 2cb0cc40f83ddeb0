"""What makes weights/tiny-sd, on a data set of forty images; and the model that ships."""

import copy
import json
import types

import pytest
import torch
from conftest import ROOT, inside

import pretrain
import tiny_sd
from concepts import PAIRS, ConceptJudge, every_prompt
from eval import load_concept_statistics
from record import checksum
from run import Run
from samples import generate, guided_sampler
from stable_diffusion import load_stable_diffusion
from unet import read_tensors
from vdu import read_posterior


def run_of(tmp_path, name, data, **words):
    settings = dict(what="tiny-sd", data=str(data), steps=2, batch_size=4, amp="off", device="cpu", lr_down=0.4,
                    out=str(tmp_path / name), per_pair=1)
    config = pretrain.Config(**settings | words)
    return config, Run(config, "")


def test_the_commands_make_a_folder_in_the_hubs_layout(tmp_path, data, monkeypatch):
    done = inside(f"pretrain.py tiny-sd-autoencoder --data {data} --steps 3 --batch-size 4 --out a", tmp_path)
    assert done.returncode == 0, done.stderr
    monkeypatch.setattr(tiny_sd, "STEPS", 2)
    config, run = run_of(tmp_path, "b", data, init=str(tmp_path / "a/tiny-sd-autoencoder.safetensors"))
    pretrain.make_tiny_sd(config, run)
    sd = load_stable_diffusion(tmp_path / "b/tiny-sd")
    assert sd.tokenizer(every_prompt()).shape == (720, 16) and sd.unet.image_shape == (4, 8, 8)
    card = json.loads((tmp_path / "b/tiny-sd/card.json").read_text())
    assert card["scores"]["images"] == 60 and card["steps"] == 2
    tensors, facts = read_tensors(tmp_path / "b/tiny-sd/statistics.safetensors", "concept statistics")
    assert tensors["features"].shape == (60, 131) and sorted(tensors["pairs"].tolist()) == list(range(60))
    assert facts["sampler"] == "DDIM, 2 steps, guidance 4.5"


def test_the_scaling_factor_brings_latents_to_unit_variance(tmp_path, data):
    config, run = run_of(tmp_path, "a", data, steps=8)
    vae = tiny_sd.train_autoencoder(config, run)
    latents, pairs = tiny_sd.encode_twice(vae, *tiny_sd.mnist(str(data), train=True), "cpu")
    mean, logvar = latents.chunk(2, dim=1)
    drawn = vae.scaling_factor * (mean + (logvar / 2).exp() * torch.randn_like(mean))
    assert drawn.shape == (80, 4, 8, 8) and drawn.std().item() == pytest.approx(1, abs=0.1)
    digits = torch.tensor(PAIRS)[pairs, 0]
    assert torch.equal(digits, torch.arange(80) % 10)  # the digit that was painted is the digit that is asked for


def test_resuming_does_not_depend_on_what_was_encoded(tmp_path, data):
    vae = tiny_sd.Autoencoder(**tiny_sd.AUTOENCODER | {"scaling_factor": 1.0})
    expected = tiny_sd.train(*run_of(tmp_path, "whole", data), vae)
    config, run = run_of(tmp_path, "part", data, save_every=1)
    steps = run.loop

    def one_step_only(state, label):  # as if it were killed behind the first step
        for step in steps(state, label):
            if step == 1:
                raise KeyboardInterrupt
            yield step

    run.loop = one_step_only
    with pytest.raises(KeyboardInterrupt):
        tiny_sd.train(config, run, vae)
    again = tiny_sd.train(*run_of(tmp_path, "part", data, resume=True), vae)
    for ours, theirs in ((again.unet, expected.unet), (again.text_encoder, expected.text_encoder)):
        assert all(torch.equal(v, theirs.state_dict()[k]) for k, v in ours.state_dict().items())


# ---------------------------------------------------------------------------- the model that ships


def test_the_shipped_model_still_draws_what_was_seen_of_it():
    """The first twelve of its 1,200 pictures, from the same noise."""
    sd, judge, features = load_stable_diffusion("tiny-sd"), ConceptJudge(), load_concept_statistics()[0][:12]
    with torch.no_grad():
        c = sd.embed(every_prompt()[:144:12])  # the first template of each of twelve pairs
        pictures, _ = generate(guided_sampler(sd, sd.unet), c, sd.unet.image_shape, 0, "cpu")
    now, digits, colours = judge(pictures)
    assert [*zip(digits.tolist(), colours.tolist())] == list(PAIRS[:12])
    assert (now - features).norm() < 1e-3 * features.norm()  # guidance 4.4 in place of 4.5 would be 1.6e-3 away


def test_at_least_95_of_100_pictures_of_the_shipped_model_are_what_they_should_be():
    """Of 1,200, whose statistics were kept, and as its card says."""
    _, digits, colours, pairs = load_concept_statistics()
    right = (torch.stack([digits, colours], 1) == torch.tensor(PAIRS)[pairs]).all(1)
    card = json.loads((ROOT / "weights/tiny-sd/card.json").read_text())
    assert len(pairs) == 1200 and right.double().mean().item() == pytest.approx(card["scores"]["both_right"])
    assert right.double().mean() >= 0.95
    files = [path for path in (ROOT / "weights/tiny-sd").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12e6


def test_diffusers_pipeline_draws_the_same_picture_from_the_shipped_model():
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    from unet import ddim_sample

    folder, prompts = ROOT / "weights/tiny-sd", ["a red seven", "the number three in blue"]
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(str(folder))
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, steps_offset=0)
    pipeline.set_progress_bar_config(disable=True)
    sd, z = load_stable_diffusion(), torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = pipeline(prompts, latents=z, num_inference_steps=50, guidance_scale=4.5, output_type="pt").images
        latents = ddim_sample(sd.unet, sd.schedule, z, sd.embed(prompts), 50, guidance=4.5, x0_clip=False,
                              null=sd.embed([""]))
        ours = ((sd.vae.decode(latents) + 1) / 2).clamp(0, 1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)


def test_the_guided_sampler_asks_the_network_that_it_is_given(monkeypatch):
    sd, seen = load_stable_diffusion("tiny-sd"), []
    other, c = copy.deepcopy(sd.unet), sd.embed(["red"])

    def spy(unet, schedule, z, *words):
        seen.append((unet, schedule, *words))
        return z

    monkeypatch.setattr("samples.ddim_sample", spy)
    guided_sampler(sd, other, steps=7, guidance=2.0, eta=0.5)(torch.randn(1, 4, 8, 8), c)
    [(unet, schedule, asked, steps, eta, guidance, x0_clip, _, null)] = seen
    assert unet is other and schedule is sd.schedule and asked is c
    assert (steps, eta, guidance, x0_clip) == (7, 0.5, 2.0, False) and torch.equal(null, sd.embed([""]))


def test_each_latent_is_trained_under_a_prompt_of_its_pair_or_none(tmp_path, data, monkeypatch):
    """Stand-in pictures say in two numbers which digit and which colour they are of."""
    config, run = run_of(tmp_path, "a", data, batch_size=1000)
    digits = torch.arange(40) % 10
    monkeypatch.setattr(tiny_sd, "mnist", lambda folder, train: (digits.float().view(40, 1, 1, 1), digits))
    monkeypatch.setattr(tiny_sd, "paint", lambda digits, colours: torch.cat([digits, colours.view(-1, 1, 1, 1).float()], 1))
    vae = types.SimpleNamespace(scaling_factor=2.0, encode=lambda x: (x, torch.full_like(x, -60.0)))
    schedule = types.SimpleNamespace(T=1000, add_noise=lambda x0, noise, t: x0)
    tokenizer, seen = tiny_sd.word_tokenizer(every_prompt(), tiny_sd.MAX_LENGTH), []
    loss = tiny_sd.latent_loss(config, run, vae, tokenizer, schedule)(
        lambda tokens: tokens, lambda x, t, text: seen.append((x, text)) or torch.zeros_like(x))
    [(x0, text)] = seen
    digit, colour = (x0 / 2).flatten(1).round().long().T
    none, prompts = (text == tokenizer([""])[0]).all(1), tokenizer(every_prompt()).view(60, 12, -1)
    asked = (text[:, None] == prompts[digit * 6 + colour]).all(2).any(1)
    assert (none ^ asked).all() and 0.07 < none.float().mean() < 0.13
    assert abs(loss.item() - 1) < 0.2  # of no prediction at all: the noise's own square


def test_the_posterior_belongs_to_the_shipped_unet_and_no_other(tmp_path, data):
    done = inside(f"pretrain.py tiny-sd-posterior --data {data} --steps 2 --checkpoints 2 --batch-size 4 --out out", tmp_path)
    assert done.returncode == 0, done.stderr
    unet, file = load_stable_diffusion("tiny-sd").unet, tmp_path / "out/posterior.safetensors"
    variance = read_posterior(str(file), unet)
    assert all((v >= 0).all() for v in variance.values()) and any(v.any() for v in variance.values())
    card = json.loads(file.with_suffix(".json").read_text())
    assert card["mean_sha256"] == checksum(unet.path) and card["sha256"] == checksum(file)
    unet.path = tmp_path / "another.safetensors"
    unet.path.write_bytes(b"other weights")
    with pytest.raises(ValueError, match="belongs to other weights"):
        read_posterior(str(file), unet)
