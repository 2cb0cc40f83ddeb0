"""The networks that look at images on behalf of the metrics: what they see, and how it is turned into features.

    Classifier    MNIST: six convolutions; ships in weights/, its penultimate layer gives 128 features
    Judge         a classifier, and the statistics of real images to compare with
"""

import torch
from torch import nn

from run import checksum
from unet import read_tensors, weights_path

# ---------------------------------------------------------------------------- the MNIST classifier


class Classifier(nn.Module):
    """The MNIST classifier behind the metrics: six convolutions, an average over the image, one dense layer.

    forward: images (B, 1, 28, 28) in [-1, 1] -> logits (B, 10); `features` -> the penultimate layer, (B, 128).
    """

    def __init__(self, widths=(32, 32, 64, 64, 128, 128), classes=10):
        super().__init__()
        self.config = {"widths": widths, "classes": classes}
        layers, cin = [], 1
        for i, cout in enumerate(widths):
            stride = 2 if i in (1, 3) else 1  # 28, 14, 14, 7, 7, 7 px
            layers += [nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout), nn.ReLU()]
            cin = cout
        self.body, self.head = nn.Sequential(*layers), nn.Linear(cin, classes)

    def features(self, images):
        return self.body(images).mean(dim=(2, 3))

    def forward(self, images):
        return self.head(self.features(images))


def load_classifier(name="mnist-classifier"):
    """The classifier in evaluation mode: a shipped name or a .safetensors path. ValueError if it is none."""
    tensors, facts = read_tensors(name, "classifier")
    classifier = Classifier(**facts["config"])
    classifier.load_state_dict(tensors)
    return classifier.eval()


def load_statistics(name="mnist-statistics"):
    """Per-class feature moments of real images and of the teachers', as made by `pretrain.py mnist-statistics`.

    {"train" | "test" | "teacher" | "unconditional": (means (10, D), covariances (10, D, D), counts (10,))}, where the
    classes of "unconditional" are what the classifier sees; and the facts about them.
    """
    tensors, facts = read_tensors(name, "statistics")
    return {
        s: tuple(tensors[f"{s}.{part}"].double() for part in ("means", "covariances", "counts"))
        for s in ("train", "test", "teacher", "unconditional")
    }, facts


@torch.no_grad()
def look(classifier, images, device="cpu", batch=500):
    """What the classifier makes of images (N, 1, 28, 28): features (N, D), class probabilities (N, K), on the CPU."""
    features = torch.cat([classifier.features(x.to(device)) for x in images.split(batch)])
    return features.cpu(), classifier.head(features).softmax(1).cpu()


class Judge:
    """Looks at images of a network (N, 1, 28, 28) on behalf of the metrics: a classifier, and what to compare with.

    unet: the network to be judged, of ten classes or unconditional; ValueError when it draws something that the
    classifier cannot read, or when a file is not what it should be.
    """

    def __init__(self, unet, classifier="mnist-classifier", statistics="mnist-statistics"):
        if unet.image_shape != (1, 28, 28) or unet.num_classes not in (None, 10):
            raise ValueError(f"{unet.path} draws {unet.num_classes or 'unknown'} classes of {unet.image_shape}; the "
                             "classifier reads 10 of shape (1, 28, 28), so give --classifier none")
        self.device = next(unet.parameters()).device
        self.classifier = load_classifier(classifier).to(self.device)
        self.statistics, self.facts = load_statistics(statistics)
        if self.facts["classifier_sha256"] != checksum(weights_path(classifier)):
            raise ValueError(f"the statistics {statistics!r} were not made with {classifier!r}; see pretrain.py")

    def to(self, device):
        self.device, self.classifier = device, self.classifier.to(device)
        return self

    def __call__(self, images):
        return look(self.classifier, images, self.device)

    @torch.no_grad()
    def live_ua(self, images, labels):
        """UA of a handful of images (B, 1, 28, 28) that were asked for as labels (B,): for a progress bar."""
        return (self.classifier(images.float().clamp(-1, 1)).argmax(1) != labels).float().mean()
