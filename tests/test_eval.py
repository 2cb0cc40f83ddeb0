"""Each metric against a known answer and, where a well-kept library computes it, against that."""

import dataclasses
import json
import math
import shutil
import types

import numpy as np
import pytest
import torch
from conftest import ROOT, random_unet, write_mnist

import eval as evaluation
import metrics
from concepts import PAIRS, ConceptJudge, load_concept_statistics
from features import Judge, load_classifier, load_statistics
from record import checksum
from samples import balanced_labels, generate, guided_sampler, image_grid, sampler_of, unconditional_sampler
from stable_diffusion import load_stable_diffusion
from unet import (
    VPSchedule,
    ancestral_sample,
    ddim_sample,
    guided_noise,
    indexed_noise,
    load_unet,
    read_tensors,
    save_unet,
    weights_path,
    write_tensors,
)


def some_moments(seed, d=12, n=200, shift=0.0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=g) @ torch.randn(d, d, generator=g) + shift
    return x, *metrics.moments(x)


def test_frechet_distance_known_answers():
    _, m, c = some_moments(0)
    assert metrics.frechet_distance(m, c, m, c) == pytest.approx(0, abs=1e-8)
    assert metrics.frechet_distance(m, c, m + 2, c) == pytest.approx(4 * 12)  # a shift alone
    a, b = torch.tensor([1.0, 4.0, 9.0]), torch.tensor([4.0, 4.0, 1.0])  # diagonal: sum (sqrt a - sqrt b)^2
    zero = torch.zeros(3)
    assert metrics.frechet_distance(zero, a.diag(), zero, b.diag()) == pytest.approx(1 + 0 + 4)
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match="not finite"):
            metrics.frechet_distance(zero, a.diag(), zero + wrong, b.diag())


@pytest.mark.parametrize("n", [200, 8])  # 8 images in 12 dimensions: singular covariances
def test_frechet_distance_is_that_of_scipy_and_torch_fidelity(n):
    linalg = pytest.importorskip("scipy.linalg")
    _, m1, c1 = some_moments(1, n=n)
    _, m2, c2 = some_moments(2, n=n, shift=0.5)
    ours = metrics.frechet_distance(m1, c1, m2, c2)
    root = linalg.sqrtm((c1 @ c2).numpy()).real
    theirs = ((m1 - m2) ** 2).sum().item() + (c1 + c2).trace().item() - 2 * root.trace()
    assert ours == pytest.approx(theirs, rel=1e-3 if n == 8 else 1e-8)
    fidelity = pytest.importorskip("torch_fidelity.metric_fid")
    peer = fidelity.fid_statistics_to_metric(
        {"mu": m1.numpy(), "sigma": c1.numpy()}, {"mu": m2.numpy(), "sigma": c2.numpy()}, False
    )
    assert ours == pytest.approx(peer["frechet_inception_distance"], rel=1e-3)


def test_pooled_moments_are_those_of_the_classes_together():
    parts = [some_moments(s, shift=s)[0] for s in range(3)]
    mean, cov = metrics.pool(
        *(torch.stack(x) for x in zip(*((p.double().mean(0), torch.cov(p.double().T, correction=0)) for p in parts)))
    )
    together = torch.cat(parts).double()
    torch.testing.assert_close(mean, together.mean(0))
    torch.testing.assert_close(cov, torch.cov(together.T, correction=0))


def test_moments_pooled_in_proportion_are_those_of_all_images_together():
    parts = [some_moments(s, n=200, shift=s)[0][:n] for s, n in ((0, 50), (1, 200), (2, 1))]
    labels = torch.cat([torch.full((len(p),), k) for k, p in enumerate(parts)])
    means, covariances, counts = metrics.class_moments(torch.cat(parts), labels, 4)
    assert counts.tolist() == [50, 200, 1, 0] and not covariances[2:].any()
    mean, covariance = metrics.pool(means, covariances, counts)
    together = torch.cat(parts).double()
    torch.testing.assert_close(mean, together.mean(0))
    torch.testing.assert_close(covariance, torch.cov(together.T), rtol=3e-2, atol=3e-2)  # 1 / n against 1 / (n - 1)


def test_percent_unlearned_known_answers():
    assert metrics.percent_unlearned(200, 20) == 0.9 and metrics.percent_unlearned(10, 0) == 1
    assert metrics.percent_unlearned(10, 15) == -0.5  # more than before
    with pytest.raises(ValueError, match="before unlearning"):
        metrics.percent_unlearned(0, 0)


def test_mean_confidence_known_answers():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.0, 0.9]])
    assert metrics.mean_confidence(p) == pytest.approx(0.8)
    assert metrics.mean_confidence(torch.full((3, 10), 0.1)) == pytest.approx(0.1)  # noise, at a loss


class Stand:
    """A judge that reads features and class off the images themselves: no network, so that every answer is known."""

    def __init__(self, before, n):
        features, probabilities = self.look(before)
        sets = {"train": class_sets(seed=1), "test": class_sets(seed=2)}
        sets["unconditional"] = metrics.class_moments(features, probabilities.argmax(1), 10)
        facts = {"sha256": "teacher", "images": n, "evaluation_seed": 0, "sampler_dtype": "float32", "confidence": 1.0, "sampler": "stand-in"}
        self.statistics, self.device = sets, "cpu"
        self.facts = {"unconditional": facts, "features": "pixels", "classifier_sha256": "stand-in"}

    def look(self, images):
        x = images.flatten(1)
        seen = ((x[:, 0] + 1) * 127.5 / 25).round().long()
        return x[:, :3].float(), torch.nn.functional.one_hot(seen, 10).float()

    __call__ = look


def class_sets(seed):
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(1000) % 10
    features = torch.rand(1000, 3, generator=g) * 2 - 1
    features[:, 0] = labels * 25 / 127.5 - 1
    return metrics.class_moments(features, labels, 10)


def drawn(classes):
    """A sampler that draws the given classes in turn: the first pixel says which, the others come from the noise."""

    def sample(z, c, noise):
        assert c is None
        x = z.clamp(-1, 1)
        k = torch.tensor([classes[i % len(classes)] for i in range(len(x))])
        x[:, 0, 0, 0] = k * 25 / 127.5 - 1
        return x

    return sample


def test_unconditional_report_counts_the_forgotten_class_before_and_after(monkeypatch):
    before, _ = generate(drawn(range(10)), 500, (1, 28, 28), 0, "cpu", batch=50)
    judge, teacher = Stand(before, 500), type("Net", (), {"path": "teacher"})
    monkeypatch.setattr(evaluation, "checksum", lambda path: path)
    same = evaluation.evaluate_unconditional(drawn(range(10)), judge, [3], 500, teacher)
    assert same["pul"] == 0 and same["n_before"] == 50 and same["u_fid"] == pytest.approx(same["teacher_u_fid"])
    gone = evaluation.evaluate_unconditional(drawn([0, 1, 2, 4, 5, 6, 7, 8, 9, 9]), judge, [3], 500, teacher)
    assert gone["pul"] == 1 and gone["counts"][3] == 0 and gone["counts"][9] == 100 and gone["confidence"] == 1
    assert gone["teacher_counts"] == [50] * 10
    assert gone["balanced_fid"] == pytest.approx(same["balanced_fid"], rel=0.2) and gone["u_fid"] > gone["teacher_fid"]
    # the distances by hand: to real images of the retained classes, as many of each as there are
    judge.statistics["train"] = (*judge.statistics["train"][:2], torch.arange(10, 110, 10))
    gone = evaluation.evaluate_unconditional(drawn([0, 1, 2, 4, 5, 6, 7, 8, 9, 9]), judge, [3], 500, teacher)
    features, p = judge(generate(drawn([0, 1, 2, 4, 5, 6, 7, 8, 9, 9]), 500, (1, 28, 28), 0, "cpu", batch=100)[0])
    kept = [k for k in range(10) if k != 3]
    real = metrics.pool(*(x[kept] for x in judge.statistics["train"]))
    whole = judge.statistics["unconditional"]
    for name, moments in (("u_fid", metrics.class_moments(features, p.argmax(1), 10)), ("teacher_u_fid", whole),
                          ("teacher_fid", [x[kept] for x in whole])):
        assert gone[name] == pytest.approx(metrics.frechet_distance(*metrics.pool(*moments), *real)), name
    # numbers that the statistics do not hold are drawn anew: here a teacher that draws 3s twice as often
    other = evaluation.evaluate_unconditional(drawn(range(10)), judge, [3], 500, type("Net", (), {"path": "other"}),
                                           drawn([0, 1, 2, 3, 4, 5, 6, 3, 8, 9]))
    assert other["n_before"] == 100 and other["pul"] == 0.5


def test_precision_recall_known_answers():
    g = torch.Generator().manual_seed(0)
    cloud = torch.randn(300, 4, generator=g)
    assert metrics.precision_recall(cloud, cloud) == (1.0, 1.0)
    assert metrics.precision_recall(cloud, cloud + 100) == (0.0, 0.0)
    two = torch.cat([cloud, cloud + 50])  # the generator draws one of two modes: precise, half the recall
    precision, recall = metrics.precision_recall(two, cloud + 0.01)
    assert precision > 0.95 and recall == pytest.approx(0.5, abs=0.02)
    with pytest.raises(ValueError, match="more than 3"):
        metrics.precision_recall(cloud[:3], cloud)


def test_precision_recall_is_that_of_torch_fidelity():
    prc = pytest.importorskip("torch_fidelity.metric_prc")
    real, generated = some_moments(1, d=4)[0], some_moments(1, d=4, n=150)[0] + 0.8
    ours = metrics.precision_recall(real, generated, k=3)
    theirs = prc.prc_features_to_metric(
        generated, real, prc_neighborhood=3, prc_batch_size=64, save_cpu_ram=False, verbose=False
    )
    assert ours[0] == pytest.approx(theirs["precision"], abs=0.01)
    assert ours[1] == pytest.approx(theirs["recall"], abs=0.01)
    assert 0.05 < ours[0] < 0.95  # and the case is not a trivial one


def test_inception_score():
    certain = torch.eye(10).repeat(20, 1)
    assert metrics.inception_score(certain) == pytest.approx(10)
    assert metrics.inception_score(certain[:1].repeat(50, 1)) == pytest.approx(1)  # one class only
    assert metrics.inception_score(torch.full((50, 10), 0.1)) == pytest.approx(1)  # no confidence
    isc = pytest.importorskip("torch_fidelity.metric_isc")
    logits = torch.randn(400, 10, generator=torch.Generator().manual_seed(0)) * 3
    peer = isc.isc_features_to_metric(logits, splits=4, shuffle=False)
    assert metrics.inception_score(logits.softmax(1), splits=4) == pytest.approx(peer["inception_score_mean"], rel=1e-4)


def test_unlearning_accuracy_counts_images_of_the_forgotten_label_only():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    seen = torch.tensor([0, 1, 1, 2, 0, 1, 2, 2])
    assert metrics.unlearning_accuracy(labels, seen, 0) == 0.75
    assert metrics.unlearning_accuracy(labels, seen, 1) == 0.5
    assert metrics.unlearning_accuracy(labels, seen, [0, 1]) == pytest.approx(4 / 6)
    assert metrics.retained_accuracy(labels, seen, [0]) == 0.75  # (1/2 + 2/2) / 2
    assert metrics.class_accuracies(labels, seen) == {0: 0.25, 1: 0.5, 2: 1.0}
    with pytest.raises(ValueError, match="no image"):
        metrics.unlearning_accuracy(labels, seen, 7)
    with pytest.raises(ValueError, match="no image"):
        metrics.retained_accuracy(labels, seen, [0, 1, 2])


def test_entropy_in_nats():
    assert metrics.entropy(torch.full((3, 10), 0.1)) == pytest.approx(math.log(10))
    assert metrics.entropy(torch.eye(10)) == 0


def test_report_leaves_the_forgotten_class_out_of_fid_and_accuracy():
    g = torch.Generator().manual_seed(0)
    labels = balanced_labels(3, 40)
    features = torch.randn(120, 5, generator=g) + labels[:, None]
    train = metrics.class_moments(features, labels, 3)
    statistics = {name: (train[0] + by, *train[1:]) for name, by in (("train", 0), ("test", 1), ("teacher", 2))}
    probabilities = torch.nn.functional.one_hot(labels, 3).float()
    probabilities[labels == 1] = torch.tensor([0.0, 0.1, 0.9])  # asked for a 1, it draws a 2
    features[labels == 1] += 30
    result = metrics.report(labels, features, probabilities, statistics, forget=[1])
    assert result["ua"] == 1 and result["ua_images"] == 40 and result["became"] == {1: [0, 0, 1]}
    assert result["retained_accuracy"] == 1
    distances = [result[name] for name in ("fid", "real_test_fid", "teacher_fid")]  # means moved by 0, 1 and 2, in five numbers
    assert distances == pytest.approx([0, 5, 20], abs=1e-6)
    assert result["entropy_retained"] == 0 < result["entropy_forgotten"]
    assert result["inception_score"] == pytest.approx(2)  # of two classes, both told for sure
    everything = metrics.report(labels, features, probabilities, statistics)
    assert "ua" not in everything and everything["fid"] > 10 and everything["retained_accuracy"] == pytest.approx(2 / 3)


def test_another_teachers_numbers_are_its_own(tmp_path):
    save_unet(random_unet(), tmp_path / "mine.safetensors")
    mine = load_unet(tmp_path / "mine.safetensors")
    teacher_sample = sampler_of(load_unet("mnist"), VPSchedule.linear(), "ddim", steps=10)[0]
    r = evaluation.evaluate(lambda z, c, noise: z, 1, Judge(mine), mine, [2], 4, 0, teacher_sample)  # beside pure noise
    assert r["teacher_retained_accuracy"] > 0.8 > r["retained_accuracy"] and r["teacher_fid"] < 0.5 * r["fid"]
    assert r["teacher_images_per_class"] == 4


def test_precision_and_recall_are_of_retained_classes_against_real_ones(tmp_path, monkeypatch):
    class Judge:
        device, statistics, facts = "cpu", None, {}

        def __call__(self, images):
            return images.flatten(1)[:, :2], torch.eye(3)[torch.arange(len(images)) % 3]

    def sample(z, c, noise):
        return 0.05 * z - 0.5 + 1.3 * (c == 2).view(-1, 1, 1, 1)  # the forgotten class lies far from all that is real

    real = 0.05 * torch.randn(200, 1, 2, 2, generator=torch.Generator().manual_seed(0)) - 0.5
    real[100:] += 0.7  # half of it is never drawn
    unet = types.SimpleNamespace(num_classes=3, image_shape=(1, 2, 2))
    r = evaluation.evaluate(sample, 1, Judge(), unet, [2], 50, 0, real=real)
    assert r["precision"] > 0.8 and 0.3 < r["recall"] < 0.6
    # the command hands real images over, without the forgotten class, whose pixels are 60 here
    labels, seen = np.arange(20, dtype=np.uint8) % 10, []
    write_mnist(tmp_path, np.repeat(labels * 20, 784).reshape(20, 28, 28), labels)

    def spy(*words):
        seen.append(words[8])
        return {"nfe": 1, "seconds_per_1000": 0}

    monkeypatch.setattr(evaluation, "evaluate", spy)
    monkeypatch.setattr(evaluation, "show", lambda *words: None)
    evaluation.main(evaluation.Config("mnist", forget="3", data=str(tmp_path), device="cpu"))
    pixels = ((seen[0] + 1) * 127.5).round().unique().tolist()
    assert len(seen[0]) == 18 and pixels == [20 * k for k in range(10) if k != 3]


def test_images_are_clipped_and_rounded_to_the_nearest_of_256_values():
    shades = torch.tensor([-40.0, 0.0, 100.4, 100.6, 300.0])
    images, _ = generate(lambda z, c, noise: (shades / 127.5 - 1).expand_as(z), 2, (1, 1, 5), 0, "cpu")
    torch.testing.assert_close((images + 1) * 127.5, torch.tensor([0.0, 0.0, 100.0, 101.0, 255.0]).expand(2, 1, 1, 5))


def test_any_first_part_of_the_labels_is_balanced():
    """So that a score over consecutive parts of the images is one of all classes in each."""
    assert balanced_labels(3, 2).tolist() == [0, 1, 2, 0, 1, 2]
    assert metrics.inception_score(torch.eye(10)[balanced_labels(10, 20)], splits=10) == pytest.approx(10)


@pytest.mark.parametrize("kind, calls", [("ddim", 14), ("ancestral", 200)])
def test_a_sampler_hands_on_guidance_eta_and_noise(kind, calls):
    unet, schedule = random_unet(image_size=8, attention_at=(4,)), VPSchedule.linear(100, 1e-3, 0.2)
    z, c = torch.randn(2, 1, 8, 8), torch.tensor([3, 4])
    sample, nfe = sampler_of(unet, schedule, kind, steps=7, eta=0.5, guidance=2.0)
    ours, noise = sample(z, c, indexed_noise(0, [0, 1])), indexed_noise(0, [0, 1])
    guided = lambda x, t, c: guided_noise(unet, x, t, c, 2.0)
    theirs = (ddim_sample(guided, schedule, z, c, 7, 0.5, noise=noise) if kind == "ddim" else
              ancestral_sample(guided, schedule, z, c, noise=noise))
    torch.testing.assert_close(ours, theirs)
    assert nfe == calls


def test_a_grid_is_in_order_and_marks_what_is_forgotten(monkeypatch):
    figures, images = [], (torch.arange(9.0) / 4 - 1).view(9, 1, 1, 1).expand(-1, 1, 2, 3)
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    image_grid(images, None, "x", "", [7], torch.tensor([0, 7, 0, 0, 0, 7, 0, 0, 0]))
    image_grid(images[:6], torch.tensor([0, 1, 2, 0, 1, 2]), "x", "", [1])
    square, rows = (figure.axes[0] for figure in figures)
    assert [patch.get_xy() for patch in square.patches] == [(2.5, -0.5), (5.5, 1.5)]
    for axes, order in ((square, range(9)), (rows, (0, 3, 1, 4, 2, 5))):
        assert np.asarray(axes.images[0].get_array())[::2, ::3].flatten() == pytest.approx([i / 8 for i in order])
    assert [tick.get_color() for tick in rows.get_yticklabels()] == ["black", "crimson", "black"]


def test_statistics_made_with_another_classifier_are_refused(tmp_path):
    tensors, facts = read_tensors("mnist-classifier", "classifier")
    tensors["head.bias"] = tensors["head.bias"] + 1
    write_tensors(tmp_path / "other.safetensors", "classifier", tensors, config=facts["config"])
    with pytest.raises(ValueError, match="were not made with"):
        Judge(load_unet("mnist"), str(tmp_path / "other.safetensors"))


def test_statistics_of_pictures_are_refused_likewise_and_those_that_lack_something(tmp_path, monkeypatch):
    assert len(load_concept_statistics()) == 4 and ConceptJudge().statistics["train"][0].shape == (10, 128)
    other = tmp_path / "other.safetensors"
    tensors, facts = read_tensors("mnist-classifier", "classifier")
    tensors["head.bias"] = tensors["head.bias"] + 1
    write_tensors(other, "classifier", tensors, config=facts["config"])
    monkeypatch.setattr("features.weights_path", lambda name: other if name == "mnist-classifier" else weights_path(name))
    for of_the_old_one in (ConceptJudge, load_concept_statistics):
        with pytest.raises(ValueError, match="were not made with"):
            of_the_old_one()
    tensors, facts = read_tensors("mnist-statistics", "statistics")
    kept = {k: v for k, v in tensors.items() if not k.startswith("unconditional.")}
    write_tensors(tmp_path / "part.safetensors", **{**facts, "tensors": kept})
    with pytest.raises(ValueError, match="lack 'unconditional.means'"):
        load_statistics(str(tmp_path / "part.safetensors"))


def test_a_teacher_that_has_changed_since_or_was_never_named_is_refused(tmp_path, monkeypatch, capsys):
    """A network is compared with the one that it was made from, and the JSON says which that was."""
    monkeypatch.chdir(tmp_path)
    teacher = load_unet("mnist-unconditional")
    save_unet(teacher, tmp_path / "teacher.safetensors")
    card = dict(method="VDU", forget=[1], teacher="teacher.safetensors")
    save_unet(teacher, tmp_path / "same.safetensors", **card, teacher_sha256=checksum(tmp_path / "teacher.safetensors"))
    save_unet(teacher, tmp_path / "changed.safetensors", **card, teacher_sha256="of what it was then")
    save_unet(teacher, tmp_path / "nobody.safetensors")

    def run(words):
        evaluation.main(evaluation.parse(evaluation.Config, "", None, [*words.split(), "--images", "100"]))

    for words, says in (("changed.safetensors", "was made from teacher.safetensors as it was then"),
                        ("nobody.safetensors --forget 1", "its card names no teacher; say with --teacher")):
        with pytest.raises(SystemExit) as exit:
            run(words)
        assert exit.value.code == 2 and says in capsys.readouterr().err
    monkeypatch.setattr(evaluation, "evaluate_unconditional", lambda *words, **more: {})
    monkeypatch.setattr(evaluation, "table", str)
    for words in ("same.safetensors", "changed.safetensors --teacher teacher.safetensors"):
        run(f"{words} --out a.json")
        result = json.loads((tmp_path / "a.json").read_text())
        assert (result["teacher"], result["teacher_sha256"]) == ("teacher.safetensors", checksum(tmp_path / "teacher.safetensors"))


def test_the_live_ua_is_the_share_that_is_not_seen_as_what_was_asked_for():
    judge, images = Judge(load_unet("mnist")), torch.rand(10, 1, 28, 28) * 2 - 1
    asked = judge(images)[1].argmax(1)
    asked[:3] = (asked[:3] + 1) % 10
    assert judge.live_ua(images, asked).item() == pytest.approx(0.3)


def test_images_do_not_depend_on_the_batch_size_and_are_eight_bit():
    unet, schedule = random_unet(), VPSchedule.linear()
    sample = sampler_of(unet, schedule, "ddim", steps=3, eta=1.0)[0]
    labels = balanced_labels(10, 1)
    a, _ = generate(sample, labels, unet.image_shape, seed=5, device="cpu", batch=10)
    b, _ = generate(sample, labels, unet.image_shape, seed=5, device="cpu", batch=3)
    assert (a - b).abs().max() <= 1.01 / 127.5  # the same up to one rounding
    grid = (a + 1) * 127.5
    assert (grid - grid.round()).abs().max() < 1e-3 and a.abs().max() <= 1


def test_the_shipped_classifier_and_statistics_fit_the_shipped_teacher():
    from unet import weights_path

    teacher = load_unet("mnist")
    judge = Judge(teacher)
    assert judge.facts["teacher"]["sha256"] == checksum(weights_path("mnist"))
    images, _ = generate(
        sampler_of(teacher, VPSchedule.linear(), "ddim", steps=20)[0],
        balanced_labels(10, 4),
        teacher.image_shape,
        seed=0,
        device="cpu",
    )
    _, probabilities = judge(images)
    assert (probabilities.argmax(1) == balanced_labels(10, 4)).double().mean() > 0.9  # 40 images, 98% expected


def test_only_the_shipped_teacher_brings_its_numbers_along(tmp_path):
    """Of a network that nobody knows, judged without a teacher, no other one's numbers are told."""
    save_unet(random_unet(), tmp_path / "mine.safetensors")
    mine, shipped = load_unet(tmp_path / "mine.safetensors"), load_unet("mnist")
    alone, beside = (
        evaluation.evaluate(lambda z, c, noise: z, 1, Judge(unet), unet, [2], 4, 0) for unet in (mine, shipped))
    assert beside["teacher_retained_accuracy"] > 0.95 and beside["teacher_fid"] < beside["fid"]
    assert {k: v for k, v in beside.items() if not k.startswith("teacher") and k != "seconds_per_1000"} == {
        k: v for k, v in alone.items() if k != "seconds_per_1000"}
    assert "teacher" in evaluation.table(beside) and "teacher" not in evaluation.table(alone)


def test_wrong_kinds_of_file_and_network_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no minUnlearn classifier"):
        load_classifier("mnist")
    tensors, _ = read_tensors("mnist-classifier", "classifier")
    for config in ({"network": "ViT", "config": {}}, {"config": {"classes": 7}}, {"config": {"depth": 3}}):
        write_tensors(tmp_path / "strange.safetensors", "classifier", tensors, **config)
        with pytest.raises(ValueError, match="does not hold the classifier"):
            load_classifier(tmp_path / "strange.safetensors")
    unet = random_unet(in_channels=3)
    unet.path = "x.safetensors"
    with pytest.raises(ValueError, match="--classifier none"):
        Judge(unet)


@pytest.mark.parametrize("text, classes", [("0", [0]), ("3,1", [1, 3]), ("1 3 3", [1, 3]), ("none", [])])
def test_parse_classes(text, classes):
    assert evaluation.parse_classes(text, 10) == classes


@pytest.mark.parametrize("text", ["10", "-1", "x", "1.5", "", ",", "none 0", "\N{SUPERSCRIPT TWO}"])
def test_parse_classes_refuses(text):
    with pytest.raises(ValueError, match="0..9"):
        evaluation.parse_classes(text, 10)


@pytest.mark.parametrize("words, says", [
    ("mnist-distilled --guidance 2", "--guidance changes nothing for mnist-distilled, sampled by one-step"),
    ("mnist-distilled --eta 1", "--eta changes nothing"),
    ("mnist-distilled --steps 5", "--steps changes nothing"),
    ("mnist-distilled --teacher mnist --steps 5", "--steps changes nothing"),  # its numbers are at hand
    ("mnist-distilled --teacher weights/mnist.safetensors --steps 5", "--steps changes nothing"),  # the same file
    ("{tiny} --forget red", "began at a mean of several networks"),  # by its card, see below
    ("mnist --sampler ancestral --eta 1", "--eta changes nothing for mnist, sampled by ancestral"),
    ("mnist --sampler ancestral --steps 100", "--steps changes nothing"),
    ("mnist-unconditional --forget 1 --guidance 3", "--guidance changes nothing"),
    ("mnist --per-pair 7", "--per-pair changes nothing for mnist, sampled by ddim; --per-class does"),
    ("mnist --features inception --statistics x", "--statistics changes nothing"),
    ("{tiny} --per-class 100", "sampled by ddim; --per-pair does"),
    ("{tiny} --features inception", "--features changes nothing"),
    ("{tiny} --teacher mnist", "--teacher changes nothing"),
    ("mnist --out mnist.safetensors", "give the name of a .json file"),
    ("mnist --per-class 1", "two images of each class"),
    ("mnist --out tests", "--out tests: give the name of a .json file"),
    ("mnist --images 500", "--images changes nothing for mnist, sampled by ddim; --per-class does"),
    ("mnist-unconditional --forget 1 --per-class 7", "--per-class changes nothing"),
    ("mnist-unconditional --forget 1 --batch-size 7", "--batch-size changes nothing"),
    ("{tiny} --batch-size 7", "--batch-size changes nothing"),
    ("mnist-distilled --features inception --data data --steps 100", "--steps changes nothing"),
    ("mnist --inception x.pt", "--inception changes nothing for mnist, sampled by ddim; --features inception does"),
])
def test_flags_that_would_change_nothing_or_lose_everything_are_refused_before_the_work(words, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    words = words.format(tiny=tmp_path / "tiny.safetensors")
    if "tiny" in words:
        save_unet(load_stable_diffusion("tiny-sd").unet, tmp_path / "tiny.safetensors", sd="tiny-sd", teacher=None)
    with pytest.raises(SystemExit) as exit:
        evaluation.main(evaluation.parse(evaluation.Config, "", None, words.split()))
    assert exit.value.code == 2 and says in capsys.readouterr().err


# ------------------------------------------------------------------ concepts


class ReadsPictures:
    """A judge of pictures that are painted with their digit and their colour, as numbers."""

    device = torch.device("cpu")

    def __call__(self, pictures):
        digits, colours = (((pictures[:, i, 0, 0] + 1) * 5).round().long() for i in (0, 1))
        return torch.stack([digits, colours], 1).float(), digits, colours

    def real_moments(self):
        return torch.tensor(PAIRS).double(), torch.eye(2).double().expand(60, 2, 2)


def test_concept_metrics_are_what_was_painted():
    """Of 240 pictures: one of four red threes stays, blue threes are eights, one green one is blue."""
    sd = types.SimpleNamespace(unet=types.SimpleNamespace(image_shape=(4, 1, 1)))
    sd.embed = lambda prompts: torch.tensor([[*pair, i] for pair in PAIRS for i in range(12)])

    def sample(z, c, noise):
        pictures = []
        for digit, colour, template in c.tolist():
            if (digit, colour) == (3, 0) and template > 0 or (digit, colour) == (3, 2):
                digit = 8
            if (digit, colour, template) == (1, 1, 1):
                colour = 2
            pictures.append([digit / 5 - 1, colour / 5 - 1, 0])
        return torch.tensor(pictures)[:, :, None, None]

    pairs = torch.arange(60).repeat(6)  # a teacher without fault in the first four of each pair, and none right after
    seen = torch.tensor(PAIRS)[torch.where(torch.arange(360) < 240, pairs, (pairs + 7) % 60)]
    teacher = seen.float(), *seen.unbind(1), pairs
    r = evaluation.evaluate_concept(sample, sd, ReadsPictures(), "red three", 4, 0, teacher)
    assert (r["ua"], r["ua_images"], r["became"]) == (0.75, 4, {"red eight": 0.75, "red three": 0.25})
    assert r["near"] == pytest.approx(52 / 56)  # nine red digits and five threes, four pictures each
    assert r["far"] == pytest.approx(179 / 180) and r["retained_accuracy"] == pytest.approx(231 / 236)
    assert (r["teacher_near"], r["teacher_far"], r["teacher_ua"], r["teacher_images"]) == (1, 1, 0, 240)
    kept = [pair for pair in PAIRS if pair != (3, 0)]
    drawn = np.array([p for pair in kept for p in [(8, 2) if pair == (3, 2) else pair] * 4], dtype=float)
    drawn[next(i for i, p in enumerate(drawn) if tuple(p) == (1, 1))] = 1, 2
    real = np.cov(np.array(kept, dtype=float).T, bias=True) + np.eye(2)
    cov, linalg = np.cov(drawn.T), pytest.importorskip("scipy.linalg")
    expected = ((drawn.mean(0) - np.mean(kept, 0)) ** 2).sum() + np.trace(cov + real - 2 * linalg.sqrtm(cov @ real).real)
    assert r["fid"] == pytest.approx(expected, rel=1e-6)
    assert evaluation.evaluate_concept(sample, sd, ReadsPictures(), "", 4, 0, teacher).keys().isdisjoint({"ua", "became"})
    hyphen = evaluation.evaluate_concept(sample, sd, ReadsPictures(), "red-three", 4, 0, teacher)  # as folders spell it
    assert all(hyphen[name] == r[name] for name in ("ua", "near", "far", "retained_accuracy"))
    few = tuple(x[:60] for x in teacher)
    shown = evaluation.table(evaluation.evaluate_concept(sample, sd, ReadsPictures(), "red three", 4, 0, few))
    assert "of 60 pictures)" in shown and "pictures)" not in evaluation.table(r)


def test_the_command_reads_a_generator_of_the_tiny_model(tmp_path, capsys):
    """The shipped model asked once is no good generator, but a three can be told from an eight."""
    unet = load_stable_diffusion("tiny-sd").unet
    save_unet(unet, tmp_path / "generator.safetensors", sd="tiny-sd", forget="three", t_init=625)
    config = evaluation.Config(checkpoint=str(tmp_path / "generator.safetensors"), per_pair=1, device="cpu", out=str(tmp_path / "a.json"))
    evaluation.main(config)
    numbers = json.loads((tmp_path / "a.json").read_text())
    assert numbers["nfe"] == 1 and numbers["sampler"] == "one-step" and numbers["images"] == numbers["teacher_images"] == 60
    assert numbers["ua_images"] == 6 and 0 <= numbers["ua"] < 1 and numbers["teacher_ua"] == 0
    assert 0.2 < numbers["retained_accuracy"] < 0.9 and numbers["near"] is None
    assert "UA (concept gone)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        evaluation.main(dataclasses.replace(config, out=str(tmp_path / "nowhere" / "a.json")))
    assert "there is no folder" in capsys.readouterr().err


def test_the_teachers_numbers_are_those_of_its_own_folder(tmp_path, capsys):
    folder = shutil.copytree(ROOT / "weights" / "tiny-sd", tmp_path / "mine")
    (folder / "statistics.safetensors").unlink()
    save_unet(load_stable_diffusion(folder).unet, tmp_path / "unet.safetensors", sd=str(folder), t_init=625)
    with pytest.raises(SystemExit) as exit:
        evaluation.main(evaluation.Config(str(tmp_path / "unet.safetensors"), per_pair=1, device="cpu"))
    assert exit.value.code == 2 and "mine/statistics.safetensors" in capsys.readouterr().err


def test_the_file_says_how_images_were_drawn(tmp_path, monkeypatch):
    """PUL and u-FID have steps of their own, whatever --sampler and --steps would be."""
    monkeypatch.setattr(evaluation, "table", str)
    config, report = evaluation.Config(out=str(tmp_path / "a.json")), {"sampler": "DDIM, 20 steps, no class asked for"}
    evaluation.show(config, report, [1], "ddim", torch.device("cpu"))
    assert json.loads((tmp_path / "a.json").read_text())["sampler"] == "DDIM, 20 steps, no class asked for"


def test_the_command_samples_the_tiny_model_with_guidance_in_its_latents(tmp_path, monkeypatch):
    seen, sd = [], load_stable_diffusion("tiny-sd")
    save_unet(sd.unet, tmp_path / "unet.safetensors", sd="tiny-sd")

    def spy(*words):
        seen.append(words)
        return words[2]

    monkeypatch.setattr("samples.ddim_sample", spy)
    out = tmp_path / "a.json"
    evaluation.main(evaluation.Config(str(tmp_path / "unet.safetensors"), per_pair=1, steps=7, device="cpu", out=str(out)))
    _, _, _, _, steps, eta, guidance, x0_clip, _, null = seen[0]
    assert (steps, eta, guidance, x0_clip) == (7, 0.0, 4.5, False) and torch.equal(null, sd.embed([""]))
    assert json.loads(out.read_text())["nfe"] == 14


def test_the_samplers_behind_published_numbers_take_the_steps_that_they_say():
    """20 calls for PUL and u-FID; 50 guided ones, each of both texts at once, for the tiny model's teacher."""
    schedule, seen = VPSchedule.linear(), []

    def network(x, t, c=None):
        seen.append((len(x), t[0].item()))
        return torch.zeros_like(x)

    network.null_label = None
    unconditional_sampler(network, schedule)(torch.randn(3, 1, 4, 4))
    assert [n for n, _ in seen] == [3] * 20 and seen[0][1] == 950 and seen[-1][1] == 0
    seen.clear()
    sd = types.SimpleNamespace(schedule=schedule, embed=lambda texts: torch.zeros(1, 2, 3), vae=types.SimpleNamespace(decode=lambda x: x))
    guided_sampler(sd, network)(torch.randn(3, 4, 4, 4), torch.ones(3, 2, 3))
    assert [n for n, _ in seen] == [6] * 50 and seen[0][1] == 980 and seen[-1][1] == 0
