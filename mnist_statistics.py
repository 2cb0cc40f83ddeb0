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
from record import checksum
from samples import balanced_labels, generate, unconditional_sampler
from unet import VPSchedule, ddim_sample, load_unet, weights_path


@torch.no_grad()
def measure(config, run):
    """(tensors, facts, scores): the moments of each class, name -> tensor; what belongs into their file beside them;
    what belongs on its card."""
    classifier, schedule = load_classifier().to(run.device), VPSchedule.linear().to(run.device)
    real = {split: mnist(config.data, train=split == "train") for split in ("train", "test")}
    features = {split: look(classifier, images, run.device)[0] for split, (images, _) in real.items()}
    sets = {split: class_moments(features[split], labels, 10) for split, (_, labels) in real.items()}
    as_drawn = pool(*sets["train"])  # in MNIST's own proportions
    balanced = pool(*sets["train"][:2])  # all classes alike

    def draw(name, sample, labels, batch):
        """What the classifier makes of a teacher's images: features and probabilities; and the scores that ask for no
        class. sample: (teacher, z, c) -> images; labels: (N,), or N."""
        teacher, N = load_unet(name).to(run.device), labels if isinstance(labels, int) else len(labels)
        images, seconds = generate(lambda z, c, noise: sample(teacher, z, c), labels, teacher.image_shape, config.seed,
                                   run.device, batch, bar=str(name))
        seen, probabilities = look(classifier, images, run.device)
        precision, recall = precision_recall(features["train"][:N], seen)
        return seen, probabilities, {"precision": precision, "recall": recall, "images": N,
                                     "seconds_per_1000": 1000 * seconds / N, "sha256": checksum(weights_path(name))}

    def class_conditional(name):
        """Moments of a class-conditional teacher's images, the classes being what was asked for; and its scores."""
        labels = balanced_labels(10, config.per_class)
        seen, probabilities, scores = draw(name, lambda unet, z, c: ddim_sample(unet, schedule, z, c, 50), labels, 250)
        moments, accuracy = class_moments(seen, labels, 10), class_accuracies(labels, probabilities.argmax(1))
        return moments, scores | {
            "accuracy": sum(accuracy.values()) / 10,
            "class_accuracy": list(accuracy.values()),
            "fid": frechet_distance(*pool(*moments[:2]), *balanced),
            "inception_score": inception_score(probabilities),
            "sampler": "DDIM, 50 steps, no guidance",
        }

    def unconditional(name):
        """The same of an unconditional teacher; its classes are what the classifier sees."""
        sample = lambda unet, z, c: unconditional_sampler(unet, schedule, run.dtype)(z)
        seen, probabilities, scores = draw(name, sample, config.images, 100)
        moments = class_moments(seen, probabilities.argmax(1), 10)
        return moments, scores | {
            "fid": frechet_distance(*pool(*moments), *as_drawn),
            "confidence": mean_confidence(probabilities),
            "counts": moments[2].tolist(),
            "sampler": "DDIM, 20 steps, no class asked for",
            "evaluation_seed": config.seed,
            "sampler_dtype": str(run.dtype or torch.float32).removeprefix("torch."),
        }

    sets["teacher"], teacher = class_conditional("mnist")
    sets["unconditional"], without = unconditional("mnist-unconditional")
    tensors = {f"{name}.{part}": x.float() for name, parts in sets.items()
               for part, x in zip(("means", "covariances", "counts"), parts)}
    facts = {
        "classifier_sha256": checksum(weights_path("mnist-classifier")),
        "teacher": teacher,
        "unconditional": without,
        "features": "penultimate layer of mnist-classifier, 128",
        "reference": "MNIST, 60,000 training images, classes weighted equally",
    }
    along = {name: class_conditional(name)[1] for name in filter(None, config.snapshots.split(","))}
    return tensors, facts, {
        "teacher": teacher,
        "unconditional": without,
        "fid_of_real_test_images": frechet_distance(*pool(*sets["test"][:2]), *balanced),
        "teachers_along_the_way": {name: {k: scores[k] for k in ("fid", "accuracy")} for name, scores in along.items()},
    }
