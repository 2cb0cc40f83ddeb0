"""Words, prompts, paint: what a concept is, and that a picture's concept can be read off it."""

import pytest
import torch
from torchvision.io import read_image

from concepts import (
    COLOURS,
    DIGITS,
    PAIRS,
    TEMPLATES,
    ConceptJudge,
    contains,
    every_prompt,
    fill,
    next_of_its_kind,
    paint,
    prompt_grid,
    read_colour,
    read_digit,
    read_prompts,
    replace,
    shown,
    without,
)
from features import load_statistics
from unet import load_unet


def test_every_template_names_both_and_every_prompt_is_another():
    prompts = every_prompt()
    assert len(prompts) == len(set(prompts)) == 720
    for i, pair in enumerate(PAIRS):
        for prompt in prompts[i * len(TEMPLATES) : (i + 1) * len(TEMPLATES)]:
            assert [d for d in range(10) if contains(prompt, DIGITS[d])] == [pair[0]]
            assert [k for k, colour in enumerate(COLOURS) if contains(prompt, colour)] == [pair[1]]


@pytest.mark.parametrize("prompt, concept, there", [
    ("a photo of a Red three", "three", True),
    ("the number three in red", "red three", True),
    ("a red five", "red three", False),
    ("a threesome, hundred", "three", False),
    ("a photo of Brad Pitt, smiling", "brad pitt", True),
])
def test_a_concept_is_there_when_all_of_its_words_are(prompt, concept, there):
    assert contains(prompt, concept) == there


@pytest.mark.parametrize("prompt, concept, override, result", [
    ("a photo of a red three", "three", "eight", "a photo of a red eight"),
    ("the number three in red", "red three", "blue eight", "the number eight in blue"),
    ("a photo of Brad Pitt, smiling", "brad pitt", "a middle aged man", "a photo of a middle aged man, smiling"),
    ("three threes and Three", "three", "two", "two threes and two"),
    ("a red three, and a three in red", "red three", "blue eight", "a blue eight, and a eight in blue"),
])
def test_a_concept_is_replaced_as_a_whole_or_word_by_word(prompt, concept, override, result):
    assert replace(prompt, concept, override) == result


def test_what_cannot_be_replaced_is_refused():
    for prompt, concept, override in [("a red five", "three", "eight"), ("three in red", "red three", "eight"),
                                      ("Brad Pitt and Brad's friend Pitt", "Brad Pitt", "a man with a hat")]:
        with pytest.raises(ValueError, match="cannot be replaced"):
            replace(prompt, concept, override)


@pytest.mark.parametrize("prompt, concept, left", [
    ("a photo of a red three", "three", "a photo of a red"),
    ("three, written in red", "Three", "written in red"),
    ("a photo of Brad Pitt in a boat", "brad pitt", "a photo of in a boat"),
    ("a woman, nude", "nude", "a woman"),
    ("a photo, Brad Pitt, studio light", "Brad Pitt", "a photo, studio light"),
    ("a photo of a man holding a gun", "a gun", "a photo of a man holding"),
    ("the number three in red", "red three", "the number in"),
    ("a red five", "red three", "a red five"),
    ("a photo of Brad Pitt and Brad's friend Pitt", "Brad Pitt", "a photo of and 's friend"),
    ("threesome", "three", "threesome"),
])
def test_a_prompt_without_the_concept(prompt, concept, left):
    assert without(prompt, concept) == left


def test_the_next_of_its_kind():
    assert [next_of_its_kind(c) for c in ("three", "nine", "red", "white", "red three")] == [
        "four", "zero", "green", "red", "red four"]
    with pytest.raises(ValueError, match="What is safe|what is safe"):
        next_of_its_kind("Brad Pitt")


def test_prompt_files(tmp_path):
    (tmp_path / "p.txt").write_text("# a comment\n\na red seven \n  ein Ärmel\n", encoding="utf-8")
    assert read_prompts(tmp_path / "p.txt") == ["a red seven", "ein Ärmel"]
    (tmp_path / "p.txt").write_text("# by a Windows editor\na red seven\n", encoding="utf-8-sig")  # with a mark before it
    assert read_prompts(tmp_path / "p.txt") == ["a red seven"]
    (tmp_path / "p.txt").write_text("a red seven\n", encoding="utf-16")
    with pytest.raises(ValueError, match="p.txt is no text in UTF-8"):
        read_prompts(tmp_path / "p.txt")
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no prompt"):
        read_prompts(tmp_path / "empty.txt")


def test_the_judge_reads_what_was_painted():
    """The shipped teacher's digits, painted: each in each colour."""
    from unet import VPSchedule, ddim_sample

    torch.manual_seed(0)
    digits = torch.arange(10).repeat(2)
    with torch.no_grad():
        grey = ddim_sample(load_unet("mnist"), VPSchedule.linear(), torch.randn(20, 1, 28, 28), digits, steps=10)
    judge, right = ConceptJudge(), 0
    means, covariances = judge.real_moments()
    for colour in range(6):
        pictures = paint(grey, torch.full((20,), colour))
        assert pictures.shape == (20, 3, 32, 32) and pictures.min() >= -1 and pictures.max() <= 1
        torch.testing.assert_close(read_digit(pictures), grey, rtol=0, atol=1e-5)  # painting loses nothing
        features, seen, colours = judge(pictures)
        assert (colours == colour).all() and (read_colour(0.7 * (pictures + 1) - 1)[1] == colour).all()
        right += (seen == digits).sum().item()
        nearest = torch.cdist(features.double(), means).argmin(1)  # features of a pair are nearest to that pair's own mean
        assert (nearest == digits * 6 + colour).double().mean() > 0.9
    assert right >= 0.9 * 120
    assert torch.equal(covariances[7, 128:], torch.zeros(3, 131).double()) and shown(1, 0, "red one")
    assert fill("{colour} {digit}", *PAIRS[7]) == "green one"


def test_real_moments_are_those_of_mnists_training_digits_in_each_colour():
    means, covariances = ConceptJudge().real_moments()
    train, ink = load_statistics()[0]["train"], torch.tensor(list(COLOURS.values())).double()
    for i, (digit, colour) in enumerate(PAIRS):
        assert torch.equal(means[i], torch.cat([train[0][digit], ink[colour]]))
        assert torch.equal(covariances[i, :128, :128], train[1][digit])


@pytest.mark.parametrize("side, n, least", [(32, 8, 50), (512, 2, 200)])
def test_a_grid_shows_pictures_and_prompts_whatever_they_are(tmp_path, side, n, least):
    """Captions with $, which matplotlib would take for formulas, and long ones; large pictures large enough to see."""
    prompts = ['"$20 gift, was $30" {$10}', "a black and white photo of somebody whose name takes up a good deal of room"]
    pictures = torch.full((2 * n, 3, side, side), -1.0)
    pictures[:n, 0] = 1  # a row of red ones, then a row of blue ones
    pictures[n:, 2] = 1
    prompt_grid(pictures, prompts, tmp_path / "grid.png", "title", forget=[1])
    image = read_image(str(tmp_path / "grid.png"))[:3]
    for channel in (0, 2):
        shown = (image[channel] > 200) & (image.sum(0) < 260)
        rows, columns = shown.any(1).nonzero().flatten(), shown.any(0).nonzero().flatten()
        assert rows[-1] - rows[0] >= least - 2 and columns[-1] - columns[0] >= n * (least - 2)
    assert columns[0] > 100  # room for prompts
