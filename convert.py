"""Converts other projects' checkpoints to ours. Only this file knows what they call the parameters of a U-Net.

    python convert.py ckpt.pth teacher.safetensors                       # the EMA weights, where there are any
    python convert.py ckpt.pth raw.safetensors --raw                     # the weights as they were trained
    python convert.py sfd.pth fake_score.safetensors --part fake-score   # the other network of a distillation
    python convert.py ddpm-cifar10-32 unconditional.safetensors          # a folder as diffusers writes it
    python convert.py hub:google/ddpm-cifar10-32 unconditional.safetensors    # the same from the hub

vdu.py takes such sources too, `--teacher hub:google/ddpm-cifar10-32`, and ddpm_sfd.py class-conditional ones.

The source is recognised by what is in it:

    a list written by torch.save, from the DDPM code family: the official SFD, SalUn, Selective Amnesia, SFR-on
        3 items    model, optimizer, step
        4 items    model, optimizer, step, EMA
        5 items    fake score, its optimizer, generator, its optimizer, step
        6 items    fake score, its optimizer, generator, its optimizer, step, EMA of the generator
    a UNet2DModel of diffusers: a folder with config.json (or unet/config.json), or the .safetensors or .bin beside it;
        its schedule must be linear if a scheduler_config.json is there to tell (hub: does not fetch that).
        Stable Diffusion 1's UNet2DConditionModel likewise, with any schedule
    one of our own .safetensors files: checked and rewritten

How it works. The configuration is read off the shapes of the tensors, or from config.json. The U-Net of that
configuration says which parameters it needs, and a table of names says what the source calls each of them. Nothing
may be left over, missing or of another shape: a network that is nearly right draws pictures that are nearly right.
Weights do not reveal the image size, since convolutions work at any: it is taken from config.json, is known for the
CIFAR-10 and STL-10 networks of the DDPM code family, and must be given with --image-size otherwise. Reading a pickle
can run code; with `weights_only`, it may hold only tensors and plain containers.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fetch import fetch
from run import option, parse, refuse, refusing
from unet import UNet, load_unet, save_unet

# ---------------------------------------------------------------------------- config


@dataclass
class Config:
    source: str = option("", "file or folder to read", positional=True)
    out: str = option("", "the .safetensors file to write", positional=True)
    raw: bool = option(False, "of a checkpoint list: the weights as trained, even where there is an EMA of them")
    part: str = option("auto", "of a list of 5 or 6 items: which network; auto: the generator",
                       choices=["auto", "generator", "fake-score"])
    image_size: int = option(0, "height and width, of the latents if the network draws those; 0: as the source "
                             "says, or as known for such networks", low=0)
    t_init: int = option(440, "the noise level that a generator works at, for its card; official: 440", low=0, high=999)


# ---------------------------------------------------------------------------- names: ours, and theirs

# Each row: a pattern in our parameters' names, and what the source has in its place; the rows apply one after another.
# A row with several names is one parameter of ours that concatenates several of theirs: qkv, and the class embedding,
# whose last row ("no label") is a separate parameter there.
DDPM_FAMILY = [
    (r"_dense\.2", "_dense.1"),
    (r"^time_dense", "temb.dense"),
    (r"^class_dense", "cemb.dense"),
    (r"^class_embedding\.weight", "classes_emb.weight", "null_classes_emb"),
    (r"\.blocks\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"^(down|up)\.(\d+)\.resize", r"\1.\2.\1sample.conv"),
    (r"^middle\.0", "mid.block_1"),
    (r"^middle\.1", "mid.attn_1"),
    (r"^middle\.2", "mid.block_2"),
    (r"\.emb_proj", ".temb_cemb_proj"),
    (r"\.shortcut", ".nin_shortcut"),
    (r"\.qkv", ".q", ".k", ".v"),
]
DIFFUSERS_BLOCKS = [  # what is alike in all of its U-Nets
    (r"^time_dense\.0", "time_embedding.linear_1"),
    (r"^time_dense\.2", "time_embedding.linear_2"),
    (r"\.blocks\.", ".resnets."),
    (r"^(down|up)\.(\d+)\.resize", r"\1.\2.\1samplers.0.conv"),
    (r"^(down|up)\.", r"\1_blocks."),
    (r"^middle\.0", "mid_block.resnets.0"),
    (r"^middle\.1", "mid_block.attentions.0"),
    (r"^middle\.2", "mid_block.resnets.1"),
    (r"\.emb_proj", ".time_emb_proj"),
    (r"\.shortcut", ".conv_shortcut"),
    (r"^norm_out", "conv_norm_out"),
]
DIFFUSERS = [  # UNet2DModel
    *DIFFUSERS_BLOCKS,
    (r"(\.attentions\.\d+)\.norm", r"\1.group_norm"),
    (r"\.qkv", ".to_q", ".to_k", ".to_v"),
    (r"\.proj_out", ".to_out.0"),
]
DIFFUSERS_TEXT = [  # UNet2DConditionModel, Stable Diffusion's
    *DIFFUSERS_BLOCKS,
    (r"(\.attentions\.\d+)\.norm([123])", r"\1.transformer_blocks.0.norm\2"),
    (r"\.self_attention", ".transformer_blocks.0.attn1"),
    (r"\.cross_attention", ".transformer_blocks.0.attn2"),
    (r"\.to_out", ".to_out.0"),
    (r"\.dense_in", ".transformer_blocks.0.ff.net.0.proj"),
    (r"\.dense_out", ".transformer_blocks.0.ff.net.2"),
]
OLD_DIFFUSERS = [  # attention, as diffusers called it until 2023 and old files do still -> as it is called now
    (r"\.query\.", ".to_q."),
    (r"\.key\.", ".to_k."),
    (r"\.value\.", ".to_v."),
    (r"\.proj_attn\.", ".to_out.0."),
]


def translate(name, table):
    """What `name` becomes under `table`: a list of names, usually just one."""
    names = [name]
    for pattern, *theirs in table:
        if re.search(pattern, names[0]):
            names = [re.sub(pattern, their, n) for n in names for their in theirs]
    return names


def rename(tensors, table):
    """The tensors (name -> tensor) under translated names. ValueError if two of them would have the same."""
    renamed = {translate(name, table)[0]: tensor for name, tensor in tensors.items()}
    if len(renamed) < len(tensors):
        raise ValueError("it holds two tensors for one parameter, in different spellings")
    return renamed


def fill(settings, tensors, table):
    """The U-Net of these settings, with its parameters from `tensors` (name in the source -> tensor), in float32.

    ValueError unless every tensor is used, every parameter is filled and all shapes agree."""
    try:
        with torch.device("meta"):  # shapes without memory
            unet = UNet(**settings)
    except Exception as error:  # whatever a configuration that makes no sense raises
        raise ValueError(f"no U-Net has the configuration {settings} ({error})") from None
    origin = {ours: translate(ours, table) for ours in unet.state_dict()}
    needed = {name for names in origin.values() for name in names}
    missing, unused = needed - tensors.keys(), tensors.keys() - needed
    for names, fault in ((missing, "lacks the tensor"), (unused, "holds, beyond those of its U-Net, the tensor")):
        if names:
            raise ValueError(f"it {fault} {min(names)}" + (f" and {len(names) - 1} more" if len(names) > 1 else ""))
    filled = {}
    for ours, parameter in unet.state_dict().items():
        pieces = [tensors[name] for name in origin[ours]]
        alike = all(p.ndim == parameter.ndim and p.shape[1:] == parameter.shape[1:] for p in pieces)
        if not alike or sum(map(len, pieces)) != len(parameter):
            shapes = ", ".join(f"{name} {tuple(p.shape)}" for name, p in zip(origin[ours], pieces))
            raise ValueError(f"it holds {shapes}, but {ours} must be {tuple(parameter.shape)}")
        filled[ours] = torch.cat(pieces).float()
        if not filled[ours].isfinite().all():
            raise ValueError(f"it holds {' or '.join(origin[ours])} with values that are not finite")
    unet.load_state_dict(filled, assign=True)
    return unet.eval()


def pixels(image_size, levels, attended):
    """The settings that are counted in pixels. attended: levels with attention; level 0 is full resolution."""
    if image_size < 1 or image_size % 2 ** (levels - 1):
        raise ValueError(f"image size {image_size}: {levels} levels need a multiple of {2 ** (levels - 1)}")
    return {"image_size": image_size, "attention_at": [image_size >> level for level in attended]}


# ---------------------------------------------------------------------------- the DDPM code family

CONTAINERS = {
    3: ["model", "optimizer", "step"],
    4: ["model", "optimizer", "step", "EMA"],
    5: ["fake score", "its optimizer", "generator", "its optimizer", "step"],
    6: ["fake score", "its optimizer", "generator", "its optimizer", "step", "EMA"],
}
IMAGE_SIZE = {  # multipliers and levels with attention of the CIFAR-10 and the STL-10 network -> pixels
    ((1, 2, 2, 2), (1,)): 32,
    ((1, 2, 2, 2, 4), (2,)): 64,
}


def pick(items, part, raw):
    """One network of a checkpoint list: its tensors (name -> tensor), and what was found."""
    names = CONTAINERS.get(len(items), [])
    if not names or isinstance(items[-1], dict) != (names[-1] == "EMA"):
        last = f", the last of them a {type(items[-1]).__name__}," if items else ""
        raise ValueError(f"a list of {len(items)} items{last} is no checkpoint that is known here (see --help)")
    if part != "auto" and "generator" not in names:
        raise ValueError(f"--part {part}: a list of {len(items)} items holds one network only; leave --part out")
    network = "fake score" if part == "fake-score" else "generator" if "generator" in names else "model"
    weights = "EMA" if "EMA" in names and not raw and network != "fake score" else "raw"
    tensors, step = items[names.index("EMA" if weights == "EMA" else network)], items[names.index("step")]
    if tensors is None:
        raise ValueError(f"its {network} ({weights}) is None: an early snapshot, saved without it")
    if not is_tensors(tensors):
        raise ValueError(f"its {network} ({weights}) is no dict of tensors")
    tensors = rename(tensors, [(r"^module\.", "")])  # DataParallel's mark
    return tensors, {"container": f"list of {len(items)} items: {', '.join(names)}", "network": network,
                     "weights": weights, "step": step if isinstance(step, int) else "not known"}


def ddpm_family_settings(tensors, image_size):
    """The configuration that the tensors' names and shapes imply."""

    def count(pattern):
        return 1 + max((int(found[1]) for found in map(re.compile(pattern).match, tensors) if found), default=-1)

    channels, in_channels = tensors["conv_in.weight"].shape[:2]
    widths = [len(tensors[f"down.{i}.block.0.conv1.weight"]) for i in range(count(r"down\.(\d+)\."))]
    multipliers = [width // channels for width in widths]
    attended = [i for i in range(len(widths)) if any(name.startswith(f"down.{i}.attn.") for name in tensors)]
    image_size = image_size or IMAGE_SIZE.get((tuple(multipliers), tuple(attended)))
    if not image_size:
        raise ValueError(f"which size of images has a network with multipliers {multipliers} and attention at levels "
                         f"{attended}? Say with --image-size of convert.py")
    return {"in_channels": in_channels, "channels": channels, "multipliers": multipliers,
            "blocks": count(r"down\.0\.block\.(\d+)\."), "num_classes": len(tensors["classes_emb.weight"]),
            "dropout": 0.1, "groups": 32, **pixels(image_size, len(widths), attended)}


def read_ddpm_family(config, items):
    """(U-Net, what was found) of a checkpoint list."""
    tensors, found = pick(items, config.part, config.raw)
    try:
        settings = ddpm_family_settings(tensors, config.image_size)
    except (LookupError, TypeError, ArithmeticError) as error:
        raise ValueError(f"its {found['network']} is not of the DDPM code family: {error!r}") from None
    if "null_classes_emb" in tensors:
        tensors["null_classes_emb"] = tensors["null_classes_emb"][None]  # (128) -> (1, 128), a row
    last = len(settings["multipliers"]) - 1
    upwards = (r"^up\.(\d+)", lambda up: f"up.{last - int(up[1])}")  # their up.0 is full resolution, ours the lowest
    unet = fill(settings, tensors, [upwards, *DDPM_FAMILY])
    one_step = {"method": "SFD", "t_init": config.t_init} if found["network"] == "generator" else {}
    return unet, found | one_step | {"tensors": len(tensors)}


# ---------------------------------------------------------------------------- diffusers

def same(**settings):
    """Rules for settings that must have these values, the library's defaults, and no others."""
    return {name: (value, [value]) for name, value in settings.items()}


# setting of a config.json -> (what diffusers takes where it is absent, the values that our U-Net supports)
COMMON_RULES = {"act_fn": ("silu", ["silu", "swish"])} | same(
    center_input_sample=False, time_embedding_type="positional", mid_block_scale_factor=1,
    resnet_time_scale_shift="default", class_embed_type=None, num_class_embeds=None)
UNET_RULES = COMMON_RULES | {  # of a UNet2DModel
    "_class_name": (None, ["UNet2DModel"]), "freq_shift": (0, [1]), "flip_sin_to_cos": (True, [False]),
    "downsample_padding": (1, [0]), "norm_eps": (1e-5, [1e-6]),
} | same(mid_block_type="UNetMidBlock2D", downsample_type="conv", upsample_type="conv", add_attention=True)
TEXT_UNET_RULES = COMMON_RULES | {"_class_name": (None, ["UNet2DConditionModel"])} | same(
    freq_shift=0, flip_sin_to_cos=True, mid_block_type="UNetMidBlock2DCrossAttn", downsample_padding=1, norm_eps=1e-5,
    use_linear_projection=False, only_cross_attention=False, dual_cross_attention=False,
    transformer_layers_per_block=1, num_attention_heads=None, addition_embed_type=None, encoder_hid_dim=None,
    time_cond_proj_dim=None, time_embedding_act_fn=None, timestep_post_act=None, conv_in_kernel=3, conv_out_kernel=3)
SCHEDULE_RULES = same(  # of a scheduler_config.json beside a UNet2DModel: VPSchedule.linear, and eps is predicted
    prediction_type="epsilon", beta_schedule="linear", num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02,
    trained_betas=None, rescale_betas_zero_snr=False)


def supported_or_refused(theirs, rules):
    """ValueError names the first setting that our U-Net cannot have. rules: name -> (diffusers' default, values)."""
    for name, (default, supported) in rules.items():
        value = theirs.get(name, default)
        if value not in supported:
            raise ValueError(f"{name} {value!r} is not supported, only {' or '.join(map(repr, supported))}")


def levels(theirs, kind, image_size, rules):
    """The settings that both kinds of U-Net share, as ours; names of blocks with attention begin with `kind`.
    ValueError as above, including for `rules`, or if nothing tells the size of images."""
    widths, down = theirs["block_out_channels"], theirs["down_block_types"]
    attended = [level for level, name in enumerate(down) if name == kind + "DownBlock2D"]
    kinds = [kind if level in attended else "" for level in range(len(widths))]
    supported_or_refused(theirs, rules | {
        "block_out_channels": (None, [[width // widths[0] * widths[0] for width in widths]]),  # whole multiples
        "down_block_types": (None, [[k + "DownBlock2D" for k in kinds]]),
        "up_block_types": (None, [[k + "UpBlock2D" for k in reversed(kinds)]])})  # attention at the same resolutions
    size = image_size or theirs.get("sample_size")
    size = size[0] if isinstance(size, list) and len(set(size)) == 1 else size
    if not isinstance(size, int):
        raise ValueError(f"sample_size {size!r} is no size of a square; convert.py takes --image-size")
    return {"channels": widths[0], "multipliers": [width // widths[0] for width in widths],
            "blocks": theirs.get("layers_per_block", 2), "dropout": theirs.get("dropout", 0.0),
            "groups": theirs.get("norm_num_groups", 32), **pixels(size, len(widths), attended)}


def diffusers_settings(theirs, image_size):
    """The configuration of a UNet2DModel, as ours. ValueError names the first setting that our U-Net cannot have."""
    widths, down = theirs["block_out_channels"], theirs["down_block_types"]
    in_channels = theirs.get("in_channels", 3)
    # a single head is as wide as its level, or the middle
    head = {widths[-1], *(width for width, kind in zip(widths, down) if kind == "AttnDownBlock2D")}
    return {"in_channels": in_channels, "num_classes": None, **levels(theirs, "Attn", image_size, UNET_RULES | {
        "out_channels": (3, [in_channels]),
        "time_embedding_dim": (None, [None, 4 * widths[0]]),
        "attention_head_dim": (8, [None, *head] if len(head) == 1 else [None]),
        "attn_norm_num_groups": (None, [None, theirs.get("norm_num_groups", 32)])})}


def read_diffusers(config, tensors, file):
    """(U-Net, what was found) of the tensors of a UNet2DModel or a UNet2DConditionModel, and its configuration."""
    try:
        theirs = json.loads(file.read_text(encoding="utf-8"))
        text = theirs.get("_class_name") == "UNet2DConditionModel"  # Stable Diffusion's
        settings = None if text else diffusers_settings(theirs, config.image_size)
        pipeline = file.parent.resolve().name == "unet"  # the folder: in the hub's cache files are links elsewhere
        schedule = file.parent / ("../scheduler" if pipeline else "") / "scheduler_config.json"
        if schedule.is_file() and not text:
            file = schedule
            supported_or_refused(json.loads(file.read_text(encoding="utf-8")), SCHEDULE_RULES)
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"its {file.name} describes no UNet2DModel: {error!r}") from None
    except ValueError as error:
        raise ValueError(f"its {file.name}: {error}") from None
    if text:
        found = {"container": "UNet2DConditionModel of diffusers", "tensors": len(tensors)}
        return text_unet(tensors, theirs | ({"sample_size": config.image_size} if config.image_size else {})), found
    tensors = {name: t[:, :, None, None] if t.ndim == 2 and ".attentions." in name else t  # Linear as 1x1 convolution
               for name, t in rename(tensors, OLD_DIFFUSERS).items()}
    return fill(settings, tensors, DIFFUSERS), {"container": "UNet2DModel of diffusers", "tensors": len(tensors)}


# ---------------------------------------------------------------------------- Stable Diffusion's U-Net, both ways


def text_unet(tensors, config):
    """The text-conditioned U-Net of a UNet2DConditionModel. tensors: name -> tensor; config: what its config.json says.

    ValueError when our U-Net cannot be that, or unless every tensor is used and every parameter filled."""
    try:
        in_channels, text_dim = config["in_channels"], config.get("cross_attention_dim", 1280)
        heads = config.get("attention_head_dim", 8)  # their number, which is called their width there
        if not isinstance(heads, int) or not isinstance(text_dim, int):
            raise ValueError("attention_head_dim and cross_attention_dim must be one number each, for all levels")
        settings = {"in_channels": in_channels, "text_dim": text_dim, "heads": heads,
                    **levels(config, "CrossAttn", 0, TEXT_UNET_RULES | {"out_channels": (4, [in_channels])})}
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"its config.json describes no UNet2DConditionModel: {error!r}") from None
    return fill(settings, tensors, DIFFUSERS_TEXT)


def text_unet_tensors(unet):
    """The inverse of `text_unet`: (name -> tensor, config.json's content) of a text-conditioned U-Net, as diffusers
    writes them."""
    ours = unet.config
    kinds = ["CrossAttn" if ours["image_size"] >> level in ours["attention_at"] else ""
             for level in range(len(ours["multipliers"]))]
    config = {name: supported[0] for name, (_, supported) in TEXT_UNET_RULES.items()} | {
        "sample_size": ours["image_size"], "in_channels": ours["in_channels"], "out_channels": ours["in_channels"],
        "block_out_channels": [ours["channels"] * multiplier for multiplier in ours["multipliers"]],
        "layers_per_block": ours["blocks"], "dropout": ours["dropout"], "norm_num_groups": ours["groups"],
        "cross_attention_dim": ours["text_dim"], "attention_head_dim": ours["heads"],
        "down_block_types": [kind + "DownBlock2D" for kind in kinds],
        "up_block_types": [kind + "UpBlock2D" for kind in reversed(kinds)]}
    return {translate(name, DIFFUSERS_TEXT)[0]: tensor for name, tensor in unet.state_dict().items()}, config


# ---------------------------------------------------------------------------- any source


def is_tensors(content):
    """Whether this is a dict name -> tensor that is not empty."""
    return isinstance(content, dict) and len(content) > 0 and all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in content.items())


def locate(source):
    """The file that holds the weights: the source itself, or the one in a folder of diffusers."""
    if not source.exists():
        raise ValueError("there is no such file or folder")
    if not source.is_dir():
        return source
    for folder in (source, source / "unet"):  # a model, or a pipeline around one
        for name in ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"):
            if (folder / "config.json").is_file() and (folder / name).is_file():
                return folder / name
    raise ValueError("a folder must hold config.json and diffusion_pytorch_model.safetensors or .bin, or both in unet/")


def load(path):
    """What a file holds: our own U-Net, or name -> tensor, or whatever plain containers were pickled."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                if "minunlearn" not in (file.metadata() or {}):
                    return {name: file.get_tensor(name) for name in file.keys()}
            return load_unet(path)
        except SafetensorError as error:
            raise ValueError(f"no sound safetensors file ({error})") from None
        except (ValueError, LookupError) as error:  # one of ours, but no whole U-Net
            raise ValueError(f"it {str(error).removeprefix(f'{path} ')}") from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or foreign pickle raises
        code = re.search(r"GLOBAL (\S+)", str(error))
        raise ValueError(f"it holds code ({code[1]}) beside tensors; none of it was run" if code else
                         f"neither safetensors nor a whole file of torch.save ({type(error).__name__})") from None


def read(config, path):
    """(U-Net in evaluation mode, what was found: name -> fact) of the file `path`. ValueError: why it is not read."""
    content = load(path)
    if isinstance(content, list):
        return read_ddpm_family(config, content)
    if config.raw or config.part != "auto":
        raise ValueError("--raw and --part choose from a checkpoint list, but this is a single network")
    if isinstance(content, UNet):
        if config.image_size not in (0, content.config["image_size"]):
            raise ValueError(f"--image-size {config.image_size}: it says itself {content.config['image_size']}")
        return content, {"container": "U-Net of minUnlearn", "tensors": len(content.state_dict())}
    if not is_tensors(content):
        raise ValueError(f"a {type(content).__name__} is neither a checkpoint list nor the tensors of a network")
    if not (path.parent / "config.json").is_file():
        raise ValueError("tensors with no config.json beside them are neither diffusers' nor ours")
    return read_diffusers(config, content, path.parent / "config.json")


# ---------------------------------------------------------------------------- the command


def main(config):
    source, out = Path(config.source), Path(config.out)
    if not config.source or not config.out:
        refuse("name a source and a file to write: python convert.py SOURCE OUT.safetensors (see --help)")
    with refusing("OUT: "):  # a name too long, a folder that may not be read
        if out.suffix != ".safetensors" or out.is_dir():
            refuse(f"{out} is no name of a .safetensors file to write")
    with refusing(f"{config.source}: "):
        path = locate(fetch(config.source))
        if out.exists() and out.samefile(path):
            raise ValueError("this is the file to write, too; give it another name")
        unet, found = read(config, path)
        card = getattr(unet, "card", {"source": source.resolve().name} | found)  # ours keep their card
        if config.t_init not in (Config.t_init, card.get("t_init")):
            what = f"its card says {card['t_init']}" if "t_init" in card else "this is none"
            raise ValueError(f"--t-init {config.t_init} is for a one-step generator of a checkpoint list; {what}")
    with refusing(f"{out}: "):
        try:
            save_unet(unet, out, **card)
        except SafetensorError as error:  # a full disk, a folder that is not ours to write in
            raise ValueError(error) from None
    found["tensors"] = f"{found['tensors']}, all of them used"
    found["parameters"] = f"{sum(p.numel() for p in unet.parameters()):,}, all of them filled"
    found["configuration"] = ", ".join(f"{name} {value}" for name, value in unet.config.items())
    for name, fact in (found | {"written": out}).items():
        print(f"{name:>13}  {fact}")


if __name__ == "__main__":
    main(parse(Config, __doc__))
