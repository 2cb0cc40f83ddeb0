"""Trains what ships in weights/, in this order, and the teachers of CIFAR-10 and STL-10, which do not:

    python pretrain.py mnist-classifier    # the classifier that the metrics use
    python pretrain.py mnist               # the class-conditional teacher: the first of three runs, all on its card
    python pretrain.py mnist-unconditional # where the unconditional ones start: the teacher above without its classes
    python pretrain.py mnist-posterior     # K networks trained from there: their mean is the unconditional teacher
    python pretrain.py mnist-statistics    # what the metrics compare with: real images, and the teachers'
    python pretrain.py tiny-sd-autoencoder # of the tiny text-to-image model
    python pretrain.py tiny-sd             # its text encoder and U-Net; the folder weights/tiny-sd
    python pretrain.py tiny-sd-posterior   # how far K U-Nets trained on from it drift apart; also weights/tiny-sd
    python pretrain.py cifar10             # days on one GPU; stl10 likewise
    python pretrain.py cifar10-posterior   # from google/ddpm-cifar10-32
    python pretrain.py cifar10-classifier  # an hour on one GPU, for eval.py --classifier; stl10-classifier likewise

Each leaves its files in runs/pretrain-<what>/, with a card (.json) that says how they were made and what they score.
Copy what ships to weights/ before the next command: the files of mnist-classifier, mnist, mnist-posterior and
mnist-statistics, the folder tiny-sd, and into it the files of tiny-sd-posterior. mnist-unconditional and
tiny-sd-autoencoder stay in runs/, where the next command finds them. mnist-distilled and its fake score are written by
`ddpm_sfd.py --forget none`, first with `--preset mnist-one-stage`, then from what that left; their cards give both
commands, and a new mnist teacher needs a new pair. Data sets are read from --data; torchvision downloads any that are
missing there.
"""

import copy
import json
import math
import os
import shlex
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import mnist_statistics
import tiny_sd
from data import cifar10, mnist, stl10
from features import Classifier, ResNet34
from record import checksum, commit, launcher, machine, precision, write_json
from run import Run, option, parse, refuse, refusing, warm_up_and_down
from stable_diffusion import Autoencoder, load_stable_diffusion, save_stable_diffusion
from teachers import load_teacher
from unet import UNet, VPSchedule, load_network, save_unet, write_tensors
from vdu import posterior

MNIST = dict(
    image_size=28, in_channels=1, channels=16, multipliers=(1, 2, 4), blocks=1, attention_at=(), dropout=0.0, groups=1
)
TEACHERS = {  # what -> the configuration of its U-Net, and its images
    "mnist": (MNIST | dict(num_classes=10), mnist),
    "mnist-unconditional": (MNIST, mnist),
    "cifar10": (dict(num_classes=10), cifar10),  # the official configuration is the U-Net's own default
    "stl10": (dict(num_classes=10, image_size=64, multipliers=(1, 2, 2, 2, 4)), stl10),
}

# ---------------------------------------------------------------------------- config

DATA = {"mnist": "MNIST", "tiny": "MNIST, painted in six colours", "cifar10": "CIFAR-10", "stl10": "STL-10"}
POSTERIORS = ("mnist-posterior", "cifar10-posterior")  # of unconditional teachers
BEGINNING = "runs/pretrain-mnist-unconditional/mnist-unconditional.safetensors"
AUTOENCODER = "runs/pretrain-tiny-sd-autoencoder/tiny-sd-autoencoder.safetensors"
PRESETS = {
    "mnist": dict(steps=16_000, batch_size=128, lr=2e-3, ema=0.9995),
    "mnist-unconditional": dict(steps=4_000, batch_size=64, lr=1e-3, min_snr=50.0, init="mnist"),
    "mnist-posterior": dict(steps=4_000, batch_size=64, lr=1e-3, min_snr=50.0, init=BEGINNING),
    "mnist-classifier": dict(steps=5_600, batch_size=128, lr=4e-3),
    "mnist-statistics": dict(steps=0),
    "cifar10-classifier": dict(steps=78_000, batch_size=128, lr=0.1),  # 200 passes over the images
    "stl10-classifier": dict(steps=15_600, batch_size=128, lr=0.1),  # 400
    "tiny-sd-autoencoder": dict(steps=2_000, batch_size=64, lr=2e-3),
    "tiny-sd": dict(steps=8_000, batch_size=64, lr=2e-3, amp="off", init=AUTOENCODER),  # bf16 is slower here
    "tiny-sd-posterior": dict(steps=600, batch_size=64, lr=1e-3, amp="off"),
    # as in the official code: 800,000 iterations, flips, one label in ten dropped, plain loss; the rate is our choice
    "cifar10": dict(steps=800_000, batch_size=128, lr=2e-4, lr_down=0.0, ema=0.9999, flip=0.5, min_snr=1e9),
    "cifar10-posterior": dict(steps=50_000, batch_size=128, lr=2e-5, init="hub:google/ddpm-cifar10-32", min_snr=1e9),
    "stl10": dict(steps=800_000, batch_size=64, lr=2e-4, lr_down=0.0, ema=0.9999, flip=0.5, min_snr=1e9),
}


@dataclass
class Config:
    what: str = option("mnist", "what to make", choices=list(PRESETS), positional=True)
    data: str = option("data", "folder of torchvision's data sets, or where to download them")
    steps: int = option(12_000, "optimizer steps", low=0)
    batch_size: int = option(64, "images a step, over all processes", low=1)
    lr: float = option(1.5e-3, "peak learning rate of Adam; of SGD for the classifiers of CIFAR-10 and STL-10", low=0)
    lr_down: float = option(0.4, "share of the steps, at the end, over which the rate falls to 0; not for "
                           "classifiers", low=0, high=1)
    flip: float = option(0.0, "share of images that are mirrored; teachers", low=0, high=1)
    ema: float = option(0.999, "decay of the weight average that is kept; teachers, tiny-sd", low=0, high=1)
    label_dropout: float = option(0.1, "share of labels or prompts replaced by 'none', for guidance; "
                                  "class-conditional teachers, tiny-sd and its posterior", low=0, high=1)
    min_snr: float = option(5.0, "loss weight min(SNR, this) / SNR (Hang et al. 2023, 'Min-SNR'; 1e9: the plain loss); "
                           "teachers, and posteriors except tiny-sd's", low=1e-3)
    init: str = option("", "what to start from: a teacher, by shipped name, file, URL or hub:ORG/NAME; tiny-sd: its "
                       "autoencoder's file")
    checkpoints: int = option(5, "K, how many networks start alike and divide the steps; posterior", low=2)
    per_class: int = option(1000, "teacher images of each class; statistics", low=2)
    images: int = option(2000, "images of the unconditional teacher; statistics", low=100)
    per_pair: int = option(20, "images of each digit in each colour; tiny-sd's scores", low=1)
    amp: str = option("auto", "mixed precision; statistics score the class-conditional teacher in float32 all the same",
                      choices=["auto", "bf16", "fp16", "off"])
    compile: bool = option(False, "torch.compile the network: minutes at the start, then faster steps on a GPU; not "
                           "for tiny-sd, its autoencoder, and statistics")
    device: str = option("auto", "where to compute", choices=["auto", "cpu", "cuda"])
    seed: int = option(0, "seed of everything random", low=0, high=10**12)
    out: str = option("", "run folder, runs/pretrain-<what> if not given")
    resume: bool = option(False, "go on from the checkpoint in the run folder")
    save_every: int = option(1000, "steps between checkpoints", low=1)


def make_card(run, path, **facts):
    """The card of a file in weights/: what it is, how it was made, what it scores, its checksum. Its command
    makes the file again: it has the flags that differ from the preset's settings, without paths."""
    settings = {k: v for k, v in run.settings.items() if k not in ("data", "out", "resume", "device")}
    usual = asdict(Config(run.config.what)) | PRESETS[run.config.what]
    changed = {k: v for k, v in settings.items() if v != usual[k] and k != "save_every"}
    flags = [f"--{k.replace('_', '-')}" + f" {shlex.quote(str(v))}" * (v is not True) for k, v in changed.items()]
    return {"file": path.name, "sha256": checksum(path), "bytes": path.stat().st_size,
            "data": DATA.get(run.config.what.split("-")[0]),
            "command": " ".join([launcher(), "pretrain.py", run.config.what, *flags]), **facts,
            "seconds": round(run.elapsed()), "machine": machine(run.device),
            "amp": precision(run.dtype), "commit": commit(), "config": settings}


def write_card(run, path, **facts):
    card = make_card(run, path, **facts)
    write_json(path.with_suffix(".json"), card)
    print(json.dumps({k: card[k] for k in ("file", "bytes", "seconds", "scores") if k in card}, indent=2))


# ---------------------------------------------------------------------------- the teachers


def weighted_denoising_loss(network, x0, c, schedule, min_snr):
    """DDPM's loss on images x0 (B, C, H, W), a mean over pixels, with the Min-SNR weight. Scalar."""
    t = torch.randint(schedule.T, (len(x0),), device=x0.device)
    noise = torch.randn_like(x0)
    eps = network(schedule.add_noise(x0, noise, t), t, c)  # (D1)
    snr = schedule.alphas_cumprod[t] / (1 - schedule.alphas_cumprod[t])
    weight = (min_snr / snr).clamp(max=1)
    return (weight * (eps - noise).square().mean(dim=(1, 2, 3))).mean()


def without_classes(unet):
    """The unconditional U-Net inside a class-conditional one: the same network, always told "no label".

    What that label adds in each block is constant, so it goes into a bias, and no class embedding is needed."""
    state = {k: v for k, v in unet.state_dict().items() if not k.startswith("class_")}
    with torch.no_grad():
        no_label = F.silu(unet.class_dense(unet.class_embedding.weight[unet.null_label]))
    for name in [k for k in state if k.endswith("emb_proj.weight")]:
        state[name], of_label = state[name].chunk(2, dim=1)
        state[name.replace("weight", "bias")] = state[name.replace("weight", "bias")] + of_label @ no_label
    unconditional = UNet(**unet.config | {"num_classes": None})
    unconditional.load_state_dict(state)
    return unconditional


def start(config):
    """The network that training begins with: a new one, or `--init`, without its classes where none are wanted."""
    settings = TEACHERS[config.what.removesuffix("-posterior")][0]
    conditional = "num_classes" in settings and not config.what.endswith("-posterior")
    settings = settings if conditional else settings | {"num_classes": None}
    if not config.init:
        return UNet(**settings)
    unet = load_teacher(config.init)
    if unet.image_shape != UNet(**settings).image_shape:
        raise ValueError(f"--init {config.init} draws images of another shape than {config.what} does")
    if conditional and unet.num_classes != settings["num_classes"]:
        raise ValueError(f"--init {config.init} draws {unet.num_classes or 'no'} classes; {config.what} needs a start "
                         f"that draws {settings['num_classes']}")
    return unet if conditional or unet.num_classes is None else without_classes(unet)


def train_teacher(config, run):
    images, labels = (x.to(run.device) for x in TEACHERS[config.what][1](config.data))
    schedule = VPSchedule.linear().to(run.device)
    unet = run.prepare(start(config).to(run.device).train())
    ema = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    optimizer = torch.optim.Adam(unet.parameters(), lr=config.lr, betas=(0.9, 0.99), eps=1e-8, fused=run.fused)
    lr = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_and_down(config.steps, config.lr_down))
    network, batch = run.parallel(unet), config.batch_size // run.world

    for step in run.loop({"unet": unet, "ema": ema, "optimizer": optimizer, "lr": lr}, label="teacher"):
        pick, c = torch.randint(len(images), (batch,), device=run.device), None
        if unet.num_classes is not None:
            dropped = torch.rand(batch, device=run.device) < config.label_dropout
            c = torch.where(dropped, unet.null_label, labels[pick])
        x0 = images[pick]
        if config.flip:
            mirrored = torch.rand(batch, 1, 1, 1, device=run.device) < config.flip
            x0 = torch.where(mirrored, x0.flip(3), x0)
        with run.autocast():
            loss = weighted_denoising_loss(network, x0, c, schedule, config.min_snr)
        run.update("loss", loss, unet, optimizer)
        lr.step()
        ema.update_parameters(unet)
        if step % 10 == 0:
            run.log(loss=loss)

    if run.rank == 0:
        kind = "unconditional" if unet.num_classes is None else "class-conditional"
        path = run.folder / f"{config.what}.safetensors"
        save_unet(ema.module, path, what=f"{kind} teacher, {config.what}", steps=config.steps)
        write_card(run, path, what=f"{kind} DDPM teacher, training images", steps=config.steps,
                   parameters=sum(p.numel() for p in unet.parameters()))


def train_posterior(config, run):
    """K networks that start from the same weights, `--init`, and train separately, each with its own seed: their mean
    is the network that vdu.py starts from, and their variance tells which weights matter."""
    data = config.what.removesuffix("-posterior")
    images, schedule = TEACHERS[data][1](config.data)[0].to(run.device), VPSchedule.linear().to(run.device)
    beginning = start(config).to(run.device)

    def loss_of(network):
        pick = torch.randint(len(images), (config.batch_size // run.world,), device=run.device)
        with run.autocast():
            return weighted_denoising_loss(network, images[pick], None, schedule, config.min_snr)

    mean, variance, facts = go_on_apart(config, run, beginning, loss_of)
    if run.rank == 0:
        beginning.load_state_dict(mean)
        path = run.folder / f"{data}-unconditional.safetensors"
        save_unet(beginning, path, what=f"unconditional teacher, {data}, the mean of a posterior", **facts)
        write_card(run, path, parameters=sum(p.numel() for p in beginning.parameters()), **facts,
                   what=f"unconditional DDPM teacher, training images: the mean of {facts['checkpoints']} networks")
        write_variance(run, run.folder / f"{data}-unconditional-posterior.safetensors", variance,
                       what=f"their mean is {data}-unconditional", mean_sha256=checksum(path), **facts)


def go_on_apart(config, run, beginning, loss_of):
    """Train K copies of the U-Net `beginning` on, each separately: mean and variance of their weights, and the facts.
    loss_of: network -> scalar, on a new batch at each call."""
    K, each = config.checkpoints, config.steps // config.checkpoints
    unet = run.prepare(copy.deepcopy(beginning).train())
    finished = torch.nn.ModuleList(copy.deepcopy(beginning) for _ in range(K))
    optimizer = torch.optim.Adam(unet.parameters(), lr=config.lr, betas=(0.9, 0.99), eps=1e-8, fused=run.fused)
    shape, network = warm_up_and_down(each, config.lr_down), run.parallel(unet)

    for step in run.loop({"unet": unet, "optimizer": optimizer, "finished": finished}, label="posterior"):
        k, i = divmod(step, each)
        if i == 0:
            unet.load_state_dict(beginning.state_dict())
            optimizer.state.clear()
            torch.manual_seed(((config.seed * K + k) * 1_000_003 + run.rank) % 2**63)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * shape(i)
        loss = loss_of(network)
        run.update("loss", loss, unet, optimizer)
        if i == each - 1:
            finished[k].load_state_dict(unet.state_dict())
        if step % 10 == 0:
            run.log(loss=loss)

    return *posterior([one.state_dict() for one in finished]), dict(checkpoints=K, steps_each=each)


def write_variance(run, path, variance, what, dtype=torch.float32, **facts):
    """A posterior's file: the variance of every weight, and its card."""
    write_tensors(path, "posterior", {name: v.to(dtype) for name, v in variance.items()}, **facts)
    sigma = torch.cat([v.flatten() for v in variance.values()]).sqrt().sort().values
    write_card(run, path, what=f"variance of every weight over {facts['checkpoints']} networks; {what}", **facts,
               sigma={f"{q:.0%}": sigma[int(q * len(sigma))].item() for q in (0.01, 0.1, 0.5, 0.9, 0.99)})


# ---------------------------------------------------------------------------- the classifier


def jitter(images, degrees=10, scale=0.1, shift=0.1):
    """Each image (B, 1, H, W) turned, scaled and shifted a little, at random. shift: as a share of half the width."""
    B, device = len(images), images.device
    angle = (torch.rand(B, device=device) * 2 - 1) * math.radians(degrees)
    zoom = 1 + (torch.rand(B, device=device) * 2 - 1) * scale
    move = (torch.rand(B, 2, device=device) * 2 - 1) * shift
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    affine = torch.stack([cos, -sin, move[:, 0], sin, cos, move[:, 1]], dim=1).view(B, 2, 3)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1  # outside the image is black, -1


def crop_and_flip(images):
    """Shift each image (B, C, H, H) by up to an eighth of its size, filling in grey, and mirror half of them."""
    B, _, H, _ = images.shape
    pad = H // 8
    first = torch.randint(2 * pad + 1, (2, B, 1), device=images.device)
    rows, columns = first + torch.arange(H, device=images.device)  # (B, H) each
    columns = torch.where(torch.rand(B, 1, device=images.device) < 0.5, columns, columns.flip(1))
    pick = torch.arange(B, device=images.device)[:, None, None]
    cropped = F.pad(images, [pad] * 4)[pick, :, rows[:, :, None], columns[:, None, :]]  # (B, H, H, C)
    return cropped.permute(0, 3, 1, 2)


CLASSIFIERS = {  # what -> its images, the network, what is done to each image of a step, and what the card calls it
    "mnist-classifier": (mnist, Classifier, jitter,
                         "MNIST classifier; its penultimate layer: the features of FID, precision and recall"),
    "cifar10-classifier": (cifar10, lambda: ResNet34(32), crop_and_flip, "CIFAR-10 classifier, ResNet-34"),
    "stl10-classifier": (stl10, lambda: ResNet34(64), crop_and_flip, "STL-10 classifier at 64 px, ResNet-34"),
}


def train_classifier(config, run):
    dataset, network, augment, what = CLASSIFIERS[config.what]
    images, labels = (x.to(run.device) for x in dataset(config.data, train=True))
    classifier = run.prepare(network().to(run.device).train())
    if isinstance(classifier, Classifier):
        optimizer, smoothing = torch.optim.AdamW(classifier.parameters(), lr=config.lr, weight_decay=0.02), 0.05
        lr = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=max(1, config.steps))
    else:
        settings = dict(lr=config.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
        optimizer, smoothing = torch.optim.SGD(classifier.parameters(), **settings), 0.0
        lr = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    for step in run.loop({"classifier": classifier, "optimizer": optimizer, "lr": lr}, label="classifier"):
        pick = torch.randint(len(images), (config.batch_size,), device=run.device)
        x = augment(images[pick])  # not under autocast, which would round where pixels come from
        with run.autocast():
            logits = classifier(x)
        loss = F.cross_entropy(logits.float(), labels[pick], label_smoothing=smoothing)
        run.update("loss", loss, classifier, optimizer)
        lr.step()
        if step % 10 == 0:
            run.log(loss=loss)

    classifier.eval()
    test_images, test_labels = dataset(config.data, train=False)
    with torch.no_grad():
        predictions = torch.cat([classifier(x.to(run.device)).argmax(1).cpu() for x in test_images.split(500)])
    path = run.folder / f"{config.what}.safetensors"
    kind = type(classifier).__name__
    write_tensors(path, "classifier", classifier.state_dict(), network=kind, config=classifier.config)
    scores = {"test_accuracy": (predictions == test_labels).double().mean().item(), "test_images": len(test_labels)}
    write_card(run, path, what=what, parameters=sum(p.numel() for p in classifier.parameters()), steps=config.steps,
               scores=scores)


# ---------------------------------------------------------------------------- the statistics, and tiny-sd


def make_statistics(config, run):
    tensors, facts, scores = mnist_statistics.measure(config, run)
    path = run.folder / "mnist-statistics.safetensors"
    write_tensors(path, "statistics", tensors, **facts)
    write_card(run, path, scores=scores,
               what="per-class feature means and covariances: real training and test images, the teachers' images")


def make_tiny_autoencoder(config, run):
    vae = tiny_sd.train_autoencoder(config, run)
    path = run.folder / "tiny-sd-autoencoder.safetensors"
    write_tensors(path, "autoencoder", vae.state_dict(), config=vae.config)
    write_card(run, path, what="autoencoder of tiny-sd, on MNIST's digits in six colours", steps=config.steps,
               parameters=sum(p.numel() for p in vae.parameters()), curves={k: v[-1] for k, v in run.curves.items()})


def read_autoencoder(source):
    """The autoencoder that `make_tiny_autoencoder` left. Errors as in `load_network`."""
    return load_network(source, "autoencoder", lambda facts: Autoencoder(**facts["config"]))[0]


def make_tiny_sd(config, run):
    sd, folder = tiny_sd.train(config, run, read_autoencoder(config.init)), run.folder / "tiny-sd"
    save_stable_diffusion(sd, folder, torch.float16)
    sd = load_stable_diffusion(folder).to(run.device)  # as it ships, in half precision
    scores = tiny_sd.score(sd, run, folder / "statistics.safetensors", config.per_pair, config.seed)
    parts = {"text_encoder": sd.text_encoder, "vae": sd.vae, "unet": sd.unet}
    parameters = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    write_json(folder / "card.json", make_card(
        run, folder / "unet" / "diffusion_pytorch_model.safetensors",
        what="text-to-image model of coloured digits, in Stable Diffusion's layout", steps=config.steps,
        parameters=parameters, scores=scores))
    print(json.dumps(scores, indent=2))


def make_tiny_posterior(config, run):
    """How far K networks trained on from the shipped tiny model's U-Net drift apart; that U-Net stays the mean."""
    with refusing():
        sd = load_stable_diffusion("tiny-sd").to(run.device)
    loss_of = tiny_sd.latent_loss(config, run, sd.vae, sd.tokenizer, sd.schedule)
    sd.text_encoder.requires_grad_(False)
    _, variance, facts = go_on_apart(config, run, sd.unet, lambda unet: loss_of(sd.text_encoder, unet))
    write_variance(run, run.folder / "posterior.safetensors", variance, "tiny-sd's U-Net is where they began",
                   torch.bfloat16, mean_sha256=checksum(sd.unet.path), **facts)  # variances are below float16's range


# ---------------------------------------------------------------------------- main


def check_flags(config):
    """ValueError for a flag that was given but has no effect here: the card would list it as if it had."""
    what = config.what
    teacher, classifier, statistics = what in TEACHERS, what in CLASSIFIERS, what == "mnist-statistics"
    posterior, tiny = what.endswith("-posterior"), what.startswith("tiny-sd")
    begins, usual = teacher or what in POSTERIORS, asdict(Config(what)) | PRESETS[what]
    useful = {
        "steps": not statistics, "batch_size": not statistics, "lr": not statistics,
        "lr_down": not statistics and not classifier, "flip": teacher, "ema": teacher or what == "tiny-sd",
        "label_dropout": "num_classes" in TEACHERS[what][0] if teacher else what in ("tiny-sd", "tiny-sd-posterior"),
        "min_snr": begins, "init": begins or what == "tiny-sd", "checkpoints": posterior, "per_class": statistics,
        "images": statistics, "per_pair": what == "tiny-sd",
        "compile": not statistics and (posterior or not tiny)}
    for name, changes_something in useful.items():
        if not changes_something and getattr(config, name) != usual[name]:
            raise ValueError(f"--{name.replace('_', '-')} changes nothing for {what}; leave it out")


def check_beginning(config):
    """ValueError or OSError if what the run begins with is not there or does not fit."""
    if config.what in POSTERIORS and not config.init:
        raise ValueError(f"--init: name the network that those of {config.what} share as their beginning")
    if config.what == "tiny-sd":
        read_autoencoder(config.init)
    elif config.what in TEACHERS or config.what in POSTERIORS:
        start(config)


def main(config):
    if config.what not in (*TEACHERS, *POSTERIORS) and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        refuse(f"{config.what} is made in one process; run it without torchrun")
    if config.what.endswith("-posterior") and (config.steps == 0 or config.steps % config.checkpoints):
        refuse(f"--steps {config.steps}: --checkpoints {config.checkpoints} networks share them; give a multiple")
    with refusing():
        check_flags(config)
    with refusing("--data: "):  # before anything is written
        what = config.what.removesuffix("-posterior").removesuffix("-classifier")
        TEACHERS.get(what, TEACHERS["mnist"])[1](config.data)
    with refusing():  # the same
        check_beginning(config)
    # K networks divide the steps, and a classifier's schedule counts them: these cannot be extended. A teacher can;
    # its rate is then that of the longer run, so from nearly 0 it goes up again, and back down at the new end
    fixed = config.what.endswith(("-posterior", "-classifier"))
    run = Run(config, f"runs/pretrain-{config.what}", fixed_steps=fixed)
    make = {
        **dict.fromkeys(TEACHERS, train_teacher),
        **dict.fromkeys(POSTERIORS, train_posterior),
        **dict.fromkeys(CLASSIFIERS, train_classifier),
        "tiny-sd-autoencoder": make_tiny_autoencoder,
        "tiny-sd": make_tiny_sd,
        "tiny-sd-posterior": make_tiny_posterior,
        "mnist-statistics": make_statistics,
    }
    make[config.what](config, run)
    run.finish({})


if __name__ == "__main__":
    main(parse(Config, __doc__, PRESETS))
