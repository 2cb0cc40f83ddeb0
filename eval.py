import torch
import torch.nn.functional as F
from torch import nn
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
