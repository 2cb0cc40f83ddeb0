"""What the metrics compare with: how real MNIST looks to the classifier, and how both teachers' images do.

    python pretrain.py mnist-statistics

Features are the classifier's penultimate layer, 128 numbers an image. Of each class their mean and covariance are kept
(`features.load_statistics` reads them), so that a distance can leave classes out.
"""

import torch

from data import mnist
from features import load_classifier, look
from metrics import (
    class_accuracies,
    class_moments,
    frechet_distance,
    inception_score,
    mean_confidence,
    pool,
    precision_recall,
)
from record import checksum, precision
from samples import balanced_labels, generate, unconditional_sampler
from unet import VPSchedule, ddim_sample, load_unet, weights_path


@torch.no_grad()
def measure(config, run):
    """(tensors, facts, scores): each class's moments, name -> tensor; the metadata of their file; the scores for its
    card."""
    classifier, schedule = load_classifier().to(run.device), VPSchedule.linear().to(run.device)
    real = {split: mnist(config.data, train=split == "train") for split in ("train", "test")}
    features = {split: look(classifier, images, run.device)[0] for split, (images, _) in real.items()}
    sets = {split: class_moments(features[split], labels, 10) for split, (_, labels) in real.items()}
    as_drawn = pool(*sets["train"])  # in MNIST's own proportions
    balanced = pool(*sets["train"][:2])  # all classes alike

    def draw(name, sample, labels, batch):
        """What the classifier makes of a teacher's images: features and probabilities; and the scores that ask for no
        class. sample: (teacher, z, c) -> images; labels: (N,), or N."""
        teacher = load_unet(name).to(run.device)
        images, seconds = generate(lambda z, c, noise: sample(teacher, z, c), labels, teacher.image_shape, config.seed,
                                   run.device, batch, bar=name)
        (seen, probabilities), N = look(classifier, images, run.device), len(images)
        precision, recall = precision_recall(features["train"][:N], seen)
        return seen, probabilities, {"precision": precision, "recall": recall, "images": N,
                                     "seconds_per_1000": 1000 * seconds / N, "sha256": checksum(weights_path(name))}

    labels = balanced_labels(10, config.per_class)
    seen, probabilities, teacher = draw("mnist", lambda unet, z, c: ddim_sample(unet, schedule, z, c, 50), labels, 250)
    sets["teacher"] = class_moments(seen, labels, 10)
    accuracy = class_accuracies(labels, probabilities.argmax(1))
    teacher |= {
        "accuracy": sum(accuracy.values()) / 10,
        "class_accuracy": list(accuracy.values()),
        "fid": frechet_distance(*pool(*sets["teacher"][:2]), *balanced),
        "inception_score": inception_score(probabilities),
        "sampler": "DDIM, 50 steps, no guidance",
    }

    sample = lambda unet, z, c: unconditional_sampler(unet, schedule, run.dtype)(z)
    seen, probabilities, without = draw("mnist-unconditional", sample, config.images, 100)
    sets["unconditional"] = class_moments(seen, probabilities.argmax(1), 10)  # its classes are what the classifier sees
    without |= {
        "fid": frechet_distance(*pool(*sets["unconditional"]), *as_drawn),
        "confidence": mean_confidence(probabilities),
        "counts": sets["unconditional"][2].tolist(),
        "sampler": "DDIM, 20 steps, no class asked for",
        "evaluation_seed": config.seed,
        "sampler_dtype": precision(run.dtype),
    }

    tensors = {f"{name}.{part}": x.float() for name, parts in sets.items()
               for part, x in zip(("means", "covariances", "counts"), parts)}
    facts = {
        "classifier_sha256": checksum(weights_path("mnist-classifier")),
        "teacher": teacher,
        "unconditional": without,
        "features": "penultimate layer of mnist-classifier, 128",
        "reference": "MNIST, 60,000 training images, classes weighted equally",
    }
    return tensors, facts, {"teacher": teacher, "unconditional": without,
                            "fid_of_real_test_images": frechet_distance(*pool(*sets["test"][:2]), *balanced)}
