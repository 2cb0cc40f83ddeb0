"""What sd_sfd.py stands on: the parts of Stable Diffusion 1, and the folder that they come in.

    import torch
    from stable_diffusion import load_stable_diffusion
    from unet import ddim_sample

    sd = load_stable_diffusion("tiny-sd")                       # or a folder as the hub serves it
    with torch.no_grad():
        c, null = sd.embed(["a red seven", "a blue three"]), sd.embed([""])
        latents = ddim_sample(sd.unet, sd.schedule, torch.randn(2, *sd.unet.image_shape), c, guidance=4.5, null=null,
                              x0_clip=False)
        images = sd.vae.decode(latents)

A latent diffusion model (Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022) is a
diffusion model of small pictures, the latents, with a translator at each end:

    tokenizer       text -> L numbers, tokens: CLIP's, in text.py
    text encoder    tokens -> one vector for each of the L places: CLIP's, in text.py
    U-Net           predicts the noise in noised latents, and looks at these vectors: unet.py, as for every other method
    schedule        how much noise each step adds: unet.py
    autoencoder     image -> Gaussian over latents, latents -> image; 8 times smaller each way in Stable Diffusion

A prompt passes through them in this order. This file has the autoencoder, the five parts together, and the code that
reads and writes a folder. Modules are nested and named as in the hub's files, so that no table has to translate names
(hence `to_out.0` and `quant_conv`). The tests compare each part with diffusers and transformers, which this
file does not need.
"""

import contextlib
import json
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import save_file
from torch import nn

from convert import OLD_DIFFUSERS, is_tensors, load, rename, same, supported_or_refused, text_unet, text_unet_tensors
from record import write_atomically, write_json
from text import ACTIVATIONS, TextEncoder, Tokenizer, settings
from unet import WEIGHTS, UNet, VPSchedule

# ---------------------------------------------------------------------------- the autoencoder


def named(**modules):
    """These modules in sequence, under their names."""
    return nn.Sequential(OrderedDict(modules))


class Residual(nn.Module):
    """GroupNorm, SiLU, conv, twice; added to the input."""

    def __init__(self, cin, cout, groups):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, cin, eps=1e-6), nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, cout, eps=1e-6), nn.Conv2d(cout, cout, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.conv_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class Attention(nn.Module):
    """Every pixel looks at every other: one head of self-attention, added to the input."""

    def __init__(self, width, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x):
        h = rearrange(self.group_norm(x), "b c h w -> b 1 (h w) c")
        h = F.scaled_dot_product_attention(self.to_q(h), self.to_k(h), self.to_v(h))  # (B, 1, H*W, C)
        return x + rearrange(self.to_out(h), "b 1 (h w) c -> b c h w", h=x.shape[2])


class Middle(nn.Module):
    """At the lowest resolution: residual block, attention, residual block."""

    def __init__(self, width, groups):
        super().__init__()
        self.resnets = nn.ModuleList([Residual(width, width, groups) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(width, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Half(nn.Module):
    """Half the height and width, by a convolution."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Twice(nn.Module):
    """Twice the height and width: each pixel four times, then a convolution."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


class Autoencoder(nn.Module):
    """The KL autoencoder of Rombach et al. 2022. The arguments have the names and defaults of an AutoencoderKL's
    config.json. Images are (B, in_channels, H, W) in [-1, 1]; latents (B, latent_channels, h, w), where h and w are
    H and W divided by 2 ** (len(block_out_channels) - 1). The U-Net works on latents times `scaling_factor`, which
    brings them to about unit variance. All that is called latents here is scaled; `encode` alone returns unscaled ones.
    """

    def __init__(self, *, in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(64,),
                 layers_per_block=1, norm_num_groups=32, scaling_factor=0.18215, sample_size=32):
        super().__init__()
        self.config = settings(locals())
        widths, groups, last = list(block_out_channels), norm_num_groups, len(block_out_channels) - 1

        def residuals(cin, cout, count):
            return nn.Sequential(*(Residual(cin if i == 0 else cout, cout, groups) for i in range(count)))

        def resized(resize, width, level, end):
            return nn.Sequential(resize(width)) if level != end else nn.Identity()

        down = [named(resnets=residuals(cin, cout, layers_per_block), downsamplers=resized(Half, cout, level, last))
                for level, (cin, cout) in enumerate(zip(widths[:1] + widths, widths))]
        up = [named(resnets=residuals(cin, cout, layers_per_block + 1), upsamplers=resized(Twice, cout, level, 0))
              for level, (cin, cout) in reversed(list(enumerate(zip(widths[1:] + widths[-1:], widths))))]
        self.encoder = named(
            conv_in=nn.Conv2d(in_channels, widths[0], 3, padding=1), down_blocks=nn.Sequential(*down),
            mid_block=Middle(widths[-1], groups), conv_norm_out=nn.GroupNorm(groups, widths[-1], eps=1e-6),
            conv_act=nn.SiLU(), conv_out=nn.Conv2d(widths[-1], 2 * latent_channels, 3, padding=1))
        self.decoder = named(
            conv_in=nn.Conv2d(latent_channels, widths[-1], 3, padding=1), mid_block=Middle(widths[-1], groups),
            up_blocks=nn.Sequential(*up), conv_norm_out=nn.GroupNorm(groups, widths[0], eps=1e-6),
            conv_act=nn.SiLU(), conv_out=nn.Conv2d(widths[0], out_channels, 3, padding=1))
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    @property
    def scaling_factor(self):
        """One over the standard deviation of unscaled latents. To change it, change the config."""
        return self.config["scaling_factor"]

    def encode(self, x):
        """Images x -> mean and logvar, two of (B, latent_channels, h, w): the Gaussian of the unscaled latents."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def latents(self, x):
        """Images x -> scaled latents, the likeliest."""
        return self.scaling_factor * self.encode(x)[0]

    def decode(self, latents):
        """Scaled latents -> images, near [-1, 1] but not clamped."""
        return self.decoder(self.post_quant_conv(latents / self.scaling_factor))


# ---------------------------------------------------------------------------- all of it


@dataclass
class StableDiffusion:
    """The five parts. ValueError when they do not fit together."""

    tokenizer: Tokenizer
    text_encoder: TextEncoder
    vae: Autoencoder
    unet: UNet
    schedule: VPSchedule

    def __post_init__(self):
        text, tokens = self.text_encoder.config, 1 + max(self.tokenizer.vocabulary.values())
        places, width, channels = self.tokenizer.max_length, text["hidden_size"], self.vae.config["latent_channels"]
        for what, one, other, fits in [
                ("tokens in tokenizer and text encoder", tokens, n := text["vocab_size"], tokens <= n),
                ("places in tokenizer and text encoder", places, n := text["max_position_embeddings"], places <= n),
                ("width of a text in text encoder and U-Net", width, n := self.unet.text_dim, width == n),
                ("channels of latents in autoencoder and U-Net", channels, n := self.unet.config["in_channels"],
                 channels == n)]:
            if not fits:
                raise ValueError(f"its parts do not fit together: {what}: {one} and {other}")

    def embed(self, prompts):
        """list of str -> text embeddings (B, L, D), on the text encoder's device. Gradients flow: call it under
        torch.no_grad() unless the text encoder is being trained."""
        return self.text_encoder(self.tokenizer(prompts).to(next(self.text_encoder.parameters()).device))

    def to(self, device):
        """Moves all parts to a device."""
        for part in (self.text_encoder, self.vae, self.unet, self.schedule):
            part.to(device)
        return self


# ---------------------------------------------------------------------------- reading a folder

# setting of a config.json -> (what the libraries take where it is absent, the values that the code above supports)
TEXT_ENCODER_RULES = {
    "use_attention_mask": (False, [False, None]), "hidden_act": ("quick_gelu", list(ACTIVATIONS)),
} | same(model_type="clip_text_model")
AUTOENCODER_RULES = {"_class_name": (None, ["AutoencoderKL"]), "act_fn": ("silu", ["silu", "swish"])} | same(
    shift_factor=None, latents_mean=None, latents_std=None, use_quant_conv=True, use_post_quant_conv=True,
    mid_block_add_attention=True)  # blocks of another kind have other tensors, which `read_network` refuses
SCHEDULER_RULES = {"beta_schedule": ("linear", ["linear", "scaled_linear"])} | same(
    prediction_type="epsilon", trained_betas=None, rescale_betas_zero_snr=False,
    num_train_timesteps=1000)  # t_init and all other t are of a thousand steps
SPECIALS = {"begin": "bos_token", "end": "eos_token", "pad": "pad_token", "unknown": "unk_token"}


@contextlib.contextmanager
def about(file):
    """Any error in the content of this file becomes a one-line ValueError that names the file."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{file}: {' '.join(what.split())}") from None


def read_json(path):
    """The dict in a JSON file. FileNotFoundError when there is no file, ValueError when there is no dict in it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: a Stable Diffusion folder, as the hub serves it, holds scheduler, "
                                "tokenizer, text_encoder, vae and unet, each with its configuration")
    with about(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not settings by their names")
    return content


def read_weights(part, stem):
    """(name -> tensor, the file they are from) of the folder `part`, from the most precise file that it has."""
    pickle = "pytorch_model" if stem == "model" else stem
    names = [f"{stem}.safetensors", f"{pickle}.bin", f"{stem}.fp16.safetensors", f"{pickle}.fp16.bin"]
    file = next((part / name for name in names if (part / name).is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{part / names[0]} is missing, and so are its other forms: {', '.join(names[1:])}")
    with about(file):
        tensors = load(file)
        if not is_tensors(tensors):
            raise ValueError("it holds no tensors by their names")
    return tensors, file


def read_network(kind, part, stem, rules, names):
    """A network of the class `kind` from the folder `part`. rules: what its config.json may say, as in
    `supported_or_refused`; names: a table, old names -> those of today, as in `rename`."""
    config = read_json(part / "config.json")
    with about(part / "config.json"):
        supported_or_refused(config, rules)
        with torch.device("meta"):  # shapes without memory
            network = kind(**{name: config.get(name, default)
                              for name, default in kind.__init__.__kwdefaults__.items()})
    tensors, file = read_weights(part, stem)
    with about(file):
        tensors = {name: tensor.float() for name, tensor in rename(tensors, names).items()
                   if not name.endswith("position_ids")}  # 0, 1, 2, ... in files of before 2023
        needed = network.state_dict()
        for fault, culprits in [
                ("lacks the tensor", needed.keys() - tensors.keys()),
                ("holds, beyond what its config.json asks for, the tensor", tensors.keys() - needed.keys()),
                ("has, in another shape than its config.json says, the tensor",
                 {name for name in needed.keys() & tensors.keys() if needed[name].shape != tensors[name].shape}),
                ("has, with values that are not finite, the tensor",
                 {name for name, tensor in tensors.items() if not tensor.isfinite().all()})]:
            if culprits:
                more = f" and {len(culprits) - 1} more" if len(culprits) > 1 else ""
                raise ValueError(f"it {fault} {min(culprits)}{more}")
        network.load_state_dict(tensors, assign=True)
    return network.eval()


def read_unet(part):
    """The U-Net from its folder; convert.py knows its names."""
    config = read_json(part / "config.json")
    tensors, file = read_weights(part, "diffusion_pytorch_model")
    with about(f"{file}, with its config.json"):
        unet = text_unet(tensors, config).eval()
    unet.path = file
    return unet


def read_schedule(file):
    """The VPSchedule of a scheduler_config.json. The sampler that it names (PNDM, DDIM, ...) is ignored."""
    config = read_json(file)
    with about(file):
        supported_or_refused(config, SCHEDULER_RULES)
        kind = getattr(VPSchedule, config.get("beta_schedule", "linear"))
        return kind(*(config.get(name, default) for name, default in
                      (("num_train_timesteps", 1000), ("beta_start", 1e-4), ("beta_end", 0.02))))


def read_tokenizer(part):
    """The Tokenizer of vocab.json and merges.txt, or of the one tokenizer.json that newer libraries write instead."""
    config = read_json(part / "tokenizer_config.json")
    if (part / "special_tokens_map.json").is_file():
        config |= read_json(part / "special_tokens_map.json")
    with about(part / "tokenizer_config.json"):
        max_length = config["model_max_length"]
        specials = {ours: config[theirs] for ours, theirs in SPECIALS.items() if config.get(theirs)}
        specials = {ours: token["content"] if isinstance(token, dict) else token for ours, token in specials.items()}
    file, merges_file = part / "vocab.json", part / "merges.txt"
    if (part / "tokenizer.json").is_file() and not file.is_file():
        file = part / "tokenizer.json"
    elif not merges_file.is_file():
        raise FileNotFoundError(f"{merges_file} is missing: vocab.json says which tokens there are, but not how to cut")
    content = read_json(file)
    with about(file):
        if file.name == "vocab.json":
            lines = merges_file.read_text(encoding="utf-8").split("\n")
            vocabulary, merges = content, [line for line in lines if line and not line.startswith("#version")]
        else:
            vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
        merges = [pair.split() if isinstance(pair, str) else pair for pair in merges]
        return Tokenizer(vocabulary, merges, max_length, **specials)


def load_stable_diffusion(folder="tiny-sd"):
    """The StableDiffusion in a folder as the hub serves it, or the one shipped in weights/ under this name. All parts
    are in float32, on the CPU, in evaluation mode.

    ValueError or FileNotFoundError, in one line that names the file, when a part is missing, damaged or of a kind that
    the code here does not support."""
    shipped = sorted(file.parent.name for file in WEIGHTS.glob("*/model_index.json"))
    root = WEIGHTS / folder if str(folder) in shipped else Path(folder)  # what is in weights/ comes first, as anywhere
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {str(folder)!r}: give one as the hub serves it, or a shipped name "
                                f"({', '.join(shipped) or 'none'})")
    schedule = read_schedule(root / "scheduler" / "scheduler_config.json")  # small files first, to refuse early
    tokenizer = read_tokenizer(root / "tokenizer")
    text_encoder = read_network(TextEncoder, root / "text_encoder", "model", TEXT_ENCODER_RULES,
                                [(r"^(?!text_model\.)", "text_model.")])  # newer libraries leave it out
    vae = read_network(Autoencoder, root / "vae", "diffusion_pytorch_model", AUTOENCODER_RULES, OLD_DIFFUSERS)
    unet = read_unet(root / "unet")
    with about(root):
        return StableDiffusion(tokenizer, text_encoder, vae, unet, schedule)


# ---------------------------------------------------------------------------- writing a folder


def write_network(part, stem, tensors, config, dtype):
    part.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    write_atomically(part / f"{stem}.safetensors", lambda file: save_file(tensors, file, {"format": "pt"}))
    write_json(part / "config.json", config)


def write_tokenizer(part, tokenizer):
    part.mkdir(parents=True, exist_ok=True)
    specials = {theirs: getattr(tokenizer, ours) for ours, theirs in SPECIALS.items()}
    merges = "".join(f"{left} {right}\n" for left, right in tokenizer.merges)
    write_json(part / "vocab.json", tokenizer.vocabulary)
    write_atomically(part / "merges.txt",
                     lambda file: Path(file).write_text(f"#version: 0.2\n{merges}", encoding="utf-8"))
    write_json(part / "special_tokens_map.json", specials)
    write_json(part / "tokenizer_config.json",
               {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokenizer.max_length, **specials})


def schedule_config(schedule):
    """What scheduler_config.json says of a VPSchedule. ValueError if it is neither linear nor scaled linear."""
    ends = {name: float(f"{schedule.betas[i]:.6g}") for name, i in (("beta_start", 0), ("beta_end", -1))}
    for kind in ("linear", "scaled_linear"):
        if torch.allclose(getattr(VPSchedule, kind)(schedule.T, **ends).betas, schedule.betas.cpu(), rtol=1e-4, atol=0):
            return {"num_train_timesteps": schedule.T, "beta_schedule": kind, **ends, "prediction_type": "epsilon"}
    raise ValueError("the schedule is neither linear nor scaled linear: scheduler_config.json has no word for it")


def save_stable_diffusion(sd, folder, dtype=torch.float32):
    """Write `sd` in the hub's layout: `load_stable_diffusion` reads it, and so does diffusers' StableDiffusionPipeline.

    dtype: torch.float32, or torch.float16 for half the size.

    From the same latents, the pipeline draws the picture of `ddim_sample(..., x0_clip=False)` once its sampler is
    `DDIMScheduler.from_config(pipeline.scheduler.config, steps_offset=0)`: by itself it takes every step one later."""
    root, vae, levels = Path(folder), sd.vae.config, len(sd.vae.config["block_out_channels"])
    write_tokenizer(root / "tokenizer", sd.tokenizer)
    (root / "scheduler").mkdir(exist_ok=True)
    write_json(root / "scheduler" / "scheduler_config.json",
               {"_class_name": "DDIMScheduler", **schedule_config(sd.schedule), "clip_sample": False,
                "set_alpha_to_one": True, "steps_offset": 1, "timestep_spacing": "leading"})
    ids = {f"{SPECIALS[name]}_id": sd.tokenizer.vocabulary[getattr(sd.tokenizer, name)]
           for name in ("begin", "end", "pad")}
    write_network(root / "text_encoder", "model", sd.text_encoder.state_dict(),
                  {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "torch_dtype": "float32",
                   **sd.text_encoder.config, **ids}, dtype)
    write_network(root / "vae", "diffusion_pytorch_model", sd.vae.state_dict(),
                  {"_class_name": "AutoencoderKL", **vae, "down_block_types": ["DownEncoderBlock2D"] * levels,
                   "up_block_types": ["UpDecoderBlock2D"] * levels}, dtype)
    write_network(root / "unet", "diffusion_pytorch_model", *text_unet_tensors(sd.unet), dtype)
    write_json(root / "model_index.json", {
        "_class_name": "StableDiffusionPipeline", "requires_safety_checker": False,
        "feature_extractor": [None, None], "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"], "tokenizer": ["transformers", "CLIPTokenizer"],
        "text_encoder": ["transformers", "CLIPTextModel"], "vae": ["diffusers", "AutoencoderKL"],
        "unet": ["diffusers", "UNet2DConditionModel"]})
