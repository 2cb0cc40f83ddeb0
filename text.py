"""CLIP's tokenizer and text encoder: how a prompt becomes what the U-Net of Stable Diffusion 1 looks at.

    tokenizer       text -> L numbers, tokens: whole words where they are common, else pieces of words
    text encoder    tokens -> one vector for each of the L places (Radford et al., "Learning Transferable Visual Models
                    From Natural Language Supervision", 2021)

Modules are nested and named as in the hub's files, so that no table has to translate (`text_model` is their word). The
tests compare both with transformers, which this file does not need; stable_diffusion.py reads and writes them.
"""

import re
import unicodedata

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

# ---------------------------------------------------------------------------- the tokenizer

# Bytes as visible characters, in the order of CLIP's vocabulary: those that are visible in Latin-1, then the others,
# which borrow the characters from 256 on.
VISIBLE = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
BYTES = VISIBLE + [byte for byte in range(256) if byte not in VISIBLE]
SYMBOL = {byte: chr(byte if place < len(VISIBLE) else 256 + place - len(VISIBLE)) for place, byte in enumerate(BYTES)}
END_OF_WORD = "</w>"

CONTRACTION = re.compile("'(?:s|t|re|ve|m|ll|d)")
RUN = re.compile("L+|N|O+|S+")  # over the kinds of characters: a word, one digit, punctuation, whitespace


def kind(character):
    """L a letter, N a number, S whitespace, O any other: what Unicode calls it."""
    category = unicodedata.category(character)[0]
    space = character.isspace() and not "\x1c" <= character <= "\x1f"  # four that are whitespace to Python alone
    return category if category in "LN" else "S" if space else "O"


def words(text):
    """Normalised and cut as CLIP does: "It's 42, Zoë!" -> it 's 4 2 , zoë !"""
    text = "".join(c.lower() for c in unicodedata.normalize("NFC", text))  # letter by letter: no final sigma
    kinds, start = "".join(map(kind, text)), 0
    while start < len(text):
        found = CONTRACTION.match(text, start) or RUN.match(kinds, start)
        if kinds[start] != "S":
            yield text[start:found.end()]
        start = found.end()


def byte_pairs(word, rank):
    """Byte-pair encoding of a word: its bytes, joined pair by pair, the pair of the lowest rank first.

    rank: (left, right) -> place in the list of merges. Returns the tokens as a list of str, the last with </w>."""
    parts = [SYMBOL[byte] for byte in word.encode()]
    parts[-1] += END_OF_WORD
    while len(parts) > 1:
        best = min(zip(parts, parts[1:]), key=lambda pair: rank.get(pair, len(rank)))
        if best not in rank:
            break
        joined, i = [], 0
        while i < len(parts):
            step = 2 if tuple(parts[i:i + 2]) == best else 1
            joined.append("".join(parts[i:i + step]))
            i += step
        parts = joined
    return parts


class Tokenizer:
    """CLIP's tokenizer: list of str -> LongTensor (B, L), begin token, words, end token, then pad to L = max_length.

    vocabulary: token -> id. merges: pairs of tokens, the most important first. begin, end, pad and unknown are tokens
    of the vocabulary; spelled out exactly in a text, they are read as such. An overlong text loses its end. ValueError
    when a merge or one of the four is not in the vocabulary.
    """

    def __init__(self, vocabulary, merges, max_length, *, begin="<|startoftext|>", end="<|endoftext|>",
                 pad="<|endoftext|>", unknown="<|endoftext|>"):
        self.vocabulary, self.merges, self.max_length = vocabulary, [tuple(pair) for pair in merges], max_length
        self.begin, self.end, self.pad, self.unknown = specials = begin, end, pad, unknown
        for token in [*map("".join, self.merges), *specials]:
            if token not in vocabulary:
                raise ValueError(f"the vocabulary lacks the token {token!r}")
        self.rank = {pair: place for place, pair in enumerate(self.merges)}
        self.special = re.compile("(" + "|".join(map(re.escape, sorted(specials, key=len, reverse=True))) + ")")

    def encode(self, text):
        """The ids of a str, as many as there are, without begin, end and pad."""
        ids = []
        for i, piece in enumerate(self.special.split(text)):
            tokens = [piece] if i % 2 else [token for word in words(piece) for token in byte_pairs(word, self.rank)]
            ids += [self.vocabulary.get(token, self.vocabulary[self.unknown]) for token in tokens]
        return ids

    def __call__(self, texts):
        begin, end, pad = (self.vocabulary[token] for token in (self.begin, self.end, self.pad))
        rows = torch.full((len(texts), self.max_length), pad)
        for row, text in zip(rows, texts):
            ids = [begin, *self.encode(text)[:self.max_length - 2], end]
            row[:len(ids)] = torch.tensor(ids)
        return rows


def word_tokenizer(known, max_length):
    """A Tokenizer that has a token for each word in `known` (list of str, in lower case), and spells out all others.

    The vocabulary is in CLIP's order: the 256 bytes, the same at the end of a word, the merges, begin and end. A new
    merge ranks behind all before it, so that words that are one token already stay one."""
    rank = {}
    for text in known:
        for word in words(text):
            while len(parts := byte_pairs(word, rank)) > 1:
                rank[parts[0], parts[1]] = len(rank)
    symbols = [SYMBOL[byte] for byte in BYTES]
    tokens = [*symbols, *(symbol + END_OF_WORD for symbol in symbols), *map("".join, rank)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]  # two merges may make the same token
    return Tokenizer({token: i for i, token in enumerate(tokens)}, list(rank), max_length)


# ---------------------------------------------------------------------------- the text encoder

ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


def settings(arguments):
    """The arguments of a constructor, from its locals()."""
    return {name: value for name, value in arguments.items() if name not in ("self", "__class__")}


class TextBlock(nn.Module):
    """Each place looks at itself and those before it, then passes through two dense layers; both added to the input."""

    def __init__(self, width, inner, heads, activation, eps):
        super().__init__()
        self.heads, self.activation = heads, ACTIVATIONS[activation]
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.self_attn = nn.ModuleDict({name: nn.Linear(width, width) for name in
                                        ("q_proj", "k_proj", "v_proj", "out_proj")})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})

    def forward(self, x):
        h = self.layer_norm1(x)  # (B, L, D)
        q, k, v = (rearrange(self.self_attn[name](h), "b l (heads d) -> b heads l d", heads=self.heads)
                   for name in ("q_proj", "k_proj", "v_proj"))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, L, D / heads)
        x = x + self.self_attn["out_proj"](rearrange(h, "b heads l d -> b l (heads d)"))
        return x + self.mlp["fc2"](self.activation(self.mlp["fc1"](self.layer_norm2(x))))


class TextEncoder(nn.Module):
    """CLIP's text transformer. The arguments have the names and defaults of a CLIPTextModel's config.json; hidden_act
    is quick_gelu or gelu. It is not told where a text ends: pads are tokens like others, as in Stable Diffusion."""

    def __init__(self, *, vocab_size=49408, hidden_size=512, intermediate_size=2048, num_hidden_layers=12,
                 num_attention_heads=8, max_position_embeddings=77, hidden_act="quick_gelu", layer_norm_eps=1e-5):
        super().__init__()
        self.config = settings(locals())
        block = (hidden_size, intermediate_size, num_attention_heads, hidden_act, layer_norm_eps)
        self.text_model = nn.ModuleDict({
            "embeddings": nn.ModuleDict({"token_embedding": nn.Embedding(vocab_size, hidden_size),
                                         "position_embedding": nn.Embedding(max_position_embeddings, hidden_size)}),
            "encoder": nn.ModuleDict({"layers": nn.Sequential(*(TextBlock(*block) for _ in range(num_hidden_layers)))}),
            "final_layer_norm": nn.LayerNorm(hidden_size, eps=layer_norm_eps)})
        for embedding in self.text_model["embeddings"].values():
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, ids):
        """ids (B, L) of tokens, L at most max_position_embeddings -> the last hidden state (B, L, hidden_size)."""
        embeddings = self.text_model["embeddings"]
        x = embeddings["token_embedding"](ids) + embeddings["position_embedding"].weight[:ids.shape[1]]
        return self.text_model["final_layer_norm"](self.text_model["encoder"]["layers"](x))
