"""Score Forgetting Distillation (SFD) for class-conditional diffusion, in one file.

Chen, Zhang, Zhou: "Score Forgetting Distillation: A Swift, Data-Free Method for Machine Unlearning in Diffusion
Models", ICLR 2025, arXiv 2409.11219. Where nothing is forgotten its losses are those of "Score identity Distillation"
(SiD).

    python ddpm_sfd.py --forget 0                     # MNIST, two CPU cores, a few minutes
    python ddpm_sfd.py --forget 3 --override 8        # who asks for a 3 gets an 8
    python ddpm_sfd.py --forget 0 1 --override random
    python ddpm_sfd.py --forget 0 --preset mnist-one-stage       # from the teacher itself
    python ddpm_sfd.py --forget none --preset mnist-one-stage    # one-step distillation alone (SiD, here with guidance)
    torchrun --nproc-per-node 2 ddpm_sfd.py --forget 0

The idea. A diffusion teacher knows the score of every class. We distil it into a generator that needs one network
call, and on the way we swap one class: whenever the generator is asked for it, the teacher is asked for a safe class
in its place. The generator never sees an image, neither a real one nor the teacher's; only scores at noised versions of
its own images. Two networks take turns:

    1. the fake score learns to denoise what the generator draws at present, so that it knows the generator's score;
    2. the generator moves its images to where the teacher's score and the fake score agree.

In one-stage SFD both begin as copies of the teacher, and distilling and forgetting go together. In two-stage SFD, the
default here, both begin where runs without a forgotten class ended (that pair is in weights/), and only forgetting
remains. The training steps are the same.

Where the two scores agree, the generator draws what the teacher would have drawn: for a retained class the class
itself, for a forgotten class the safe one. (With guidance k > 1 this holds only nearly, as guided scores at different t
do not belong to one distribution.) Nothing in the loss pulls towards the forgotten class any more.

Glossary. Each label marks the line of code that implements it; (D1) to (D3) and (L1) are in unet.py.

    teacher, phi        eps_phi    the frozen diffusion model
    fake_score, psi     eps_psi    tracks the score of the generator's own images                    (S2)
    generator, theta    eps_theta  draws an image in one call, at noise level t_init                 (S1)
    z, x_g              z, x_g     Gaussian noise, and the image that the generator makes of it
    c_fake              c          the label that was asked for; the generator and the fake score see it
    c_teacher           c'         the label that the teacher is asked for: c, or the safe class if c is to be forgotten
    f_phi, f_psi                   the clean images that the guided teacher and the fake score predict from x_t (D3)
    guidance, k         k          the teacher uses classifier-free guidance: eps_phi^k = eps_phi(x_t, t) +
                                   k (eps_phi(x_t, t, c') - eps_phi(x_t, t)); k = 1: eps_phi itself           (L1)
    alpha               alpha      the weight of what (S3) subtracts, see `generator_loss`           (S3)
    w                   w          the generator loss's weight, one for each image                   (S4)
    lambda_*            lambda     the weight of the forgotten class beside the retained ones; may fall (S5)
    class_rate                     our addition: in theta, what reads the class learns that much faster, see `by_class`
    ema_fake_score                 our addition: an average of psi's weights along the run, which predicts f_psi in (S3)

Tensors are images (B, C, H, W) in [-1, 1], steps t (B,) in 0..999 and labels (B,).
"""
import copy
import functools
from dataclasses import dataclass

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from eval import check_forget, evaluate, parse_classes, table
from features import Judge
from record import checksum
from run import Run, linear_decay, option, parse, refusing
from samples import balanced_labels, generate, image_grid
from teachers import load_teacher, read_pair
from unet import VPSchedule, ddim_sample, guided_noise, save_unet

# ---------------------------------------------------------------------------- config

ONE_STAGE = dict(init_generator="none", init_fake_score="none")  # theta and psi begin as copies of the teacher
OFFICIAL = ONE_STAGE | dict(  # the settings of the official code's CIFAR-10 run
    steps=50_000, batch_size=128, forget_batch_size=128, lr_generator=1e-5, class_rate=1.0, lr_fake_score=1e-5,
    lr_end=1.0, alpha=1.2, lambda_generator=0.01, lambda_fake_score=0.01, lambda_end=1.0, t_init=440, t_min=38,
    t_max=712, ema=0.9999, ema_fake_score=0.0, clip_value=1.0, guidance=1.0, guidance_safe=1.0, clip_images="off",
    classifier="none",
)
PRESETS = {
    "mnist": {},  # the defaults below: two stages, the first of which is done; weights/mnist-distilled is what it left
    "mnist-one-stage": ONE_STAGE | dict(  # there is more to learn, hence larger rates; our choice, as the defaults are
        steps=300, lr_generator=5e-4, class_rate=1.0, lr_fake_score=2e-3, lambda_generator=0.25,
        lambda_fake_score=0.25, lambda_end=1.0, alpha=1.2, guidance=1.2, guidance_safe=1.7, t_min=100,
        ema_fake_score=0.0),
    "cifar10": OFFICIAL | dict(teacher="cifar10.safetensors"),
    "stl10": OFFICIAL | dict(teacher="stl10.safetensors", batch_size=64, forget_batch_size=64,
                             lr_fake_score=3e-5),
}


@dataclass
class Config:
    preset: str = option("mnist", "settings to start from", choices=list(PRESETS))
    forget: str = option("0", "class or classes to forget; none: only distil", nargs="+")
    override: str = option("next", "the safe class: a number, next (the next retained one) or random (drawn each time)")
    teacher: str = option("mnist", "class-conditional: a shipped name, a file or a URL, see convert.py; for one of "
                         "your own use --preset mnist-one-stage: the shipped pair belongs to the shipped teacher")
    init_generator: str = option("mnist-distilled", "two-stage SFD: where theta begins, the generator of a --forget "
                                 "none run, a shipped name or a file; none: the teacher; official CIFAR-10 run: none")
    init_fake_score: str = option("mnist-distilled-fake-score", "where psi begins, the fake score of that run; none: "
                                  "the teacher; official CIFAR-10 run: none")
    steps: int = option(400, "training steps, each one update of both networks; official CIFAR-10 run: 50,000", low=0)
    batch_size: int = option(32, "images of retained classes a step, over all processes; official: 128", low=1)
    forget_batch_size: int = option(8, "images of forgotten classes a step; official: as many as retained ones", low=1)
    lr_generator: float = option(5e-5, "learning rate of theta, but for what has --class-rate; official: 1e-5", low=0)
    class_rate: float = option(16.0, "rate of theta's weights that read the class, in units of --lr-generator; with a "
                               "low rate for all others, forgetting disturbs less; our choice; official: 1", low=0)
    lr_fake_score: float = option(1.6e-3, "learning rate of psi; official: 1e-5, or 3e-5 in two stages and in plain "
                                  "distillation", low=0)
    lr_end: float = option(0.05, "share of all rates that is left at the end of a linear decay; official: 1, constant",
                           low=0, high=1)
    alpha: float = option(1.05, "alpha of (S3); official: 1.2")
    guidance: float = option(1.1, "k of (L1), the teacher's guidance; our choice; official: 1, none", low=0)
    guidance_safe: float = option(1.5, "k of (L1) where the teacher is asked for the safe class; official: 1", low=0)
    lambda_generator: float = option(0.5, "lambda of (S5) for theta, at first; with 0.25 each of the 32 + 8 images "
                                     "counts alike; official: 0.01", low=0)
    lambda_fake_score: float = option(0.5, "lambda of (S5) for psi, at first; official: 0.01", low=0)
    lambda_end: float = option(0.1, "share of both lambdas that is left at the end of an exponential decay; our "
                               "choice; official: 1, constant", low=1e-6, high=1)
    t_init: int = option(440, "the noise level that the generator works at; official: 440", low=0, high=999)
    t_min: int = option(200, "first step t of (S2) and (S3); our choice; official: 38", low=0, high=999)
    t_max: int = option(712, "upper end of t in (S2) and (S3), exclusive; official: 712", low=1, high=1000)
    ema: float = option(0.98, "decay of theta's weight average, the result; official: 0.9999", low=0, high=1)
    ema_fake_score: float = option(0.9, "decay of the average of psi's weights that predicts f_psi in (S3), as psi "
                                   "swings from step to step; our choice; official: 0, psi itself", low=0, high=1)
    clip_value: float = option(1.0, "each gradient entry is clipped to +-this; 0: not; official: 1", low=0)
    clip_images: str = option("on", "clip x_g to [-1, 1] before the scores see it, as is done anyway to show it; "
                              "our choice; official: off", choices=["on", "off"])
    amp: str = option("auto", "mixed precision; auto: bf16 where it is native, else fp16 on a GPU, none on a CPU",
                      choices=["auto", "bf16", "fp16", "off"])
    compile: bool = option(False, "torch.compile the networks: minutes at the start, then faster steps on a GPU")
    device: str = option("auto", "where to compute", choices=["auto", "cpu", "cuda"])
    seed: int = option(0, "seed of everything random", low=0, high=10**12)
    out: str = option("", "run folder; runs/ddpm_sfd-<preset>-forget<classes> if not given")
    resume: bool = option(False, "go on from the checkpoint in the run folder")
    save_every: int = option(500, "steps between checkpoints", low=1)
    eval_images: int = option(1000, "images of each class to compute metrics on; a teacher that is not shipped must "
                              "draw as many, at 50 calls each", low=2)
    classifier: str = option("mnist-classifier", "for the metrics: shipped, or from pretrain.py; none: no metrics")


# ---------------------------------------------------------------------------- the method: (S1) to (S5)


def one_step(generator, z, c, schedule, t_init):
    """The one-step generator. z (B, C, H, W) standard Gaussian, c (B,) -> images x_g (B, C, H, W), not clipped.

    The network still predicts noise, as the teacher did, but its input is now pure noise, at level t_init."""
    t = torch.full((len(z),), t_init, device=z.device)
    a, s = schedule.a(t), schedule.s(t)
    return (s * z - s * generator(s * z, t, c)) / a  # (S1) x_g = (s z - s eps_theta(s z, t_init, c)) / a


def fake_score_loss(fake_score, x_g, t, c, noise, schedule):
    """DDPM's denoising loss, on the generator's images x_g (B, C, H, W) in place of data: one value a sample, (B,).

    t (B,), c (B,) labels, noise (B, C, H, W)."""
    x_t = schedule.add_noise(x_g, noise, t)  # (D1)
    return (noise - fake_score(x_t, t, c)).square().sum(dim=(1, 2, 3))  # (S2) L_psi = || eps - eps_psi(x_t, t, c) ||^2


def generator_loss(teacher, fake_score, x_g, t, c_teacher, c_fake, noise, schedule, alpha):
    """How far apart teacher and fake score are at the generator's images x_g (B, C, H, W): one value a sample, (B,).

    t (B,), noise (B, C, H, W); c_teacher and c_fake (B,): c' and c; both networks: (x_t, t, c) -> the noise in x_t.
    Gradients reach the generator through every x_g, including those in the inputs of both networks. With d = f_phi -
    f_psi, and leaving w aside, (S3) is d . (f_phi - x_g) - alpha d . d. If f_psi is what it learns to be, the mean of
    x_g given x_t, both products are on average the same Fisher divergence. So values may be negative, and at alpha 1
    they lie around 0: what matters is the gradient (SiD)."""
    x_t = schedule.add_noise(x_g, noise, t)  # (D1)
    f_phi = schedule.predict_x0(x_t, teacher(x_t, t, c_teacher), t)  # (D3), asked for c'
    f_psi = schedule.predict_x0(x_t, fake_score(x_t, t, c_fake), t)  # (D3), asked for c
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


# ---------------------------------------------------------------------------- labels


def draw_labels(retained, forget, override, n_retained, n_forgotten):
    """Labels of one step, retained ones first: for the generator and fake score, and for the teacher. (B,), (B,)

    retained, forget: the classes, (R,), (F,). override: the safe class of each forgotten one, (F,), or None for random.
    """
    def indices(classes, n):
        return torch.randint(len(classes), (n,), device=classes.device)

    keep = retained[indices(retained, n_retained)]
    if len(forget) == 0:
        return keep, keep
    pick = indices(forget, n_forgotten)
    safe = override[pick] if override is not None else retained[indices(retained, n_forgotten)]
    return torch.cat([keep, forget[pick]]), torch.cat([keep, safe])


def read_classes(config, num_classes):
    """The command line's words as (retained, forget, override) for `draw_labels`. ValueError says what is wrong."""
    forget = parse_classes(config.forget, num_classes)
    check_forget(forget, num_classes)
    retained = [k for k in range(num_classes) if k not in forget]
    if not forget and config.override != "next":
        raise ValueError(f"--override {config.override} is for a class to forget; with --forget none leave it out")
    override = None
    if config.override == "next":
        override = [min(retained, key=lambda r: (r - k) % num_classes) for k in forget]
    elif config.override != "random":
        safe = parse_classes(config.override, num_classes, "--override")
        if len(safe) != 1 or safe[0] in forget:
            raise ValueError(f"--override {config.override} is no retained class; the retained ones are {retained}")
        override = safe * len(forget)
    return [None if x is None else torch.tensor(x, dtype=torch.long) for x in (retained, forget, override)]


# ---------------------------------------------------------------------------- the loop


def by_class(unet):
    """The parameters that read the class label, and all others: two lists. The first are the label table, its dense
    layers, and each block's projection of time and class; of MNIST's network a tenth. For a label to mean another class
    mainly these have to change; the others draw the strokes of all classes."""
    named = dict(unet.named_parameters())
    reads = [name for name in named if "class_" in name or "emb_proj" in name]
    return [named[name] for name in reads], [named[name] for name in named if name not in reads]


def train(config, run, teacher, schedule, classes, judge=None, generator=None, fake_score=None):
    """SFD from `teacher`, which is not changed; returns the generator (theta's averaged weights) and the fake score.

    classes: as `read_classes` returns them. judge: for UA on the progress bar; without it none is shown. generator,
    fake_score: initial theta and psi, changed in place; copies of the teacher if not given."""
    retained, forget, override = (None if x is None else x.to(run.device) for x in classes)
    n_retained = config.batch_size // run.world
    n_forgotten = config.forget_batch_size // run.world if len(forget) else 0

    teacher = run.prepare(teacher.eval().requires_grad_(False))  # phi
    fake_score = run.prepare((fake_score or copy.deepcopy(teacher)).train().requires_grad_(True))  # psi
    generator = run.prepare((generator or copy.deepcopy(teacher)).train().requires_grad_(True))  # theta
    ema = AveragedModel(generator, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    ema_fake_score = AveragedModel(fake_score, multi_avg_fn=get_ema_multi_avg_fn(config.ema_fake_score))
    ema_fake_score = run.prepare(ema_fake_score.eval().requires_grad_(False))  # as the teacher: only asked
    adam = dict(betas=(0.0, 0.999), eps=1e-8, fused=run.fused)
    optimizer_psi = torch.optim.Adam(fake_score.parameters(), lr=config.lr_fake_score, **adam)
    reads, rest = by_class(generator)
    groups = [{"params": rest}, {"params": reads, "lr": config.class_rate * config.lr_generator}]
    optimizer_theta = torch.optim.Adam(groups, lr=config.lr_generator, **adam)
    decays = [linear_decay(optimizer, config.lr_end, config.steps) for optimizer in (optimizer_psi, optimizer_theta)]
    state = {"fake_score": fake_score, "generator": generator, "ema": ema, "ema_fake_score": ema_fake_score,
             "optimizer_psi": optimizer_psi, "optimizer_theta": optimizer_theta, "decay_psi": decays[0],
             "decay_theta": decays[1]}
    parallel_fake_score, parallel_generator = run.parallel(fake_score), run.parallel(generator)
    k = torch.tensor([config.guidance] * n_retained + [config.guidance_safe] * n_forgotten, device=run.device)
    k = k.view(-1, 1, 1, 1) if (k != 1).any() else 1  # a k for each image, or none at all
    guided_teacher = functools.partial(guided_noise, teacher, guidance=k)  # eps_phi^k, by (L1)

    def draw_t_and_noise(x):
        return torch.randint(config.t_min, config.t_max, (len(x),), device=x.device), torch.randn_like(x)

    for step in run.loop(state, label="SFD"):
        share = config.lambda_end ** (step / config.steps)  # of lambda, from 1: forget first, then mend what that cost

        # labels are drawn, images are the generator's own; retained and forgotten ones share one pass
        c, c_teacher = draw_labels(retained, forget, override, n_retained, n_forgotten)
        z = torch.randn(len(c), *teacher.image_shape, device=run.device)
        with run.autocast():
            x_g = one_step(parallel_generator, z, c, schedule, config.t_init)  # (S1)
        if config.clip_images == "on":  # as it will be shown; else black stays grainy. No gradient outside [-1, 1]
            x_g = x_g.clamp(-1, 1)

        # 1. the fake score learns the generator's distribution
        t, noise = draw_t_and_noise(x_g)
        with run.autocast():
            loss = fake_score_loss(parallel_fake_score, x_g.detach(), t, c, noise, schedule)  # (S2)
        loss_psi = total(loss, n_retained, share * config.lambda_fake_score)  # (S5)
        run.update("loss_psi", loss_psi, fake_score, optimizer_psi, config.clip_value)
        ema_fake_score.update_parameters(fake_score)

        # 2. the generator moves to where teacher and fake score (by its average) agree; both stand still
        t, noise = draw_t_and_noise(x_g)
        with run.autocast():
            loss = generator_loss(
                guided_teacher, ema_fake_score, x_g, t, c_teacher, c, noise, schedule, config.alpha)  # (S3)
        loss_theta = total(loss, n_retained, share * config.lambda_generator)  # (S5)
        run.update("loss_theta", loss_theta, generator, optimizer_theta, config.clip_value)
        ema.update_parameters(generator)
        for decay in decays:
            decay.step()

        numbers = {"loss_psi": loss_psi, "loss_theta": loss_theta}
        if judge and n_forgotten:  # of the images just drawn
            numbers["ua"] = judge.live_ua(x_g[n_retained:], c[n_retained:])
        run.log(**numbers)
    return ema.module.eval(), fake_score.eval()


# ---------------------------------------------------------------------------- main


def main(config):
    with refusing():
        teacher = load_teacher(config.teacher)
        if teacher.num_classes is None:
            kind = "unconditional" if teacher.text_dim is None else "text-conditional"
            raise ValueError(f"--teacher {config.teacher} is {kind}; SFD needs a class-conditional teacher")
        classes = read_classes(config, teacher.num_classes)
        generator, fake_score = read_pair(config, teacher)
        if config.t_min >= config.t_max:
            raise ValueError(f"--t-min {config.t_min} must be below --t-max {config.t_max}")
        judge = None if config.classifier == "none" else Judge(teacher, config.classifier)
    forget = classes[1].tolist()
    folder = f"runs/ddpm_sfd-{config.preset}-forget{'-'.join(map(str, forget)) or 'none'}"
    run = Run(config, folder, loss_scale=16.0)  # low for fp16, as the losses are sums over pixels
    teacher, schedule = teacher.to(run.device), VPSchedule.linear().to(run.device)
    generator, fake_score, judge = (x and x.to(run.device) for x in (generator, fake_score, judge))

    generator, fake_score = train(config, run, teacher, schedule, classes, judge, generator, fake_score)

    metrics = {"nfe": 1, "forget": forget, "training_seconds": run.seconds}
    if run.rank == 0:
        card = dict(method="SFD", forget=forget, teacher=config.teacher, teacher_sha256=checksum(teacher.path),
                    steps=config.steps, seed=config.seed)
        save_unet(generator, run.folder / "generator.safetensors", t_init=config.t_init, **card)
        save_unet(fake_score, run.folder / "fake_score.safetensors", what="fake score", **card)

        def sample(z, c, noise=None):
            return one_step(generator, z, c, schedule, config.t_init)

        def teacher_sample(z, c, noise=None):
            return ddim_sample(teacher, schedule, z, c, steps=50)

        labels = balanced_labels(teacher.num_classes, 10)  # ten images a class, before and after from the same noise
        for name, draw, title in (("before", teacher_sample, "teacher, 50 network calls"),
                                  ("after", sample, "SFD, 1 network call")):
            with run.autocast():
                images, _ = generate(draw, labels, teacher.image_shape, config.seed, run.device)
            image_grid(images, labels, run.folder / f"samples_{name}.png", title, forget)
        if judge:
            metrics |= evaluate(sample, 1, judge, teacher, forget, config.eval_images, config.seed, teacher_sample)
            print(table(metrics))
    run.finish(metrics)


if __name__ == "__main__":
    main(parse(Config, __doc__, PRESETS))
