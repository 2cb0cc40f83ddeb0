"""The networks that look at images on behalf of the metrics: what they see, and how it is turned into features.

    Classifier    MNIST: six convolutions; ships in weights/, its penultimate layer gives 128 features
    ResNet34      CIFAR-10 and STL-10; `pretrain.py cifar10-classifier` and `stl10-classifier` train it
    Judge         a classifier, and the statistics of real images to compare with

The FID Inception is in inception.py.
"""

import torch
from torch import nn
from tqdm import tqdm

from record import checksum
from unet import load_network, read_tensors, weights_path

# ---------------------------------------------------------------------------- classifiers


class Classifier(nn.Module):
    """The MNIST classifier behind the metrics: six convolutions, an average over the image, one dense layer.

    forward: images (B, 1, 28, 28) in [-1, 1] -> logits (B, classes); `features` -> the penultimate layer, (B, 128).
    """

    def __init__(self, widths=(32, 32, 64, 64, 128, 128), classes=10):
        super().__init__()
        self.config = {"widths": widths, "classes": classes}
        self.image_shape = (1, 28, 28)
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


class ResNet34(nn.Module):
    """Torchvision's ResNet-34 for small images: its first convolution is 3x3 with stride 1, and up to 32 px no pooling
    follows. forward: images (B, 3, H, W) in [-1, 1] -> logits (B, classes); `features` -> the penultimate layer,
    (B, 512).
    """

    def __init__(self, image_size=32, classes=10):
        super().__init__()
        import torchvision.models  # here, so that whoever needs no ResNet does not load torchvision

        self.config = {"image_size": image_size, "classes": classes}
        self.image_shape = (3, image_size, image_size)
        self.body = torchvision.models.resnet34(num_classes=classes)
        self.body.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        if image_size <= 32:
            self.body.maxpool = nn.Identity()
        self.head, self.body.fc = self.body.fc, nn.Identity()

    def features(self, images):
        return self.body(images)

    def forward(self, images):
        return self.head(self.features(images))


def load_classifier(name="mnist-classifier"):
    """The classifier in evaluation mode: a shipped name or a .safetensors path. ValueError if it is none."""
    def build(facts):
        return {"Classifier": Classifier, "ResNet34": ResNet34}[facts.get("network", "Classifier")](**facts["config"])

    return load_network(name, "classifier", build)[0]


def load_statistics(name="mnist-statistics"):
    """Per-class feature moments of real images and of the teachers', as made by `pretrain.py mnist-statistics`.

    {"train" | "test" | "teacher" | "unconditional": (means (10, D), covariances (10, D, D), counts (10,))}, where the
    classes of "unconditional" are what the classifier sees; and the facts about them.
    """
    tensors, facts = read_tensors(name, "statistics")
    try:
        return {
            s: tuple(tensors[f"{s}.{part}"].double() for part in ("means", "covariances", "counts"))
            for s in ("train", "test", "teacher", "unconditional")
        }, facts
    except KeyError as error:
        raise ValueError(f"the statistics {name} lack {error}; make them with pretrain.py mnist-statistics") from None


def check_classifier(facts, statistics, classifier="mnist-classifier"):
    """ValueError when statistics say, by their facts, that they were made with another classifier than this one."""
    if facts.get("classifier_sha256") != checksum(weights_path(classifier)):
        raise ValueError(f"the statistics {str(statistics)!r} were not made with {classifier!r} as it is now; see "
                         "pretrain.py, or give --classifier none")


@torch.no_grad()
def look(network, images, device="cpu", batch=500, bar=None):
    """What a classifier, or the Inception, makes of images (N, C, H, W): features (N, D), class probabilities (N, K),
    on the CPU. bar: what a progress bar calls it; none if not given."""
    batches = tqdm(images.split(batch), desc=bar, leave=False, disable=bar is None)
    features = torch.cat([network.features(x.to(device)) for x in batches])
    return features.cpu(), network.head(features).softmax(1).cpu()


class Judge:
    """Looks at a network's images (N, C, H, W) for the metrics: a classifier, and the statistics to compare with.

    unet: the network to be judged, unconditional or with the classifier's classes; ValueError when it draws something
    that the classifier cannot read, or when a file is not what it should be. `statistics` and `facts` exist only for
    MNIST (else None and {}): at other sizes, distances use Inception's features, see inception.py.
    """

    def __init__(self, unet, classifier="mnist-classifier", statistics="mnist-statistics"):
        self.device = next(unet.parameters()).device
        self.classifier = load_classifier(classifier).to(self.device)
        shape, classes = self.classifier.image_shape, self.classifier.config["classes"]
        if unet.image_shape != shape or unet.num_classes not in (None, classes):
            raise ValueError(f"{unet.path} draws {unet.num_classes or 'unknown'} classes of {unet.image_shape}; the "
                             f"classifier reads {classes} of shape {shape}; give --classifier none (to eval.py: "
                             "--features inception)")
        self.statistics, self.facts = None, {}
        if isinstance(self.classifier, Classifier):
            self.statistics, self.facts = load_statistics(statistics)
            check_classifier(self.facts, statistics, classifier)

    def to(self, device):
        self.device, self.classifier = device, self.classifier.to(device)
        return self

    def __call__(self, images):
        return look(self.classifier, images, self.device)

    @torch.no_grad()
    def live_ua(self, images, labels):
        """UA of a handful of images (B, C, H, W) that were asked for as labels (B,): for a progress bar."""
        return (self.classifier(images.float().clamp(-1, 1)).argmax(1) != labels).float().mean()
