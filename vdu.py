"""Variational Diffusion Unlearning (VDU): an unconditional diffusion model forgets a class, given only images of it.

Panda, Varun M S, Jain, Maharana, Prathosh A. P., "Variational Diffusion Unlearning" (v4: "Unlearning in Diffusion
Models under Data Constraints: A Variational Inference Approach"), TMLR 2026, arXiv 2510.04058.

    python vdu.py --forget 1                          # MNIST, on two CPU cores or a GPU
    python vdu.py --forget 2 --images 10              # given only ten images of it
    python vdu.py --forget 3 --data my_images/        # a folder of pictures of what to forget
    python vdu.py --preset tiny-sd --forget red       # a feature, from a text-to-image model
    python pretrain.py cifar10-posterior              # CIFAR-10: K networks that go on from google/ddpm-cifar10-32
    python vdu.py --teacher runs/pretrain-cifar10-posterior/cifar10-unconditional.safetensors \\
        --posterior runs/pretrain-cifar10-posterior/cifar10-unconditional-posterior.safetensors --data data \\
        --classifier none --out runs/vdu-cifar10-forget1        # with MNIST's settings: none were tuned for CIFAR-10

The idea. Training gave us a belief about the weights, the posterior p(theta | D): a Gaussian around the weights mu*
that we use. Its width sigma* stands for how far K training runs drift apart after a shared start: wide where they
disagree, narrow where they agree. What we would like is the belief that we would hold had we never seen the undesired
images D_f, only the rest, the retained images D_r. Bayes' rule takes evidence out as easily as it puts it in.
As p(theta | D) is proportional to p(D_f | theta) p(theta | D_r),

    (V1)  p(theta | D_r) is proportional to p(theta | D) / p(D_f | theta)

Nothing on the right needs the retained data. We look for the Gaussian q, with its mean theta free to move, that is
closest to this posterior:

    (V2)  KL(q || p(theta | D_r)) = E_q [log q(theta) - log p(theta | D) + log p(D_f | theta)] + constant
                                  = KL(q || p(theta | D)) + E_q log p(D_f | theta) + constant

The second term makes the undesired images unlikely. The negative denoising error bounds log p from below, and (V3), the
plasticity inducer, pushes this bound down: the network is made to denoise D_f badly. (We hope that log p itself falls;
this is not proved.) The first term, for two Gaussians of equal width, is half the squared distance between their means,
in units of sigma*: that is (V4), the stability regularizer, which lets a weight move if the training runs disagree on
it, and holds it if they agree. (V5) mixes the two.

How far should we go? (V3) has no lower bound: on its own it ends in a network that draws blots. On the way, it seems,
the error on D_f grows mostly through what all images share, such as more or less ink, so retained images suffer too.
At mu* the slope of (V3) is still about D_f. So --plasticity tangent, the default, replaces (V3) by its tangent at mu*,
(V6), which makes (V5), with any gamma above 0, a bowl with a minimum. We descend by the natural gradient of q, in short
steps, and stop when the error on some of D_f has grown by a given factor.

Glossary. Each label marks the line of code that implements it; (D1) to (D3) are in unet.py.

    unet, theta     theta       the network, begun at mu*
    mean            mu*         the posterior mean of each weight, given all data, name -> tensor
    variance        sigma*^2    its posterior variance, likewise
    x0              x_0 in D_f  an undesired image, (B, C, H, W), in [-1, 1]; with --sd its latent
    w               w_t         the weight of the error at step t in the bound                   (V3)
    A               A           plasticity inducer, minimised: minus the denoising error on D_f  (V3)
    B               B           stability regularizer                                            (V4)
    gamma           gamma       0: forget at any cost; 1: do not move                            (V5)
    at              mu*         the network at which (V3) is evaluated; --plasticity full: unet  (V6)
"""
import copy
from dataclasses import dataclass

import torch

from concepts import (
    ConceptJudge,
    check_drawn,
    contains,
    draw_concepts,
    evaluate_concept,
    every_prompt,
    load_concept_statistics,
    prompt_grid,
)
from data import some_images
from eval import check_forget, evaluate_unconditional, parse_classes, table
from features import Judge
from record import checksum
from run import Run, option, parse, refusing
from samples import generate, guided_sampler, image_grid, unconditional_sampler
from stable_diffusion import load_stable_diffusion
from teachers import load_teacher
from unet import VPSchedule, ddim_sample, load_unet, read_tensors, save_unet

# ---------------------------------------------------------------------------- config

PRESETS = {
    "mnist": {},  # the defaults below
    "tiny-sd": dict(sd="tiny-sd", forget="red", images=100, steps=100, stop_at=12.0, batch_size=64, lr=4.0, gamma=0.7,
                    plasticity="full", t_max=900),
}


@dataclass
class Config:
    preset: str = option("mnist", "settings to start from", choices=list(PRESETS))
    forget: str = option("1", "class or classes to forget", nargs="+")
    sd: str = option("", "feature unlearning in a text-to-image model: tiny-sd, or a folder as the hub serves Stable "
                     "Diffusion 1.x, with --preset tiny-sd; --forget is then a word or a phrase")
    data: str = option("auto", "the undesired images: a folder with MNIST, CIFAR-10, tiny ImageNet or pictures; "
                               "teacher: drawn by the class-conditional teacher, or by --sd tiny-sd itself; "
                               "auto: from data/, downloaded if need be; else, or with --sd tiny-sd, as teacher")
    images: int = option(0, "how many undesired images to use; 0: all that --data has, or 100 drawn", low=0)
    teacher: str = option("mnist-unconditional", "a shipped name, a file, a URL or hub:ORG/NAME; see convert.py")
    posterior: str = option("auto", "the variance of the teacher's weights: a shipped name, a file, or K >= 2 U-Net "
                            "files: their variance is used, and their mean as teacher; auto: the shipped one",
                            nargs="+")
    steps: int = option(60, "training steps, at most; our choice", low=0)
    stop_at: float = option(1.2, "end when the error on some fixed noised images of D_f has grown by this factor; 0: "
                            "never; our choice", low=0)
    batch_size: int = option(256, "undesired images a step, over all processes; our choice", low=1)
    optimizer: str = option("natural", "natural: the natural gradient of q, sigma*^2 times the plain one; or adam; our "
                            "choice", choices=["natural", "adam"])
    lr: float = option(1.0, "natural: length of a step in sigmas, over all weights; adam: its rate, such as 1e-5; our "
                       "choice", low=0)
    gamma: float = option(0.3, "gamma of (V5); our choice", low=0, high=1)
    plasticity: str = option("tangent", "tangent: (V6), (V3)'s tangent at mu*; full: (V3) itself, at theta; our choice",
                             choices=["full", "tangent"])
    weighting: str = option("simple", "w_t of (V3); bound: that of the DDPM bound; simple: 1; our choice",
                            choices=["bound", "simple"])
    reduction: str = option("mean", "A and B: sums over pixels, steps and weights, as in (V3) and (V4), or means; over "
                            "images A is a mean either way; our choice", choices=["mean", "sum"])
    sigma_floor: float = option(1e-4, "lower limit of every sigma*; our choice", low=1e-12)
    covariance: str = option("posterior", "identity: all weights have the same variance, the mean one; to compare",
                             choices=["posterior", "identity"])
    t_min: int = option(300, "first step of (V3); our choice", low=0, high=999)
    t_max: int = option(600, "upper end of t in (V3), exclusive; our choice", low=1, high=1000)
    amp: str = option("auto", "mixed precision; auto: bf16 where it is native, else fp16 on a GPU, none on a CPU",
                      choices=["auto", "bf16", "fp16", "off"])
    compile: bool = option(False, "torch.compile the network: minutes at the start, then faster steps on a GPU")
    device: str = option("auto", "where to compute", choices=["auto", "cpu", "cuda"])
    seed: int = option(0, "seed of the undesired images and of training; images to judge have seed 0, as the teacher's",
                       low=0, high=10**12)
    out: str = option("", "run folder; runs/vdu-<preset>-forget<classes>, with --sd runs/vdu-sd-forget-<concept>")
    resume: bool = option(False, "go on from the checkpoint in the run folder")
    save_every: int = option(500, "steps between checkpoints", low=1)
    eval_images: int = option(2000, "unconditional images that the metrics look at; --sd: 20 of each pair", low=100)
    classifier: str = option("mnist-classifier", "the metrics' classifier: a shipped name or file; none: no metrics")


# ---------------------------------------------------------------------------- the method: (V3), (V4), (V6), posterior


def bound_weight(t, schedule):
    """What the error at steps t (B,) weighs in the DDPM bound on -log p(x0), with sigma_t^2 = beta_t. (B,)"""
    beta, abar = schedule.betas[t], schedule.alphas_cumprod[t]
    sigma2, alpha = beta, 1 - beta
    return beta**2 / (2 * sigma2 * alpha * (1 - abar))  # w_t = beta_t^2 / (2 sigma_t^2 alpha_t (1 - abar_t))


def plasticity_inducer(unet, x0, t, noise, schedule, c=None, weighting="bound"):
    """Minus the weighted denoising error on undesired images x0 (B, C, H, W): one value per image, (B,), summed
    over pixels. It is minimised but has no lower bound, so steps, learning rate and (V4) decide where that ends.

    t (B,), noise (B, C, H, W); c: None, or text embeddings (B, L, D). weighting: "bound", w_t of the DDPM bound, or
    "simple", w_t = 1, the command's default."""
    x_t = schedule.add_noise(x0, noise, t)  # (D1)
    w = bound_weight(t, schedule) if weighting == "bound" else 1.0
    eps = unet(x_t, t) if c is None else unet(x_t, t, c)
    return -w * (noise - eps).square().sum(dim=(1, 2, 3))  # (V3) A = -w_t || eps - eps_theta(x_t, t) ||^2


def stability_regularizer(unet, mean, variance):
    """Half the squared distance of the weights from mu*, in units of sigma*. mean, variance: name -> tensor. Scalar."""
    return sum(((theta - mean[name]).square() / (2 * variance[name])).sum()
               for name, theta in unet.named_parameters())  # (V4) B = sum_i (theta_i - mu*_i)^2 / (2 sigma*_i^2)


def tangent(values, at, unet, mean):
    """The mean of (V3) over images, linearised at mu*: a scalar whose gradient reaches `unet`. values (B,): (V3) for
    the network `at`, whose weights are mu*; mean: mu*, name -> tensor. Overwrites the gradients of `at`; with DDP they
    are means over processes."""
    at.zero_grad(set_to_none=True)
    values.sum().backward()  # not of the mean, whose gradients would be too small for fp16
    slope = {name: p.grad / len(values) for name, p in at.named_parameters()}
    moved = sum((slope[name] * (theta - mean[name])).sum() for name, theta in unet.named_parameters())
    return values.mean().detach() + moved  # (V6) A = A(mu*) + grad A(mu*) . (theta - mu*)


def posterior(checkpoints):
    """Mean and unbiased variance of every weight over K checkpoints: name -> tensor, name -> tensor. ValueError when
    there are fewer than two, or when they are not of one network.

    checkpoints: state dicts of networks that shared their pretraining and were then trained separately. (From separate
    starts they would agree only up to the order of their units, and their mean would be meaningless.)"""
    if len(checkpoints) < 2:
        raise ValueError(f"a posterior needs at least 2 checkpoints, not {len(checkpoints)}")
    shapes = [{name: w.shape for name, w in checkpoint.items()} for checkpoint in checkpoints]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError("these checkpoints are not of one network: their weights differ in name or shape")
    stacks = {name: torch.stack([checkpoint[name].double() for checkpoint in checkpoints]) for name in checkpoints[0]}
    return {k: w.mean(0).float() for k, w in stacks.items()}, {k: w.var(0).float() for k, w in stacks.items()}


# ---------------------------------------------------------------------------- the loop


class NaturalGradient(torch.optim.Optimizer):
    """Descent in the mean of q = N(theta, sigma*^2) by q's natural gradient, sigma*^2 times the plain one: each weight
    moves as its width allows. Each step has length `lr`, the root of the sum over weights of (change / sigma*)^2.

    theta: the parameters; variance: their variances, in the same order. The gradient is a running mean, to
    reduce its noise."""

    def __init__(self, theta, variance, lr, momentum=0.9):
        super().__init__(theta, {"lr": lr, "momentum": momentum})
        self.variance = list(variance)

    @torch.no_grad()
    def step(self):
        [group] = self.param_groups
        gradients = [self.state[p].setdefault("gradient", torch.zeros_like(p)).lerp_(p.grad, 1 - group["momentum"])
                     for p in group["params"]]
        length = sum((v * g.square()).sum() for g, v in zip(gradients, self.variance)).sqrt()  # | sigma* g |
        for p, g, v in zip(group["params"], gradients, self.variance):
            p -= group["lr"] * v * g / length.clamp(min=1e-30)


def train(config, run, unet, variance, images, schedule, texts=None):
    """VDU on `unet`, starting from mu*, in place. images (N, C, H, W): D_f; variance: name -> tensor, sigma*^2, the
    same in every process; texts (N, L, D): the embedded prompt of each image, for a U-Net that takes text."""
    run.prepare(unet.eval().requires_grad_(True))  # no dropout: theta is what q says, not a thinned version of it
    mean = {name: theta.detach().clone() for name, theta in unet.named_parameters()}  # mu*
    if config.covariance == "identity":
        mean_variance = torch.cat([v.flatten() for v in variance.values()]).mean()
        variance = {name: mean_variance.expand_as(v) for name, v in variance.items()}
    variance = {name: v.to(run.device).clamp(min=config.sigma_floor**2) for name, v in variance.items()}  # sigma*^2
    pixels, weights = images[0].numel(), sum(v.numel() for v in variance.values())
    if config.optimizer == "natural":
        of_each = [variance[name] for name, _ in unet.named_parameters()]
        optimizer = NaturalGradient(unet.parameters(), of_each, config.lr)
    else:
        optimizer = torch.optim.Adam(unet.parameters(), lr=config.lr, fused=run.fused)
    at = run.prepare(copy.deepcopy(unet)) if config.plasticity == "tangent" else unet  # where (V3) is taken: mu*, theta
    network, batch = run.parallel(at), config.batch_size // run.world
    # what (V5) mixes: sums over steps and weights, as (V3) and (V4) say, or means over pixels and weights
    unit_A, unit_B = (config.t_max - config.t_min, 1) if config.reduction == "sum" else (1 / pixels, 1 / weights)
    images = images.to(run.device)

    def draw(n):
        pick = torch.randint(len(images), (n,), device=run.device)
        t = torch.randint(config.t_min, config.t_max, (n,), device=run.device)
        x0 = images[pick]
        return x0, t, torch.randn_like(x0), None if texts is None else texts[pick]

    probe = []  # fixed noised images of D_f: their error changes only because theta does
    for t in torch.linspace(config.t_min, config.t_max - 1, 128, device=run.device).long().split(batch):
        x0, _, noise, c = draw(len(t))
        probe.append((x0, t, noise, schedule, c, config.weighting))

    @torch.no_grad()
    def probe_error():
        with run.autocast():
            return -torch.cat([plasticity_inducer(unet, *some) for some in probe]).mean()

    error_at_mean = probe_error()
    for _ in run.loop({"unet": unet, "optimizer": optimizer}, label="VDU"):
        x0, t, noise, c = draw(batch)
        with run.autocast():
            values = plasticity_inducer(network, x0, t, noise, schedule, c, config.weighting)  # (V3), of each image
        if config.plasticity == "tangent":
            A = unit_A * tangent(values, at, unet, mean)  # (V6)
        else:
            A = unit_A * values.mean()
        B = unit_B * stability_regularizer(unet, mean, variance)  # (V4)
        loss = (1 - config.gamma) * A + config.gamma * B  # (V5) L = (1 - gamma) A + gamma B
        run.update("loss", loss, unet, optimizer)
        growth = probe_error() / error_at_mean
        run.enough = run.any_process(run.rank == 0 and config.stop_at and growth >= config.stop_at)  # process 0 decides
        run.log(plasticity=A, stability=B, growth=growth)
    return unet.eval()


# ---------------------------------------------------------------------------- what the method is given


def undesired_images(source, forget, shape, n=0, seed=0):
    """D_f: `n` images (0: all, or 100 from the teacher) of the classes `forget`, (N, C, H, W) in [-1, 1], and a
    description of where they come from.

    source: a folder that holds MNIST, CIFAR-10, tiny ImageNet or pictures; "teacher"; "auto". No image of another class
    is used or, where images are separate files, even opened. forget None: a folder of pictures, whatever they show.
    ValueError or OSError if no images of `shape` are available.
    """
    if source == "auto":
        try:
            return undesired_images("data", forget, shape, n, seed)
        except OSError as error:  # neither there nor to be downloaded
            images, origin = undesired_images("teacher", forget, shape, n, seed)
            return images, f"{origin}, since {' '.join(str(error).split())}; --data names a folder with real ones"
    if source == "teacher":
        teacher, n = load_unet("mnist"), n or 100
        if teacher.image_shape != shape or max(forget) >= teacher.num_classes:
            raise ValueError(f"the shipped teacher draws the classes 0..9 of {teacher.image_shape}, not class "
                             f"{max(forget)} of {shape}; --data names a folder with real images")
        images, _ = generate(lambda z, c, noise: ddim_sample(teacher, VPSchedule.linear(), z, c, steps=25, guidance=2),
                             torch.tensor(forget).repeat(n)[:n], teacher.image_shape, seed, "cpu", bar="drawing")
        return images, f"{n} images of class {forget} drawn from the class-conditional teacher"

    images = some_images(source, forget, shape, n, seed)
    return images, f"{len(images)} images from {source}"


def undesired_pictures(config, sd, concept):
    """D_f of a text-to-image model: pictures (N, 3, H, W) in [-1, 1], their prompts, and where they come from.

    Either from a folder, with the concept as every prompt; or drawn by the tiny model itself, from those of its prompts
    that contain the concept. ValueError when there are no such pictures."""
    side = sd.unet.config["image_size"] * 2 ** (len(sd.vae.config["block_out_channels"]) - 1)
    if config.data not in ("auto", "teacher"):
        pictures, origin = undesired_images(config.data, None, (3, side, side), config.images, config.seed)
        return pictures, [concept] * len(pictures), origin
    if config.sd != "tiny-sd":
        raise ValueError("--data: name a folder of pictures to forget; the tiny model alone draws its own")
    prompts, n = [prompt for prompt in every_prompt() if contains(prompt, concept)], config.images or 100
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(config.seed)).tolist()
    names = [prompts[order[i % len(prompts)]] for i in range(n)]
    with torch.no_grad():
        pictures, _ = generate(guided_sampler(sd, sd.unet), sd.embed(names), sd.unet.image_shape, config.seed, "cpu",
                               bar="drawing")
    return pictures, names, f"{n} pictures drawn by the model itself from its prompts with {concept!r}"


def read_posterior(words, unet):
    """The variance of every weight of `unet`, whose own weights are the mean: name -> tensor. ValueError if the files
    are for another network. words: one posterior (name or file), or several U-Nets, whose mean `unet` then takes."""
    words = words.split(",")
    if len(words) > 1:
        mean, variance, facts = *posterior([load_unet(word).state_dict() for word in words]), {}
    else:
        tensors, facts = read_tensors(words[0], "posterior")
        variance = {name: tensor.float() for name, tensor in tensors.items()}
    if {k: v.shape for k, v in variance.items()} != {k: v.shape for k, v in unet.state_dict().items()}:
        raise ValueError(f"{','.join(words)} is of another network than {unet.path.name}; see --posterior")
    for name, v in variance.items():
        if not (v.isfinite() & (v >= 0)).all():
            raise ValueError(f"{','.join(words)}: the variance of {name} is not everywhere finite and >= 0")
    if "mean_sha256" in facts and facts["mean_sha256"] != checksum(unet.path):
        raise ValueError(f"--posterior {words[0]} belongs to other weights than those of {unet.path.name}")
    if len(words) > 1:
        unet.load_state_dict(mean)
        unet.path = None  # no file holds these weights
    return variance


# ---------------------------------------------------------------------------- main


def check_flags(config):
    """ValueError for values that do not go together, and for a flag that was given and would change nothing."""
    if config.t_min >= config.t_max:
        raise ValueError(f"--t-min {config.t_min} must be below --t-max {config.t_max}")
    if 0 < config.stop_at <= 1:
        raise ValueError(f"--stop-at {config.stop_at:g} must be above 1, since the error grows from there; 0: never")
    if config.optimizer == "adam" and config.lr > 0.1:
        raise ValueError(f"--lr {config.lr} is a length in sigmas; Adam wants a rate, such as --lr 1e-5")
    if config.sd and config.classifier not in (Config.classifier, "none"):
        raise ValueError(f"--classifier {config.classifier}: with --sd it is {Config.classifier} or none")
    for name in ("teacher", "eval_images"):
        if config.sd and getattr(config, name) != getattr(Config, name):
            raise ValueError(f"--{name.replace('_', '-')} changes nothing with --sd; leave it out")


def main_of_sd(config):
    """Feature unlearning in a text-to-image model: the same method on its latents, each under its text."""
    concept = config.forget.replace(",", " ").strip()
    with refusing():
        if config.preset == "mnist":
            raise ValueError("--sd goes with --preset tiny-sd, whose settings are meant for it; give that too")
        if concept == "none":
            raise ValueError("--forget none: there is nothing to do")
        if config.sd == "tiny-sd":
            check_drawn(concept)
        sd = load_stable_diffusion(config.sd)
        if config.posterior == "auto" and config.sd != "tiny-sd":
            raise ValueError("--posterior: name the variance of this model's weights; the one that ships is tiny-sd's")
        variance = read_posterior("tiny-sd/posterior" if config.posterior == "auto" else config.posterior, sd.unet)
        judge, teacher_seen = None, None
        if config.sd == "tiny-sd" and config.classifier != "none":
            judge, teacher_seen = ConceptJudge(), load_concept_statistics()
        pictures, names, origin = undesired_pictures(config, sd, concept)
    run = Run(config, f"runs/vdu-sd-forget-{concept.replace(' ', '-')}")
    if run.rank == 0:
        print(f"undesired: {origin}")
    sd = sd.to(run.device)
    judge = judge and judge.to(run.device)
    with torch.no_grad():
        latents = torch.cat([sd.vae.latents(some.to(run.device)) for some in pictures.split(8)])
        texts = sd.embed(names)
    teacher = copy.deepcopy(sd.unet)  # mu*

    unet = train(config, run, sd.unet, variance, latents, sd.schedule, texts)

    metrics = {"forget": concept, "undesired_images": len(pictures), "undesired_from": origin,
               "steps_taken": run.step, "training_seconds": run.seconds}
    if run.rank == 0:
        save_unet(unet, run.folder / "unlearned.safetensors", method="VDU", forget=concept, sd=config.sd,
                  teacher=config.sd if teacher.path else None,  # None: a mean that no file holds
                  gamma=config.gamma, steps=run.step, seed=config.seed)
        others = every_prompt()[::71] if config.sd == "tiny-sd" else [""]  # eleven, of many digits and colours
        rows = list(dict.fromkeys(names))[:4] + [prompt for prompt in others if not contains(prompt, concept)]
        with torch.no_grad():
            c = sd.embed(rows).repeat_interleave(8 if config.sd == "tiny-sd" else 2, dim=0)
            for name, network in (("before", teacher), ("after", unet)):
                drawn, _ = generate(guided_sampler(sd, network), c, unet.image_shape, 0, run.device, 80)
                prompt_grid(drawn, rows, run.folder / f"samples_{name}.png", f"{name} VDU",
                            [i for i, prompt in enumerate(rows) if contains(prompt, concept)])
        if judge:
            if teacher.path is None:  # a mean that no file holds: what ships are another model's
                drawn, pairs, _ = draw_concepts(guided_sampler(sd, teacher), sd, 20, 0, run.device, "teacher, to judge")
                teacher_seen = *judge(drawn), pairs
            metrics |= evaluate_concept(guided_sampler(sd, unet), sd, judge, concept, 20, 0, teacher_seen, nfe=100)
            print(table(metrics))
    run.finish(metrics)


def main(config):
    with refusing():
        check_flags(config)
    if config.sd:
        return main_of_sd(config)
    with refusing():
        unet = load_teacher(config.teacher)
        if unet.num_classes is not None or unet.text_dim is not None:
            kind = "class-conditional" if unet.text_dim is None else "text-conditional"
            raise ValueError(f"--teacher {config.teacher} is {kind}; VDU is for unconditional ones, and for --sd")
        shipped = "mnist-unconditional-posterior"
        variance = read_posterior(shipped if config.posterior == "auto" else config.posterior, unet)
        forget = parse_classes(config.forget, 1000)
        if not forget:
            raise ValueError("--forget none: there is nothing to do")
        judge = None if config.classifier == "none" else Judge(unet, config.classifier)
        if judge and judge.statistics is None:
            raise ValueError(f"--classifier {config.classifier} comes without statistics of real images; give "
                             "--classifier none here, and measure with eval.py --features inception")
        if judge:
            check_forget(forget)
        images, origin = undesired_images(config.data, forget, unet.image_shape, config.images, config.seed)
    run = Run(config, f"runs/vdu-{config.preset}-forget{'-'.join(map(str, forget))}")
    if run.rank == 0:
        print(f"undesired: {origin}")
    unet, schedule = unet.to(run.device), VPSchedule.linear().to(run.device)
    teacher = copy.deepcopy(unet)  # mu*
    judge = judge and judge.to(run.device)

    train(config, run, unet, variance, images, schedule)

    metrics = {"forget": forget, "undesired_images": len(images), "undesired_from": origin,
               "steps_taken": run.step, "training_seconds": run.seconds}
    if run.rank == 0:
        save_unet(unet, run.folder / "unlearned.safetensors", method="VDU", forget=forget,
                  teacher=config.teacher if teacher.path else None,  # None: a mean that no file holds
                  teacher_sha256=teacher.path and checksum(teacher.path),
                  gamma=config.gamma, steps=run.step, seed=config.seed)
        samplers = {name: unconditional_sampler(network, schedule, run.dtype)
                    for name, network in (("before", teacher), ("after", unet))}
        for (name, sample), title in zip(samplers.items(), ("teacher", "VDU")):
            drawn, _ = generate(sample, 100, unet.image_shape, 0, run.device)  # from the same noise
            seen = judge(drawn)[1].argmax(1) if judge else None
            image_grid(drawn, None, run.folder / f"samples_{name}.png", f"{title}, no class asked for", forget, seen)
        if judge:
            metrics |= evaluate_unconditional(samplers["after"], judge, forget, config.eval_images, teacher,
                                              samplers["before"], run.dtype)
            print(table(metrics))
    run.finish(metrics)


if __name__ == "__main__":
    main(parse(Config, __doc__, PRESETS))
