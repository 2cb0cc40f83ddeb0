"""Stable Diffusion's parts: each computes what diffusers and transformers compute, at Stable Diffusion 1.5's own shapes
and at small ones; folders are read in all forms that the hub serves, and what is not sound is refused in one line.

The real vocabulary and weights are not at hand: the tokenizer is compared on a vocabulary of its size, learnt from the
standard library's sources, and the networks with random weights.
"""

import json
import os
import random
import re
import shutil
import unicodedata
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file, save_file

import convert
from stable_diffusion import (
    Autoencoder,
    StableDiffusion,
    load_stable_diffusion,
    read_tokenizer,
    save_stable_diffusion,
)
from text import TextEncoder, Tokenizer, byte_pairs, word_tokenizer, words
from unet import UNet, VPSchedule, ddim_sample

START, END = "<|startoftext|>", "<|endoftext|>"
PROMPTS = ["a red seven", "a photo of a blue three", "the number 5, in GREEN!", ""]
TEXT = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=16)
VAE = dict(block_out_channels=[8, 16, 16], norm_num_groups=4)
UNET = dict(image_size=8, in_channels=4, channels=16, multipliers=(1, 2), blocks=1, attention_at=(8,), text_dim=32, heads=4,
            groups=8, dropout=0.0)
WEIGHTS_OF = {"text_encoder": "model.safetensors", "vae": "diffusion_pytorch_model.safetensors",
              "unet": "diffusion_pytorch_model.safetensors"}


def shaken(network, seed=0):
    """The network with nothing in it trivially zero or one, in evaluation mode; its outputs are of order one."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(1_000_003, generator=generator)  # much faster than new numbers for a billion weights
    tensors, at = {}, 0
    for name, tensor in network.state_dict().items():
        at = (at + 7919) % 1000
        values = noise[at:].repeat(1 + tensor.numel() // len(noise[at:]))[:tensor.numel()].view(tensor.shape)
        scale = 0.1 if tensor.ndim == 1 else tensor[0].numel() ** -0.5
        tensors[name] = values * scale + (1 if tensor.ndim == 1 and name.endswith("weight") else 0)
    network.load_state_dict(tensors, assign=True)
    return network.eval()


def tiny_sd(**change):
    torch.manual_seed(0)
    tokenizer = word_tokenizer(PROMPTS, 16)
    text = TextEncoder(**TEXT | {"vocab_size": len(tokenizer.vocabulary)} | change)
    return StableDiffusion(tokenizer, *map(shaken, (text, Autoencoder(**VAE), UNet(**UNET))), VPSchedule.scaled_linear())


@pytest.fixture(scope="module")
def sd():
    return tiny_sd()


@pytest.fixture(scope="module")
def saved(sd, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sd") / "tiny"
    save_stable_diffusion(sd, folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy, to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "tiny"))


def edit(path, **change):
    """Change a JSON file; a value of None takes the setting out."""
    content = json.loads(path.read_text()) | change
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def same(ours, theirs, tolerance=0.0):
    """Both models have the same parts, to the last bit unless there is a tolerance."""
    assert ours.tokenizer(PROMPTS).equal(theirs.tokenizer(PROMPTS))
    for part in ("text_encoder", "vae", "unet", "schedule"):
        one, other = getattr(ours, part).state_dict(), getattr(theirs, part).state_dict()
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == torch.float32
            torch.testing.assert_close(one[name], other[name], rtol=tolerance, atol=tolerance)


def close(ours, theirs):
    """The largest difference is at most 1e-4, of outputs of order one."""
    assert 0.05 < theirs.std() < 20
    assert (ours - theirs).abs().max() <= 1e-4


# ---------------------------------------------------------------------------- the tokenizer


def test_words_by_hand():
    assert list(words("It's 42, Zoë!")) == ["it", "'s", "4", "2", ",", "zoë", "!"]
    assert list(words("WE'LL\u00a0go\x1cnow ''tis")) == ["we", "'ll", "go", "\x1c", "now", "''", "tis"]
    assert list(words("Zoe\u0308")) == ["zoë"] and list(words("q\u0308")) == ["q", "\u0308"]  # composed where it can be
    assert list(words(" \t\n ")) == []


def test_byte_pairs_by_hand():
    rank = {("l", "o"): 1, ("lo", "w</w>"): 2, ("o", "w</w>"): 0, ("e", "e"): 3}
    assert byte_pairs("low", rank) == ["l", "ow</w>"]  # the lower rank first, although it stands to the right
    assert byte_pairs("lo", rank) == ["l", "o</w>"]  # o at the end of a word is another symbol
    assert byte_pairs("eeee", rank) == ["ee", "e", "e</w>"]
    assert byte_pairs("é!", {}) == ["Ã", "©", "!</w>"] and byte_pairs("\x00", {}) == ["Ā</w>"]


def test_word_tokenizer_has_one_token_for_each_word():
    known = "three there red green bananas nana papa a sandbanana ananas zoë".split()
    tokenizer = word_tokenizer(known, 8)
    assert all(len(tokenizer.encode(word)) == 1 for word in known)
    assert len({*map(tuple, map(tokenizer.encode, known))}) == len(known)
    assert len(tokenizer.encode("threes")) > 1
    tokens = list(tokenizer.vocabulary)
    assert tokens[:2] == ["!", '"'] and tokens[256] == "!</w>" and tokens[511] == "Ń</w>" and tokens[-2:] == [START, END]
    assert list(tokenizer.vocabulary.values()) == list(range(len(tokens)))
    begin, end = len(tokens) - 2, len(tokens) - 1
    assert tokenizer(["red THREE", ""]).tolist() == [
        [begin, tokenizer.vocabulary["red</w>"], tokenizer.vocabulary["three</w>"]] + 5 * [end], [begin] + 7 * [end]]
    assert tokenizer(["red " * 20]).tolist() == [[begin] + 6 * [tokenizer.vocabulary["red</w>"]] + [end]]
    assert tokenizer([]).shape == (0, 8)


def test_a_vocabulary_that_lacks_what_it_needs_is_refused():
    with pytest.raises(ValueError, match="lacks the token 'ab'"):
        Tokenizer({"a": 0, "b": 1, START: 2, END: 3}, [("a", "b")], 8)
    with pytest.raises(ValueError, match="startoftext"):
        Tokenizer({"a": 0, END: 1}, [], 8)


def many_strings(count=2500, seed=0):
    """Strings of every kind. Characters whose Unicode category has changed since 3.2 are left out, and new ones:
    different versions of Unicode, in Python and in transformers, are not what is compared here."""
    old = unicodedata.ucd_3_2_0
    stable = [c for c in map(chr, range(1, 0x30000)) if unicodedata.category(c) not in ("Cn", "Cs", "Co")
              and old.category(c)[0] == unicodedata.category(c)[0]]
    by_kind = {}
    for c in stable:
        by_kind.setdefault(unicodedata.category(c), []).append(c)
    latin = [c for c in stable if ord(c) < 0x250]
    emoji = [chr(c) for c in range(0x1F600, 0x1F640)] + ["👩‍👩‍👧", "🏳️‍🌈", "👍🏽", "🇩🇪", "❤️", "3️⃣"]
    space = list(" \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2000\u200a\u2028\u2029\u202f\u205f\u3000\u200b\ufeff")
    english = "a photo of The number 3 they're WE'VE I'm he'd she'll it's don't rock'n'roll 'twas o'clock naïve café".split()
    pools = [latin, emoji, space, stable, list("'’`\"!?.,;:-_()[]{}<>|/\\@#$%^&*+=~"), list("0123456789½²Ⅷ٣一二"),
             by_kind["Lo"], [*by_kind["Mn"], *"aeiou"], by_kind["Cc"] + by_kind["Cf"], list("ΑΒΣΟΣ σςİIıſßẞŉǰΐﬁǅ")]
    strings = ["", " ", "\n\n", "'", "''", "'s", "S'S'S", "a" * 3000, "ab " * 500, "一" * 300, "!" * 500, "\u0301" * 40,
               "ΟΔΥΣΣΕΥΣ", "İstanbul", "a\u0338b", "\u1112\u1161\u11ab\uae00", "e\u0301\u0323", "0" * 100, END, "a" + END + "b",
               f"{START} a photo{END}!!", "<|endoftext", "x</w>y", "<|", "user@example.com https://example.com/?q=1&r=2",
               "don't can't won't I'd they're we've it's I'm you'll 'S 'T", "3.14159 1,000,000 1e-5", "½ ² Ⅷ ٣"]
    source = random.Random(seed)
    while len(strings) < count:
        pool = source.choice(pools)
        make = [lambda: "".join(source.choices(pool, k=source.randint(1, 12))), lambda: source.choice(english),
                lambda: "".join(source.choices(latin, k=source.randint(1, 8)))]
        pieces = [source.choice(make)() for _ in range(source.randint(1, 12))]
        strings.append(source.choice(["", " ", " ", source.choice(space)]).join(pieces))
    return strings


@pytest.fixture(scope="module")
def learnt(tmp_path_factory):
    """A folder with a vocabulary in CLIP's format, about its size, learnt by another implementation."""
    tokenizers = pytest.importorskip("tokenizers")
    from tokenizers import normalizers, pre_tokenizers, trainers

    peer = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    peer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    cut = pre_tokenizers.Split(tokenizers.Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), "removed", invert=True)
    peer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in sorted(Path(os.__file__).parent.glob("*.py"))]
    texts += [" ".join(many_strings(500, seed=1))]
    peer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=49406, end_of_word_suffix="</w>", show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    merges = [tuple(pair) for pair in json.loads(peer.to_str())["model"]["merges"]]
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [*map(chr, visible), *map(chr, range(256, 256 + 256 - len(visible)))]
    tokens = dict.fromkeys([*symbols, *(s + "</w>" for s in symbols), *map("".join, merges), START, END])
    assert len(tokens) > 20_000
    folder = tmp_path_factory.mktemp("learnt")
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges), encoding="utf-8")
    return folder


@pytest.mark.parametrize("pad", [END, "!"])  # Stable Diffusion 1 and 2
def test_tokenizer_agrees_with_transformers(pad, learnt, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = Path(shutil.copytree(learnt, tmp_path / "tokenizer"))
    specials = {"bos_token": START, "eos_token": {"content": END}, "unk_token": {"content": END}, "pad_token": pad}
    (folder / "special_tokens_map.json").write_text(json.dumps(specials))
    (folder / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": START, "eos_token": END, "pad_token": pad,
         "unk_token": END}))
    theirs, ours = transformers.CLIPTokenizer.from_pretrained(folder), read_tokenizer(folder)
    strings = many_strings()
    assert len(set(strings)) > 2000
    expected = theirs(strings, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    different = [(s, a, b) for s, a, b in zip(strings, ours(strings).tolist(), expected.tolist()) if a != b]
    assert not different, f"{len(different)} of {len(strings)}, the first {different[0]}"
    assert expected.unique().numel() > 2000  # many merges are at work
    theirs.save_pretrained(tmp_path / "again")  # in newer versions: tokenizer.json alone
    assert read_tokenizer(tmp_path / "again")(strings[:500]).equal(expected[:500])


# ---------------------------------------------------------------------------- the networks


def peer_text_encoder(**config):
    """A CLIPTextModel without memory for its weights, and its tensors' names as they are in the hub's files."""
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        peer = transformers.CLIPTextModel(transformers.CLIPTextConfig(**config, bos_token_id=0, eos_token_id=1)).eval()
    bare = not any(name.startswith("text_model.") for name in peer.state_dict())  # newer versions
    return peer, lambda name: name.removeprefix("text_model.") if bare else name


@pytest.mark.parametrize("config", [
    TEXT | {"vocab_size": 99}, TEXT | {"vocab_size": 99, "hidden_act": "gelu", "layer_norm_eps": 1e-3},
    pytest.param(dict(vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                      max_position_embeddings=77), id="SD 1.5")])
@torch.no_grad()
def test_text_encoder_agrees_with_transformers(config):
    peer, name_there = peer_text_encoder(**config)
    with torch.device("meta"):
        ours = TextEncoder(**config)
    shaken(ours)
    peer.load_state_dict({name_there(name): tensor for name, tensor in ours.state_dict().items()}, assign=True)
    length = config["max_position_embeddings"]
    for L in (length, 5):
        ids = torch.randint(config["vocab_size"], (2, L), generator=torch.Generator().manual_seed(L))
        close(ours(ids), peer(ids, position_ids=torch.arange(L)[None]).last_hidden_state)


@pytest.mark.parametrize("config", [
    VAE, VAE | {"layers_per_block": 2, "latent_channels": 3, "in_channels": 1, "out_channels": 2, "scaling_factor": 0.5},
    pytest.param(dict(block_out_channels=[128, 256, 512, 512], layers_per_block=2), id="SD 1.5")])
@torch.no_grad()
def test_autoencoder_agrees_with_diffusers(config):
    diffusers = pytest.importorskip("diffusers")
    levels = len(config["block_out_channels"])
    with torch.device("meta"):
        ours = Autoencoder(**config)
        peer = diffusers.AutoencoderKL(**config, down_block_types=["DownEncoderBlock2D"] * levels,
                                       up_block_types=["UpDecoderBlock2D"] * levels).eval()
    shaken(ours)
    peer.load_state_dict(ours.state_dict(), assign=True)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, config.get("in_channels", 3), 8 * 2 ** (levels - 1), 4 * 2 ** (levels - 1), generator=generator)
    latents = torch.randn(1, config.get("latent_channels", 4), 8, 4, generator=generator)
    expected = peer.encode(x).latent_dist
    mean, logvar = ours.encode(x)
    close(mean, expected.mean)
    close(logvar, expected.logvar)
    factor = config.get("scaling_factor", 0.18215)
    close(ours.latents(x) / factor, expected.mode())
    close(ours.decode(latents), peer.decode(latents / factor).sample)


def test_logvar_is_kept_in_bounds():
    vae = shaken(Autoencoder(**VAE))
    with torch.no_grad():
        vae.quant_conv.bias[4:6], vae.quant_conv.bias[6:] = 1000, -1000
        logvar = vae.encode(torch.zeros(1, 3, 8, 8))[1]
    assert logvar.unique().tolist() == [-30, 20]


@pytest.mark.slow
@torch.no_grad()
def test_the_unet_of_stable_diffusion_1_5_agrees_with_diffusers():
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        peer = diffusers.UNet2DConditionModel(cross_attention_dim=768, sample_size=64).eval()  # all else is its default
    config = json.loads(peer.to_json_string())
    assert config["block_out_channels"] == [320, 640, 1280, 1280] and config["attention_head_dim"] == 8
    shaken(peer)
    assert sum(p.numel() for p in peer.parameters()) == 859_520_964
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([20, 979])
    text = torch.randn(2, 77, 768, generator=generator)
    expected = peer(x, t, text).sample
    tensors = peer.state_dict()
    del peer
    ours = convert.text_unet(tensors, config)
    close(ours(x, t, text), expected)


# ---------------------------------------------------------------------------- folders, read


def test_what_is_saved_is_read(sd, saved):
    again = load_stable_diffusion(saved)
    same(again, sd)
    assert again.vae.config == sd.vae.config and again.text_encoder.config == sd.text_encoder.config
    assert not any(module.training for module in (again.text_encoder, again.vae, again.unet))
    assert again.embed(PROMPTS).shape == (4, 16, 32)
    assert again.to("cpu") is again
    assert not list(saved.rglob("*.tmp"))


def test_float16_halves_the_files(sd, saved, tmp_path):
    save_stable_diffusion(sd, tmp_path / "half", dtype=torch.float16)
    same(load_stable_diffusion(tmp_path / "half"), sd, tolerance=1e-3)
    for part, file in WEIGHTS_OF.items():
        assert {t.dtype for t in load_file(tmp_path / "half" / part / file).values()} == {torch.float16}


def test_a_shipped_name_is_a_folder_in_weights(sd, saved, monkeypatch):
    monkeypatch.setattr("stable_diffusion.WEIGHTS", saved.parent)
    same(load_stable_diffusion("tiny"), sd)
    with pytest.raises(FileNotFoundError, match=r"no folder 'small': .*\(tiny\)"):
        load_stable_diffusion("small")


def fp16(file):
    save_file({k: v.half() for k, v in load_file(file).items()}, file.with_suffix(".fp16.safetensors"))
    file.unlink()


def fp16_beside(file):
    save_file({k: v.half() for k, v in load_file(file).items()}, file.with_suffix(".fp16.safetensors"))


def pickled(file):
    torch.save(load_file(file), file.parent / ("pytorch_model.bin" if file.stem == "model" else f"{file.stem}.bin"))
    file.unlink()


def old_names(file):
    """As files of 2022 have them; the U-Net's attention was never called otherwise."""
    tensors = load_file(file)
    if file.parent.name == "vae":
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            tensors = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in tensors.items()}
        assert any("attentions.0.proj_attn.weight" in name for name in tensors)
    if file.parent.name == "text_encoder":
        tensors["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(tensors, file)


def new_names(file):
    save_file({name.removeprefix("text_model."): tensor for name, tensor in load_file(file).items()}, file)


@pytest.mark.parametrize("form", [fp16, fp16_beside, pickled, old_names, new_names])
def test_every_form_of_weights_is_read(form, folder, sd):
    for part, file in WEIGHTS_OF.items():
        form(folder / part / file)
    same(load_stable_diffusion(folder), sd, tolerance=1e-3 if form is fp16 else 0)


def test_settings_that_config_json_leaves_out_are_the_libraries_defaults(folder, sd):
    """Stable Diffusion 1.5's own config.json is of before scaling_factor."""
    edit(folder / "vae" / "config.json", scaling_factor=None, act_fn=None, sample_size=None)
    edit(folder / "text_encoder" / "config.json", hidden_act=None, layer_norm_eps=None)
    edit(folder / "scheduler" / "scheduler_config.json", prediction_type=None)
    again = load_stable_diffusion(folder)
    same(again, sd)
    assert again.vae.scaling_factor == 0.18215


@pytest.mark.parametrize("settings", [dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02),
                                      dict(_class_name="PNDMScheduler", skip_prk_steps=True)])
def test_the_schedule_agrees_with_diffusers(settings, folder):
    diffusers = pytest.importorskip("diffusers")
    file = folder / "scheduler" / "scheduler_config.json"
    edit(file, **settings)
    theirs = diffusers.DDPMScheduler.from_config(json.loads(file.read_text()))
    sd = load_stable_diffusion(folder)
    torch.testing.assert_close(sd.schedule.betas, theirs.betas, rtol=1e-5, atol=0)
    torch.testing.assert_close(sd.schedule.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4, atol=0)
    save_stable_diffusion(sd, folder)
    written = json.loads(file.read_text())
    expected = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000} | settings
    assert {k: written[k] for k in expected if k in ("beta_schedule", "beta_start", "beta_end", "num_train_timesteps")}.items() <= expected.items()


def test_a_schedule_that_is_neither_linear_nor_scaled_linear_is_not_written(sd, tmp_path):
    odd = StableDiffusion(sd.tokenizer, sd.text_encoder, sd.vae, sd.unet, VPSchedule(torch.full((10,), 0.1).cumsum(0) ** 3 / 2))
    with pytest.raises(ValueError, match="neither linear nor scaled linear"):
        save_stable_diffusion(odd, tmp_path / "odd")


# ---------------------------------------------------------------------------- folders, refused


def removed(*names):
    def change(folder):
        for name in names:
            shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    return change


def setting(file, **settings):
    return lambda folder: edit(folder / file, **settings)


def tensors(part, change):
    def change_file(folder):
        content = load_file(folder / part / WEIGHTS_OF[part])
        change(content)
        save_file(content, folder / part / WEIGHTS_OF[part])
    return change_file


def written(file, content):
    return lambda folder: (folder / file).write_bytes(content)


def cut(part, to=0.5):
    def change(folder):
        content = (folder / part / WEIGHTS_OF[part]).read_bytes()
        (folder / part / WEIGHTS_OF[part]).write_bytes(content[:int(len(content) * to)])
    return change


def with_code(folder):
    (folder / "unet" / WEIGHTS_OF["unet"]).unlink()
    torch.save({"x": re.compile("x"), "y": print}, folder / "unet" / "diffusion_pytorch_model.bin")


SCHEDULER = "scheduler/scheduler_config.json"


@pytest.mark.parametrize("change, error, where, why", [
    *((removed(part), FileNotFoundError, f"{part}/{file}", "is missing") for part, file in [
        ("scheduler", "scheduler_config.json"), ("tokenizer", "tokenizer_config.json"), ("text_encoder", "config.json"),
        ("vae", "config.json"), ("unet", "config.json")]),
    *((removed(f"{part}/{file}"), FileNotFoundError, f"{part}/{file}", r"is missing.*\.fp16\.safetensors")
      for part, file in WEIGHTS_OF.items()),
    (removed("tokenizer/vocab.json"), FileNotFoundError, "tokenizer/vocab.json", "is missing"),
    (removed("tokenizer/merges.txt"), FileNotFoundError, "tokenizer/merges.txt", "is missing"),
    (setting("tokenizer/tokenizer_config.json", model_max_length=None), ValueError, "tokenizer/tokenizer_config.json", "model_max_length"),
    (setting("tokenizer/special_tokens_map.json", pad_token="<pad>"), ValueError, "tokenizer/vocab.json", "lacks the token '<pad>'"),
    (written("tokenizer/vocab.json", b'{"a": 0'), ValueError, "tokenizer/vocab.json", "delimiter"),
    (written("tokenizer/vocab.json", b'["a"]'), ValueError, "tokenizer/vocab.json", "holds a list"),
    (setting(SCHEDULER, prediction_type="v_prediction"), ValueError, SCHEDULER, "prediction_type 'v_prediction' .*'epsilon'"),
    (setting(SCHEDULER, prediction_type="sample"), ValueError, SCHEDULER, "prediction_type 'sample' .*'epsilon'"),
    (setting(SCHEDULER, beta_schedule="squaredcos_cap_v2"), ValueError, SCHEDULER, "beta_schedule 'squaredcos_cap_v2'"),
    (setting(SCHEDULER, trained_betas=[0.1, 0.2]), ValueError, SCHEDULER, "trained_betas"),
    (setting(SCHEDULER, rescale_betas_zero_snr=True), ValueError, SCHEDULER, "rescale_betas_zero_snr True"),
    (setting(SCHEDULER, num_train_timesteps=500), ValueError, SCHEDULER, "num_train_timesteps 500 .*1000"),
    (setting("text_encoder/config.json", hidden_act="relu"), ValueError, "text_encoder/config.json", "hidden_act 'relu' .*'gelu'"),
    (setting("text_encoder/config.json", model_type="t5"), ValueError, "text_encoder/config.json", "model_type 't5'"),
    (setting("text_encoder/config.json", num_hidden_layers=3), ValueError, "text_encoder/model.safetensors", r"lacks the tensor .*layers\.2.* and 15 more"),
    (setting("text_encoder/config.json", num_hidden_layers=1), ValueError, "text_encoder/model.safetensors", r"beyond .*layers\.1.* and 15 more"),
    (setting("text_encoder/config.json", hidden_size=64), ValueError, "text_encoder/model.safetensors", "another shape .*text_model"),
    (setting("text_encoder/config.json", hidden_size="x"), ValueError, "text_encoder/config.json", "."),
    (setting("vae/config.json", act_fn="gelu"), ValueError, "vae/config.json", "act_fn 'gelu'"),
    (setting("vae/config.json", shift_factor=0.1), ValueError, "vae/config.json", "shift_factor 0.1"),
    (setting("vae/config.json", latents_mean=[0.1]), ValueError, "vae/config.json", "latents_mean"),
    (setting("vae/config.json", use_quant_conv=False), ValueError, "vae/config.json", "use_quant_conv False"),
    (setting("vae/config.json", mid_block_add_attention=False), ValueError, "vae/config.json", "mid_block_add_attention False"),
    (setting("vae/config.json", _class_name="AutoencoderTiny"), ValueError, "vae/config.json", "_class_name 'AutoencoderTiny'"),
    (setting("vae/config.json", norm_num_groups=5), ValueError, "vae/config.json", "divisible"),
    (setting("vae/config.json", block_out_channels=7), ValueError, "vae/config.json", "."),
    (setting("unet/config.json", use_linear_projection=True), ValueError, "unet/", "use_linear_projection True"),
    *((cut(part), ValueError, f"{part}/{file}", "no sound safetensors file") for part, file in WEIGHTS_OF.items()),
    (cut("vae", 0), ValueError, "vae/" + WEIGHTS_OF["vae"], "no sound safetensors file"),
    (tensors("vae", lambda t: t.pop("quant_conv.bias")), ValueError, "vae/" + WEIGHTS_OF["vae"], "lacks the tensor quant_conv.bias$"),
    (tensors("vae", lambda t: t.update(loss=torch.zeros(1))), ValueError, "vae/" + WEIGHTS_OF["vae"], "the tensor loss$"),
    (tensors("vae", lambda t: t["quant_conv.bias"].fill_(float("nan"))), ValueError, "vae/" + WEIGHTS_OF["vae"], "not finite, the tensor quant_conv.bias"),
    (tensors("unet", lambda t: t.pop("conv_in.bias")), ValueError, "unet/" + WEIGHTS_OF["unet"], "lacks the tensor conv_in.bias"),
    (tensors("text_encoder", lambda t: t.update(text_projection=torch.zeros(1))), ValueError, "text_encoder/model.safetensors", "text_projection"),
    (with_code, ValueError, "unet/diffusion_pytorch_model.bin", "code"),
    (setting("tokenizer/tokenizer_config.json", model_max_length=77), ValueError, "tiny", "places .*77 and 16"),
])
def test_what_is_not_sound_is_refused_in_one_line(change, error, where, why, folder):
    change(folder)
    with pytest.raises(error) as refused:
        load_stable_diffusion(folder)
    line = str(refused.value)
    assert "\n" not in line and line.startswith(str(folder)) and where in line and line.count(str(folder)) == 1
    assert re.search(why, line.split(where, 1)[1]), line


@pytest.mark.parametrize("change, why", [
    (dict(vocab_size=500), "tokens"), (dict(max_position_embeddings=8), "places"),
    (dict(hidden_size=64), "width of a text .*64 and 32")])
def test_parts_that_do_not_fit_together_are_refused(change, why):
    with pytest.raises(ValueError, match="do not fit together: " + why):
        tiny_sd(**change)


# ---------------------------------------------------------------------------- diffusers reads ours, and we theirs


def pipeline_of(folder):
    pytest.importorskip("transformers")
    diffusers = pytest.importorskip("diffusers")
    diffusers.utils.logging.disable_progress_bar()
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = diffusers.DDIMScheduler.from_config(pipeline.scheduler.config, steps_offset=0)
    return pipeline


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@torch.no_grad()
def test_diffusers_pipeline_draws_the_same_image(dtype, sd, tmp_path):
    folder = tmp_path / "tiny"
    save_stable_diffusion(sd, folder, dtype)
    pipeline, ours = pipeline_of(folder), load_stable_diffusion(folder)
    z = torch.randn(len(PROMPTS), *ours.unet.image_shape, generator=torch.Generator().manual_seed(0))
    theirs = pipeline(PROMPTS, latents=z, num_inference_steps=20, guidance_scale=4.5, output_type="pt").images
    c, null = ours.embed(PROMPTS), ours.embed([""])
    latents = ddim_sample(ours.unet, ours.schedule, z, c, steps=20, guidance=4.5, null=null, x0_clip=False)
    images = (ours.vae.decode(latents) / 2 + 0.5).clamp(0, 1)
    assert images.shape == (4, 3, 32, 32) and images.std() > 0.1
    assert (images - theirs).abs().max() <= 1e-3
    unguided = ours.vae.decode(ddim_sample(ours.unet, ours.schedule, z, c, steps=20, x0_clip=False))
    assert ((unguided / 2 + 0.5).clamp(0, 1) - theirs).abs().max() > 0.01  # the text matters
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files >= {"model_index.json", "tokenizer/merges.txt", "unet/config.json"}


def test_what_diffusers_writes_is_read(sd, saved, tmp_path):
    pipeline_of(saved).save_pretrained(tmp_path / "theirs")
    same(load_stable_diffusion(tmp_path / "theirs"), sd)


def test_a_shipped_name_means_what_ships(sd_folder, tmp_path, monkeypatch):
    """Also beside a folder of that name: its statistics and its posterior are the shipped ones, too."""
    shutil.copytree(sd_folder, tmp_path / "tiny-sd")
    monkeypatch.chdir(tmp_path)
    shipped, local = load_stable_diffusion("tiny-sd").unet, load_stable_diffusion("./tiny-sd").unet
    assert shipped.path.resolve() == ROOT / "weights/tiny-sd/unet/diffusion_pytorch_model.safetensors"
    assert shipped.config["channels"] == 48 and local.config["channels"] == 8
