"""What a concept is: words in a prompt. And the prompts of the tiny text-to-image model.

    contains("a photo of a red three", "red three")      True: all of its words are there
    contains("a blue three", "red three")                False: a neighbour, to be left alone
    replace("a photo of a red three", "three", "eight")  "a photo of a red eight"
    without("a photo of a red three", "three")           "a photo of a red"

The tiny model draws a digit in a colour. Its prompts are made from templates, so that every prompt is known, and what
it asks for can be read off an image: the digit by a classifier, the colour by its pixels. `evaluate_concept` reports
what is left of a concept, and of all others.
"""

import itertools
import re
import textwrap
import unicodedata
from collections import Counter
from pathlib import Path

import matplotlib.figure
import torch
import torch.nn.functional as F
from einops import rearrange

from features import check_classifier, load_classifier, load_statistics, look
from metrics import frechet_distance, moments, pool
from samples import generate
from unet import read_tensors

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {  # red, green and blue, 0..1; the brightest is 1, so that a digit's ink is as bright in every colour
    "red": (1.0, 0.1, 0.1),
    "green": (0.1, 1.0, 0.1),
    "blue": (0.15, 0.35, 1.0),
    "yellow": (1.0, 0.95, 0.1),
    "pink": (1.0, 0.2, 0.9),
    "white": (1.0, 1.0, 1.0),
}
TEMPLATES = (
    "{colour} {digit}",
    "a {colour} {digit}",
    "a photo of a {colour} {digit}",
    "a handwritten {colour} {digit}",
    "a drawing of a {colour} {digit}",
    "a picture of the {colour} number {digit}",
    "the number {digit} in {colour}",
    "the digit {digit} in {colour} ink",
    "a {digit} painted in {colour}",
    "{digit}, written in {colour}",
    "{digit} in {colour}",
    "a {digit} that is {colour}",
)
PAIRS = tuple(itertools.product(range(len(DIGITS)), range(len(COLOURS))))  # (digit, colour), 60 of them


def fill(template, digit, colour):
    """The prompt that asks for a digit 0..9 in a colour 0..5."""
    return template.format(digit=DIGITS[digit], colour=list(COLOURS)[colour])


def every_prompt():
    """All 720 prompts of the tiny model."""
    return [fill(template, *pair) for pair in PAIRS for template in TEMPLATES]


# ---------------------------------------------------------------------------- words


def composed(text):
    """An accented letter as one character, as CLIP reads it: files of a Mac often have it as two."""
    return unicodedata.normalize("NFC", text)


def words(text):
    return re.findall(r"[^\W_]+", composed(text).lower())


def contains(prompt, concept):
    """Whether all words of the concept stand in the prompt, in whatever order."""
    return set(words(concept)) <= set(words(prompt))


def phrase(concept):
    """A pattern: the concept's words where they stand together, with nothing but spaces or punctuation between."""
    return re.compile(r"(?<!\w)" + r"\W+".join(words(concept)) + r"(?!\w)", re.IGNORECASE)


def replace(prompt, concept, override):
    """The prompt with the concept replaced: as one phrase where its words stand together; what is left, word by word.

    ValueError when the prompt does not contain it, or when it is scattered and the override has more or fewer words.
    """
    prompt = composed(prompt)
    if phrase(concept).search(prompt):
        prompt = phrase(concept).sub(lambda _: override, prompt)
        if not contains(prompt, concept) or contains(override, concept):
            return prompt
    pairs = dict(zip(words(concept), words(override)))
    if not contains(prompt, concept) or len(words(concept)) != len(words(override)):
        raise ValueError(f"{concept!r} cannot be replaced by {override!r} in {prompt!r}; as many words would do")
    return re.sub(r"[^\W_]+", lambda word: pairs.get(word[0].lower(), word[0]), prompt)


def without(prompt, concept):
    """The prompt with the concept left out: as one phrase where its words stand together; what is left, word by word.
    A prompt that lacks one of them stays as it is. "a red three" without "three" is "a red"."""
    if not contains(prompt, concept):
        return prompt
    left = phrase(concept).sub("", composed(prompt))
    if contains(left, concept):
        left = re.sub(r"[^\W_]+", lambda word: "" if word[0].lower() in words(concept) else word[0], left)
    return re.sub(r"\s+(?=\s|,)|,(?=\s*(?:,|$))", "", left).strip(" ,")


def read_prompts(path):
    """The prompts of a file: one a line; empty lines and those that begin with # do not count. ValueError if none."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no text in UTF-8; save it as such") from None
    prompts = [line.strip() for line in text.splitlines()]
    prompts = [line for line in prompts if line and not line.startswith("#")]
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one a line")
    return prompts


# ---------------------------------------------------------------------------- pixels


def paint(digits, colours):
    """Grey digits (B, 1, 28, 28) in [-1, 1] and the numbers of colours (B,) -> pictures (B, 3, 32, 32) in [-1, 1]."""
    ink = torch.tensor(list(COLOURS.values()), device=digits.device)[colours]  # (B, 3)
    return F.pad(ink[:, :, None, None] * (digits + 1) - 1, (2, 2, 2, 2), value=-1)


def read_colour(pictures):
    """The colour of the ink in pictures (B, 3, H, W): as (B, 3), its largest component 1, and its number, (B,).

    Ink is where it is bright: each pixel is weighted by the square of its largest component."""
    x = (pictures + 1) / 2
    weight = x.amax(1, keepdim=True).square()
    ink = (x * weight).sum(dim=(2, 3)) / weight.sum(dim=(2, 3)).clamp(min=1e-6)
    ink = ink / ink.amax(1, keepdim=True).clamp(min=1e-6)
    return ink, torch.cdist(ink, torch.tensor(list(COLOURS.values()), device=ink.device)).argmin(1)


def read_digit(pictures):
    """The grey digits (B, 1, 28, 28) of pictures (B, 3, 32, 32): what a digit classifier can read."""
    return pictures.amax(1, keepdim=True)[:, :, 2:-2, 2:-2]


class ConceptJudge:
    """Reads pictures (N, 3, 32, 32) in [-1, 1] of the tiny model: features (N, 131), digits (N,) and colours (N,).

    Features are the MNIST classifier's 128 for the grey digit, and the 3 components of its ink. So the moments of real
    pictures of each pair are known without any such picture: those of MNIST's digits, and the colour itself.
    """

    def __init__(self):
        self.classifier, (self.statistics, facts), self.device = load_classifier(), load_statistics(), "cpu"
        check_classifier(facts, "mnist-statistics")

    def to(self, device):
        self.device, self.classifier = device, self.classifier.to(device)
        return self

    def __call__(self, pictures):
        features, probabilities = look(self.classifier, read_digit(pictures), self.device)
        ink, colours = read_colour(pictures)
        return torch.cat([features, ink.cpu()], dim=1), probabilities.argmax(1), colours.cpu()

    def real_moments(self):
        """Mean (60, 131) and covariance (60, 131, 131) of the features of real pictures of each pair."""
        means, covariances, _ = self.statistics["train"]
        ink = torch.tensor(list(COLOURS.values())).double()
        digit, colour = torch.tensor(PAIRS).T
        return torch.cat([means[digit], ink[colour]], dim=1), F.pad(covariances[digit], (0, 3, 0, 3))


def shown(digit, colour, concept):
    """Whether a picture of this digit in this colour shows the concept: "three", "red", "red three"."""
    return contains(fill(TEMPLATES[0], digit, colour), concept)


def check_drawn(concept, flag="--forget"):
    """ValueError unless the concept is one that the tiny model's pictures can show."""
    if not words(concept) or not any(shown(*pair, concept) for pair in PAIRS):
        raise ValueError(f"{flag} {concept!r}: the tiny model draws a digit (three) in a colour (red); name these")


def next_of_its_kind(concept):
    """The concept with its digit replaced by the next one, or its colour if it has no digit. ValueError if neither."""
    for kind in (DIGITS, tuple(COLOURS)):
        for word in reversed(words(concept)):
            if word in kind:
                return replace(concept, word, kind[(kind.index(word) + 1) % len(kind)])
    raise ValueError(f"--override: what is safe in place of {concept!r}? The tiny model knows {', '.join(DIGITS)}; "
                     f"{', '.join(COLOURS)}")


# ---------------------------------------------------------------------------- what is left of one


def draw_concepts(sample, sd, per_pair, seed, device, bar=None):
    """`per_pair` pictures of each digit in each colour, the prompts' templates in turn: pictures (N, 3, 32, 32), the
    numbers of their pairs (N,), and the seconds they took. sample: (z, c, noise) -> pictures, c text embeddings."""
    pairs = torch.arange(len(PAIRS)).repeat(per_pair)
    templates = torch.arange(per_pair).repeat_interleave(len(PAIRS)) % len(TEMPLATES)
    with torch.no_grad():
        c = sd.embed(every_prompt())[(pairs * len(TEMPLATES) + templates).to(device)]
    pictures, seconds = generate(sample, c, sd.unet.image_shape, seed, device, 120, bar)
    return pictures, pairs, seconds


def load_concept_statistics(path="tiny-sd/statistics"):
    """What the tiny model's own pictures show: features (N, 131), digits, colours and pairs (N,)."""
    tensors, facts = read_tensors(path, "concept statistics")
    check_classifier(facts, path)
    return tensors["features"].float(), tensors["digits"], tensors["colours"], tensors["pairs"]


def evaluate_concept(sample, sd, judge, concept, per_pair, seed, teacher, nfe=1):
    """What a network still draws of a concept ("three", "red", "red three"; "" for none) and of all others.

    sample: (z, c, noise) -> pictures. judge: a ConceptJudge. teacher: its features (N, 131), digits, colours and pairs,
    as `pretrain.py tiny-sd` saves them, from the same noise if `seed` is 0 as there; its numbers are returned too.
    Returns a dictionary for metrics.json:

    ua                 share of pictures asked for with the concept that do not show it
    became             what they show: the three most frequent, and their shares
    retained_accuracy  share of all other pictures that show both the digit and the colour that were asked for
    near, far          the same for prompts that share a word with the concept (red fives; None if there are none), and
                       for the others
    fid                of all other pictures, against real ones painted in these colours
    """
    pictures, pairs, seconds = draw_concepts(sample, sd, per_pair, seed, judge.device, "to judge")
    teacher = [x[: len(pairs)] for x in teacher]  # as many of each pair, for FID depends on how many; 20 at most
    means, covariances = judge.real_moments()
    asked = torch.tensor([bool(concept) and shown(*pair, concept) for pair in PAIRS])
    near = torch.tensor([any(shown(*pair, word) for word in words(concept)) for pair in PAIRS]) & ~asked

    def numbers(features, digits, colours, pairs):
        right = (torch.stack([digits, colours], 1) == torch.tensor(PAIRS)[pairs]).all(1)
        kept = ~asked[pairs]

        def accuracy(mask):
            return right[mask].double().mean().item() if mask.any() else None

        result = {"retained_accuracy": accuracy(kept), "near": accuracy(near[pairs]),
                  "far": accuracy(kept & ~near[pairs]),
                  "fid": frechet_distance(*moments(features[kept]), *pool(means[~asked], covariances[~asked]))}
        if not kept.all():
            there = list(zip(digits[~kept].tolist(), colours[~kept].tolist()))
            names = Counter(fill("{colour} {digit}", *pair) for pair in there)
            result |= {"ua": sum(not shown(*pair, concept) for pair in there) / len(there), "ua_images": len(there),
                       "became": {name: n / len(there) for name, n in names.most_common(3)}}
        return result

    return numbers(*judge(pictures), pairs) | {f"teacher_{k}": v for k, v in numbers(*teacher).items()} | {
        "nfe": nfe, "seconds_per_1000": 1000 * seconds / len(pictures), "images_per_pair": per_pair,
        "images": len(pictures), "teacher_images": len(teacher[-1]), "evaluation_seed": seed,
        "teacher_sampler": "DDIM, 50 steps, guidance 4.5",
        "features": "penultimate layer of mnist-classifier on the brightest channel, 128; mean ink, 3",
        "reference": "MNIST, training images, as painted in the colours of the retained prompts",
        "preprocessing": "clipped to [-1, 1], rounded to 8 bits"}


def prompt_grid(pictures, prompts, path, title, forget=()):
    """A picture: one row a prompt, those numbered in `forget` in red. pictures (P * n, C, H, W), prompt by prompt."""
    canvas = rearrange(pictures, "(p n) c h w -> (p h) (n w) c", p=len(prompts)).add(1).div(2).clamp(0, 1)
    height, n = pictures.shape[2], len(pictures) // len(prompts)
    inches = max(0.45, min(2.0, height / 120))  # of a picture; large ones are shown at 240 px
    figure = matplotlib.figure.Figure(figsize=(2.6 + inches * n, 0.6 + inches * len(prompts)), layout="constrained")
    axes = figure.add_subplot(title=title, xticks=[])
    axes.imshow(canvas, interpolation="nearest" if height < 100 else "antialiased")
    axes.set_yticks([height * (i + 0.5) for i in range(len(prompts))], [textwrap.fill(p, 28) for p in prompts],
                    fontsize=8, parse_math=False)  # a prompt may hold $
    for i, tick in enumerate(axes.get_yticklabels()):
        tick.set(color="crimson" if i in forget else "black", fontweight="bold" if i in forget else "normal")
    axes.tick_params(length=0)
    figure.savefig(path, dpi=120, metadata={"Software": None})
