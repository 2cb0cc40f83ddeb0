"""The Inception behind FID at CIFAR-10 and STL-10 size, and what the metrics compare with: features of real images.

The network is the one of Heusel et al. 2017, TensorFlow's of December 2015: the weights are pytorch-fid's, and
images are enlarged and scaled as in TensorFlow and torch-fidelity (pytorch-fid itself differs in both).
Torchvision's Inception v3 is a different network: this one leaves padding out of its averages, takes a maximum instead
of an average in its last block, has 1,008 classes, and enlarges images as TensorFlow did then. Each of these changes
the score, so FIDs are comparable only if all of them are as here.

    images -> 8 bits -> 299 px -> (x - 128) / 128 -> Inception -> 2,048 features -> FID, precision, recall
                                                               -> 1,008 probabilities -> inception score

sFID, on features that keep the place in the image, is left out.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn

from data import cifar10, stl10
from features import look
from fetch import fetch
from metrics import (
    as_classes,
    frechet_distance,
    inception_score,
    mean_confidence,
    moments,
    percent_unlearned,
    precision_recall,
    report,
)
from record import checksum
from samples import balanced_labels, generate
from unet import read_tensors, write_tensors

WEIGHTS = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
           "#sha256=6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2")

# ---------------------------------------------------------------------------- the network


def resize(images, size=299):
    """(B, C, H, W) -> (B, C, size, size), bilinear as TensorFlow 1 did it: pixel i of the result lies at i H / size of
    the original, with no half pixels, and beyond the last pixel there is the last pixel."""

    def shares(n):  # (size, n): what each new pixel takes of the n old ones
        place = torch.arange(size, device=images.device) * (n / size)
        left = place.long()
        right = F.one_hot((left + 1).clamp(max=n - 1), n) * (place - left)[:, None]
        return F.one_hot(left, n) * (1 - (place - left))[:, None] + right

    return torch.einsum("ih,bchw,jw->bcij", shares(images.shape[2]), images, shares(images.shape[3]))


class Conv(nn.Module):
    """Convolution, BatchNorm, ReLU. Those of stride 1 keep the size, unless `pad` says otherwise."""

    def __init__(self, cin, cout, kernel, stride=1, pad=True):
        super().__init__()
        padding = "same" if stride == 1 and pad else 0
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


def average(x):
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def maximum(x):
    return F.max_pool2d(x, 3, stride=1, padding=1)


def half(x):
    return F.max_pool2d(x, 3, stride=2)


class Mixed(nn.Module):
    """Parallel branches, each a chain of convolutions, and one that begins with a pooling; concatenated along channels.

    branches: name -> convolutions, (width, kernel[, stride]); a list of two in place of one is a fork, whose ends are
    concatenated. pool: the pooling; pooled: the width of the convolution after it, 0 for none."""

    def __init__(self, cin, branches, pool, pooled=0):
        super().__init__()
        self.pool, self.chains, self.width = pool, [], pooled or cin
        for name, stages in branches.items():
            chain, width = [], cin
            for i, stage in enumerate(stages, start=1):
                fork = stage if isinstance(stage, list) else [stage]
                number = f"_{i}" if len(stages) > 1 else ""  # names are those of the file of weights
                chain.append([f"branch{name}{number}{end if len(fork) > 1 else ''}" for end, _ in zip("ab", fork)])
                for conv, settings in zip(chain[-1], fork):
                    self.add_module(conv, Conv(width, *settings))
                width = sum(settings[0] for settings in fork)
            self.chains.append(chain)
            self.width += width
        self.branch_pool = Conv(cin, pooled, 1) if pooled else nn.Identity()

    def forward(self, x):
        ends = []
        for chain in self.chains:
            h = x
            for stage in chain:
                h = torch.cat([self.get_submodule(conv)(h) for conv in stage], dim=1)
            ends.append(h)
        return torch.cat([*ends, self.branch_pool(self.pool(x))], dim=1)


class Inception(nn.Module):
    """`features`: images (B, 3, H, W) in [-1, 1] -> (B, 2048); `head`: these -> (B, 1008), as the inception score takes
    them, without the bias; `forward`: images -> logits (B, 1008)."""

    def __init__(self):
        super().__init__()
        row, column = (1, 7), (7, 1)

        def five(cin, pooled):  # at 35 px
            return Mixed(cin, {"1x1": [(64, 1)], "5x5": [(48, 1), (64, 5)], "3x3dbl": [(64, 1), (96, 3), (96, 3)]},
                         average, pooled)

        def six(w):  # at 17 px
            return Mixed(768, {"1x1": [(192, 1)], "7x7": [(w, 1), (w, row), (192, column)],
                               "7x7dbl": [(w, 1), (w, column), (w, row), (w, column), (192, row)]}, average, 192)

        def seven(cin, pool):  # at 8 px
            fork = [(384, (1, 3)), (384, (3, 1))]
            return Mixed(cin, {"1x1": [(320, 1)], "3x3": [(384, 1), fork],
                               "3x3dbl": [(448, 1), (384, 3), fork]}, pool, 192)

        self.Conv2d_1a_3x3 = Conv(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, pad=False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = five(192, 32), five(256, 64), five(288, 64)
        self.Mixed_6a = Mixed(288, {"3x3": [(384, 3, 2)], "3x3dbl": [(64, 1), (96, 3), (96, 3, 2)]}, half)
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = six(128), six(160), six(160), six(192)
        seven_by_seven = [(192, 1), (192, row), (192, column), (192, 3, 2)]
        self.Mixed_7a = Mixed(768, {"3x3": [(192, 1), (320, 3, 2)], "7x7x3": seven_by_seven}, half)
        self.Mixed_7b, self.Mixed_7c = seven(1280, average), seven(2048, maximum)
        self.fc = nn.Linear(2048, 1008)

    def features(self, images):
        x = resize(((images + 1) * 127.5).round())  # (B, 3, 299, 299), 0..255
        x = (x - 128) / 128
        x = half(self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x))))  # (B, 64, 73, 73)
        x = half(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x)))  # (B, 192, 35, 35)
        for name, block in self.named_children():
            if name.startswith("Mixed"):
                x = block(x)
        return x.mean(dim=(2, 3))

    def head(self, features):
        return features @ self.fc.weight.T


def load_inception(source=""):
    """The network in evaluation mode, with `sha256` of its file. source: a file or a URL; "" is pytorch-fid's, which is
    fetched once. ValueError or OSError when it cannot be had."""
    path = fetch(source or WEIGHTS)
    if not path.is_file():
        raise OSError(f"no file {str(path)!r}: give the FID Inception's weights, {Path(WEIGHTS.split('#')[0]).name}")
    inception = Inception()
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        missing, unexpected = inception.load_state_dict(tensors, strict=False)
        wrong = [name for name in missing if not name.endswith("num_batches_tracked")] + unexpected  # old files lack it
        if wrong:
            raise ValueError(f"{len(wrong)} names differ, {wrong[0]} for one")
    except Exception as error:  # whatever a damaged or foreign pickle raises
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} does not hold the FID Inception: {reason}") from None
    inception.sha256 = checksum(path)
    return inception.eval().requires_grad_(False)


# ---------------------------------------------------------------------------- the metrics

MOST = 10_000  # images of each kind that precision and recall look at
DATASETS = {(3, 32, 32): ("cifar10", cifar10), (3, 64, 64): ("stl10", stl10)}  # a network's images -> the real ones


def real_reference(inception, shape, folder, forget=(), device="cpu"):
    """What generated images of `shape` are compared with: real training images of the classes that are not in `forget`.

    {"mean": (2048,), "covariance": (2048, 2048), "features": (<= MOST, 2048)}, and the facts. They are computed once,
    from the data set in `folder`, and kept there in a file. ValueError when no data set of this shape is known."""
    if shape not in DATASETS:
        raise ValueError(f"Inception features are for CIFAR-10 and STL-10, images of 32 or 64 px, not for {shape}")
    name, dataset = DATASETS[shape]
    without = f"-without-{'-'.join(map(str, sorted(forget)))}" if forget else ""
    path = Path(folder) / f"inception-{name}-train{without}.safetensors"
    if path.is_file():
        tensors, facts = read_tensors(path, "Inception reference")
        if facts["inception_sha256"] == inception.sha256:
            return tensors, {name: fact for name, fact in facts.items() if name != "kind"}

    def kept(train):
        images, labels = dataset(folder, train)
        return look(inception, images[~torch.isin(labels, as_classes(forget))], device, 100, f"real {name}")[0]

    features, test = kept(True), kept(False)
    mean, covariance = moments(features)
    facts = {"inception_sha256": inception.sha256, "reference": f"{name}, training images{without.replace('-', ' ')}",
             "reference_images": len(features), "real_test_images": len(test),
             "real_test_fid": frechet_distance(*moments(test), mean, covariance)}
    some = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))[:MOST]
    tensors = {"mean": mean, "covariance": covariance, "features": features[some]}
    try:
        write_tensors(path, "Inception reference", tensors, **facts)
    except (OSError, SafetensorError) as error:  # a folder that is not ours to write in: the numbers are good
        print(f"{path} was not written ({error}); the next run will look at the real images again", file=sys.stderr)
    return tensors, facts


def inception_metrics(images, inception, reference, device="cpu"):
    """FID, inception score (the mean over ten parts, as is the custom), precision and recall of images (N, 3, H, W) in
    [-1, 1], at least four, against the tensors of a `real_reference`."""
    features, probabilities = look(inception, images, device, 100, "Inception")
    precision, recall = precision_recall(*(x[:MOST].to(device) for x in (reference["features"], features)))
    return {"fid": frechet_distance(*moments(features), reference["mean"], reference["covariance"]),
            "inception_score": inception_score(probabilities, splits=min(10, len(images))),
            "precision": precision, "recall": recall}


def evaluate_inception(sample, nfe, unet, forget, n, seed, inception, reference, judge=None, teacher_sample=None,
                       batch=250):
    """Draw `n` images of every class (`n` in all, where `unet` is unconditional) with `sample` (z, c, noise) -> images
    and compare those of the retained classes (all, where unconditional: u-FID) with real ones: FID, inception score,
    precision and recall on Inception features, as a dictionary for metrics.json.

    reference: what `real_reference` gives. judge: a classifier, for accuracies and UA, or for PUL and confidence.
    teacher_sample: the teacher's sampler; its own numbers, from the same noise, are then added as `teacher_...`.
    """
    device, (real, facts) = next(inception.parameters()).device, reference
    labels = n if unet.num_classes is None else balanced_labels(unet.num_classes, n)

    def numbers(sample, bar):
        images, seconds = generate(sample, labels, unet.image_shape, seed, device, batch, bar)
        kept = images if unet.num_classes is None else images[~torch.isin(labels, as_classes(forget))]
        result = inception_metrics(kept, inception, real, device)
        if judge and unet.num_classes is None:
            seen = judge(images)[1]
            result |= {"counts": seen.argmax(1).bincount(minlength=10).tolist(), "confidence": mean_confidence(seen)}
        elif judge:
            result |= report(labels, None, judge(images)[1], None, forget)
        if unet.num_classes is None:
            result["u_fid"] = result.pop("fid")
        return result | {"images": len(images), "seconds_per_1000": 1000 * seconds / len(images)}

    result = numbers(sample, "to judge")
    if teacher_sample:
        result |= {f"teacher_{name}": value for name, value in numbers(teacher_sample, "teacher").items()}
    if "teacher_counts" in result and forget:
        before, after = (sum(result[name][k] for k in forget) for name in ("teacher_counts", "counts"))
        result |= {"pul": percent_unlearned(before, after) if before else None, "n_before": before, "n_after": after}
    return result | facts | {
        "nfe": nfe, "evaluation_seed": seed, "features": "FID Inception (December 2015), 2,048, at 299 px",
        "preprocessing": "clipped to [-1, 1], rounded to 8 bits, resized as in TensorFlow 1, real and generated alike"}
