"""Every metric as a function: numbers in, numbers out. No network, no file; eval.py says what each is good for."""

import torch
import torch.nn.functional as F

# ---------------------------------------------------------------------------- from labels


def as_classes(forget):
    return torch.as_tensor([forget] if isinstance(forget, int) else list(forget))


def unlearning_accuracy(labels, predictions, forget):
    """UA, 0..1: the share of images asked for as a class in `forget` that a classifier does not see as that class.

    labels, predictions: (N,) integers, what was asked for and what is seen. forget: one class or several.
    Only images asked for as forgotten classes count, in numerator and denominator. ValueError if there are none.
    """
    asked = torch.isin(labels, as_classes(forget))
    if not asked.any():
        raise ValueError(f"no image was asked for as class {forget}, so there is no unlearning accuracy")
    return 1 - (predictions[asked] == labels[asked]).double().mean().item()


def percent_unlearned(before, after):
    """PUL: the share of the forgotten class that is gone, from its counts in equally many unconditional images before
    and after unlearning. At most 1; negative if the count has grown. ValueError if it was 0 before."""
    if before <= 0:
        raise ValueError(f"PUL needs images of the forgotten class before unlearning, not {before}")
    return (before - after) / before  # PUL = (N_before - N_after) / N_before


def class_accuracies(labels, predictions):
    """{class: share of its images, 0..1, that are seen as it}, for each class among the labels (N,)."""
    return {int(k): (predictions[labels == k] == k).double().mean().item() for k in labels.unique()}


def retained_accuracy(labels, predictions, forget=()):
    """Accuracy, 0..1, averaged over the classes that are not forgotten. labels, predictions (N,); forget: one class or
    several. ValueError when that leaves none."""
    kept = [v for k, v in class_accuracies(labels, predictions).items() if k not in as_classes(forget)]
    if not kept:
        raise ValueError(f"no image of a class other than {forget}, so there is no retained accuracy")
    return sum(kept) / len(kept)


def entropy(probabilities):
    """Mean entropy in nats, 0..ln K, of probabilities (N, K)."""
    return torch.special.entr(probabilities).sum(dim=1).mean().item()


def mean_confidence(probabilities):
    """Mean probability, 1/K..1, of each image's most likely class: (N, K). It can be high on noise."""
    return probabilities.max(dim=1).values.mean().item()


def inception_score(probabilities, splits=1):
    """Salimans et al. 2016: exp(mean KL(p(y|x) || p(y))), 1..K, averaged over `splits` parts of the (N, K)."""
    scores = []
    for p in probabilities.double().chunk(splits):
        kl = torch.special.xlogy(p, p).sum(1) - torch.special.xlogy(p, p.mean(0)).sum(1)
        scores.append(kl.mean().exp())
    return torch.stack(scores).mean().item()


# ---------------------------------------------------------------------------- from features


def moments(features):
    """Mean (D,) and unbiased covariance (D, D) of features (N, D), in float64. ValueError under two images."""
    if len(features) < 2:
        raise ValueError("mean and covariance need at least two images")
    return features.double().mean(0), torch.cov(features.double().T)


def pool(means, covariances, counts=None):
    """The moments of a mixture of K classes, from those of each class: (K, D), (K, D, D) -> (D,), (D, D). Classes are
    weighted by `counts` (K,), or equally if not given."""
    share = torch.ones(len(means)) if counts is None else counts
    share = share.double() / share.sum()
    mean = share @ means
    between = means - mean
    return mean, torch.einsum("k,kij->ij", share, covariances) + between.T @ (share[:, None] * between)


def class_moments(features, labels, classes):
    """Moments of each class in turn, and its number of images: features (N, D), labels (N,) -> (K, D), (K, D, D), (K,).

    A class of one image has covariance 0, and one of none mean 0 too."""
    counts, D = labels.bincount(minlength=classes), features.shape[1]
    nothing = torch.zeros(D, D).double()
    pairs = [moments(features[labels == k]) if counts[k] > 1 else (features[labels == k].double().sum(0), nothing)
             for k in range(classes)]
    return torch.stack([m for m, _ in pairs]), torch.stack([c for _, c in pairs]), counts


def frechet_distance(mean1, cov1, mean2, cov2):
    """|m1 - m2|^2 + trace(C1 + C2 - 2 (C1 C2)^(1/2)), the squared 2-Wasserstein distance of two Gaussians (Dowson and
    Landau 1982; FID: Heusel et al. 2017). Means (D,), covariances (D, D), symmetric and positive semi-definite.
    ValueError where they are not finite.

    trace (C1 C2)^(1/2) is the sum of the square roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric,
    so no matrix root with spurious imaginary parts is needed.
    """
    mean1, cov1, mean2, cov2 = (torch.as_tensor(x, dtype=torch.float64) for x in (mean1, cov1, mean2, cov2))
    if not all(x.isfinite().all() for x in (mean1, cov1, mean2, cov2)):
        raise ValueError("no distance: features are not finite, or there is no image to take them from")
    values, vectors = torch.linalg.eigh(cov1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return ((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross).item()


def precision_recall(real, generated, k=3):
    """Kynkäänniemi et al. 2019. Features (N, D), (M, D) -> two shares, 0..1.

    Around every point of one set lies a ball that reaches its k-th nearest neighbour in that set. Precision: generated
    images inside some real ball; recall: real images inside some generated ball. ValueError under k + 1 points.
    """
    if min(len(real), len(generated)) <= k:
        raise ValueError(f"precision and recall with k = {k} need more than {k} images of each kind")

    def share_inside(points, centres):
        radius = torch.cat([torch.cdist(rows, centres).kthvalue(k + 1, dim=1).values for rows in centres.split(1000)])
        inside = torch.cat([(torch.cdist(rows, centres) <= radius).any(1) for rows in points.split(1000)])
        return inside.double().mean().item()

    real, generated = real.double(), generated.double()
    return share_inside(generated, real), share_inside(real, generated)


def balanced_distance(moments, real, kept):
    """Fréchet distance of the classes `kept`, weighted equally, to real ones; both as `class_moments` returns them."""
    return frechet_distance(*pool(*(x[kept] for x in moments[:2])), *pool(*(x[kept] for x in real[:2])))


# ---------------------------------------------------------------------------- all of them, of images asked for by class


def report(labels, features, probabilities, statistics, forget=()):
    """Every number that needs no real image at hand, as a dictionary for metrics.json.

    labels (N,): each class 0 .. K-1 equally often; features (N, D), probabilities (N, K): as a `Judge` gives them.
    statistics: name -> (means (K, D), covariances (K, D, D), counts (K,)); "train", the reference of every FID, and
    "test" must be there, "teacher" may. None: accuracies alone.
    """
    predictions, kept = probabilities.argmax(1), [k for k in labels.unique().tolist() if k not in forget]
    asked = torch.isin(labels, as_classes(forget))

    result = {
        "retained_accuracy": retained_accuracy(labels, predictions, forget),
        "class_accuracy": class_accuracies(labels, predictions),
        "entropy_retained": entropy(probabilities[~asked]),
    }
    if statistics:
        drawn = class_moments(features, labels, probabilities.shape[1])
        result |= {
            "fid": balanced_distance(drawn, statistics["train"], kept),
            "real_test_fid": balanced_distance(statistics["test"], statistics["train"], kept),
            "inception_score": inception_score(probabilities[~asked]),
        }
    if statistics and "teacher" in statistics:
        result |= {"teacher_fid": balanced_distance(statistics["teacher"], statistics["train"], kept),
                   "teacher_images_per_class": int(statistics["teacher"][2][0])}
    if asked.any():
        result |= {
            "ua": unlearning_accuracy(labels, predictions, forget),
            "ua_images": int(asked.sum()),
            "entropy_forgotten": entropy(probabilities[asked]),
            "became": {k: F.one_hot(predictions[labels == k], probabilities.shape[1]).double().mean(0).tolist()
                       for k in forget},
        }
    return result
