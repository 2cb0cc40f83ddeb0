"""Real images, by torchvision: a data set, read from a folder or downloaded there; or a user's own pictures.

Images are (N, C, H, W) in [-1, 1], float32; labels (N,) in 0..9. SFD needs no real images, and VDU only
those of the undesired class; the metrics compare with the rest.
"""

import os
from pathlib import Path

import torch
import torch.nn.functional as F


def open_dataset(name, folder, **split):
    """One of torchvision's data sets, from `folder` or downloaded into it; OSError when neither works."""
    import torchvision.datasets  # here, so that whoever opens no data set does not load its code either

    dataset = getattr(torchvision.datasets, name)
    try:
        return dataset(folder, **split, download=False)
    except (RuntimeError, ValueError, AssertionError):  # torchvision's words for "not there", and for a damaged file
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # they would all write the same files
            raise OSError(f"{name} does not lie in {str(folder)!r}, and of several processes none downloads it: let a "
                          "single one do it first") from None
        try:
            return dataset(folder, **split, download=True)
        except (RuntimeError, OSError, ValueError, AssertionError) as error:
            raise OSError(f"{name} does not lie whole in {str(folder)!r} and could not be downloaded "
                          f"({error})") from None


def mnist(folder, train=True):
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


PICTURES = {".png", ".jpg", ".jpeg"}


def read_picture(path, shape):
    """An image file as (C, H, W), 0..255: the shorter side resized to that of `shape`, the middle kept."""
    from torchvision.io import ImageReadMode, read_image  # here, as above
    from torchvision.transforms.functional import center_crop, resize

    mode = ImageReadMode.GRAY if shape[0] == 1 else ImageReadMode.RGB
    try:
        x = read_image(str(path), mode, apply_exif_orientation=True)  # upright, however the camera was held
        x = (x.int() >> 8).to(torch.uint8) if x.dtype == torch.uint16 else x  # as a scanner may have it
        return center_crop(resize(x, shape[1], antialias=True), shape[1])
    except RuntimeError as error:
        raise ValueError(f"{path} is no readable picture ({str(error).splitlines()[0]})") from None


def some_images(source, classes, shape, n=0, seed=0):
    """`n` images (0: all) of some classes from a folder that holds MNIST, CIFAR-10, tiny ImageNet or pictures:
    (N, C, H, W). classes None: a folder of pictures, whatever they show.

    No image of another class is used or, where images are files, even opened. A data set is downloaded only into
    "data", or where part of it exists already. ValueError or OSError when there are no images of `shape`."""
    def some(count):  # which of `count` images
        if count == 0:
            raise ValueError(f"--data {source} holds no image of class {classes}")
        return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: n or count].tolist()

    folder = Path(source)
    if source != "data" and not folder.is_dir():
        raise OSError(f"--data {source} is no folder")
    known = {(1, 28, 28): ("MNIST", mnist), (3, 32, 32): ("cifar-10-batches-py", cifar10)} if classes else {}
    pictures = sorted(p for p in folder.glob("[!.]*") if p.suffix.lower() in PICTURES)
    if shape in known and (folder / known[shape][0]).is_dir():
        pictures = []  # a picture that lies beside a data set is none of it
    if classes and (folder / "wnids.txt").is_file():  # tiny ImageNet: class k is the k-th line of wnids.txt
        names = (folder / "wnids.txt").read_text().split()
        if max(classes) >= len(names):
            raise ValueError(f"--forget {max(classes)}: {source} has the classes 0..{len(names) - 1}")
        pictures = sorted(p for k in classes for p in (folder / "train" / names[k] / "images").glob("[!.]*"))
    if pictures:
        return torch.stack([read_picture(pictures[i], shape) for i in some(len(pictures))]) / 127.5 - 1
    if shape not in known or source != "data" and not (folder / known[shape][0]).is_dir():
        raise ValueError(f"--data {source} holds no pictures ({' '.join(sorted(PICTURES))})"
                         + (f" or data set of {shape}" if classes else ""))
    images, labels = known[shape][1](folder, train=True)
    images = images[torch.isin(labels, torch.tensor(classes))]
    return images[some(len(images))]
