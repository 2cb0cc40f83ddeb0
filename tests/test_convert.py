"""Foreign checkpoints: the converted network computes what the original does, and what is not sound is refused.

The originals are a reference network of the DDPM code family, written here from the description of its names and layers
alone, and diffusers' own UNet2DModel.
"""

import hashlib
import json
import math
import os
import runpy
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, random_unet
from safetensors.torch import load_file, save_file
from torch import nn

import convert
import ddpm_sfd
from teachers import load_teacher, read_pair
from unet import load_unet, save_unet

# ---------------------------------------------------------------------------- the reference network


class Dense(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.dense = nn.ModuleList([nn.Linear(width, 4 * width), nn.Linear(4 * width, 4 * width)])

    def forward(self, x):
        x = self.dense[0](x)
        return self.dense[1](x * torch.sigmoid(x))


class Block(nn.Module):
    def __init__(self, cin, cout, emb):
        super().__init__()
        self.norm1 = nn.GroupNorm(32, cin, eps=1e-6)
        self.conv1 = nn.Conv2d(cin, cout, 3, 1, 1)
        self.temb_cemb_proj = nn.Linear(2 * emb, cout)
        self.norm2 = nn.GroupNorm(32, cout, eps=1e-6)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1)
        if cin != cout:
            self.nin_shortcut = nn.Conv2d(cin, cout, 1)

    def forward(self, x, time, label):
        both = torch.cat((time, label), 1)
        h = self.norm1(x)
        h = self.conv1(h * torch.sigmoid(h))
        h = h + self.temb_cemb_proj(both * torch.sigmoid(both)).reshape(*h.shape[:2], 1, 1)
        h = self.norm2(h)
        h = self.conv2(h * torch.sigmoid(h))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class SelfAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2) for conv in (self.q, self.k, self.v))  # (B, C, N)
        weights = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / math.sqrt(x.shape[1]), dim=2)
        return x + self.proj_out(torch.einsum("bij,bcj->bci", weights, v).reshape(x.shape))


class Stage(nn.Module):
    def __init__(self, blocks, attentions, **resize):
        super().__init__()
        self.block, self.attn = nn.ModuleList(blocks), nn.ModuleList(attentions)
        for name, width in resize.items():
            holder = nn.Module()
            holder.conv = nn.Conv2d(width, width, 3, 2, 0) if name == "downsample" else nn.Conv2d(width, width, 3, 1, 1)
            setattr(self, name, holder)


class Reference(nn.Module):
    """The class-conditional U-Net of the DDPM code family, by the names that its checkpoints use."""

    def __init__(self, width=32, multipliers=(1, 2, 2, 2), blocks=1, attended=(1,), classes=10):
        super().__init__()
        widths, top = [width * m for m in multipliers], len(multipliers) - 1
        self.width = width
        self.temb, self.cemb = Dense(width), Dense(width)
        self.classes_emb = nn.Embedding(classes, width)
        self.null_classes_emb = nn.Parameter(torch.zeros(width))
        self.conv_in = nn.Conv2d(3, width, 3, 1, 1)
        self.down, stack, at = nn.ModuleList(), [width], width
        for level, out in enumerate(widths):
            stage = []
            for _ in range(blocks):
                stage.append(Block(at, out, 4 * width))
                at = out
                stack.append(at)
            attention = [SelfAttention(out) for _ in stage if level in attended]
            self.down.append(Stage(stage, attention, **({"downsample": out} if level < top else {})))
            if level < top:
                stack.append(at)
        self.mid = nn.Module()
        self.mid.block_1, self.mid.attn_1, self.mid.block_2 = Block(at, at, 4 * width), SelfAttention(at), Block(at, at, 4 * width)
        up = {}
        for level in range(top, -1, -1):
            stage = []
            for _ in range(blocks + 1):
                stage.append(Block(at + stack.pop(), widths[level], 4 * width))
                at = widths[level]
            attention = [SelfAttention(at) for _ in stage if level in attended]
            up[level] = Stage(stage, attention, **({"upsample": at} if level > 0 else {}))
        self.up = nn.ModuleList([up[level] for level in range(top + 1)])  # up.0 is full resolution
        self.norm_out, self.conv_out = nn.GroupNorm(32, at, eps=1e-6), nn.Conv2d(at, 3, 3, 1, 1)

    def forward(self, x, t, c=None):
        """c None: no label, for all images."""
        half = self.width // 2
        angles = torch.tensor([[step * 10000 ** (-i / (half - 1)) for i in range(half)] for step in t.tolist()])
        time = self.temb(torch.cat((torch.sin(angles), torch.cos(angles)), 1))
        label = self.cemb(self.null_classes_emb.expand(len(x), -1) if c is None else self.classes_emb(c))
        h = self.conv_in(x)
        stack = [h]
        for stage in self.down:
            for i, block in enumerate(stage.block):
                h = block(h, time, label)
                h = stage.attn[i](h) if len(stage.attn) else h
                stack.append(h)
            if hasattr(stage, "downsample"):
                h = stage.downsample.conv(nn.functional.pad(h, (0, 1, 0, 1)))
                stack.append(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h, time, label)), time, label)
        for stage in reversed(self.up):
            for i, block in enumerate(stage.block):
                h = block(torch.cat((h, stack.pop()), 1), time, label)
                h = stage.attn[i](h) if len(stage.attn) else h
            if hasattr(stage, "upsample"):
                h = stage.upsample.conv(h.repeat_interleave(2, 2).repeat_interleave(2, 3))
        h = self.norm_out(h)
        return self.conv_out(h * torch.sigmoid(h))


def randomise(network, seed):
    """Every parameter random, those too that usually begin as zeros or ones, at scales that keep the output near 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in network.named_parameters():
            p.normal_(std=0.3 if p.ndim == 1 else p[0].numel() ** -0.5, generator=generator)
            p += "norm" in name and name.endswith("weight")
    return network.eval()


# ---------------------------------------------------------------------------- helpers


def run(*words):
    """python convert.py WORDS, in this process."""
    convert.main(convert.parse(convert.Config, convert.__doc__, argv=[str(w) for w in words]))


def refused(capsys, *words):
    """The one line in which `python convert.py WORDS` is refused; nothing may appear beside what is there."""
    out = words[1] if len(words) > 1 else None
    before = {p: p.read_bytes() for p in out.parent.rglob("*") if p.is_file()} if hasattr(out, "parent") else {}
    with pytest.raises(SystemExit) as stop:
        run(*words)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == "" and printed.err.count("\n") == 1, printed
    after = {p: p.read_bytes() for p in out.parent.rglob("*") if p.is_file()} if hasattr(out, "parent") else {}
    assert before == after
    return printed.err


def agree(unet, network, size=16, labels=None):
    """Both networks on the same images, at a low, a middle and the highest noise level. They work at any size, and
    small images cost less."""
    x = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(7))
    t = torch.tensor([0, 437, 999])
    with torch.no_grad():
        theirs = network(x, t) if labels is None else network(x, t, labels)
        theirs = getattr(theirs, "sample", theirs)
        c = None if unet.num_classes is None else torch.full((3,), unet.null_label) if labels is None else labels
        torch.testing.assert_close(unet(x, t, c), theirs, rtol=1e-4, atol=1e-4)
    assert 0.1 < theirs.std() < 100  # the comparison is not one of nothing with nothing


@pytest.fixture(scope="module")
def networks():
    """Three networks of one shape: what a distillation's list holds as fake score, generator and EMA."""
    return {name: randomise(Reference(), seed) for seed, name in enumerate(("fake score", "generator", "EMA"))}


def adam():
    """What such lists hold of an optimizer: the state_dict of torch.optim.Adam, with one parameter."""
    moments = {"step": torch.tensor(1.0), "exp_avg": torch.zeros(2, 2), "exp_avg_sq": torch.ones(2, 2)}
    return {"state": {0: moments}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.999), "amsgrad": False, "params": [0]}]}


def prefixed(network, prefix):
    return {prefix + name: tensor for name, tensor in network.state_dict().items()}


def container(items, networks, prefix=""):
    """A list of that many items: the names of networks where there are networks."""
    fake_score, generator = (prefixed(networks[name], prefix) for name in ("fake score", "generator"))
    ema = dict(networks["EMA"].state_dict())  # plain, whatever the others' names
    one, two = [generator, adam(), 17], [fake_score, adam(), generator, adam(), 17]
    return {3: one, 4: [*one, ema], 5: two, 6: [*two, ema]}[items]


# ---------------------------------------------------------------------------- the DDPM code family


@pytest.mark.parametrize("items, words, network, prefix", [
    (3, "", "generator", ""), (3, "", "generator", "module."), (3, "--raw", "generator", "module."),
    (4, "", "EMA", ""), (4, "", "EMA", "module."), (4, "--raw", "generator", ""), (4, "--raw", "generator", "module."),
    (5, "", "generator", ""), (5, "--part generator", "generator", "module."),
    (5, "--part fake-score", "fake score", ""), (5, "--part fake-score --raw", "fake score", "module."),
    (6, "", "EMA", ""), (6, "--part generator", "EMA", "module."), (6, "--part generator --raw", "generator", "module."),
    (6, "--raw", "generator", ""), (6, "--part fake-score", "fake score", ""), (6, "--part fake-score", "fake score", "module."),
])
def test_every_container_gives_the_network_that_was_asked_for(
        items, words, network, prefix, networks, tmp_path, capsys):
    torch.save(container(items, networks, prefix), tmp_path / "ckpt.pth")
    run(tmp_path / "ckpt.pth", tmp_path / "new" / "out.safetensors", *words.split())
    unet = load_unet(tmp_path / "new" / "out.safetensors")
    agree(unet, networks[network], labels=torch.tensor([0, 4, 9]))
    agree(unet, networks[network])  # no label: the null row
    assert unet.card["weights"] == ("EMA" if network == "EMA" else "raw") and unet.card["step"] == 17
    assert unet.card.get("t_init") == (440 if items > 4 and network != "fake score" else None)  # eval.py goes by it
    printed = capsys.readouterr().out
    parameters = sum(p.numel() for p in networks[network].parameters())
    for words in (f"list of {items} items", "channels 32, multipliers [1, 2, 2, 2], blocks 1", "attention_at [16]",
                  f"{len(networks[network].state_dict())}, all of them used", f"{parameters:,}, all of them filled"):
        assert words in printed


@pytest.mark.parametrize("items", [5, 6])
def test_what_a_list_holds_of_one_run_begins_the_second_stage(items, networks, tmp_path):
    torch.save(container(items, networks), tmp_path / "ckpt.pth")
    files = [tmp_path / f"{part}.safetensors" for part in ("generator", "fake-score")]
    for file in files:
        run(tmp_path / "ckpt.pth", file, "--part", file.stem)
    config = ddpm_sfd.Config(init_generator=str(files[0]), init_fake_score=str(files[1]))
    generator, fake_score = read_pair(config, teacher=load_unet(files[1]))
    agree(generator, networks["EMA" if items == 6 else "generator"])
    agree(fake_score, networks["fake score"])


@pytest.mark.parametrize("shape, size, words", [
    (dict(multipliers=(1, 2, 2, 2, 4), attended=(2,)), 64, ""),
    (dict(multipliers=(1, 3), attended=(0, 1), blocks=2, classes=7), 16, "--image-size 16"),
    (dict(multipliers=(1, 2, 2, 2), attended=()), 8, "--image-size 8"),
    (dict(width=64, multipliers=(1,), attended=(0,)), 8, "--image-size 8"),
])
def test_the_configuration_is_read_off_the_tensors(shape, size, words, tmp_path):
    network = randomise(Reference(**shape), 5)
    torch.save([network.state_dict(), {}, 0], tmp_path / "ckpt.pth")
    run(tmp_path / "ckpt.pth", tmp_path / "out.safetensors", *words.split())
    unet = load_unet(tmp_path / "out.safetensors")
    agree(unet, network, labels=torch.tensor([0, 3, 6]))
    assert unet.image_shape == (3, size, size) and unet.num_classes == shape.get("classes", 10)
    assert unet.config["attention_at"] == [size >> level for level in shape["attended"]]
    assert unet.config["dropout"] == 0.1  # of no matter here, but the method files train with it


@pytest.mark.parametrize("multipliers, attended, size, tensors, parameters", [
    ((1, 2, 2, 2), (1,), 32, 334, 38_632_323), ((1, 2, 2, 2, 4), (2,), 64, 396, 83_159_683)])
def test_official_networks_have_the_official_numbers(multipliers, attended, size, tensors, parameters):
    with torch.device("meta"):
        shapes = Reference(128, multipliers, 2, attended).state_dict()
    assert len(shapes) == tensors and sum(p.numel() for p in shapes.values()) == parameters
    content = {name: torch.zeros(1).expand(p.shape) for name, p in shapes.items()}  # takes no memory
    unet, found = convert.read_ddpm_family(convert.Config(), [content, {}, 0])
    assert found["tensors"] == tensors and sum(p.numel() for p in unet.parameters()) == parameters
    assert unet.image_shape == (3, size, size)
    assert unet.config == {"image_size": size, "in_channels": 3, "channels": 128, "multipliers": list(multipliers), "blocks": 2,
                           "attention_at": [16], "num_classes": 10, "text_dim": None, "heads": 8, "dropout": 0.1,
                           "groups": 32}


# ---------------------------------------------------------------------------- diffusers

SMALL = {"_class_name": "UNet2DModel", "act_fn": "silu", "attention_head_dim": None, "block_out_channels": [16, 32, 32],
         "center_input_sample": False, "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
         "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "in_channels": 3, "layers_per_block": 1,
         "mid_block_scale_factor": 1, "norm_eps": 1e-06, "norm_num_groups": 8, "out_channels": 3, "sample_size": 16,
         "time_embedding_type": "positional", "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]}
CIFAR10 = SMALL | {"block_out_channels": [128, 256, 256, 256], "layers_per_block": 2, "norm_num_groups": 32, "sample_size": 32,
                   "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
                   "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"]}  # google/ddpm-cifar10-32
OLD = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def peer(settings, seed=0):
    diffusers = pytest.importorskip("diffusers")
    diffusers.logging.set_verbosity_error()
    return randomise(diffusers.UNet2DModel(**{k: v for k, v in settings.items() if k != "_class_name"}), seed)


def folder(path, settings, tensors, name="diffusion_pytorch_model.safetensors"):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(settings))
    save_file(tensors, path / name) if name.endswith("safetensors") else torch.save(tensors, path / name)
    return path


def with_old_names(tensors):
    for new, old in OLD.items():
        tensors = {name.replace(new, old): tensor for name, tensor in tensors.items()}
    assert any(".proj_attn." in name for name in tensors)
    return tensors


def test_diffusers_folders_and_files_give_diffusers_network(tmp_path, capsys):
    network = peer(SMALL)
    network.save_pretrained(tmp_path / "new")  # as diffusers itself writes them
    network.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    network.save_pretrained(tmp_path / "pipeline" / "unet")
    folder(tmp_path / "old", SMALL, with_old_names(network.state_dict()), "diffusion_pytorch_model.bin")
    old = type(network).from_pretrained(tmp_path / "old", use_safetensors=False)  # diffusers knows the old names, too
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), old.parameters()))
    file = tmp_path / "new" / "diffusion_pytorch_model.safetensors"
    for i, source in enumerate([tmp_path / "new", tmp_path / "pickled", tmp_path / "pipeline", tmp_path / "old", file]):
        run(source, tmp_path / f"{i}.safetensors")
        unet = load_unet(tmp_path / f"{i}.safetensors")
        agree(unet, network)
        assert unet.num_classes is None and unet.image_shape == (3, 16, 16) and unet.config["attention_at"] == [8]
        printed = capsys.readouterr().out
        assert "UNet2DModel of diffusers" in printed and f"{len(network.state_dict())}, all of them used" in printed


@pytest.mark.parametrize("change", [
    {"attention_head_dim": 32},  # one head, since attention is 32 wide wherever there is some
    {"block_out_channels": [16, 16, 48], "down_block_types": ["AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
     "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"], "layers_per_block": 2},
    {"in_channels": 1, "out_channels": 1, "dropout": 0.25, "act_fn": "swish", "norm_num_groups": 4},
], ids=str)
def test_other_settings_of_diffusers_are_followed(change, tmp_path):
    network = peer(SMALL | change)
    run(folder(tmp_path / "a", SMALL | change, network.state_dict()), tmp_path / "out.safetensors")
    unet = load_unet(tmp_path / "out.safetensors")
    x, t = torch.randn(2, SMALL["in_channels"] if "in_channels" not in change else 1, 16, 16), torch.tensor([3, 800])
    with torch.no_grad():
        torch.testing.assert_close(unet(x, t), network(x, t).sample, rtol=1e-4, atol=1e-4)
    assert unet.config["dropout"] == change.get("dropout", 0.0)


def test_the_hubs_cifar10_network(tmp_path):
    """In the shape and the spelling of google/ddpm-cifar10-32, whose config.json is older than many settings."""
    network = peer(CIFAR10)
    source = folder(tmp_path / "ddpm-cifar10-32", CIFAR10, with_old_names(network.state_dict()), "diffusion_pytorch_model.bin")
    run(source, tmp_path / "out.safetensors")
    unet = load_unet(tmp_path / "out.safetensors")
    assert unet.config["attention_at"] == [16] and sum(p.numel() for p in unet.parameters()) == 35_746_307
    x, t = torch.randn(1, 3, 32, 32), torch.tensor([500])
    with torch.no_grad():
        torch.testing.assert_close(unet(x, t), network(x, t).sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("setting, value", [
    ("_class_name", "UNet3DConditionModel"), ("freq_shift", 0), ("freq_shift", None), ("flip_sin_to_cos", True),
    ("flip_sin_to_cos", None), ("norm_eps", 1e-5), ("norm_eps", None), ("downsample_padding", 1),
    ("downsample_padding", None), ("attention_head_dim", 8), ("attention_head_dim", None), ("center_input_sample", True),
    ("time_embedding_type", "fourier"), ("time_embedding_dim", 100), ("mid_block_type", "UNetMidBlock2DCrossAttn"),
    ("mid_block_scale_factor", 1.41), ("act_fn", "gelu"), ("resnet_time_scale_shift", "scale_shift"),
    ("add_attention", False), ("class_embed_type", "timestep"), ("num_class_embeds", 10), ("out_channels", 6),
    ("downsample_type", "resnet"), ("upsample_type", "resnet"), ("attn_norm_num_groups", 4),
    ("block_out_channels", [16, 24, 24]), ("down_block_types", ["DownBlock2D", "SkipDownBlock2D", "DownBlock2D"]),
    ("down_block_types", ["DownBlock2D", "AttnDownBlock2D"]), ("up_block_types", ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"]),
    ("sample_size", None), ("sample_size", [16, 32])])
def test_settings_that_our_unet_lacks_are_refused_by_name(setting, value, tmp_path, capsys):
    """Value None: config.json does not say, and diffusers' own default is not ours."""
    settings = {k: v for k, v in (SMALL | {setting: value}).items() if k != setting or v is not None}
    line = refused(capsys, folder(tmp_path / "a", settings, {"x": torch.zeros(1)}), tmp_path / "out.safetensors")
    assert f"config.json: {setting} " in line


def test_a_width_of_heads_that_is_one_head_here_and_two_there_is_refused(tmp_path, capsys):
    settings = SMALL | {"attention_head_dim": 16, "down_block_types": ["AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
                        "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D"]}  # 16 wide, and 32 in the middle
    source = folder(tmp_path / "a", settings, {"x": torch.zeros(1)})
    assert "attention_head_dim 16 is not supported, only None" in refused(capsys, source, tmp_path / "out.safetensors")


def test_sizes_that_cannot_be_halved_are_refused_and_the_users_size_wins(tmp_path, capsys):
    source = folder(tmp_path / "a", SMALL, peer(SMALL).state_dict())
    assert "multiple of 4" in refused(capsys, source, tmp_path / "out.safetensors", "--image-size", 18)
    run(source, tmp_path / "out.safetensors", "--image-size", 32)
    assert load_unet(tmp_path / "out.safetensors").config["attention_at"] == [16]


def test_weights_in_half_precision_become_float32(tmp_path):
    network = peer(SMALL).half()
    run(folder(tmp_path / "a", SMALL, network.state_dict()), tmp_path / "out.safetensors")
    assert {t.dtype for t in load_file(tmp_path / "out.safetensors").values()} == {torch.float32}
    agree(load_unet(tmp_path / "out.safetensors"), network.float())


# ---------------------------------------------------------------------------- ours


def stable_diffusion_unet(**change):
    diffusers = pytest.importorskip("diffusers")
    down, up = ["CrossAttnDownBlock2D", "DownBlock2D"], ["UpBlock2D", "CrossAttnUpBlock2D"]
    settings = dict(sample_size=8, block_out_channels=[16, 32], layers_per_block=2, cross_attention_dim=12, dropout=0.1,
                    attention_head_dim=4, norm_num_groups=8, down_block_types=down, up_block_types=up) | change
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(**settings).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return theirs, json.loads(theirs.to_json_string())


@pytest.mark.parametrize("place", ["pipeline/scheduler", "model"])
def test_another_schedule_or_prediction_is_refused_by_name(place, tmp_path, capsys):
    source = folder(tmp_path / place.replace("scheduler", "unet"), SMALL, peer(SMALL).state_dict())
    (tmp_path / place).mkdir(exist_ok=True)
    file, out = tmp_path / place / "scheduler_config.json", tmp_path / "out.safetensors"
    for wrong in ({"prediction_type": "v_prediction"}, {"beta_schedule": "squaredcos_cap_v2"}, {"beta_end": 0.012},
                  {"num_train_timesteps": 4000}, {"beta_start": 0.00085}, {"trained_betas": [0.1]},
                  {"rescale_betas_zero_snr": True}):
        file.write_text(json.dumps(wrong))
        error = refused(capsys, source, out)
        assert f"scheduler_config.json: {[*wrong][0]}" in error and not out.exists()
    file.write_text(json.dumps({"_class_name": "DDPMScheduler", "beta_start": 0.0001, "clip_sample": True}))
    run(source, out)


def test_the_schedule_is_found_where_files_are_links_as_in_the_hubs_cache(tmp_path, capsys):
    blobs = folder(tmp_path / "blobs", SMALL, peer(SMALL).state_dict())
    (tmp_path / "snapshot" / "unet").mkdir(parents=True)
    for file in blobs.iterdir():
        (tmp_path / "snapshot" / "unet" / file.name).symlink_to(file)
    (tmp_path / "snapshot" / "scheduler").mkdir()
    (tmp_path / "snapshot" / "scheduler" / "scheduler_config.json").write_text('{"prediction_type": "v_prediction"}')
    assert "prediction_type" in refused(capsys, tmp_path / "snapshot", tmp_path / "out.safetensors")


def test_stable_diffusions_unet_and_back(tmp_path):
    theirs, config = stable_diffusion_unet()
    source = folder(tmp_path / "sd" / "unet", config, theirs.state_dict())
    run(source.parent, tmp_path / "out.safetensors")  # a whole model's folder
    ours = load_unet(tmp_path / "out.safetensors")
    x, t, text = torch.randn(3, 4, 8, 8), torch.tensor([0, 500, 999]), torch.randn(3, 7, 12)
    with torch.no_grad():
        expected = theirs(x, t, text).sample
        torch.testing.assert_close(ours(x, t, text), expected, rtol=1e-4, atol=1e-5)
    assert expected.std() > 0.01 and ours.config["dropout"] == 0.1
    run(source.parent, tmp_path / "larger.safetensors", "--image-size", "16")
    assert (ours.image_shape, load_unet(tmp_path / "larger.safetensors").image_shape) == ((4, 8, 8), (4, 16, 16))
    tensors, written = convert.text_unet_tensors(ours)
    assert {k: config[k] for k in written} == written
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensors.pop(name), tensor)
    assert not tensors


@pytest.mark.parametrize("setting, value", [
    ("flip_sin_to_cos", False), ("freq_shift", 1), ("downsample_padding", 0), ("num_attention_heads", 8),
    ("mid_block_type", "UNetMidBlock2D"), ("only_cross_attention", True), ("dual_cross_attention", True),
    ("transformer_layers_per_block", 2), ("addition_embed_type", "text"), ("time_embedding_act_fn", "gelu"),
    ("timestep_post_act", "silu"), ("encoder_hid_dim", 8), ("conv_in_kernel", 5), ("conv_out_kernel", 5),
    ("use_linear_projection", True), ("attention_head_dim", [4, 8]), ("in_channels", 9), ("time_cond_proj_dim", 8), ("norm_eps", 1e-6)])
def test_stable_diffusion_settings_that_our_unet_lacks_are_refused_by_name(setting, value):
    theirs, config = stable_diffusion_unet()
    with pytest.raises(ValueError, match="out_channels" if setting == "in_channels" else setting):
        convert.text_unet(theirs.state_dict(), config | {setting: value})


def test_a_stable_diffusion_unet_that_is_not_whole_is_refused():
    theirs, config = stable_diffusion_unet()
    tensors = theirs.state_dict()
    with pytest.raises(ValueError, match="attn2.to_k.weight"):
        convert.text_unet({k: v for k, v in tensors.items() if "attn2.to_k" not in k}, config)
    with pytest.raises(ValueError, match="beyond those of its U-Net"):
        convert.text_unet(tensors | {"add_embedding.weight": torch.zeros(1)}, config)
    with pytest.raises(ValueError, match="describes no UNet2DConditionModel"):
        convert.text_unet(tensors, {"_class_name": "UNet2DConditionModel"})


def test_our_own_files_are_written_again_bit_for_bit(tmp_path, capsys):
    unet = random_unet()
    save_unet(unet, tmp_path / "a.safetensors", what="fake score", scores={"fid": 1.5})
    run(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert "U-Net of minUnlearn" in capsys.readouterr().out
    for words in ("--raw", "--part generator", "--image-size 32"):
        assert words.split()[0] in refused(capsys, tmp_path / "a.safetensors", tmp_path / "c.safetensors", *words.split())
    tensors = dict(unet.state_dict())
    tensors.pop("conv_in.bias")
    save_file(tensors, tmp_path / "d.safetensors", {"minunlearn": json.dumps({"kind": "U-Net", "config": unet.config, "card": {}})})
    assert "d.safetensors: it does not hold the U-Net" in refused(capsys, tmp_path / "d.safetensors", tmp_path / "c.safetensors")
    save_file(tensors, tmp_path / "e.safetensors", {"minunlearn": json.dumps({"kind": "classifier"})})
    assert "classifier" in refused(capsys, tmp_path / "e.safetensors", tmp_path / "c.safetensors")


# ---------------------------------------------------------------------------- refusals


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def damaged(name, tensors):
    """A network's tensors (name -> tensor) with one fault, and a pattern that the refusal must hold."""
    tensors = dict(tensors)
    key = "down.1.block.0.nin_shortcut.weight"
    if name == "missing":
        del tensors["mid.attn_1.k.bias"]
    elif name == "extra":
        tensors["up.9.extra.weight"] = torch.zeros(3)
    elif name == "shape":
        tensors[key] = tensors[key].transpose(0, 1).contiguous()  # as many numbers, and as many bytes
    elif name == "long":
        tensors["mid.attn_1.v.bias"] = torch.zeros(65)
    elif name == "null shape":
        tensors["null_classes_emb"] = tensors["null_classes_emb"].reshape(2, -1)
    elif name == "infinite":
        tensors[key] = tensors[key] / 0
    elif name == "twice":
        tensors["module." + key] = tensors[key]
    elif name == "no first":
        del tensors["conv_in.weight"]
    elif name == "no labels":
        del tensors["classes_emb.weight"]
    elif name == "no null":
        del tensors["null_classes_emb"]
    return tensors


@pytest.mark.parametrize("fault, word", [
    ("missing", "lacks the tensor mid.attn_1.k.bias"), ("extra", "the tensor up.9.extra.weight"),
    ("shape", "down.1.block.0.nin_shortcut.weight (32, 64, 1, 1)"), ("long", "mid.attn_1.v.bias (65,)"), ("null shape", "null_classes_emb"), ("infinite", "not finite"),
    ("twice", "two tensors for one parameter"), ("no first", "conv_in.weight"), ("no labels", "classes_emb.weight"),
    ("no null", "lacks the tensor null_classes_emb")])
def test_networks_that_are_not_whole_are_refused(fault, word, networks, tmp_path, capsys):
    torch.save([damaged(fault, networks["EMA"].state_dict()), {}, 0], tmp_path / "ckpt.pth")
    assert word in refused(capsys, tmp_path / "ckpt.pth", tmp_path / "out.safetensors")


def test_lists_that_are_not_known_are_refused(networks, tmp_path, capsys):
    known = {n: container(n, networks) for n in (3, 4, 5, 6)}
    network = known[3][0]
    early = [None, None, *known[6][2:3], None, 17, known[6][5]]
    for content, words, word in [
        (known[3][:2], "", "a list of 2 items"),
        ([], "", "a list of 0 items"),
        ([*known[6], 1], "", "a list of 7 items"),
        ([network, {}, known[4][3]], "", "the last of them a dict"),
        ([network, {}, 17, 18], "", "the last of them a int"),
        (known[6][:4] + [17, None], "", "the last of them a NoneType"),
        (known[3], "--part fake-score", "--part fake-score"),
        (known[4], "--part generator", "--part generator"),
        (early, "--part fake-score", "fake score (raw) is None"),
        ([*[None] * 4, 17, known[6][5]], "--raw", "generator (raw) is None"),
        ([{"state_dict": network}, {}, 17], "", "no dict of tensors"),
        ([{}, {}, 17], "", "no dict of tensors"),
        ([{3: torch.zeros(1)}, {}, 17], "", "no dict of tensors"),
        ({"step": 17, "state": network}, "", "a dict is neither"),
        (torch.zeros(3), "", "a Tensor is neither"),
        (network, "", "no config.json"),
        (network, "--raw", "--raw"),
        ([randomise(Reference(multipliers=(1, 3)), 0).state_dict(), {}, 0], "", "--image-size"),
        ([randomise(Reference(attended=(2,)), 0).state_dict(), {}, 0], "", "attention at levels [2]"),  # 64 px, perhaps
    ]:
        torch.save(content, tmp_path / "ckpt.pth")
        assert word in refused(capsys, tmp_path / "ckpt.pth", tmp_path / "out.safetensors", *words.split())
    torch.save(early, tmp_path / "ckpt.pth")  # what it does hold can be had
    for words, name in (("", "EMA"), ("--raw", "generator")):
        run(tmp_path / "ckpt.pth", tmp_path / "out.safetensors", *words.split())
        agree(load_unet(tmp_path / "out.safetensors"), networks[name])


def test_code_in_a_pickle_is_not_run(networks, tmp_path, capsys):
    network = networks["EMA"].state_dict()
    torch.save([network, Bomb(tmp_path / "boom"), 0], tmp_path / "ckpt.pth")
    assert "it holds code (posix.mkdir)" in refused(capsys, tmp_path / "ckpt.pth", tmp_path / "out.safetensors")
    assert not (tmp_path / "boom").exists()
    torch.load(tmp_path / "ckpt.pth", weights_only=False)
    assert (tmp_path / "boom").exists()  # it was live


def test_files_that_are_no_checkpoints_are_refused(networks, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    out.write_text("an older result")
    torch.save([networks["EMA"].state_dict(), {}, 0], tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    save_file(networks["EMA"].state_dict(), tmp_path / "foreign.safetensors")
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "foreign.safetensors").read_bytes()[:-100])
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("hello, I am no checkpoint")
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    folder(tmp_path / "unnamed", SMALL, {"x": torch.zeros(1)}, "other.safetensors")
    (folder(tmp_path / "broken", {}, {"x": torch.zeros(1)}) / "config.json").write_text("{")
    folder(tmp_path / "list", [1], {"x": torch.zeros(1)})
    folder(tmp_path / "bare", {"_class_name": "UNet2DModel"}, {"x": torch.zeros(1)})
    for name, word in [("cut.pth", "no"), ("cut.safetensors", "no sound safetensors"), ("text.pth", "nor a whole file"),
                       ("text.safetensors", "no sound safetensors"), ("empty.pth", "nor a whole file"),
                       ("absent.pth", "no such file"), ("foreign.safetensors", "no config.json"),
                       ("folder", "must hold config.json"), ("unnamed", "must hold config.json"),
                       ("broken", "config.json"), ("list", "no UNet2DModel"), ("bare", "block_out_channels")]:
        line = refused(capsys, tmp_path / name, out)
        assert word in line and name in line
    assert out.read_text() == "an older result"
    save_unet(random_unet(), tmp_path / "generator.safetensors", t_init=300)
    line = refused(capsys, tmp_path / "generator.safetensors", out, "--t-init", "625")
    assert "its card says 300" in line and out.read_text() == "an older result"
    line = refused(capsys, tmp_path / "whole.pth", out, "--t-init", "625")
    assert "--t-init 625 is for a one-step generator" in line and out.read_text() == "an older result"
    network = folder(tmp_path / "diffusers", SMALL, peer(SMALL).state_dict())
    line = refused(capsys, network, out, "--t-init", "625")
    assert "--t-init 625 is for a one-step generator" in line and out.read_text() == "an older result"
    run(tmp_path / "whole.pth", out)  # and a success does replace it
    assert load_unet(out).num_classes == 10


def test_a_place_that_cannot_be_written_to_is_refused(tmp_path, capsys):
    source = tmp_path / "a.safetensors"
    save_unet(random_unet(), source)
    (tmp_path / "folder.safetensors").mkdir()
    assert "the file to write, too" in refused(capsys, source, source)
    for out, word in [("b.pth", "no name of a .safetensors"), ("b" * 300 + ".safetensors", "too long"), ("folder.safetensors", "no name of a .safetensors"),
                      ("a.safetensors/b.safetensors", "a.safetensors")]:
        assert word in refused(capsys, source, tmp_path / out)
    for words in ([], [source]):
        assert "SOURCE OUT.safetensors" in refused(capsys, *words)


def test_as_a_command(networks, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save([networks["EMA"].state_dict(), {}, 0], "ckpt.pth")
    monkeypatch.setattr(sys, "argv", ["convert.py", "ckpt.pth", "out.safetensors"])
    runpy.run_path(str(ROOT / "convert.py"), run_name="__main__")
    assert "list of 3 items" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt.pth", "out.safetensors"]
    assert torch.equal(load_unet("out.safetensors").conv_in.weight, networks["EMA"].conv_in.weight)
    monkeypatch.setattr(sys, "argv", ["convert.py", "absent.pth", "new.safetensors"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(ROOT / "convert.py"), run_name="__main__")
    assert capsys.readouterr().err == "convert.py: error: absent.pth: there is no such file or folder\n"


# ------------------------------------------------------------------ from the network


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server on loopback, and an empty cache. Paths that begin with /short/ promise more than they give."""
    files, asked = {}, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            content = files.get(self.path.removeprefix("/short"))
            if content is None:
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if self.path.startswith("/short/") else content)

        def log_message(self, *words):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    yield SimpleNamespace(url=f"http://127.0.0.1:{httpd.server_port}", files=files, asked=asked, cache=tmp_path / "cache")
    httpd.shutdown()


def test_a_url_is_fetched_once(server, tiny_file):
    server.files["/teacher.safetensors"] = Path(tiny_file).read_bytes()
    digits = hashlib.sha256(Path(tiny_file).read_bytes()).hexdigest()
    for _ in range(2):
        unet = load_teacher(f"{server.url}/teacher.safetensors#sha256={digits}")
    assert server.asked == ["/teacher.safetensors"]
    ours = load_unet(tiny_file).state_dict()
    assert all(torch.equal(ours[k], v) for k, v in unet.state_dict().items())
    by_file = load_teacher(f"file://{tiny_file}")
    assert all(torch.equal(ours[k], v) for k, v in by_file.state_dict().items())


def test_a_model_of_the_hub_is_fetched_and_converted(server, tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(32, 32), down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), layers_per_block=1, downsample_padding=0, flip_sin_to_cos=False,
        freq_shift=1, norm_eps=1e-6, attention_head_dim=None).eval()
    theirs.save_pretrained(tmp_path / "model")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        server.files[f"/org/name/resolve/main/{name}"] = (tmp_path / "model" / name).read_bytes()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    unet = load_teacher("hub:org/name")
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        torch.testing.assert_close(unet(x, t), theirs(x, t).sample, rtol=0, atol=1e-4)
    assert load_teacher("hub:org/name").num_classes is None and len(server.asked) == 2


@pytest.mark.parametrize("path, says", [
    ("/nobody.safetensors", "404"),
    ("/short/teacher.safetensors", "broke off after"),
    ("/teacher.safetensors#sha256=" + 64 * "0", "has the SHA-256"),
])
def test_what_does_not_come_whole_is_refused_and_leaves_nothing(server, tiny_file, path, says):
    server.files["/teacher.safetensors"] = Path(tiny_file).read_bytes()
    with pytest.raises(OSError, match=says) as error:
        load_teacher(server.url + path)
    assert server.url in str(error.value)
    assert not [p for p in server.cache.rglob("*") if p.is_file()]
    # and the next try, of a sound file, works
    assert load_teacher(server.url + "/teacher.safetensors").num_classes == 10


def test_a_server_that_does_not_answer_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    with pytest.raises(OSError, match="http://127.0.0.1:9/x.safetensors: "):
        load_teacher("http://127.0.0.1:9/x.safetensors")


def test_files_of_one_name_from_two_addresses_are_two(server, tiny_file, tmp_path):
    save_unet(random_unet(1), tmp_path / "other.safetensors")
    server.files["/a/teacher.safetensors"] = Path(tiny_file).read_bytes()
    server.files["/b/teacher.safetensors"] = (tmp_path / "other.safetensors").read_bytes()
    a, b = (load_teacher(f"{server.url}/{name}/teacher.safetensors") for name in "ab")
    assert (a.image_shape, b.image_shape) == ((1, 8, 8), (1, 28, 28))
    with pytest.raises(OSError, match="has the SHA-256"):  # what lies in the cache was fetched without one
        load_teacher(f"{server.url}/a/teacher.safetensors#sha256={64 * '0'}")


def test_a_teacher_may_be_any_folder_or_file_at_hand(networks, tmp_path, monkeypatch):
    theirs = peer(SMALL)
    source = folder(tmp_path / "model", SMALL, theirs.state_dict())
    for path in (source, source / "diffusion_pytorch_model.safetensors"):
        unet = load_teacher(path)
        agree(unet, theirs)
        assert unet.path == source / "diffusion_pytorch_model.safetensors"
    monkeypatch.chdir(tmp_path)
    source.rename("mnist-unconditional")  # a path is a path, also where a shipped name is in it
    agree(load_teacher("./mnist-unconditional"), theirs)
    torch.save(container(4, networks), tmp_path / "ckpt.pth")
    unet = load_teacher(tmp_path / "ckpt.pth")
    agree(unet, networks["EMA"], labels=torch.tensor([0, 4, 9]))
    assert unet.card["weights"] == "EMA" and unet.path == tmp_path / "ckpt.pth"
