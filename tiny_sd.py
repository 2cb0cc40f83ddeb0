"""Trains the tiny text-to-image model in weights/tiny-sd: coloured handwritten digits, in Stable Diffusion's layout.

    python pretrain.py tiny-sd-autoencoder
    python pretrain.py tiny-sd                # text encoder and U-Net, on the latents of that autoencoder

The same parts as in Stable Diffusion 1, only small: 32 px pictures, 8 px latents, prompts of at most 16 tokens.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from concepts import PAIRS, TEMPLATES, ConceptJudge, draw_concepts, every_prompt, paint
from data import mnist
from metrics import frechet_distance, moments, pool
from record import checksum
from run import warm_up_and_down
from samples import guided_sampler
from stable_diffusion import Autoencoder, StableDiffusion
from text import TextEncoder, word_tokenizer
from unet import UNet, VPSchedule, weights_path, write_tensors

AUTOENCODER = dict(block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8, sample_size=32)
TEXT_ENCODER = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4)
UNET = dict(image_size=8, in_channels=4, channels=48, multipliers=(1, 2), blocks=1, attention_at=(8,), text_dim=64,
            heads=4, dropout=0.0, groups=8)
MAX_LENGTH = 16  # tokens of a prompt, begin and end included
KL_WEIGHT = 1e-3  # of the latents' Gaussian against the standard one, beside the error of the pixels


def train_autoencoder(config, run):
    """The autoencoder, on MNIST's digits in random colours; its scaling factor brings the latents to unit variance."""
    digits = mnist(config.data, train=True)[0].to(run.device)
    vae = Autoencoder(**AUTOENCODER | {"scaling_factor": 1.0}).to(run.device)
    optimizer = torch.optim.Adam(vae.parameters(), lr=config.lr)
    lr = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_and_down(config.steps, config.lr_down, 200))

    def pictures(n):
        pick, colours = (torch.randint(count, (n,), device=run.device) for count in (len(digits), 6))
        return paint(digits[pick], colours)

    for step in run.loop({"vae": vae, "optimizer": optimizer, "lr": lr}, label="autoencoder"):
        x = pictures(config.batch_size)
        with run.autocast():
            mean, logvar = vae.encode(x)
            mean, logvar = mean.float(), logvar.float()
            again = vae.decode(mean + (logvar / 2).exp() * torch.randn_like(mean))
        error = (again - x).abs().mean()
        kl = (mean.square() + logvar.exp() - 1 - logvar).mean() / 2  # of N(mean, exp(logvar)) from N(0, 1), in nats
        loss = error + KL_WEIGHT * kl
        run.update("loss", loss, vae, optimizer, 1.0)
        lr.step()
        if step % 10 == 0:
            run.log(loss=loss, error=error, kl=kl)
    with torch.no_grad():
        mean, logvar = vae.eval().encode(pictures(1000))
        vae.config["scaling_factor"] = 1 / (mean + (logvar / 2).exp() * torch.randn_like(mean)).std().item()
    return vae


@torch.no_grad()
def encode_twice(vae, digits, labels, device):
    """Every digit in two random colours: latents' means and logvars (2 N, 8, 8, 8), numbers of their pairs (2 N,)."""
    latents, pairs = [], []
    for index in torch.arange(2 * len(digits)).split(500):
        pick = index % len(digits)
        colours = torch.randint(6, (len(pick),))
        latents.append(torch.cat(vae.encode(paint(digits[pick], colours).to(device)), dim=1))
        pairs.append(labels[pick] * 6 + colours)
    return torch.cat(latents), torch.cat(pairs).to(device)


def latent_loss(config, run, vae, tokenizer, schedule):
    """DDPM's loss on latents of painted digits, one prompt in ten empty: a function (text encoder, U-Net) -> scalar, of
    another batch at each call."""
    digits, labels = mnist(config.data, train=True)
    random = torch.get_rng_state()  # what is drawn later does not depend on how the latents are encoded
    with run.autocast():
        latents, pairs = encode_twice(vae, digits, labels, run.device)
    torch.set_rng_state(random)
    tokens = tokenizer([*every_prompt(), ""]).to(run.device)  # (721, 16); prompts of pair i begin at 12 i

    def loss(text_encoder, unet):
        pick, template = (torch.randint(count, (config.batch_size,), device=run.device)
                          for count in (len(latents), len(TEMPLATES)))
        prompt = pairs[pick] * len(TEMPLATES) + template
        prompt[torch.rand(len(prompt), device=run.device) < config.label_dropout] = -1  # the empty one
        mean, logvar = latents[pick].float().chunk(2, dim=1)
        x0 = vae.scaling_factor * (mean + (logvar / 2).exp() * torch.randn_like(mean))
        t, noise = torch.randint(schedule.T, (len(x0),), device=run.device), torch.randn_like(x0)
        with run.autocast():
            eps = unet(schedule.add_noise(x0, noise, t), t, text_encoder(tokens[prompt]))  # (D1)
        return F.mse_loss(eps.float(), noise)

    return loss


def train(config, run, vae):
    """Text encoder and U-Net together; returns all five parts."""
    tokenizer = word_tokenizer(every_prompt(), MAX_LENGTH)
    text_encoder = TextEncoder(vocab_size=len(tokenizer.vocabulary), max_position_embeddings=MAX_LENGTH, **TEXT_ENCODER)
    networks = nn.ModuleDict({"text_encoder": text_encoder, "unet": UNet(**UNET)}).to(run.device).train()
    schedule, vae = VPSchedule.scaled_linear().to(run.device), vae.to(run.device).eval()
    ema = AveragedModel(networks, multi_avg_fn=get_ema_multi_avg_fn(config.ema))
    optimizer = torch.optim.Adam(networks.parameters(), lr=config.lr, betas=(0.9, 0.99))
    lr = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up_and_down(config.steps, config.lr_down, 200))
    loss_of = latent_loss(config, run, vae, tokenizer, schedule)

    for step in run.loop({"networks": networks, "ema": ema, "optimizer": optimizer, "lr": lr}, label="tiny-sd"):
        loss = loss_of(networks["text_encoder"], networks["unet"])
        run.update("loss", loss, networks, optimizer, 1.0)
        lr.step()
        ema.update_parameters(networks)
        if step % 10 == 0:
            run.log(loss=loss)
    networks = ema.module.eval()
    return StableDiffusion(tokenizer, networks["text_encoder"], vae, networks["unet"], schedule)


GUIDANCE, STEPS = 4.5, 50  # how the teacher is sampled wherever it is scored


@torch.no_grad()
def score(sd, run, path, per_pair, seed):
    """Draw `per_pair` pictures of each digit in each colour, and see what they show. Writes to `path` what was seen,
    which sd_sfd.py's pictures are compared with; returns the scores."""
    judge, sample = ConceptJudge().to(run.device), guided_sampler(sd, sd.unet, run.autocast, STEPS, GUIDANCE)
    pictures, pairs, seconds = draw_concepts(sample, sd, per_pair, seed, run.device, bar="tiny-sd")
    features, digits, colours = judge(pictures)
    right = torch.stack([digits, colours], 1) == torch.tensor(PAIRS)[pairs]  # (N, 2)
    means, covariances = judge.real_moments()
    facts = dict(evaluation_seed=seed, images_per_pair=per_pair, sampler=f"DDIM, {STEPS} steps, guidance {GUIDANCE}",
                 classifier_sha256=checksum(weights_path("mnist-classifier")))
    write_tensors(path, "concept statistics", {"features": features.half(), "digits": digits, "colours": colours,
                                               "pairs": pairs}, **facts)
    return facts | {
        "both_right": right.all(1).double().mean().item(), "digit_right": right[:, 0].double().mean().item(),
        "colour_right": right[:, 1].double().mean().item(), "images": len(pictures),
        "worst_pair": min(right.all(1)[pairs == k].double().mean().item() for k in range(len(PAIRS))),
        "fid": frechet_distance(*moments(features), *pool(means, covariances)),
        "seconds_per_1000": 1000 * seconds / len(pictures)}
