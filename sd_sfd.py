"""Score Forgetting Distillation (SFD) for text-to-image Stable Diffusion, in one file.

Chen, Zhang, Zhou: "Score Forgetting Distillation: A Swift, Data-Free Method for Machine Unlearning in Diffusion
Models", ICLR 2025, arXiv 2409.11219. Guidance as in Zhou et al., "Long and Short Guidance in Score identity
Distillation" (LSG).

    python sd_sfd.py --forget "three" --override "eight"      # the tiny model that ships, two CPU cores, minutes
    python sd_sfd.py --forget "red" --override "blue"         # a colour
    python sd_sfd.py --forget "red three"                     # a pair; red fives and blue threes stay
    python sd_sfd.py --forget "seven" --mode negative         # no substitute: the word is left out
    python sd_sfd.py --forget none                            # plain one-step distillation (SiD-LSG)
    python sd_sfd.py --preset sd15 --sd stable-diffusion-v1-5 --forget "Brad Pitt" --override "a middle aged man" \\
        --forget-prompts prompts/portraits.txt --retain-prompts prompts/captions.txt
    python sd_sfd.py --preset sd15 --sd stable-diffusion-v1-5 --mode negative --forget nude naked \\
        --forget-prompts prompts/people.txt --retain-prompts prompts/captions.txt

The idea is the same as in ddpm_sfd.py: a diffusion teacher is distilled into a generator that needs one network call,
using only scores at noised versions of the generator's own pictures; and when the generator is asked for the concept to
be forgotten, the teacher is asked for a safe prompt in its place. What differs in text-to-image models:

    - everything happens in latents, the autoencoder's small pictures, which it decodes only for viewing;
    - the condition c is a text embedding. A concept is given by prompts that name it, and by the same prompts with it
      replaced ("replace"), or left out while the teacher is told to avoid it ("negative");
    - the teacher draws well only with guidance, and so does the fake score that is compared with it      (L1)

Glossary. Each label marks the line of code that implements it; (D1) to (D3) and (L1) are in unet.py.

    teacher, phi        eps_phi    the frozen diffusion model
    fake_score, psi     eps_psi    tracks the score of the generator's own latents                   (S2)
    generator, theta    eps_theta  draws a latent in one call, at noise level t_init                 (S1)
    z, x_g              z, x_g     Gaussian noise, and the latent that the generator makes of it
    c_fake              c          the prompt that was asked for; the generator and the fake score see it
    c_teacher           c'         the prompt that the teacher is asked for: c, or the safe one
    nothing             ""         the embedding of the empty prompt, where guidance starts from
    k1, k2, k3, k4      k          guidance scales: of the fake score in its training (k1) and where it is compared
                                   (k2 = k3), and of the teacher (k4)                                (L1)
    f_phi, f_psi                   the clean latents that teacher and fake score predict from x_t    (D3)
    alpha, w, lambda_*             as in ddpm_sfd.py                                                 (S3) (S4) (S5)

Tensors are latents (B, C, H, W), steps t (B,) in 0..999 and text embeddings (B, L, D).
"""
import copy
import functools
from dataclasses import dataclass

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from concepts import (
    ConceptJudge,
    check_drawn,
    contains,
    evaluate_concept,
    every_prompt,
    load_concept_statistics,
    next_of_its_kind,
    prompt_grid,
    read_prompts,
    replace,
    shown,
    without,
)
from eval import table
from record import checksum
from run import Run, choose_amp, choose_device, linear_decay, option, parse, refusing
from samples import generate, guided_sampler
from stable_diffusion import load_stable_diffusion
from teachers import read_pair
from unet import guided_noise, save_unet

# ---------------------------------------------------------------------------- config

PRESETS = {
    "tiny": {},  # the defaults below
    "sd15": dict(  # the settings of the official code's Stable Diffusion run; about 1,000 retained images are seen
        steps=125, batch_size=8, forget_batch_size=8, accumulate=4, lr_generator=1e-6, lr_fake_score=3e-6, lr_end=1.0,
        ema=0.0, adam_eps=1e-6, lambda_generator=1.0, max_weight=0.0, k_train=4.5, k_fake=4.5, k_teacher=4.5,
        sd="stable-diffusion-v1-5", eval_images=0, amp="fp16"),
}


@dataclass
class Config:
    preset: str = option("tiny", "settings to start from", choices=list(PRESETS))
    forget: str = option("three", "the concept: a word or a phrase (--mode negative with --sd FOLDER takes several, "
                         "forbidding each); none: plain distillation", nargs="+")
    override: str = option("next", "the safe concept; next: the tiny model's next digit or colour", nargs="+",
                          joint=" ")
    mode: str = option("replace", "replace: the teacher is asked for the prompt with the concept replaced; negative: "
                       "it is asked for the prompt without the concept, and the concept is its negative prompt",
                       choices=["replace", "negative"])
    sd: str = option("tiny-sd", "the shipped model, or a folder as the hub serves Stable Diffusion 1.x")
    retain_prompts: str = option("", "file of prompts to retain, one a line; the tiny model has its own")
    forget_prompts: str = option("", "file of prompts to forget, one per line, each with the concept or {}; with a "
                                "folder and --mode negative the concept is appended where both are missing")
    init_generator: str = option("none", "two-stage SFD: where theta begins, the generator of a --forget none run; "
                                "none: the teacher")
    init_fake_score: str = option("none", "two-stage SFD: where psi begins, the fake score of that run; none: the "
                                 "teacher")
    steps: int = option(150, "training steps, each one update of both networks; official: about 1,000 images", low=0)
    batch_size: int = option(24, "latents of retained prompts a step, over all processes; official: 8", low=1)
    forget_batch_size: int = option(8, "latents of forgotten prompts a step; official: as many", low=1)
    accumulate: int = option(1, "parts that a step's batch is cut into, to save memory", low=1)
    lr_generator: float = option(5e-4, "learning rate of theta; official: 1e-6", low=0)
    lr_fake_score: float = option(2e-3, "learning rate of psi; official: 3e-6", low=0)
    lr_end: float = option(0.3, "share of both rates that is left at the end of a linear decay; official: 1, constant",
                           low=0, high=1)
    adam_eps: float = option(1e-8, "epsilon of Adam; official, for fp16: 1e-6", low=0)
    alpha: float = option(1.0, "alpha of (S3); official: 1")
    lambda_generator: float = option(0.3, "lambda of (S5) for theta; official: 1", low=0)
    max_weight: float = option(12.0, "a forgotten prompt weighs at most as much as this many retained ones; theta's "
                               "lambda is lowered where need be; 0: no limit; our choice; official: 0", low=0)
    lambda_fake_score: float = option(1.0, "lambda of (S5) for psi; official: 1", low=0)
    k_train: float = option(1.5, "k1: guidance of the fake score while it is trained; official: 4.5", low=0)
    k_fake: float = option(1.5, "k2 = k3: guidance of the fake score where it is compared; official: 4.5", low=0)
    k_teacher: float = option(1.5, "k4: guidance of the teacher; official: 4.5", low=0)
    prompt_dropout: float = option(0.1, "share of prompts replaced by the empty one in psi's training; official: 0.1",
                                   low=0, high=1)
    t_init: int = option(625, "the noise level that the generator works at; official: 625", low=0, high=999)
    t_min: int = option(20, "first step t of (S2) and (S3); official: 20", low=0, high=999)
    t_max: int = option(980, "upper end of t in (S2) and (S3), exclusive; official: 980", low=1, high=1000)
    ema: float = option(0.95, "decay of theta's weight average, the result; official: 0, theta itself", low=0, high=1)
    clip_value: float = option(1.0, "each gradient entry is clipped to +-this; 0: not", low=0)
    weights: str = option("float32", "precision of the stored weights; bf16 takes half the memory, but loses updates "
                          "below 1/500 to 1/250 of a weight, at the official rates nearly all of them",
                          choices=["float32", "bf16"])
    gradient_checkpointing: bool = option(False, "recompute activations inside the networks' blocks in the backward "
                                          "pass instead of storing them: less memory, slower")
    compile: bool = option(False, "torch.compile the networks: minutes at the start, then faster steps on a GPU")
    amp: str = option("off", "mixed precision; off is faster at the tiny model's size; auto: bf16 where it is native, "
                      "else fp16 on a GPU, none on a CPU; official: fp16", choices=["auto", "bf16", "fp16", "off"])
    device: str = option("auto", "where to compute", choices=["auto", "cpu", "cuda"])
    seed: int = option(0, "seed of everything random", low=0, high=10**12)
    out: str = option("", "run folder; runs/sd_sfd-<preset>-forget-<concept> if not given")
    resume: bool = option(False, "go on from the checkpoint in the run folder")
    save_every: int = option(500, "steps between checkpoints", low=1)
    eval_images: int = option(20, "images of each digit in each colour that the metrics look at; 0: no metrics", low=0)


# ---------------------------------------------------------------------------- the method: (S1) to (S5)


def one_step(generator, z, c, schedule, t_init):
    """The one-step generator. z (B, C, H, W) standard Gaussian, c (B, L, D) -> latents x_g (B, C, H, W)."""
    t = torch.full((len(z),), t_init, device=z.device)
    a, s = schedule.a(t), schedule.s(t)
    return (s * z - s * generator(s * z, t, c)) / a  # (S1) x_g = (s z - s eps_theta(s z, t_init, c)) / a


def fake_score_loss(fake_score, x_g, t, c, nothing, noise, schedule, k1):
    """DDPM's denoising loss of the guided prediction (LSG) on the generator's latents x_g (B, C, H, W): summed over
    each latent, (B,).

    t (B,), c (B, L, D), noise (B, C, H, W); nothing (1, L, D): the text embedding of ""."""
    x_t = schedule.add_noise(x_g, noise, t)  # (D1)
    eps = guided_noise(fake_score, x_t, t, c, k1, nothing)  # (L1)
    return (noise - eps).square().sum(dim=(1, 2, 3))  # (S2) L_psi = || eps - eps_psi^k1(x_t, t, c) ||^2


def generator_loss(teacher, fake_score, x_g, t, c_teacher, c_fake, nothing_teacher, nothing, noise, schedule, alpha,
                   k_teacher, k_fake):
    """How far apart the guided teacher and fake score are at the latents x_g (B, C, H, W): one value each, (B,).

    t (B,), noise (B, C, H, W); c_teacher and c_fake (B, L, D): c' and c; nothing (1, L, D): ""; nothing_teacher
    (B, L, D): where the teacher's guidance starts from: "", or the negative prompt if there is one. Values may be
    negative. Gradients reach the generator through every x_g, including those in both networks' inputs."""
    x_t = schedule.add_noise(x_g, noise, t)  # (D1)
    eps_phi = guided_noise(teacher, x_t, t, c_teacher, k_teacher, nothing_teacher)  # (L1) with k4
    eps_psi = guided_noise(fake_score, x_t, t, c_fake, k_fake, nothing)  # (L1) with k2 = k3
    f_phi, f_psi = schedule.predict_x0(x_t, eps_phi, t), schedule.predict_x0(x_t, eps_psi, t)  # (D3)
    distance = (f_phi - x_g).abs().mean(dim=(1, 2, 3), keepdim=True).detach()
    w = 1 / distance.clamp(min=1e-5)  # (S4) w = 1 / mean |f_phi - x_g|, detached, clamped
    product = (f_phi - f_psi) * (f_phi - x_g - alpha * (f_phi - f_psi))
    return (w * product).sum(dim=(1, 2, 3))  # (S3) w (f_phi - f_psi) . (f_phi - x_g - alpha (f_phi - f_psi))


def total(loss, retained, lambda_):
    """Losses (B,), of which the first `retained` are of retained samples and the rest of forgotten ones -> scalar.
    Without forgotten ones this is plain distillation (SiD)."""
    L_retained = loss[:retained].mean()
    L_forgotten = loss[retained:].sum() / max(1, len(loss) - retained)  # a mean, and 0 when there are none
    return L_retained + lambda_ * L_forgotten  # (S5) L(retained) + lambda L(forgotten)


# ---------------------------------------------------------------------------- prompts


def read_concept(config):
    """The command line's words as prompts: (retained, forget, safe, negative prompt). ValueError says what is wrong.

    safe: what the teacher is asked for in place of each prompt of `forget`. Plain distillation has no `forget`."""
    tiny = config.sd == "tiny-sd"
    if not tiny and not config.retain_prompts:
        raise ValueError("--retain-prompts: name a file of prompts; the tiny model alone has prompts of its own")
    prompts = read_prompts(config.retain_prompts) if config.retain_prompts else every_prompt()
    concept = config.forget.replace(",", " ").strip()
    if config.override != "next" and (concept == "none" or config.mode == "negative"):
        flag = "--forget none" if concept == "none" else "--mode negative"
        raise ValueError(f"--override {config.override!r} names a substitute; {flag} has none, so leave it out")
    if concept == "none":
        if config.mode == "negative" or config.forget_prompts:
            flag = "--forget-prompts" if config.forget_prompts else "--mode negative"
            raise ValueError(f"{flag} changes nothing with --forget none; leave it out")
        return prompts, [], [], ""
    if config.mode == "negative" and config.k_teacher <= 1:
        raise ValueError(f"--mode negative works by guidance: --k-teacher {config.k_teacher:g} must be above 1")
    candidates = read_prompts(config.forget_prompts) if config.forget_prompts else every_prompt() if tiny else prompts
    if config.mode == "negative" and not tiny:
        return forbid(config.forget, candidates, prompts)
    candidates = [prompt.replace("{}", concept) for prompt in candidates]
    forget = [p for p in candidates if contains(p, concept)]
    retained = [p for p in prompts if not contains(p, concept)]
    if tiny:
        check_drawn(concept)
    if not forget:
        raise ValueError(f"--forget {concept!r} stands in none of the prompts; the first of them is {candidates[0]!r}")
    if config.forget_prompts and len(forget) < len(candidates):
        other = next(p for p in candidates if not contains(p, concept))
        raise ValueError(f"--forget-prompts: {other!r} is without {concept!r}; write it out, or {{}} in its place")
    if not retained:
        raise ValueError(f"--forget {concept!r} stands in every prompt; leave some to retain")
    if config.mode == "negative":
        return retained, forget, [without(p, concept) for p in forget], concept
    if config.override == "next" and not tiny:
        raise ValueError(f"--override: name what is safe in place of {concept!r}; the tiny model alone knows of a next")
    override = next_of_its_kind(concept) if config.override == "next" else config.override
    safe = [replace(p, concept, override) for p in forget]
    if any(contains(p, concept) for p in safe):
        raise ValueError(f"--override {override!r} contains what is to be forgotten, {concept!r}")
    if tiny:
        check_drawn(override, "--override")
        if not config.forget_prompts and not set(safe) <= set(every_prompt()):
            raise ValueError(f"--override {override!r} is of another kind than {concept!r}: {safe[0]!r}")
    return retained, forget, safe, ""


def forbid(words, subjects, prompts):
    """--mode negative in a real model: combines each subject with each forbidden word, in place of {} or at the end ->
    (retained, forget, safe, negative prompt). words: as --forget gives them; prompts: those to retain."""
    forbidden = [word.strip() for word in words.split(",")]
    added = [p if "{}" in p or any(contains(p, word) for word in forbidden) else f"{p}, {{}}" for p in subjects]
    forget = list(dict.fromkeys(p.replace("{}", word) for p in added for word in forbidden))  # none of them twice
    retained = [p for p in prompts if not any(contains(p, word) for word in forbidden)]
    if not retained:
        raise ValueError(f"--forget {words!r}: each prompt to retain holds one of these; leave some")
    return retained, forget, [functools.reduce(without, forbidden, p) for p in forget], ", ".join(forbidden)


def check_length(tokenizer, forget, safe):
    """ValueError if a prompt of `forget` is cut off before it differs from its safe version, so both read the same."""
    for prompt, unread in zip(forget, (tokenizer(forget) == tokenizer(safe)).all(dim=1)):
        if unread:
            raise ValueError(f"only the first {tokenizer.max_length - 2} tokens of a prompt are read; what is to be "
                             f"forgotten stands behind them in {prompt!r}, so shorten it")


# ---------------------------------------------------------------------------- the loop


def train(config, run, teacher, schedule, prompts, live_ua=None, generator=None, fake_score=None):
    """SFD from `teacher`, which is not changed; returns the generator (theta, or its weight average if there is one)
    and the fake score.

    prompts: text embeddings (N, L, D): retained, forget, safe (as many), negative (one), nothing (one).
    live_ua: function (latents of forget prompts) -> share that does not show the concept, for the bar.
    generator, fake_score: where theta and psi begin, changed in place; copies of the teacher if not given."""
    retained, forget, safe, negative, nothing = prompts
    n_retained = config.batch_size // run.world // config.accumulate
    n_forgotten = config.forget_batch_size // run.world // config.accumulate if len(forget) else 0
    lambda_theta = config.lambda_generator
    if config.max_weight and len(forget):  # few prompts would each carry much of lambda, at the cost of similar ones
        lambda_theta = min(lambda_theta, config.max_weight * len(forget) / len(retained))
    nothing_teacher = torch.cat([nothing.repeat(n_retained, 1, 1), negative.repeat(n_forgotten, 1, 1)])

    teacher = teacher.eval().requires_grad_(False)  # phi
    fake_score = (fake_score or copy.deepcopy(teacher)).requires_grad_(True)  # psi
    generator = (generator or copy.deepcopy(teacher)).requires_grad_(True)  # theta
    for network in (teacher, fake_score, generator):
        run.prepare(network)
        network.gradient_checkpointing = config.gradient_checkpointing
    ema = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(config.ema)) if config.ema else None
    adam = dict(betas=(0.0, 0.999), eps=config.adam_eps, fused=run.fused)
    optimizer_psi = torch.optim.Adam(fake_score.parameters(), lr=config.lr_fake_score, **adam)
    optimizer_theta = torch.optim.Adam(generator.parameters(), lr=config.lr_generator, **adam)
    decays = [linear_decay(optimizer, config.lr_end, config.steps) for optimizer in (optimizer_psi, optimizer_theta)]
    state = {"fake_score": fake_score, "generator": generator, "optimizer_psi": optimizer_psi,
             "optimizer_theta": optimizer_theta, "decay_psi": decays[0], "decay_theta": decays[1]}
    state |= {"ema": ema} if ema else {}
    parallel_fake_score, parallel_generator = run.parallel(fake_score), run.parallel(generator)

    def draw():
        """Prompts and noise of one part of a batch, retained ones first."""
        keep = torch.randint(len(retained), (n_retained,))
        pick = torch.randint(max(1, len(forget)), (n_forgotten,))
        c = torch.cat([retained[keep], forget[pick]]).to(run.device)
        c_teacher = torch.cat([retained[keep], safe[pick]]).to(run.device)
        return c, c_teacher, torch.randn(len(c), *teacher.image_shape, device=run.device)

    def draw_t_and_noise(x):
        return torch.randint(config.t_min, config.t_max, (len(x),), device=x.device), torch.randn_like(x)

    for _ in run.loop(state, label="SFD"):
        # 1. the fake score learns the generator's distribution; dropout is active only in what is being trained
        generator.eval()
        fake_score.train().requires_grad_(True)
        loss_psi = 0.0
        for _ in range(config.accumulate):  # the parts of a batch
            c, _, z = draw()
            with torch.no_grad(), run.autocast():
                x_g = one_step(generator, z, c, schedule, config.t_init)  # (S1)
            t, noise = draw_t_and_noise(x_g)
            dropped = torch.rand(len(c), 1, 1, device=run.device) < config.prompt_dropout
            with run.autocast():
                loss = fake_score_loss(parallel_fake_score, x_g, t, torch.where(dropped, nothing, c), nothing, noise,
                                       schedule, config.k_train)  # (S2)
            loss_psi += run.backward(total(loss, n_retained, config.lambda_fake_score) / config.accumulate)  # (S5)
        run.descend("loss_psi", loss_psi, fake_score, optimizer_psi, config.clip_value)

        # 2. the generator moves to where teacher and fake score agree
        generator.train()
        fake_score.eval().requires_grad_(False)
        loss_theta = 0.0
        for _ in range(config.accumulate):
            c, c_teacher, z = draw()
            with run.autocast():
                x_g = one_step(parallel_generator, z, c, schedule, config.t_init)  # (S1)
            t, noise = draw_t_and_noise(x_g)
            with run.autocast():
                loss = generator_loss(teacher, fake_score, x_g, t, c_teacher, c, nothing_teacher, nothing, noise,
                                      schedule, config.alpha, config.k_teacher, config.k_fake)  # (S3)
            loss_theta += run.backward(total(loss, n_retained, lambda_theta) / config.accumulate)  # (S5)
        run.descend("loss_theta", loss_theta, generator, optimizer_theta, config.clip_value)
        if ema:
            ema.update_parameters(generator)
        for decay in decays:
            decay.step()

        numbers = {"loss_psi": loss_psi, "loss_theta": loss_theta}
        if live_ua and n_forgotten:  # of the latents just drawn
            numbers["ua"] = live_ua(x_g[n_retained:])
        run.log(**numbers)
    return (ema.module if ema else generator).eval(), fake_score.eval()


# ---------------------------------------------------------------------------- main


def main(config):
    tiny = config.sd == "tiny-sd"
    with refusing():
        retained, forget, safe, negative = read_concept(config)
        if config.t_min >= config.t_max:
            raise ValueError(f"--t-min {config.t_min} must be below --t-max {config.t_max}")
        sd = load_stable_diffusion(config.sd)
        if config.preset == "tiny" and max(sd.unet.image_shape) > 8:  # the tiny model's latents are (4, 8, 8)
            raise ValueError(f"--sd {config.sd} goes with --preset sd15, whose settings are meant for its size")
        check_length(sd.tokenizer, forget, safe)
        generator, fake_score = read_pair(config, sd.unet)
        if config.weights == "bf16" and choose_amp(config.amp, choose_device(config.device)) != torch.bfloat16:
            raise ValueError("--weights bf16 needs --amp bf16")
        judge, teacher_seen = (ConceptJudge(), load_concept_statistics()) if tiny else (None, None)
    concept = config.forget.replace(",", " ").strip()
    folder = f"runs/sd_sfd-{config.preset}-forget-{concept.replace(' ', '-')}"
    run = Run(config, folder, loss_scale=16.0)  # low for fp16, as the losses are sums over pixels
    sd, teacher, schedule = sd.to(run.device), sd.unet, sd.schedule
    with torch.no_grad():  # once for all: training does not call the text encoder
        nothing, negative = sd.embed([""]), sd.embed([negative])

        def embed(texts):  # a long list part by part, and not on the GPU: ten thousand texts are 2.4 GB
            parts = [sd.embed(texts[i:i + 256]).cpu() for i in range(0, len(texts), 256)]
            return torch.cat([nothing[:0].cpu(), *parts])

        prompts = (embed(retained), embed(forget), embed(safe), negative, nothing)
    if config.weights == "bf16":
        for network in filter(None, (teacher, generator, fake_score)):
            network.to(torch.bfloat16)
    generator, fake_score, judge = (x and x.to(run.device) for x in (generator, fake_score, judge))

    @torch.no_grad()
    def live_ua(latents):
        """The share of latents that do not show the concept."""
        _, digits, colours = judge(sd.vae.decode(latents.float()).clamp(-1, 1))
        there = [shown(int(digit), int(colour), concept) for digit, colour in zip(digits, colours)]
        return 1 - sum(there) / len(there)

    generator, fake_score = train(config, run, teacher, schedule, prompts, judge and live_ua, generator, fake_score)

    run.state.clear()  # the optimizers: pictures need the memory
    metrics = {"nfe": 1, "forget": concept, "training_seconds": run.seconds}
    if run.rank == 0:
        card = dict(method="SFD", forget=concept, mode=config.mode, sd=config.sd, teacher_sha256=checksum(teacher.path),
                    steps=config.steps, seed=config.seed)
        save_unet(generator, run.folder / "generator.safetensors", t_init=config.t_init, **card)
        save_unet(fake_score, run.folder / "fake_score.safetensors", what="fake score", **card)

        def sample(z, c, noise=None):
            with run.autocast():
                latents = one_step(generator, z, c, schedule, config.t_init)
            return sd.vae.decode(latents.float())

        def spread(prompts, n):  # n of them, evenly
            return [prompts[i * len(prompts) // n] for i in range(min(n, len(prompts)))]

        rows = spread(forget, 4) + spread(retained, 6)
        with torch.no_grad():
            c = sd.embed(rows).repeat_interleave(8 if tiny else 2, dim=0)
        before = guided_sampler(sd, teacher, run.autocast)
        for name, draw, title in (("before", before, "teacher, 50 steps, guidance 4.5"),
                                  ("after", sample, "SFD, 1 network call")):
            pictures, _ = generate(draw, c, teacher.image_shape, config.seed, run.device, 80 if tiny else 10)
            prompt_grid(pictures, rows, run.folder / f"samples_{name}.png", title, range(min(4, len(forget))))
        if judge and config.eval_images:
            metrics |= evaluate_concept(
                sample, sd, judge, concept if forget else "", config.eval_images, config.seed, teacher_seen)
            print(table(metrics))
    run.finish(metrics)


if __name__ == "__main__":
    main(parse(Config, __doc__, PRESETS))
