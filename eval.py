"""What is left of the forgotten class, and of everything else: reports of a network, and the command that makes them.

    python eval.py runs/ddpm_sfd-mnist-forget0/generator.safetensors --forget 0
    python eval.py mnist --sampler ddim --steps 50 --per-class 100      # 1,000, the default, take a quarter of an hour
    python eval.py mnist --sampler ancestral --per-class 10 --data data    # with real images also precision and recall
    python eval.py generator.safetensors --features inception --data data --teacher cifar10.safetensors
    python eval.py runs/sd_sfd-tiny-forget-three/generator.safetensors

What each number says, and what it misses:

    ua                  unlearning accuracy: 1 - accuracy of a classifier on images asked for as the forgotten class.
                        Noise can score 100% too (this classifier takes it for an 8), so read it beside `became`
    retained_accuracy   accuracy on images asked for as each of the other classes, averaged over classes
    became              what the classifier sees in images of the forgotten label: share per class
    entropy_retained,   mean entropy of the classifier's answer, in nats; 0: certain, ln 10 = 2.3: no idea. Low on noise
    entropy_forgotten   too, so it does not give noise away
    fid                 Frechet distance between features of generated and of real images, retained classes only
    precision, recall   share of generated images near real ones, and of real images near generated ones
    inception_score     exp(mean KL(p(y|x) || p(y))): confident and varied; knows nothing of real images
    nfe                 network calls per image

and for an unconditional network:

    pul                 percent unlearned: the share of the forgotten class that is gone from unconditional images.
                        Noise can score 100% too, so read it beside `u_fid`
    u_fid               fid of all its images against real images of the retained classes
    confidence          mean probability that the classifier gives to its top class; high on noise too

On MNIST, features are the 128 of the classifier's penultimate layer, so the distances cannot be compared with Inception
FIDs, only with each other: each report also gives the teacher's and that of real test images (the floor). fid weights
all classes equally. In u_fid the real images have MNIST's own class proportions, and the generated ones those that
were drawn; in precision and recall the real ones have MNIST's. All images are rounded to 8 bits before the classifier
sees them. On a GPU, float32 convolutions use TF32.

--features inception is for CIFAR-10 and STL-10: it uses the 2,048 features of the FID Inception (inception.py), 5,000
images per class, and as reference the training images of the retained classes, whose features are computed from --data
once and kept there in a file. Accuracies then need a classifier (`pretrain.py cifar10-classifier`), and the teacher's
numbers need --teacher.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from concepts import ConceptJudge, check_drawn, evaluate_concept, load_concept_statistics
from data import mnist
from features import Judge, load_classifier, look  # noqa: F401 (some names are for those who import from eval)
from inception import evaluate_inception, load_inception, real_reference
from metrics import (  # noqa: F401 (the same)
    as_classes,
    balanced_distance,
    class_accuracies,
    class_moments,
    frechet_distance,
    mean_confidence,
    moments,
    percent_unlearned,
    pool,
    precision_recall,
    report,
    unlearning_accuracy,
)
from record import check_out, checksum, command, commit, machine, precision, write_json
from run import choose_amp, choose_device, option, parse, refusing
from samples import balanced_labels, generate, guided_sampler, sampler_of, unconditional_sampler
from stable_diffusion import load_stable_diffusion
from teachers import load_teacher, made_from
from unet import VPSchedule, load_unet, weights_path

# ---------------------------------------------------------------------------- classes


def parse_classes(text, count, flag="--forget"):
    """'0', '0,3' or '0 3' -> sorted list of classes; 'none' -> []. ValueError for anything that is not a class."""
    words = text.replace(",", " ").split()
    if words == ["none"]:
        return []
    if not words:
        raise ValueError(f"{flag} names no class; give some of 0..{count - 1}, or none")
    for word in words:
        if not word.isdecimal() or int(word) >= count:
            raise ValueError(f"{flag} {word}: the classes are 0..{count - 1}")
    return sorted({int(w) for w in words})


def check_forget(forget, classes=10):
    """ValueError if `forget` names every class, or one that does not exist."""
    if max(forget, default=0) >= classes:
        raise ValueError(f"--forget {max(forget)}: the classes are 0..{classes - 1}")
    if len(forget) == classes:
        raise ValueError("--forget names every class; leave at least one to retain")


# ---------------------------------------------------------------------------- reports


def evaluate(sample, nfe, judge, unet, forget, per_class, seed, teacher_sample=None, real=None, batch=250):
    """Draw `per_class` images of every class with `sample` (z, c, noise) -> images, and judge them: the report.

    unet: the teacher, for its image shape and its own numbers. These come with the statistics if it is the shipped one,
    otherwise from images drawn with `teacher_sample`; without that they are left out. real: images (N, C, H, W) of
    retained classes to take precision and recall against. nfe: network calls an image, for the record. A judge without
    statistics reports accuracies alone. Images are drawn in float32, whatever the training's precision was.
    """
    labels = balanced_labels(unet.num_classes, per_class)
    images, seconds = generate(sample, labels, unet.image_shape, seed, judge.device, batch, "to judge")
    features, probabilities = judge(images)
    statistics, accuracies = judge.statistics, None
    if judge.facts and checksum(unet.path) == judge.facts["teacher"]["sha256"]:
        accuracies = judge.facts["teacher"]["class_accuracy"]
    elif teacher_sample:
        teacher_images, _ = generate(teacher_sample, labels, unet.image_shape, seed, judge.device, batch, "teacher")
        teacher_features, teacher_probabilities = judge(teacher_images)
        statistics = statistics and statistics | {"teacher": class_moments(teacher_features, labels, unet.num_classes)}
        accuracies = [*class_accuracies(labels, teacher_probabilities.argmax(1)).values()]
    elif statistics:  # another network's numbers are not its own
        statistics = {name: moments for name, moments in statistics.items() if name != "teacher"}
    result = report(labels, features, probabilities, statistics, forget)
    kept = [k for k in range(unet.num_classes) if k not in forget]
    if accuracies:
        result["teacher_retained_accuracy"] = sum(accuracies[k] for k in kept) / len(kept)
    if real is not None:
        generated = features[torch.isin(labels, as_classes(kept))]
        result["precision"], result["recall"] = precision_recall(judge(real)[0], generated)
    if statistics:
        result |= {"features": judge.facts["features"], "reference": "MNIST, training images of the retained classes"}
    return result | {"nfe": nfe, "seconds_per_1000": 1000 * seconds / len(labels), "images_per_class": per_class,
                     "evaluation_seed": seed, "sampler_dtype": "float32",
                     "preprocessing": "clipped to [-1, 1], rounded to 8 bits, real and generated alike"}


def evaluate_unconditional(sample, judge, forget, n=2000, teacher=None, teacher_sample=None, dtype=None, seed=0):
    """Draw `n` images of MNIST's shape without labels, with `sample` (z, c, noise) -> images, and compare them with the
    teacher's from the same noise: PUL, u-FID and the classifier's confidence, as a dictionary for metrics.json.

    u_fid         of all n images against real images of the retained classes, the latter in their own proportions
    teacher_fid   of the teacher's images, except those that the classifier sees as forgotten, against the same: the
                  value for a model that merely leaves those out. `teacher_u_fid` is of all the teacher's images
    balanced_fid  of the images that the classifier sees as a retained class, with each class weighted equally, in the
                  reference too: it ignores how often each class is drawn, and images still seen as forgotten. A class
                  that is never drawn counts as having all features 0
    forget: list of classes. judge: one with statistics. dtype: what both samplers autocast to, for the record.
    teacher, teacher_sample: the network and its sampler. The shipped teacher's numbers come with the statistics when n,
    seed and dtype are those of the statistics; otherwise its images are drawn too.
    """
    batch, sampler_dtype = 100, precision(dtype)
    kept = [k for k in range(10) if k not in forget]
    images, seconds = generate(sample, n, (1, 28, 28), seed, judge.device, batch, "to judge")
    features, probabilities = judge(images)
    counts = probabilities.argmax(1).bincount(minlength=10)
    known = judge.facts["unconditional"]
    mine = {"sha256": teacher.path and checksum(teacher.path), "images": n, "evaluation_seed": seed,
            "sampler_dtype": sampler_dtype}
    if mine == {name: known[name] for name in mine}:
        before, confidence = judge.statistics["unconditional"], known["confidence"]
    else:
        teacher_images, _ = generate(teacher_sample, n, (1, 28, 28), seed, judge.device, batch, "teacher")
        teacher_features, teacher_probabilities = judge(teacher_images)
        before = class_moments(teacher_features, teacher_probabilities.argmax(1), 10)
        confidence = mean_confidence(teacher_probabilities)

    after = class_moments(features, probabilities.argmax(1), 10)
    real = pool(*(x[kept] for x in judge.statistics["train"]))
    n_before, n_after = int(before[2][forget].sum()), int(counts[forget].sum())
    return {
        "pul": percent_unlearned(n_before, n_after) if n_before else None,  # None: there was nothing to forget
        "n_before": n_before, "n_after": n_after,
        "u_fid": frechet_distance(*pool(*after), *real),
        "teacher_fid": frechet_distance(*pool(*(x[kept] for x in before)), *real),
        "teacher_u_fid": frechet_distance(*pool(*before), *real),
        "balanced_fid": balanced_distance(after, judge.statistics["train"], kept),
        "teacher_balanced_fid": balanced_distance(before, judge.statistics["train"], kept),
        "real_test_fid": frechet_distance(*pool(*(x[kept] for x in judge.statistics["test"])), *real),
        "confidence": mean_confidence(probabilities),
        "teacher_confidence": confidence,
        "counts": counts.tolist(), "teacher_counts": [int(count) for count in before[2]],
        "images": n, "evaluation_seed": seed,
        "sampler": known["sampler"], "sampler_dtype": sampler_dtype,
        "evaluation_seconds": seconds, "seconds_per_1000": 1000 * seconds / n,
        "features": judge.facts["features"],
        "reference": "MNIST, training images of the retained classes, in their own proportions",
        "preprocessing": "clipped to [-1, 1], rounded to 8 bits, real and generated alike",
    }


# ---------------------------------------------------------------------------- for people


def table(result):
    """The report for people: one line a number."""
    rows = []

    def with_teacher(name, form, more=""):
        key = f"teacher_{name}"
        beside = (f"teacher {form.format(result[key])}" if key in result else "") + more
        return form.format(result[name]) + (f"   ({beside.removeprefix(', ')})" if beside else "")

    if "far" in result:
        def beside(name):
            return "none" if result[name] is None else f"{result[name]:.2%}   (teacher {result[f'teacher_{name}']:.2%})"

        n_teacher = result["teacher_images"]  # FIDs of other numbers of pictures do not quite compare
        of = f" of {n_teacher:,} pictures" if n_teacher != result["images"] else ""
        if "ua" in result:
            rows = [("UA (concept gone)", f"{result['ua']:.2%} of {result['ua_images']:,} pictures"),
                    ("they show", ", ".join(f"{v:.1%} {k}s" for k, v in result["became"].items()))]
        rows += [("retained accuracy", beside("retained_accuracy")), ("near the concept", beside("near")),
                 ("far from it", beside("far")),
                 ("FID on retained prompts", f"{result['fid']:.3f}   (teacher {result['teacher_fid']:.3f}{of})"),
                 ("network calls a picture", f"{result['nfe']}"),
                 ("seconds per 1,000", f"{result['seconds_per_1000']:.2f}")]
        return "\n".join(f"{name:>26}  {value}" for name, value in rows)
    if "pul" in result:
        counts = f"{result['n_before']} before, {result['n_after']} after, of {result['images']:,} images"
        pul = "not defined" if result["pul"] is None else f"{result['pul']:.2%}"
        rows = [("PUL (forgotten class gone)", f"{pul}   ({counts})")]
    if "balanced_fid" in result:
        rows += [
            ("u-FID", f"{result['u_fid']:.3f}   (teacher's retained images {result['teacher_fid']:.3f}, all its images "
                      f"{result['teacher_u_fid']:.3f}, real test images {result['real_test_fid']:.3f})"),
            ("with classes alike", f"{result['balanced_fid']:.3f}   (teacher's {result['teacher_balanced_fid']:.3f})"),
            ("classifier's confidence", f"{result['confidence']:.2%}   (teacher {result['teacher_confidence']:.2%})"),
            ("digits before", "  ".join(f"{k}: {n}" for k, n in enumerate(result["teacher_counts"]))),
            ("digits after", "  ".join(f"{k}: {n}" for k, n in enumerate(result["counts"]))),
            ("seconds per 1,000 images", f"{result['seconds_per_1000']:.2f}"),
        ]
        return "\n".join(f"{name:>26}  {value}" for name, value in rows)
    if "ua" in result:
        rows.append(("UA (forgotten class gone)", f"{result['ua']:.2%} of {result['ua_images']:,} images"))
        for k, shares in result["became"].items():
            best = sorted(enumerate(shares), key=lambda item: -item[1])[:3]
            rows.append((f"asked for {k}, it draws", ", ".join(f"{share:.1%} {j}s" for j, share in best if share > 0)))
    if "retained_accuracy" in result:
        others = [f"{k}: {v:.1%}" for k, v in result["class_accuracy"].items() if k not in result.get("became", {})]
        rows += [("retained accuracy", with_teacher("retained_accuracy", "{:.2%}")), ("by class", "  ".join(others))]
    if "fid" in result:
        n_teacher = result.get("teacher_images_per_class")  # at another number of images FIDs do not quite compare
        floor = f" at {n_teacher} a class" if n_teacher and n_teacher != result["images_per_class"] else ""
        floor += f", real test images {result['real_test_fid']:.3f}"
        rows += [("FID on retained classes", with_teacher("fid", "{:.3f}", floor))]
    for name in ("u_fid", "precision", "recall", "inception_score"):
        if name in result:
            rows += [(name.replace("u_fid", "u-FID").replace("_", " "), with_teacher(name, "{:.3f}"))]
    entropies = [f"{result[f'entropy_{part}']:.2f} {part}" for part in ("forgotten", "retained")
                 if f"entropy_{part}" in result]
    if entropies:
        rows.append(("entropy, in nats", ", ".join(entropies)))
    if result.get("features", "").startswith("FID Inception"):  # which data set follows from the size of its images
        rows.append(("compared with", result["reference"]))
    rows += [("network calls an image", f"{result['nfe']}"),
             ("seconds per 1,000 images", f"{result['seconds_per_1000']:.2f}")]
    if "training_seconds" in result:
        rows.append(("seconds of training", f"{result['training_seconds']:.0f}"))
    return "\n".join(f"{name:>26}  {value}" for name, value in rows)


# ---------------------------------------------------------------------------- the command


@dataclass
class Config:
    checkpoint: str = option("mnist", "a shipped name or a .safetensors file", positional=True)
    sampler: str = option("auto", "auto: one-step for a distilled generator, ddim otherwise",
                          choices=["auto", "one-step", "ddim", "ancestral"])
    steps: int = option(50, "steps of the ddim sampler; PUL and u-FID always take 20", low=1, high=1000)
    eta: float = option(0.0, "ddim: 0 deterministic, 1 as much noise as the ancestral sampler", low=0, high=1)
    guidance: float = option(0.0, "k in null + k (cond - null); 1: none; 0: the usual k (1, or 4.5 for text-to-image)",
                             low=0)
    forget: str = option("auto", "classes that should be gone; auto: those on the checkpoint's card; none: no class",
                         nargs="+")
    features: str = option("classifier", "what distances are taken on; inception: CIFAR-10 and STL-10, needs --data",
                           choices=["classifier", "inception"])
    per_class: int = option(0, "images of each class; compare FIDs only at equal numbers; 0: 1,000; Inception: 5,000",
                            low=0)
    images: int = option(0, "images of an unconditional checkpoint; if not given 2,000, with Inception 50,000", low=100)
    per_pair: int = option(20, "pictures of each digit in each colour, of a text-to-image checkpoint", low=1)
    data: str = option("", "folder with MNIST: adds precision and recall against its training images; with Inception "
                           "the folder with CIFAR-10 or STL-10")
    teacher: str = option("", "the network before unlearning: a shipped name, file, URL or hub:ORG/NAME; if not given, "
                              "the card's, or none with Inception")
    inception: str = option("", "the FID Inception's weights, a file or a URL; if not given they are fetched once")
    classifier: str = option("auto", "shipped name or file; auto: mnist-classifier, with Inception none")
    statistics: str = option("mnist-statistics", "shipped name or file")
    batch_size: int = option(250, "images at a time; changes no number but for rounding", low=1)
    device: str = option("auto", "where to compute", choices=["auto", "cpu", "cuda"])
    seed: int = option(0, "seed of the noise", low=0, high=10**12)
    out: str = option("", "JSON file to write the numbers to")


def choose_kind(config, unet):
    """The sampler that --sampler selects; ValueError if it is one-step and the network is not a generator."""
    kind = config.sampler if config.sampler != "auto" else "one-step" if "t_init" in unet.card else "ddim"
    if kind == "one-step" and "t_init" not in unet.card:
        raise ValueError(f"--sampler one-step: {config.checkpoint} is no distilled generator (its card has no t_init)")
    return kind


def check_flags(config, unet, kind):
    """ValueError for a flag that was given and would change nothing."""
    text, classes = unet.text_dim is not None, unet.num_classes is not None
    on_inception = config.features == "inception"
    count = "--per-pair" if text else "--per-class" if classes else "--images"
    # a teacher whose numbers are not at hand
    teacher = config.teacher or ("" if on_inception else unet.card.get("teacher", "mnist"))
    drawn = teacher not in ("", "mnist") and Path(str(teacher)).resolve() != weights_path("mnist")
    for name, useless, instead in (
            ("per_class", count != "--per-class", count), ("images", count != "--images", count),
            ("per_pair", count != "--per-pair", count), ("inception", text or not on_inception, "--features inception"),
            ("features", text, ""), ("data", text, ""), ("teacher", text, ""), ("classifier", text, ""),
            ("statistics", text or on_inception, ""), ("eta", kind != "ddim", ""),
            ("batch_size", text or not (classes or on_inception), ""),
            ("guidance", kind == "one-step" or not (text or classes), ""),
            ("steps", kind == "ancestral" or kind == "one-step" and (text or not drawn), "")):
        if useless and getattr(config, name) != getattr(Config, name):
            flag, does = f"--{name.replace('_', '-')}", f"{instead} does" if instead else "leave it out"
            raise ValueError(f"{flag} changes nothing for {config.checkpoint}, sampled by {kind}; {does}")


def show(config, result, forget, kind, device):
    print(table(result))
    if config.out:
        with refusing("--out: "):
            write_json(config.out, {"sampler": kind} | result | {
                "checkpoint": config.checkpoint, "forget": forget, "command": command(), "machine": machine(device),
                "commit": commit(), "config": asdict(config)})


def main_of_concepts(config, unet, kind, device):
    """The command, for a network of the tiny text-to-image model."""
    with refusing():
        folder = unet.card.get("sd", "tiny-sd")
        if unet.card.get("teacher", folder) is None:
            raise ValueError(f"{config.checkpoint} began at a mean of several networks, which left no pictures")
        sd = load_stable_diffusion(folder).to(device)
        concept = unet.card.get("forget", "none") if config.forget == "auto" else config.forget.replace(",", " ")
        if sd.unet.config != unet.config or sd.unet.image_shape != (4, 8, 8):
            raise ValueError(f"{config.checkpoint} is no network of the tiny model: its pictures cannot be read")
        if concept != "none":
            check_drawn(concept)
        if kind == "ancestral":
            raise ValueError("--sampler ancestral is for images; the tiny model's latents are sampled with ddim")
        teacher = load_concept_statistics(Path(folder) / "statistics.safetensors" if folder != "tiny-sd" else
                                          "tiny-sd/statistics")  # what this model draws, as pretrain.py left it there
    if kind == "one-step":
        draw, calls = sampler_of(unet, sd.schedule, kind)
        sample = lambda z, c, noise: sd.vae.decode(draw(z, c, noise))
    else:
        guidance = config.guidance or 4.5
        sample = guided_sampler(sd, unet, steps=config.steps, guidance=guidance, eta=config.eta)
        calls = config.steps * (1 if guidance == 1 else 2)
    result = evaluate_concept(sample, sd, ConceptJudge().to(device), "" if concept == "none" else concept,
                              config.per_pair, config.seed, teacher, calls)
    show(config, result, concept, kind, device)


def main(config):
    device = choose_device(config.device)
    with refusing():
        check_out(config.out)
        if config.per_class == 1:
            raise ValueError("--per-class 1: distances need two images of each class at least")
        unet = load_unet(config.checkpoint).to(device)
        kind = choose_kind(config, unet)
        check_flags(config, unet, kind)
    if unet.text_dim is not None:
        return main_of_concepts(config, unet, kind, device)
    unconditional, on_inception = unet.num_classes is None, config.features == "inception"
    schedule, per_class = VPSchedule.linear().to(device), config.per_class or (5000 if on_inception else 1000)
    images = config.images or (50_000 if on_inception else 2000)
    classifier = config.classifier if config.classifier != "auto" else "none" if on_inception else "mnist-classifier"
    with refusing():
        if classifier == "none" and not on_inception:
            raise ValueError("--classifier none: nothing is left to look at the images; see --features inception")
        judge = None if classifier == "none" else Judge(unet, classifier, config.statistics)
        if judge and judge.statistics is None and config.statistics != Config.statistics:
            raise ValueError(f"--statistics changes nothing beside --classifier {classifier}; leave it out")
        said = ",".join(map(str, unet.card.get("forget", []))) or "none"
        classes = unet.num_classes or 10
        forget = parse_classes(said if config.forget == "auto" else config.forget, classes)
        check_forget(forget, classes)
        sample, nfe = sampler_of(unet, schedule, kind, config.steps, config.eta, config.guidance or 1.0)
        source = config.teacher or ("" if on_inception else unet.card.get("teacher", ""))
        if source is None:
            raise ValueError(f"{config.checkpoint} began at the mean of several networks; name one with --teacher")
        teacher = load_teacher(source).to(device) if source else None
        if teacher and not config.teacher and not made_from(unet.card, teacher):
            raise ValueError(f"{config.checkpoint} was made from {source} as it was then; name that with --teacher")
        if teacher and (teacher.image_shape, teacher.num_classes) != (unet.image_shape, unet.num_classes):
            raise ValueError(f"--teacher {source} draws {teacher.num_classes or 'no'} classes of "
                             f"{teacher.image_shape}, unlike {config.checkpoint}")
        teacher_sample = teacher and sampler_of(teacher, schedule, "ddim", config.steps)[0]
        if on_inception:
            if classes != 10:
                raise ValueError(f"--features inception compares with CIFAR-10 and STL-10: ten classes, not {classes}")
            if not config.data:
                raise ValueError("--features inception needs --data, the folder with the real images to compare with")
            inception = load_inception(config.inception).to(device)
            reference = real_reference(inception, unet.image_shape, config.data, forget, device)
        elif unconditional:
            if judge.statistics is None:
                raise ValueError(f"the distances of {config.checkpoint} need --features inception")
            if config.data:
                raise ValueError("--data: precision and recall are of class-conditional images; leave it out")
            if not forget:
                raise ValueError(f"{config.checkpoint} is unconditional; say with --forget which class should be gone")
            if config.sampler not in ("auto", "ddim") or (config.steps, config.eta) != (Config.steps, Config.eta):
                raise ValueError("PUL and u-FID are of 20 DDIM steps; leave out --sampler, --steps, --eta")
            if not teacher:
                raise ValueError(f"{config.checkpoint}: its card names no teacher; say with --teacher what it was "
                                 "before (mnist-unconditional ships)")
        real = None
        if config.data and not on_inception:
            if judge.statistics is None:
                raise ValueError(f"--data: images {unet.image_shape} are for --features inception; leave it out")
            real, labels = mnist(config.data, train=True)
            real = real[~torch.isin(labels, as_classes(forget))][: per_class * (10 - len(forget))]
    with refusing():  # too few images for a metric
        if on_inception:
            n = images if unconditional else per_class
            result = evaluate_inception(sample, nfe, unet, forget, n, config.seed, inception, reference, judge,
                                        teacher_sample, config.batch_size)
        elif unconditional:
            dtype = choose_amp("auto", device)
            after, before = (unconditional_sampler(network, schedule, dtype) for network in (unet, teacher))
            result = evaluate_unconditional(after, judge, forget, images, teacher, before, dtype, config.seed)
        else:
            result = evaluate(sample, nfe, judge, teacher or unet, forget, per_class, config.seed, teacher_sample, real,
                              config.batch_size)
    named = {"teacher": source or None, "teacher_sha256": teacher and checksum(teacher.path)}
    show(config, result | named, forget, kind, device)


if __name__ == "__main__":
    main(parse(Config, __doc__))
