"""A perfect teacher that needs no training: a mixture of Gaussians in the plane, with classes.

A mixture of Gaussians stays one when noise is added to it, so its density, its score and the noise that a perfect
network would predict are known exactly, at every step t and for every class. The notebooks look at each idea here
first, where all of it can be drawn.

A point of the plane travels as an image of two channels and one pixel, (B, 2, 1, 1): whatever takes images and a
network in unet.py and ddpm_sfd.py takes these points and this teacher too.
"""
import math

import torch
from torch import nn


class Mixture(nn.Module):
    """Called like a class-conditional `unet.UNet`: (x_t, t, c) -> the noise in x_t.

    means (K, 2), classes (K,): where each of the K equally weighted Gaussians lies, and the class that it belongs to.
    std: their width, the same for all; 0 makes them points. Label `null_label`, as in a U-Net, is "no label": all K.
    """

    image_shape = (2, 1, 1)

    def __init__(self, schedule, means, classes, std):
        super().__init__()
        self.schedule, self.means, self.classes, self.std = schedule, means, classes, std
        self.num_classes = self.null_label = int(classes.max()) + 1

    def members(self, c):
        """Which Gaussians a label stands for: (B,) -> (B, K) of truth values."""
        return (self.classes == c[:, None]) | (c[:, None] == self.null_label)

    def at(self, x, t, c):
        """The way from x_t to the centre of each noised Gaussian (B, K, 2), their variance (B, 1), and the logarithm
        of each one's share in the density at x_t (B, K), up to the same constant for all."""
        a, s = self.schedule.a(t).flatten(1), self.schedule.s(t).flatten(1)  # (B, 1)
        way = a[..., None] * self.means - x.flatten(1)[:, None]  # (D1) moves the centre m to a_t m
        variance = a**2 * self.std**2 + s**2  # and the variance std^2 to a_t^2 std^2 + s_t^2
        shares = -way.square().sum(2) / (2 * variance)
        return way, variance, shares.masked_fill(~self.members(c), -math.inf)

    def log_density(self, x, t, c):
        """log p_t(x_t | c), (B,)."""
        _, variance, shares = self.at(x, t, c)
        return shares.logsumexp(1) - self.members(c).sum(1).log() - (2 * math.pi * variance).log().squeeze(1)

    def forward(self, x, t, c):
        """x_t (B, 2, 1, 1), t (B,), c (B,) -> noise (B, 2, 1, 1)."""
        way, variance, shares = self.at(x, t, c)
        score = torch.einsum("bk,bkd->bd", shares.softmax(1), way) / variance  # the gradient of log_density
        return -self.schedule.s(t) * score[..., None, None]  # (D2), solved for the noise

    def draw(self, c, generator=None):
        """Clean points x_0 (B, 2, 1, 1) of labels c (B,): the data set, were there one."""
        k = self.members(c).float().multinomial(1, generator=generator).squeeze(1)
        return (self.means[k] + self.std * torch.randn(len(c), 2, generator=generator))[..., None, None]

    def class_probabilities(self, x):
        """p(c | x_0): what a perfect classifier says of clean points (B, 2, 1, 1), as (B, num_classes)."""
        t = torch.zeros(len(x), dtype=torch.long)  # step 0 is not quite clean, but s_0 is 0.01
        return torch.stack([self.log_density(x, t, t + k) for k in range(self.num_classes)], dim=1).softmax(1)


def same(value, x):
    """One step, or one label, for all of the points x (B, 2, 1, 1): (B,)."""
    return torch.full((len(x),), value)


def three_classes(schedule):
    """The mixture of the notebooks: three classes of two Gaussians each, on a ring; class 0 at the top, then around."""
    angles = torch.tensor([68.0, 112.0, 188.0, 232.0, 308.0, 352.0]).deg2rad()
    means = 0.9 * torch.stack([angles.cos(), angles.sin()], dim=1)
    return Mixture(schedule, means, torch.tensor([0, 0, 1, 1, 2, 2]), std=0.22)
