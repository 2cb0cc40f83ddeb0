"""Evaluation at CIFAR-10 size: the FID Inception against torch-fidelity's, the reference of real images, the command,
and the ResNet-34 that accuracies are taken with."""

import json
import pickle

import pytest
import torch
from conftest import random_unet, write_cifar10
from test_convert import Bomb

import eval as evaluation
import inception
import metrics
import pretrain
import vdu
from features import Judge, ResNet34, load_classifier
from run import Run
from samples import balanced_labels, generate, sampler_of
from unet import VPSchedule, load_unet, save_unet, write_tensors

# ------------------------------------------------------------------ the network


@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (7, 300)])
def test_resize_is_that_of_torch_fidelity(shape):
    peer = pytest.importorskip("torch_fidelity.interpolate_compat_tensorflow")
    images = torch.randint(0, 256, (2, 3, *shape)).float()
    theirs = peer.interpolate_bilinear_2d_like_tensorflow1x(images, size=(299, 299), align_corners=False)
    torch.testing.assert_close(inception.resize(images), theirs, rtol=0, atol=1e-3)  # of 255
    torchs = torch.nn.functional.interpolate(images, size=(299, 299), mode="bilinear")
    assert (theirs - torchs).abs().max() > 10  # and the usual one is another


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file such as pytorch-fid's, with random weights that keep the images apart."""
    torch.manual_seed(0)
    network = inception.Inception()
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, std=(2 / module.weight[0].numel()) ** 0.5)
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.8, 1.2)
            torch.nn.init.normal_(module.bias, std=0.1)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


def test_inception_is_that_of_torch_fidelity(weights):
    """The same file in both, names and all; features, logits of the inception score, and logits."""
    peer = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    theirs = peer.FeatureExtractorInceptionV3("", ["2048", "logits_unbiased", "logits"], feature_extractor_weights_path=weights)
    network = inception.load_inception(weights)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        features = network.features(images / 127.5 - 1)
        expected = theirs(images)
        for ours, peers in zip((features, network.head(features), network.fc(features)), expected):
            apart = (peers[0] - peers[1]).abs().max()
            assert apart > 0.01 * peers.abs().max()  # the images differ in it
            assert (ours - peers).abs().max() < 1e-3 * apart


def test_a_file_that_is_no_inception_is_refused(tmp_path, weights):
    with pytest.raises(OSError, match="pt_inception-2015-12-05-6726825d.pth"):
        inception.load_inception(tmp_path / "nowhere.pth")
    (tmp_path / "damaged.pth").write_bytes(weights.read_bytes()[:1000])
    torch.save({"fc.weight": torch.zeros(1008, 2048)}, tmp_path / "other.pth")
    torch.save({"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "shape.pth")
    (tmp_path / "empty.pth").write_bytes(b"")  # as a download that broke off leaves it
    torch.save({"fc.weight": Bomb(tmp_path / "boom")}, tmp_path / "code.pth")
    for name in ("damaged", "other", "shape", "empty", "code"):
        with pytest.raises(ValueError, match="does not hold the FID Inception"):
            inception.load_inception(tmp_path / f"{name}.pth")
    assert not (tmp_path / "boom").exists()


# ------------------------------------------------------------------ what it is compared with, and the command


class StandIn(torch.nn.Module):
    """In Inception's place: features (N, 12), a few averages over the image."""

    def __init__(self, sha256="stand-in"):
        super().__init__()
        self.weight, self.sha256, self.seen = torch.nn.Parameter(torch.eye(12)), sha256, 0

    def features(self, images):
        self.seen += len(images)
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1) @ self.weight

    def head(self, features):
        return 5 * features


@pytest.fixture
def data(tmp_path, monkeypatch):
    return write_cifar10(tmp_path / "data", monkeypatch)


def test_cifar10_is_read_upright_and_in_its_colours(data):
    raw = pickle.loads((data / "cifar-10-batches-py/data_batch_1").read_bytes())["data"].reshape(6, 3, 32, 32)
    images, labels = inception.cifar10(data)
    assert torch.equal(((images[:6] + 1) * 127.5).round().to(torch.uint8), torch.from_numpy(raw))
    assert labels[:6].tolist() == [0, 1, 2, 3, 4, 5]


def test_the_reference_is_of_retained_training_images_and_is_computed_once(data):
    network = StandIn()
    tensors, facts = inception.real_reference(network, (3, 32, 32), data, [3, 0])
    images, labels = inception.cifar10(data)
    assert images.shape == (30, 3, 32, 32) and -1 <= images.min() and images.max() <= 1
    kept = network.features(images[(labels != 0) & (labels != 3)]).detach()
    mean, covariance = metrics.moments(kept)
    torch.testing.assert_close(tensors["mean"], mean)
    torch.testing.assert_close(tensors["covariance"], covariance)
    assert sorted(tensors["features"].tolist()) == sorted(kept.tolist())
    assert facts["reference_images"] == 24 and facts["real_test_images"] == 16 and facts["real_test_fid"] > 0
    assert facts["reference"] == "cifar10, training images without 0 3"
    (data / "cifar-10-batches-py/test_batch").unlink()  # from here on the file has to do
    again, same = inception.real_reference(network, (3, 32, 32), data, [0, 3])
    assert same == facts and torch.equal(again["covariance"], tensors["covariance"])
    assert [p.name for p in data.glob("*.safetensors")] == ["inception-cifar10-train-without-0-3.safetensors"]
    for other, forget in ((StandIn("other weights"), [0, 3]), (network, [4])):  # not with these
        with pytest.raises((OSError, RuntimeError)):
            inception.real_reference(other, (3, 32, 32), data, forget)
    with pytest.raises(ValueError, match="32 or 64 px"):
        inception.real_reference(network, (3, 28, 28), data)


def cifar_unet(seed=0):
    return random_unet(seed, image_size=32, in_channels=3, attention_at=())


@pytest.fixture
def files(tmp_path, data, monkeypatch):
    """A distilled generator that should have forgotten 1, its teacher, and a classifier."""
    monkeypatch.chdir(tmp_path)
    save_unet(cifar_unet(0), "generator.safetensors", t_init=440, forget=[1])
    save_unet(cifar_unet(1), "teacher.safetensors")
    save_unet(random_unet(image_size=32, in_channels=3, attention_at=(), num_classes=20), "twenty.safetensors", forget=[15])
    save_unet(random_unet(num_classes=None, image_size=32, in_channels=3, attention_at=()), "unlearned.safetensors")
    torch.manual_seed(0)
    classifier = ResNet34()
    write_tensors("classifier.safetensors", "classifier", classifier.state_dict(), network="ResNet34", config=classifier.config)
    monkeypatch.setattr(evaluation, "load_inception", lambda source: StandIn())
    return tmp_path


def evaluated(words):
    evaluation.main(evaluation.parse(evaluation.Config, "", None, [*words.split(), "--data", "data", "--out", "out.json"]))
    return json.load(open("out.json"))


def test_the_command_measures_on_inception_features(files, capsys):
    words = "generator.safetensors --features inception --per-class 2 --teacher teacher.safetensors --steps 2"
    result = evaluated(f"{words} --classifier classifier.safetensors")
    network, schedule, labels = StandIn(), VPSchedule.linear(), balanced_labels(10, 2)
    reference, facts = inception.real_reference(network, (3, 32, 32), files / "data", [1])
    generator = cifar_unet(0)
    generator.card = {"t_init": 440}
    for prefix, unet, kind in (("", generator, "one-step"), ("teacher_", cifar_unet(1), "ddim")):
        images, _ = generate(sampler_of(unet, schedule, kind, 2)[0], labels, (3, 32, 32), 0, "cpu")
        features = network.features(images[labels != 1]).detach()
        fid = metrics.frechet_distance(*metrics.moments(features), reference["mean"], reference["covariance"])
        assert result[f"{prefix}fid"] == pytest.approx(fid, rel=1e-4)
        precision, recall = metrics.precision_recall(reference["features"], features)
        assert (result[f"{prefix}precision"], result[f"{prefix}recall"]) == (precision, recall)
        score = metrics.inception_score((5 * features).softmax(1), splits=10)
        assert result[f"{prefix}inception_score"] == pytest.approx(score, rel=1e-4)
        seen = load_classifier("classifier.safetensors")(images).argmax(1)
        assert result[f"{prefix}ua"] == metrics.unlearning_accuracy(labels, seen, 1)
    assert result["nfe"] == 1 and result["images"] == 20 and result["real_test_fid"] == facts["real_test_fid"]
    out = capsys.readouterr().out
    assert "compared with  cifar10, training images" in out
    assert "FID on retained classes" in out and "teacher" in out and "UA (forgotten class gone)" in out
    assert "ua" not in evaluated(words)  # without a classifier, only the distances


def test_an_unconditional_checkpoint_is_measured_with_all_its_images(files, capsys, monkeypatch):
    words = "unlearned.safetensors --features inception --images 100 --forget 2 --steps 1"
    result = evaluated(words)
    assert result["images"] == 100 and result["u_fid"] > 0 and not {"pul", "fid"} & result.keys()
    assert f"u-FID  {result['u_fid']:.3f}" in capsys.readouterr().out
    network = StandIn()
    evaluated_images = inception.evaluate_inception(
        lambda z, c, noise: z.clamp(-1, 1), 1, type("Net", (), {"num_classes": None, "image_shape": (3, 32, 32)}), [2], 10, 0,
        network, inception.real_reference(network, (3, 32, 32), files / "data", [2]),
        judge=lambda images: (None, torch.eye(10)), teacher_sample=lambda z, c, noise: z.clamp(-1, 1))
    assert evaluated_images["counts"] == [1] * 10 and evaluated_images["pul"] == 0  # the same images, nothing unlearned
    assert evaluated_images["teacher_u_fid"] == evaluated_images["u_fid"]
    never = inception.evaluate_inception(
        lambda z, c, noise: z.clamp(-1, 1), 1, type("Net", (), {"num_classes": None, "image_shape": (3, 32, 32)}), [2], 10, 0,
        network, inception.real_reference(network, (3, 32, 32), files / "data", [2]),
        judge=lambda images: (None, torch.eye(10)[:2].repeat(5, 1)), teacher_sample=lambda z, c, noise: z.clamp(-1, 1))
    assert never["pul"] is None and never["u_fid"] > 0  # there was nothing to forget; the distances are told all the same
    gone = inception.evaluate_inception(  # the teacher's images are dark, and dark ones are seen as half 2s, bright ones as none
        lambda z, c, noise: z.clamp(0, 1), 1, type("Net", (), {"num_classes": None, "image_shape": (3, 32, 32)}), [2], 10, 0,
        network, inception.real_reference(network, (3, 32, 32), files / "data", [2]),
        judge=lambda images: (None, torch.eye(10)[[2, 3] * 5 if images.mean() < 0 else [3, 4] * 5]),
        teacher_sample=lambda z, c, noise: z.clamp(-1, 0))
    assert (gone["pul"], gone["n_before"], gone["n_after"]) == (1, 5, 0)
    asked = []
    monkeypatch.setattr(evaluation, "evaluate_inception", lambda *words: asked.append(words[4]) or result)
    evaluated("unlearned.safetensors --features inception --forget 2")  # --images not given
    evaluated("generator.safetensors --features inception")
    assert asked == [50_000, 5_000]  # in all; of each class


@pytest.mark.parametrize("words, says", [
    ("generator.safetensors --features inception", "needs --data"),
    ("mnist --features inception --data data", "32 or 64 px"),
    ("mnist --classifier none", "--features inception"),
    ("twenty.safetensors --features inception --data data", "ten classes, not 20"),  # not scored against CIFAR-10
    ("generator.safetensors --classifier classifier.safetensors --data data", "for --features inception; leave it out"),
    ("generator.safetensors --classifier classifier.safetensors --statistics nowhere", "--statistics changes nothing"),
    ("generator.safetensors", "--classifier none"),  # the MNIST classifier cannot read it
    ("generator.safetensors --features inception --data data --teacher mnist", "unlike generator.safetensors"),
    ("unlearned.safetensors --classifier classifier.safetensors --forget 1", "need --features inception"),
    ("generator.safetensors --features inception --data empty", "CIFAR10 does not lie whole in 'empty'"),
    ("mnist-unconditional --forget 3 --images 5", "must be at least 100, not 5"),
    ("mnist-unconditional --forget 3 --data data", "leave it out"),  # precision and recall are of classes asked for
    ("mnist-unconditional", "say with --forget"),
])
def test_bad_input_is_one_line_and_status_2(files, words, says, capsys, monkeypatch):
    def no_network(self):
        raise RuntimeError("no network")

    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", no_network)
    with pytest.raises(SystemExit) as exit:
        evaluation.main(evaluation.parse(evaluation.Config, "", None, words.split()))
    error = capsys.readouterr().err
    assert exit.value.code == 2 and error.count("\n") == 1 and says in error


def test_the_number_of_classes_is_the_checkpoints(files):
    torch.manual_seed(0)
    classifier = ResNet34(classes=20)
    write_tensors("twenty-classifier.safetensors", "classifier", classifier.state_dict(), network="ResNet34", config=classifier.config)
    words = "twenty.safetensors --classifier twenty-classifier.safetensors --steps 1 --per-class 2 --out out.json"
    evaluation.main(evaluation.parse(evaluation.Config, "", None, words.split()))
    result = json.load(open("out.json"))
    assert result["forget"] == [15] and len(result["class_accuracy"]) == 20 and len(result["became"]["15"]) == 20


# ------------------------------------------------------------------ the classifier


class ReadsColours(torch.nn.Module):
    """Ten greys from black to white, each a class of its own."""

    def features(self, images):
        return images.mean(dim=(1, 2, 3))[:, None]

    def head(self, features):
        return -(features - torch.linspace(-1, 1, 10)).abs() * 100


def test_a_judge_without_statistics_reports_accuracies_alone(files, capsys):
    unet = cifar_unet()
    unet.path = files / "teacher.safetensors"
    judge = Judge(unet, "classifier.safetensors")
    assert judge.statistics is None
    colours = torch.linspace(-1, 1, 10)
    judge.classifier = ReadsColours()

    def sample(z, c, noise):
        c = torch.where((c == 2) | (c == 7), 9, c)  # what is to be forgotten, and one of the others, come out wrong
        return colours[c].view(-1, 1, 1, 1).expand(-1, 3, 32, 32)

    other = lambda z, c, noise: sample(z, c.clamp(max=4), noise)  # five more of the others
    result = evaluation.evaluate(sample, 1, judge, unet, [2], 1, 0, other)
    assert result["ua"] == 1 and result["retained_accuracy"] == pytest.approx(8 / 9)
    assert result["teacher_retained_accuracy"] == pytest.approx(4 / 9) and "fid" not in result
    assert "FID" not in evaluation.table(result) and "retained accuracy" in evaluation.table(result)


def test_crops_shift_and_flips_mirror():
    torch.manual_seed(0)
    images = torch.arange(1.0, 257).view(1, 1, 16, 16).expand(64, 3, 16, 16)
    out = pretrain.crop_and_flip(images)
    assert out.shape == images.shape
    seen = set()
    for image in out:
        flipped = bool((image[0] != 0).any(0).nonzero().numel() and image[0, 8, 9] < image[0, 8, 8])
        plain = image.flip(2) if flipped else image
        dy, dx = divmod(int(plain[0, 8, 8]) - 1, 16)
        dy, dx = dy - 8, dx - 8
        rolled = torch.zeros(16, 16)
        rolled[max(0, -dy):16 - max(0, dy), max(0, -dx):16 - max(0, dx)] = images[0, 0, max(0, dy):16 + min(0, dy), max(0, dx):16 + min(0, dx)]
        assert all(torch.equal(channel, rolled) for channel in plain)
        seen.add((dy, dx, flipped))
    assert {abs(d) for dy, dx, _ in seen for d in (dy, dx)} == {0, 1, 2} and {f for *_, f in seen} == {True, False}


def test_vdu_refuses_a_classifier_without_statistics_and_names_eval(files, capsys):
    torch.manual_seed(0)
    variance = {name: torch.ones_like(p) for name, p in load_unet("unlearned.safetensors").named_parameters()}
    write_tensors("posterior.safetensors", "posterior", variance)
    words = "--teacher unlearned.safetensors --posterior posterior.safetensors --classifier classifier.safetensors"
    with pytest.raises(SystemExit) as exit:
        vdu.main(vdu.parse(vdu.Config, "", vdu.PRESETS, words.split()))
    assert exit.value.code == 2 and "eval.py --features inception" in capsys.readouterr().err


@pytest.mark.slow
def test_the_resnet_command_learns(tmp_path, monkeypatch):
    """Ten colours, at 8 px; SGD, crops and flips as for CIFAR-10."""
    torch.manual_seed(0)
    labels = torch.arange(20) % 10
    colours = torch.stack([labels % 3 - 1, labels // 3 % 3 - 1, labels // 9 * 2 - 1], 1).float()
    images = colours[:, :, None, None].expand(20, 3, 8, 8)
    monkeypatch.setitem(pretrain.CLASSIFIERS, "cifar10-classifier",
                        (lambda folder, train: (images, labels), lambda: ResNet34(8), pretrain.crop_and_flip, "ten colours"))
    words = f"cifar10-classifier --steps 30 --batch-size 20 --lr 0.02 --amp off --out {tmp_path}/run".split()
    config = pretrain.parse(pretrain.Config, "", pretrain.PRESETS, words)
    run = Run(config, "")
    pretrain.train_classifier(config, run)
    run.finish({})
    card = json.loads((tmp_path / "run/cifar10-classifier.json").read_text())
    assert card["scores"]["test_accuracy"] > 0.5 and card["data"] == "CIFAR-10" and card["what"] == "ten colours"  # chance is 0.1
    assert run.state["optimizer"].param_groups[0]["lr"] == pytest.approx(0, abs=1e-6)  # down a cosine
    classifier = load_classifier(tmp_path / "run/cifar10-classifier.safetensors")
    with torch.no_grad():
        assert (classifier(images).argmax(1) == labels).double().mean().item() == card["scores"]["test_accuracy"]
