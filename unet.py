"""The network, the noise schedule and the samplers: what every method file stands on.

    import torch
    from unet import VPSchedule, load_unet, ddim_sample

    teacher, schedule = load_unet("mnist"), VPSchedule.linear()
    images = ddim_sample(teacher, schedule, torch.randn(10, 1, 28, 28), torch.arange(10))

Read this file first. It has four parts: the variance-preserving (VP) schedule, the U-Net of Ho, Jain
and Abbeel ("Denoising Diffusion Probabilistic Models", 2020), the samplers, and weights on disk.

Glossary. Labels (D1) to (D3) and (L1) are this project's own; each marks the line of code that implements it.

    x0         x_0          a clean image, (B, C, H, W), in [-1, 1]
    noise      eps          standard Gaussian noise, the shape of x0
    t          t            a step of the diffusion, 0 (almost clean) to T - 1 = 999 (almost pure noise), (B,)
    x_t        x_t          the image noised to step t                                        (D1)
    a, s       a_t, s_t     sqrt(abar_t) and sqrt(1 - abar_t): how much signal, how much noise
    eps        eps_theta    the network's guess of the noise in x_t; the score is -eps / s_t  (D2)
    c          c            what the image should show: None, a class label, (B,), or a text embedding, (B, L, D)
    guidance   k            how far to go from the prediction without c ("") towards that with c; 1: all the way  (L1)
"""
import functools
import json
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

WEIGHTS = Path(__file__).resolve().parent / "weights"


# ---------------------------------------------------------------------------- the VP schedule


class VPSchedule(nn.Module):
    """How much noise each of the T steps adds. `betas` (T,), each in (0, 1), and `alphas_cumprod` (T,) are buffers."""

    def __init__(self, betas):
        super().__init__()
        self.register_buffer("betas", betas.float())
        self.register_buffer("alphas_cumprod", torch.cumprod(1 - betas.double(), 0).float())  # abar_t
        self.T = len(betas)

    @classmethod
    def linear(cls, T=1000, beta_start=1e-4, beta_end=0.02):
        """The schedule of Ho et al. 2020: beta grows linearly."""
        return cls(torch.linspace(beta_start, beta_end, T, dtype=torch.float64))

    @classmethod
    def scaled_linear(cls, T=1000, beta_start=0.00085, beta_end=0.012):
        """The schedule of Stable Diffusion: the square root of beta grows linearly."""
        return cls(torch.linspace(beta_start**0.5, beta_end**0.5, T, dtype=torch.float64) ** 2)

    def a(self, t):
        """Signal level a_t = sqrt(abar_t) of steps t (B,), as (B, 1, 1, 1)."""
        return rearrange(self.alphas_cumprod[t].sqrt(), "b -> b 1 1 1")

    def s(self, t):
        """Noise level s_t = sqrt(1 - abar_t) of steps t (B,), as (B, 1, 1, 1)."""
        return rearrange((1 - self.alphas_cumprod[t]).sqrt(), "b -> b 1 1 1")

    def add_noise(self, x0, noise, t):
        """The forward process. x0 and noise (B, C, H, W), t (B,) -> x_t (B, C, H, W)."""
        return self.a(t) * x0 + self.s(t) * noise  # (D1) x_t = a_t x0 + s_t eps

    def score(self, eps, t):
        """The score, the gradient of log p_t at x_t, from predicted noise eps (B, C, H, W)."""
        return -eps / self.s(t)  # (D2) score = -eps / s_t

    def predict_x0(self, x_t, eps, t):
        """Tweedie's formula: the expected clean image. x_t and eps (B, C, H, W), t (B,) -> (B, C, H, W)."""
        return (x_t - self.s(t) * eps) / self.a(t)  # (D3) x0_hat = (x_t - s_t eps) / a_t


# ---------------------------------------------------------------------------- the U-Net


def sinusoidal_embedding(t, dim, stable_diffusion=False):
    """Steps t (B,) as sines and cosines of geometrically spaced frequencies: (B, dim), dim even.

    Ho et al. put the sines first and end at frequency 1/10000; Stable Diffusion puts the cosines first and ends one
    frequency earlier."""
    last = dim // 2 if stable_diffusion else dim // 2 - 1
    frequencies = torch.exp(-math.log(10000) * torch.arange(dim // 2, device=t.device) / last)
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()] if stable_diffusion else [angles.sin(), angles.cos()], dim=1)


def zeroed(module):
    """Start at zero, so that every residual branch, and the network, begins as 'add nothing' (Ho et al. 2020)."""
    nn.init.zeros_(module.weight)
    nn.init.zeros_(module.bias)
    return module


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, conv, + the projected embedding, GroupNorm, SiLU, dropout, conv; all added to the input."""

    def __init__(self, cin, cout, emb_dim, groups, dropout, eps=1e-6):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, cin, eps=eps)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.emb_proj = nn.Linear(emb_dim, cout)
        self.norm2 = nn.GroupNorm(groups, cout, eps=eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(cout, cout, 3, padding=1))
        self.shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.emb_proj(emb)[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.shortcut(x) + h


class Attention(nn.Module):
    """Every pixel looks at every other: one head of self-attention, added to the input."""

    def __init__(self, channels, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x, text=None):
        q, k, v = rearrange(self.qkv(self.norm(x)), "b (n c) h w -> n b (h w) c", n=3)
        attention = (q / math.sqrt(q.shape[2]) @ k.mT).softmax(dim=2)  # (B, H*W, H*W), rows of sum 1
        return x + self.proj_out(rearrange(attention @ v, "b (h w) c -> b c h w", h=x.shape[2]))


class NoAttention(nn.Module):
    """The identity, at levels without attention."""

    def forward(self, x, text=None):
        return x


class MultiHeadAttention(nn.Module):
    """Every pixel looks at every place of `source`: x (B, N, C), source (B, M, D) -> (B, N, C)."""

    def __init__(self, channels, source_dim, heads):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(source_dim, channels, bias=False)
        self.to_v = nn.Linear(source_dim, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x, source):
        q, k, v = (rearrange(h, "b n (heads c) -> b heads n c", heads=self.heads)
                   for h in (self.to_q(x), self.to_k(source), self.to_v(source)))
        h = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, C / heads)
        return self.to_out(rearrange(h, "b heads n c -> b n (heads c)"))


class TextTransformer(nn.Module):
    """Stable Diffusion's replacement for plain attention: pixels attend to each other, then to the text tokens, then
    each passes through two dense layers; the result is added to the input."""

    def __init__(self, channels, text_dim, heads, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.self_attention = MultiHeadAttention(channels, channels, heads)
        self.cross_attention = MultiHeadAttention(channels, text_dim, heads)
        self.dense_in = nn.Linear(channels, 8 * channels)  # four times the width, and as many gates
        self.dense_out = nn.Linear(4 * channels, channels)
        self.proj_out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x, text):
        h = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c")
        pixels = self.norm1(h)
        h = h + self.self_attention(pixels, pixels)
        h = h + self.cross_attention(self.norm2(h), text)
        value, gate = self.dense_in(self.norm3(h)).chunk(2, dim=-1)
        h = h + self.dense_out(value * F.gelu(gate))  # GEGLU (Shazeer 2020)
        return x + self.proj_out(rearrange(h, "b (h w) c -> b c h w", h=x.shape[2]))


class Level(nn.Module):
    """One resolution on the way down or up: residual blocks, each followed by attention or nothing, then a resize."""

    def __init__(self, blocks, attentions, resize):
        super().__init__()
        self.blocks, self.attentions = nn.ModuleList(blocks), nn.ModuleList(attentions)
        self.resize = resize  # a convolution, or None at the last level


class UNet(nn.Module):
    """Predicts the noise in a noised image, as in Ho et al. 2020. Class labels are as in the official SFD code; text is
    as in Stable Diffusion 1 (Rombach et al. 2022), with its time embedding, padding and epsilon.

    image_size     height and width in pixels, divisible by 2 ** (len(multipliers) - 1)
    channels       width at full resolution; level i is channels * multipliers[i] wide
    blocks         residual blocks a level (one more on the way up)
    attention_at   the sizes, in pixels, at which attention follows each block (and always in the middle)
    num_classes    None: no class labels. Otherwise labels 0 .. num_classes - 1, and `null_label` = num_classes, the
                   extra row that classifier-free guidance calls "no label"
    text_dim       None: no text. Otherwise the width of the text embeddings, and `heads` the attention heads
    dropout        active in training mode only
    groups         groups of every GroupNorm; divides every width
    """

    def __init__(self, *, image_size=32, in_channels=3, channels=128, multipliers=(1, 2, 2, 2), blocks=2,
                 attention_at=(16,), num_classes=None, text_dim=None, heads=8, dropout=0.1, groups=32):
        super().__init__()
        if num_classes is not None and text_dim is not None:
            raise ValueError("a U-Net is told a class or a text, not both: give num_classes or text_dim")
        self.config = dict(image_size=image_size, in_channels=in_channels, channels=channels, multipliers=multipliers,
                           blocks=blocks, attention_at=attention_at, num_classes=num_classes, text_dim=text_dim,
                           heads=heads, dropout=dropout, groups=groups)
        self.image_shape = (in_channels, image_size, image_size)
        self.num_classes = self.null_label = num_classes
        self.text_dim = text_dim
        self.gradient_checkpointing = False  # True: saves memory in training, costs a second forward pass
        widths = [channels * m for m in multipliers]
        last = len(widths) - 1
        dim, eps = 4 * channels, 1e-6 if text_dim is None else 1e-5
        self.padding = (0, 1, 0, 1) if text_dim is None else (1, 1, 1, 1)  # of an image that is about to be halved

        self.time_dense = nn.Sequential(nn.Linear(channels, dim), nn.SiLU(), nn.Linear(dim, dim))
        if num_classes is not None:
            self.class_embedding = nn.Embedding(num_classes + 1, channels)
            self.class_dense = nn.Sequential(nn.Linear(channels, dim), nn.SiLU(), nn.Linear(dim, dim))
            dim = 2 * dim  # each block sees cat[time, class]

        def residual(cin, cout):
            return ResidualBlock(cin, cout, dim, groups, dropout, eps)

        def attention(width, level=None):
            if level is not None and image_size >> level not in attention_at:
                return NoAttention()
            return Attention(width, groups) if text_dim is None else TextTransformer(width, text_dim, heads, groups)

        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        skips, width = [channels], channels  # the widths that the way up will find on the stack
        self.down = nn.ModuleList()
        for level, out in enumerate(widths):
            residuals = [residual(width if i == 0 else out, out) for i in range(blocks)]
            resize = nn.Conv2d(out, out, 3, stride=2) if level < last else None
            self.down.append(Level(residuals, [attention(out, level) for _ in range(blocks)], resize))
            skips += [out] * (blocks + (level < last))
            width = out

        self.middle = nn.ModuleList([residual(width, width), attention(width), residual(width, width)])

        self.up = nn.ModuleList()
        for level, out in reversed(list(enumerate(widths))):
            residuals = [residual((width if i == 0 else out) + skips.pop(), out) for i in range(blocks + 1)]
            resize = nn.Conv2d(out, out, 3, padding=1) if level > 0 else None
            self.up.append(Level(residuals, [attention(out, level) for _ in range(blocks + 1)], resize))
            width = out

        self.norm_out = nn.GroupNorm(groups, width, eps=eps)
        self.conv_out = zeroed(nn.Conv2d(width, in_channels, 3, padding=1))

    def embed(self, t, c):
        """What every block is told: the time, and the class if there is one. t (B,), c as in `forward` -> (B, D)."""
        if (c is None) != (self.num_classes is None and self.text_dim is None):
            wanted = (f"c: text embeddings (B, L, {self.text_dim})" if self.text_dim is not None else "no c"
                      if c is not None else f"c: labels 0..{self.num_classes - 1}, or {self.null_label} for none")
            raise ValueError(f"this U-Net takes {wanted}")
        emb = self.time_dense(sinusoidal_embedding(t, self.config["channels"], self.text_dim is not None))
        if self.num_classes is not None:
            emb = torch.cat([emb, self.class_dense(self.class_embedding(c))], dim=1)
        return F.silu(emb)

    def forward(self, x, t, c=None):
        """Noised images -> the noise in them, (B, C, H, W) both.

        t (B,) integer steps. c: None, integer labels (B,), or text embeddings (B, L, text_dim)."""
        emb, text = self.embed(t, c), c if self.text_dim is not None else None

        def apply(block, attention, h):
            return attention(block(h, emb), text)

        if self.gradient_checkpointing and torch.is_grad_enabled():
            apply = functools.partial(checkpoint, apply, use_reentrant=False)
        h = self.conv_in(x)
        skips = [h]
        for level in self.down:
            for block, attention in zip(level.blocks, level.attentions):
                h = apply(block, attention, h)
                skips.append(h)
            if level.resize is not None:
                h = level.resize(F.pad(h, self.padding))  # half the size
                skips.append(h)
        first, attention, second = self.middle
        h = second(apply(first, attention, h), emb)
        for level in self.up:
            for block, attention in zip(level.blocks, level.attentions):
                h = apply(block, attention, torch.cat([h, skips.pop()], dim=1))
            if level.resize is not None:
                h = level.resize(F.interpolate(h, scale_factor=2, mode="nearest"))  # twice the size
        return self.conv_out(F.silu(self.norm_out(h)))


# ---------------------------------------------------------------------------- the samplers


def indexed_noise(seed, indices):
    """A source of noise in which image i's noise depends on (seed, i) alone, whatever the batch around it.

    Returns a function shape -> (len(indices), *shape) on the CPU; each call goes on where the last one ended. Two
    networks that are given the same source can be compared image by image.
    """
    sources = [torch.Generator().manual_seed(seed * 1_000_003 + int(i)) for i in indices]
    return lambda shape: torch.stack([torch.randn(tuple(shape), generator=source) for source in sources])


def guided_noise(unet, x_t, t, c, guidance, null=None):
    """Predicted noise (B, C, H, W) with classifier-free guidance, null + guidance (cond - null). x_t (B, C, H, W),
    t (B,), c as the U-Net takes it; None: no guidance.

    guidance: a number, or one per image, (B, 1, 1, 1). 1 means none and costs one call, others cost two in one batch.
    null: the empty condition, in the shape of c; the null label if not given. With text it is the embedding of "" and
    must be given, else ValueError."""
    if c is None or (not torch.is_tensor(guidance) and guidance == 1):
        return unet(x_t, t, c)
    if null is None and unet.null_label is None:
        raise ValueError('with text, guidance needs null, the embedding of ""')
    null = torch.full_like(c, unet.null_label) if null is None else null.expand_as(c)
    eps, eps_null = unet(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([c, null])).chunk(2)
    return eps_null + guidance * (eps - eps_null)  # (L1) eps^k = eps(x, t, "") + k (eps(x, t, c) - eps(x, t, ""))


@torch.no_grad()
def ddim_sample(unet, schedule, z, c=None, steps=50, eta=0.0, guidance=1.0, x0_clip=True, noise=None, null=None):
    """Images from noise, by DDIM (Song, Meng, Ermon 2021).

    z (B, C, H, W) standard Gaussian, c as the U-Net takes it -> images (B, C, H, W), in [-1, 1] with x0_clip (not for
    latents). steps, 1..T, else ValueError: one network call each, two with guidance, at t = i T // steps for i = steps
    - 1 .. 0; so 980, 960, .. 0 for 50, and only 0 for 1, which hardly changes z. eta, 0..1: 0 is deterministic, 1 with
    steps = T the ancestral sampler. guidance, null: as in `guided_noise`. noise: a function shape -> (B, *shape), such
    as `indexed_noise(...)`, for eta > 0.
    """
    if not 1 <= steps <= schedule.T:
        raise ValueError(f"steps must be 1..{schedule.T}, not {steps}")
    noise = noise or (lambda shape: torch.randn(len(z), *shape, device=z.device))
    times = [i * schedule.T // steps for i in range(steps)]  # 0, T / steps, .. (steps - 1) T / steps
    x = z
    for i in reversed(range(steps)):
        t = torch.full((len(z),), times[i], device=z.device)
        eps = guided_noise(unet, x, t, c, guidance, null)
        x0 = schedule.predict_x0(x, eps, t)  # (D3)
        if x0_clip:
            x0 = x0.clamp(-1, 1)
            eps = (x - schedule.a(t) * x0) / schedule.s(t)  # (D1), solved for the noise that agrees with the clipped x0
        abar = schedule.alphas_cumprod[times[i]]
        abar_next = schedule.alphas_cumprod[times[i - 1]] if i > 0 else torch.ones_like(abar)
        sigma = eta * ((1 - abar_next) / (1 - abar) * (1 - abar / abar_next)).sqrt()
        x = abar_next.sqrt() * x0 + (1 - abar_next - sigma**2).clamp(min=0).sqrt() * eps
        if eta > 0 and i > 0:  # the last step adds none
            x = x + sigma * noise(z.shape[1:]).to(z.device)
    return x


def ancestral_sample(unet, schedule, z, c=None, guidance=1.0, x0_clip=True, noise=None, null=None):
    """Images from noise by Ho et al.'s own sampler: x_{t-1} ~ q(x_{t-1} | x_t, x0_hat), one call for each of T steps,
    with the posterior's variance ("fixed small"). That is DDIM at eta 1 without a step left out."""
    return ddim_sample(unet, schedule, z, c, schedule.T, 1.0, guidance, x0_clip, noise, null)


# ---------------------------------------------------------------------------- weights on disk


def shipped_names():
    """What lies in weights/, by name: "mnist", "tiny-sd/posterior"."""
    return sorted(path.relative_to(WEIGHTS).with_suffix("").as_posix() for path in WEIGHTS.rglob("*.safetensors"))


def weights_path(source):
    """The file of a shipped name ("mnist"), or a path that ends in .safetensors. FileNotFoundError if not there."""
    path = WEIGHTS / f"{source}.safetensors" if str(source) in shipped_names() else Path(source)
    if path.suffix != ".safetensors" or not path.is_file():
        shipped = ", ".join(name for name in shipped_names() if "/" not in name) or "none"
        raise FileNotFoundError(f"no weights {str(source)!r}: give a .safetensors file, or a shipped name ({shipped})")
    return path


def write_tensors(path, kind, tensors, **facts):
    """Write `tensors` (name -> tensor) to `path` as safetensors, atomically: no reader ever sees half a file.

    The metadata holds, as JSON, the `kind` of file and all other facts, under a single key, so that the same content
    always gives the same bytes.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # another process may be writing the same file
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(tensors, temporary, {"minunlearn": json.dumps({"kind": kind, **facts})})
        os.chmod(temporary, 0o644)  # safetensors makes it the owner's alone
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(source, kind):
    """The tensors and the facts of a file that `write_tensors` wrote as this `kind`; source as in `weights_path`.

    FileNotFoundError when there is no such file; ValueError when it is damaged, or not one of ours, or of another kind.
    """
    path = weights_path(source)
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("minunlearn", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is no readable safetensors file ({error})") from None
    if facts.get("kind") != kind:
        raise ValueError(f"{path} holds no minUnlearn {kind}, but {facts.get('kind', 'something of another project')}")
    return tensors, facts


def save_unet(unet, path, **card):
    """Write `unet` to `path`, with its configuration (what `load_unet` builds it from) and the card: any facts that
    JSON can hold, such as data, steps and scores."""
    write_tensors(path, "U-Net", unet.state_dict(), config=unet.config, card=card)


def load_network(source, kind, build):
    """A network of this `kind` in evaluation mode, on the CPU, and the facts of its file. build: facts -> the network,
    before it has the file's weights. Errors as in `read_tensors`, and ValueError when the tensors do not fit it."""
    tensors, facts = read_tensors(source, kind)
    try:
        network = build(facts)
        network.load_state_dict(tensors)
    except (KeyError, TypeError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()[:200]  # PyTorch's first line names no tensor
        raise ValueError(f"{source} does not hold the {kind} that it says: {reason}") from None
    return network.eval(), facts


def load_unet(source):
    """A U-Net in evaluation mode, on the CPU. source: a shipped name ("mnist") or the path of a .safetensors file.

    Errors as in `load_network`. The card comes along as `unet.card`, the file as `unet.path`."""
    unet, facts = load_network(source, "U-Net", lambda facts: UNet(**facts["config"]))
    unet.card, unet.path = facts.get("card", {}), weights_path(source)
    return unet
