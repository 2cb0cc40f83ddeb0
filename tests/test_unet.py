"""The schedule and the samplers against diffusers, the network against what is known of it, the files against damage."""

import math

import pytest
import torch
from conftest import ROOT, TINY, random_unet
from safetensors.torch import save_file

from unet import (
    UNet,
    VPSchedule,
    ancestral_sample,
    ddim_sample,
    guided_noise,
    indexed_noise,
    load_unet,
    save_unet,
    sinusoidal_embedding,
    weights_path,
    write_tensors,
)


@pytest.mark.parametrize(
    "ours, theirs",
    [
        (VPSchedule.linear(), dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)),
        (VPSchedule.scaled_linear(), dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)),
    ],
)
def test_schedule_is_that_of_diffusers(ours, theirs):
    diffusers = pytest.importorskip("diffusers")
    peer = diffusers.DDPMScheduler(num_train_timesteps=1000, **theirs)
    torch.testing.assert_close(ours.betas, peer.betas, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(ours.alphas_cumprod, peer.alphas_cumprod, rtol=1e-4, atol=1e-7)
    x0, noise, t = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4), torch.tensor([0, 10, 440, 711, 999])
    torch.testing.assert_close(ours.add_noise(x0, noise, t), peer.add_noise(x0, noise, t), rtol=1e-4, atol=1e-5)


def test_tweedie_undoes_the_forward_process_and_the_score_is_that_of_the_gaussian():
    schedule = VPSchedule.linear()
    x0, noise, t = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.tensor([0, 300, 700])
    x_t = schedule.add_noise(x0, noise, t)
    torch.testing.assert_close(schedule.predict_x0(x_t, noise, t), x0, rtol=1e-3, atol=1e-4)
    # the score of N(a x0, s^2) at x_t, by automatic differentiation of its log density
    x = x_t.clone().requires_grad_()
    abar = schedule.alphas_cumprod[t].view(3, 1, 1, 1)
    torch.distributions.Normal(abar.sqrt() * x0, (1 - abar).sqrt()).log_prob(x).sum().backward()
    torch.testing.assert_close(schedule.score(noise, t), x.grad, rtol=1e-3, atol=1e-2)


def test_official_cifar10_configuration_has_the_official_number_of_parameters():
    unet = UNet(num_classes=10)
    assert sum(p.numel() for p in unet.parameters()) == 38_632_323
    assert unet.class_embedding.weight.shape == (11, 128)  # ten classes and the null row


def test_time_embedding_is_sines_then_cosines_from_1_to_1_over_10000():
    e = sinusoidal_embedding(torch.tensor([3]), 8)[0]
    w = [10000 ** (-i / 3) for i in range(4)]  # half_dim - 1 in the exponent
    expected = [math.sin(3 * f) for f in w] + [math.cos(3 * f) for f in w]
    torch.testing.assert_close(e, torch.tensor(expected), rtol=1e-5, atol=1e-5)


def test_a_fresh_network_predicts_nothing_and_a_changed_input_changes_the_output(tiny):
    x, t, c = torch.randn(2, 1, 28, 28), torch.tensor([5, 900]), torch.tensor([1, 2])
    assert UNet(**TINY)(x, t, c).abs().max() == 0
    out = tiny(x, t, c)
    assert out.shape == x.shape
    for other in (tiny(x + 0.1, t, c), tiny(x, t + 50, c), tiny(x, t, c + 1), tiny(x, t, torch.tensor([10, 10]))):
        assert (out - other).abs().amax((1, 2, 3)).min() > 1e-4


@pytest.mark.parametrize("conditioning", [{}, {"num_classes": None, "text_dim": 12, "heads": 2}])
def test_every_residual_branch_of_a_fresh_network_adds_nothing(conditioning):
    last = {name: p for name, p in UNet(**TINY | conditioning).named_parameters() if ".conv2." in name or ".proj_out." in name}
    assert any("proj_out" in name for name in last) and not any(p.any() for p in last.values())


def test_images_of_a_batch_do_not_see_each_other(tiny):
    x, t, c = torch.randn(3, 1, 28, 28), torch.tensor([5, 500, 900]), torch.tensor([1, 2, 10])
    together = tiny(x, t, c)
    alone = torch.cat([tiny(x[i : i + 1], t[i : i + 1], c[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


def test_every_parameter_is_used(tiny):
    tiny(torch.randn(2, 1, 28, 28), torch.tensor([5, 500]), torch.tensor([1, 10])).square().sum().backward()
    unused = [name for name, p in tiny.named_parameters() if p.grad is None or not p.grad.any()]
    assert unused == []


def test_dropout_is_active_in_training_mode_only(tiny):
    x, t, c = torch.randn(2, 1, 28, 28), torch.tensor([5, 900]), torch.tensor([1, 2])
    assert torch.equal(tiny(x, t, c), tiny(x, t, c))
    tiny.train()
    assert not torch.equal(tiny(x, t, c), tiny(x, t, c))


def test_conditioning_that_does_not_fit_is_refused(tiny):
    x, t = torch.randn(1, 1, 28, 28), torch.tensor([5])
    with pytest.raises(ValueError, match=r"takes c: labels 0\.\.9, or 10 for none"):
        tiny(x, t)
    with pytest.raises(ValueError, match="takes no c"):
        random_unet(num_classes=None)(x, t, torch.tensor([1]))


def scheduler_of_diffusers(name, **settings):
    """A scheduler of diffusers, with our linear schedule and our choice of steps."""
    diffusers = pytest.importorskip("diffusers")
    return getattr(diffusers, name)(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
                                    clip_sample=True, timestep_spacing="leading", steps_offset=0, **settings)


@pytest.mark.parametrize("steps", [1, 7, 600, 1000])
def test_ddim_goes_evenly_from_the_noisiest_step_to_the_first(steps):
    asked = []

    def network(x, t, c):
        asked.append(int(t[0]))
        return torch.zeros_like(x)

    ddim_sample(network, VPSchedule.linear(), torch.randn(1, 1, 2, 2), None, steps)
    gaps = [a - b for a, b in zip([1000, *asked], asked)]
    assert len(asked) == steps and asked[-1] == 0 and set(gaps) <= {1000 // steps, 1000 // steps + 1}


@pytest.mark.parametrize("steps, eta", [(10, 0.0), (8, 0.0), (10, 1.0)])
def test_ddim_is_that_of_diffusers(tiny, steps, eta):
    scheduler = scheduler_of_diffusers("DDIMScheduler", set_alpha_to_one=True)
    scheduler.set_timesteps(steps)
    schedule, z, c = VPSchedule.linear(), torch.randn(2, 1, 28, 28), torch.tensor([3, 4])
    ours = ddim_sample(tiny, schedule, z, c, steps, eta, noise=indexed_noise(0, [0, 1]))
    x, noise = z, indexed_noise(0, [0, 1])
    with torch.no_grad():
        for t in scheduler.timesteps:
            drawn = noise((1, 28, 28)) if eta > 0 and t > 0 else torch.zeros_like(x)
            x = scheduler.step(
                tiny(x, t.expand(2), c), t, x, eta=eta, use_clipped_model_output=True, variance_noise=drawn
            ).prev_sample
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-4)


def test_ancestral_sampler_is_that_of_diffusers():
    scheduler, schedule = scheduler_of_diffusers("DDPMScheduler", variance_type="fixed_small"), VPSchedule.linear()
    x0, x_t, t = torch.rand(2, 1, 28, 28), torch.randn(2, 1, 28, 28), 400
    # one step of the peer's posterior mean, against ours by a network that always predicts the noise that x0 implies

    class Oracle(torch.nn.Module):
        num_classes = None

        def forward(self, x, t, c=None):
            return (x - schedule.a(t) * x0) / schedule.s(t)

    zero = lambda shape: torch.zeros(2, *shape)  # noqa: E731
    trace = []
    ancestral_sample(lambda x, t, c: trace.append(x) or Oracle()(x, t), schedule, x_t, noise=zero)
    x = x_t
    for i, t in enumerate(range(999, 989, -1)):
        torch.testing.assert_close(trace[i], x, rtol=1e-4, atol=1e-5)
        peer = scheduler.step(Oracle()(x, torch.tensor([t, t])), t, x, generator=torch.Generator().manual_seed(0))
        alpha_bar, beta = schedule.alphas_cumprod[t], schedule.betas[t]
        deviation = ((1 - schedule.alphas_cumprod[t - 1]) / (1 - alpha_bar) * beta).sqrt()
        x = peer.prev_sample - deviation * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))


def test_ddim_draws_the_data_when_the_network_is_exact():
    """For data N(mu, 0.25^2) the best noise prediction is known; the sampler must then return that distribution."""
    schedule, mu, sd = VPSchedule.linear(), 0.3, 0.25

    def exact(x, t, c=None):
        a, s = schedule.a(t), schedule.s(t)
        return s * (x - a * mu) / (a**2 * sd**2 + s**2)

    z = torch.randn(4000, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    for steps, eta in ((100, 0.0), (1000, 1.0)):
        x = ddim_sample(exact, schedule, z, steps=steps, eta=eta, x0_clip=False)
        assert abs(x.mean().item() - mu) < 0.02 and abs(x.std().item() - sd) < 0.02


def test_guidance_follows_its_convention(tiny):
    x, t, c = torch.randn(2, 1, 28, 28), torch.tensor([5, 900]), torch.tensor([1, 2])
    cond, null = tiny(x, t, c), tiny(x, t, torch.tensor([10, 10]))
    torch.testing.assert_close(guided_noise(tiny, x, t, c, 1.0), cond)
    torch.testing.assert_close(guided_noise(tiny, x, t, c, 0.0), null, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(guided_noise(tiny, x, t, c, 3.0), null + 3 * (cond - null), rtol=1e-4, atol=1e-4)


@pytest.fixture
def told_by_text():
    return random_unet(image_size=8, in_channels=4, attention_at=(8,), num_classes=None, text_dim=12, heads=2)


def test_text_reaches_every_pixel_token_by_token(told_by_text):
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.randn(2, 6, 12)
    out = told_by_text(x, t, text)
    changed = text.clone()
    changed[:, 3] += 1  # one token of six
    assert ((told_by_text(x, t, changed) - out).abs().amax(1) > 1e-7).all()
    torch.testing.assert_close(told_by_text(x, t, text[:, torch.randperm(6)]), out, rtol=1e-4, atol=1e-5)  # a set to it
    with pytest.raises(ValueError, match=r"takes c: text embeddings \(B, L, 12\)"):
        told_by_text(x, t)
    with pytest.raises((RuntimeError, IndexError)):  # labels in place of embeddings: no refusal, but no result either
        told_by_text(x, t, torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="not both"):
        UNet(num_classes=10, text_dim=12)


def test_stable_diffusions_time_embedding_is_cosines_then_sines():
    e = sinusoidal_embedding(torch.tensor([3]), 8, stable_diffusion=True)[0]
    w = [10000 ** (-i / 4) for i in range(4)]  # half_dim in the exponent
    expected = [math.cos(3 * f) for f in w] + [math.sin(3 * f) for f in w]
    torch.testing.assert_close(e, torch.tensor(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("conditioning", [{}, {"num_classes": None, "text_dim": 12, "heads": 2}])
def test_gradient_checkpointing_changes_memory_not_gradients(conditioning):
    unet = random_unet(image_size=8, attention_at=(8,), blocks=2, **conditioning)
    x, t = torch.randn(2, 1, 8, 8, requires_grad=True), torch.tensor([5, 900])
    c = torch.randn(2, 6, 12) if conditioning else torch.tensor([0, 2])
    kept = []

    def gradients():
        count = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: count.append(x.numel()) or x, lambda x: x):
            loss = unet(x, t, c).square().sum()
        kept.append(sum(count))
        return torch.autograd.grad(loss, [x, *unet.parameters()])

    plain = gradients()
    unet.gradient_checkpointing = True
    for a, b in zip(plain, gradients()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert kept[1] < 0.6 * kept[0]  # numbers kept for the backward pass


def test_guidance_with_text_starts_from_the_embedding_of_nothing(told_by_text):
    x, t, text, nothing = torch.randn(2, 4, 8, 8), torch.tensor([5, 900]), torch.randn(2, 6, 12), torch.randn(1, 6, 12)
    eps, null = told_by_text(x, t, text), told_by_text(x, t, nothing.repeat(2, 1, 1))
    with pytest.raises(ValueError, match="needs null"):
        guided_noise(told_by_text, x, t, text, 4.5)
    torch.testing.assert_close(guided_noise(told_by_text, x, t, text, 4.5, nothing), 4.5 * eps - 3.5 * null,
                               rtol=1e-4, atol=1e-5)


def test_the_ancestral_sampler_of_latents_starts_guidance_from_the_nothing_that_it_is_given(told_by_text):
    z, text, schedule = torch.randn(2, 4, 8, 8), torch.randn(2, 6, 12), VPSchedule.linear(T=20, beta_start=1e-3, beta_end=0.2)
    drawn = [ancestral_sample(told_by_text, schedule, z, text, 2.0, False, indexed_noise(1, [0, 1]), nothing)
             for nothing in torch.randn(2, 1, 6, 12)]
    assert (drawn[0] - drawn[1]).abs().mean() > 0.05 and drawn[0].abs().max() > 1


def test_a_file_without_a_card_is_read(tiny, tmp_path):
    write_tensors(tmp_path / "a.safetensors", "U-Net", tiny.state_dict(), config=tiny.config)
    unet = load_unet(tmp_path / "a.safetensors")
    assert unet.card == {} and torch.equal(unet.conv_in.weight, tiny.conv_in.weight)


def test_noise_depends_on_seed_and_index_alone():
    whole, part = indexed_noise(7, range(5)), indexed_noise(7, [3])
    first, second = whole((1, 4, 4)), whole((1, 4, 4))
    assert torch.equal(first[3], part((1, 4, 4))[0]) and torch.equal(second[3], part((1, 4, 4))[0])
    assert not torch.equal(first[3], first[4]) and not torch.equal(first, second)
    assert not torch.equal(indexed_noise(8, [3])((1, 4, 4))[0], first[3])
    assert not torch.equal(indexed_noise(8, [2])((1, 4, 4))[0], first[3])  # the next seed is not the same noise, moved on


def test_a_write_that_breaks_off_leaves_the_old_file(tiny, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    save_unet(tiny, path)
    before = path.read_bytes()

    def half(tensors, file, metadata):
        assert file != tmp_path / "a.safetensors.tmp"  # a name of this process's own: another may be writing, too
        file.write_bytes(before[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr("unet.save_file", half)
    with pytest.raises(KeyboardInterrupt):
        save_unet(random_unet(1), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_weights_survive_the_disk_bit_for_bit(tiny, tmp_path):
    save_unet(tiny, tmp_path / "a.safetensors", seed=3, scores={"fid": 1.5})
    again = load_unet(tmp_path / "a.safetensors")
    assert again.config == tiny.config | {"multipliers": [1, 2], "attention_at": [14]} and not again.training
    assert again.card == {"seed": 3, "scores": {"fid": 1.5}}
    assert all(torch.equal(a, b) for a, b in zip(tiny.state_dict().values(), again.state_dict().values()))
    save_unet(
        again, tmp_path / "b.safetensors", seed=3, scores={"fid": 1.5}
    )  # and nothing in the file is left to chance
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"a.safetensors", "b.safetensors"}


def test_files_that_are_not_ours_are_refused(tiny, tmp_path):
    good = tmp_path / "good.safetensors"
    save_unet(tiny, good)
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:-100])
    (tmp_path / "text.safetensors").write_text("hello")
    save_file({"x": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    write_tensors(tmp_path / "missing.safetensors", "U-Net", {"x": torch.zeros(1)}, config={}, card={})
    write_tensors(tmp_path / "other.safetensors", "classifier", {"x": torch.zeros(1)})
    for name, message in [
        ("cut", "no readable safetensors"),
        ("text", "no readable safetensors"),
        ("foreign", "something of another project"),
        ("other", "but classifier"),
        ("missing", "does not hold the U-Net"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_unet(tmp_path / f"{name}.safetensors")
    with pytest.raises(FileNotFoundError, match="shipped name"):
        load_unet("no-such-teacher")


def test_a_path_is_never_taken_for_a_shipped_name(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert weights_path("mnist").parent == ROOT / "weights" and weights_path("tiny-sd/posterior").is_file()
    save_unet(tiny, tmp_path / "folder.safetensors")
    for path in ("./mnist", "tiny-sd/../mnist", tmp_path / "folder", ROOT / "weights/mnist"):
        with pytest.raises(FileNotFoundError, match="shipped name"):
            weights_path(path)
