"""Real images, by torchvision: read from a folder, or downloaded there.

Images are (N, C, H, W) in [-1, 1], float32; labels (N,) in 0..9. The methods need none of it (SFD), or images of the
undesired class alone (VDU); the metrics compare with the rest.
"""

import os

import torch
import torch.nn.functional as F


def open_dataset(name, folder, **split):
    """A data set of torchvision's, in `folder` or downloaded there; OSError when it is not there and cannot be had."""
    import torchvision.datasets  # here, so that whoever opens no data set does not load its code either

    dataset = getattr(torchvision.datasets, name)
    try:
        return dataset(folder, **split, download=False)
    except RuntimeError:  # torchvision's word for "not there"
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # they would all write the same files
            raise OSError(f"{name} does not lie in {str(folder)!r}, and of several processes none downloads it: let a "
                          "single one do it first") from None
        try:
            return dataset(folder, **split, download=True)
        except (RuntimeError, OSError) as error:
            raise OSError(f"{name} does not lie in {str(folder)!r} and could not be downloaded ({error})") from None


def mnist(folder, train):
    """Images (60000 or 10000, 1, 28, 28) and labels."""
    data = open_dataset("MNIST", folder, train=train)
    return data.data[:, None] / 127.5 - 1, data.targets


def cifar10(folder, train=True):
    """Images (50000 or 10000, 3, 32, 32) and labels."""
    data = open_dataset("CIFAR10", folder, train=train)
    return torch.from_numpy(data.data).permute(0, 3, 1, 2) / 127.5 - 1, torch.tensor(data.targets)


def stl10(folder, train=True):
    """Labelled images (5000 or 8000, 3, 64, 64), shrunk from 96 px, and labels."""
    data = open_dataset("STL10", folder, split="train" if train else "test")
    images = F.interpolate(torch.from_numpy(data.data) / 127.5 - 1, size=64, mode="bilinear", antialias=True)
    return images.clamp(-1, 1), torch.from_numpy(data.labels).long()
