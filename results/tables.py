"""Writes the tables of README.md and results/README.md from the JSON files in this folder.

python results/tables.py            # both pages anew
python results/tables.py --check    # status 1 if one is not what the files say
"""

import json
import re
import sys
import textwrap
from pathlib import Path
from statistics import mean, stdev

HERE = Path(__file__).resolve().parent


def read(folder, pattern="*.json"):
    """The runs of a folder. One line under the table describes them all, so their settings and precision must be the
    same, except for what is to be forgotten, the seed and where a run began."""
    runs = [json.loads(path.read_text()) for path in sorted((HERE / folder).glob(pattern))]
    if not runs:
        sys.exit(f"results/{folder} holds no runs")

    def kind(run):
        own = ("forget", "seed", "out", "posterior", "init_generator", "init_fake_score")
        return {k: v for k, v in run["config"].items() if k not in own} | {"precision": run["amp"]}

    first = kind(runs[0])
    different = {name for run in runs for name, value in kind(run).items() if first.get(name, value) != value}
    if different:
        sys.exit(f"results/{folder} holds runs of several kinds: they differ in {', '.join(sorted(different))}")
    return runs


def seeds(runs):
    """seed 1; seeds 1, 2, 3"""
    of = sorted({run["seed"] for run in runs})
    return f"seed{'s' * (len(of) > 1)} {', '.join(map(str, of))}"


def where(runs):
    """The machines, with the seeds that each one ran if there are several."""
    by = {run["machine"]: [r for r in runs if r["machine"] == run["machine"]] for run in runs}
    names = [f"{name} ({seeds(group)})" if len(by) > 1 else name for name, group in by.items()]
    return f"machine{'s' * (len(names) > 1)}: {'; '.join(names)}, {runs[0]['amp']}"


def spread(values, form):
    return form.format(mean(values)) + (f" ± {form.format(stdev(values))}" if len(values) > 1 else "")


def lambdas(config, name):
    """lambda of (S5) for theta or psi: 0.25, or where it falls, 0.5 to 0.05. Runs from before --lambda-end: constant."""
    start, end = config[name], config[name] * config.get("lambda_end", 1)
    return f"{start:g}" if end == start else f"{start:g} to {end:g}"


def all_classes():
    """One row a forgotten class: mean and standard deviation over seeds, the worst seed beside it."""
    runs = read("ddpm_sfd-mnist")
    lines = [
        "| forgotten | UA, % (worst) | retained accuracy, % (worst) | teacher's | FID (worst) | teacher's | worst ratio "
        "| seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def row(name, group):
        ua, accuracy, teacher = (
            [100 * run[key] for run in group] for key in ("ua", "retained_accuracy", "teacher_retained_accuracy"))
        fid, teacher_fid, took = ([run[key] for run in group] for key in ("fid", "teacher_fid", "seconds"))
        return (
            f"| {name} | {spread(ua, '{:.2f}')} ({min(ua):.2f}) "
            f"| {spread(accuracy, '{:.2f}')} ({min(accuracy):.2f}) | {mean(teacher):.2f} "
            f"| {spread(fid, '{:.4f}')} ({max(fid):.4f}) | {mean(teacher_fid):.4f} "
            f"| {max(a / b for a, b in zip(fid, teacher_fid)):.2f} | {spread(took, '{:.0f}')} |"
        )

    for k in sorted({run["forget"][0] for run in runs}):
        lines.append(row(k, [run for run in runs if run["forget"] == [k]]))
    lines.append(row(f"**all {len(runs)} runs**", runs))
    first, config = runs[0], runs[0]["config"]
    lines += [
        "",
        f"{seeds(runs).capitalize()}; {first['images_per_class']} images of each class; {config['steps']} steps, "
        f"alpha {config['alpha']:g}, lambda {lambdas(config, 'lambda_generator')} for theta and "
        f"{lambdas(config, 'lambda_fake_score')} for psi, t from "
        f"{config['t_min']} to below {config['t_max']}, guidance {config['guidance']:g} ({config['guidance_safe']:g} towards "
        f"the safe class); {where(runs)}; FID of real test images, for scale: "
        f"{first['real_test_fid']:.4f} without class {first['forget'][0]}. "
        "Made by `python results/all_classes.py ddpm_sfd`, raw numbers in `results/ddpm_sfd-mnist/`.",
    ]
    return lines


def aims(runs):
    """FID over the teacher's, a number a run; how many runs reach the aim of UA, of accuracy, of FID, and all three."""
    ratios = [run["fid"] / run["teacher_fid"] for run in runs]
    reached = [(run["ua"] >= 0.995, run["retained_accuracy"] >= run["teacher_retained_accuracy"], ratio <= 1.1)
               for run, ratio in zip(runs, ratios)]
    return ratios, *(sum(column) for column in zip(*reached)), sum(map(all, reached))


def glance():
    """One row a method, over all of its runs: what is gone, what is kept, and how many runs reach all aims."""
    lines = ["| | runs | gone, % (worst) | kept | distance over the teacher's (worst) | runs that reach all aims |",
             "|---|---|---|---|---|---|"]

    def row(name, runs, gone, kept, ratios, reached):
        gone = [100 * run[gone] for run in runs]
        lines.append(f"| {name} | {len(runs)} | {spread(gone, '{:.1f}')} ({min(gone):.1f}) | {kept} "
                     f"| {spread(ratios, '{:.2f}')} ({max(ratios):.2f}) | {reached} |")

    runs = read("ddpm_sfd-mnist")
    ratios, *_, reached = aims(runs)
    accuracy, its = (mean(100 * run[key] for run in runs) for key in ("retained_accuracy", "teacher_retained_accuracy"))
    row("SFD, each digit, MNIST", runs, "ua", f"accuracy {accuracy:.1f}% (teacher {its:.1f}%)", ratios, reached)

    runs = read("sd_sfd-tiny")
    ratios = [run["fid"] / run["teacher_fid"] for run in runs]
    right = {name: [(run[name], run[f"teacher_{name}"]) for run in runs if run[name] is not None] for name in ("near", "far")}
    reached = sum(run["ua"] >= 0.99 and ratio <= 1.2 and all(run[name] is None or run[name] >= run[f"teacher_{name}"] - 0.02
                                                             for name in right) for run, ratio in zip(runs, ratios))
    kept = ", ".join(f"{name} {mean(100 * a for a, _ in pairs):.1f}%" for name, pairs in right.items())
    kept += f" (teacher {mean(100 * b for _, b in right['far']):.0f}%)"
    row("SFD, digits, colours and pairs, text-to-image", runs, "ua", kept, ratios, reached)

    runs = read("vdu-mnist")
    ratios, *_, reached = vdu_aims(runs)
    row("VDU, each digit, MNIST", runs, "pul", f"confidence {spread(vdu_points(runs), '{:.1f}')} points", ratios, reached)
    return lines


def vdu_points(runs):
    """The classifier's confidence in the images of each run, in points over that in the teacher's."""
    return [100 * (run["confidence"] - run["teacher_confidence"]) for run in runs]


def vdu_aims(runs):
    """u-FID of each run over the teacher's; how many runs reach the aim of PUL, of u-FID, of confidence, and all."""
    ratios = [run["u_fid"] / run["teacher_u_fid"] for run in runs]
    reached = [(run["pul"] >= 0.9, ratio <= 2, abs(points) <= 4)
               for run, ratio, points in zip(runs, ratios, vdu_points(runs))]
    return ratios, *(sum(column) for column in zip(*reached)), sum(map(all, reached))


def side_by_side(sets):
    """Sets of runs, name -> folder, at the digits and seeds that they share: how many runs reach each aim, the mean and
    the worst."""
    sets = {name: read(folder) for name, folder in sets.items()}
    common = set.intersection(*({(*run["forget"], run["seed"]) for run in runs} for runs in sets.values()))
    lines = ["| | steps | rates, theta and psi | alpha | guidance; towards the safe class | lambda for theta | runs "
             "| UA at least 99.5% (mean, worst) | accuracy not below the teacher's (mean) "
             "| FID at most 1.1 times the teacher's (mean, worst) | all three | on |", "|---" * 12 + "|"]
    for name, runs in sets.items():
        runs = [run for run in runs if (*run["forget"], run["seed"]) in common]
        config, (ratios, ua, accuracy, fid, all_three) = runs[0]["config"], aims(runs)
        uas, accuracies = [100 * run["ua"] for run in runs], [100 * run["retained_accuracy"] for run in runs]
        theta, class_rate = config["lr_generator"], config.get("class_rate", 1)  # runs from before it was an option: 1
        rates = f"{theta:.7f}".rstrip("0") + f" ({theta * class_rate:g} for what reads the class)" * (class_rate != 1)
        lines.append(f"| {name} | {config['steps']} | {rates}, {config['lr_fake_score']:g} "
                     f"| {config['alpha']:g} | {config['guidance']:g}; {config['guidance_safe']:g} "
                     f"| {lambdas(config, 'lambda_generator')} | {len(runs)} "
                     f"| {ua} ({mean(uas):.1f}%, {min(uas):.1f}%) | {accuracy} ({mean(accuracies):.1f}%) "
                     f"| {fid} ({mean(ratios):.2f}, {max(ratios):.2f}) | {all_three} | {processor(runs[0])}, {runs[0]['amp']} |")
    return lines


def processor(run):
    return run["machine"].split(",")[0].replace("(R)", "").removesuffix(" Processor")


def stages():
    """From the teacher or in two stages."""
    return side_by_side({"two stages": "ddpm_sfd-mnist-earlier", "one stage, from the teacher": "ddpm_sfd-mnist-one-stage",
                         "the same on another machine": "ddpm_sfd-mnist-one-stage-intel",
                         "one stage, guidance of two stages": "ddpm_sfd-mnist-one-stage-guidance-1.05"})


def thirty():
    """Every digit with three seeds: the default, the one before, another pair, and three defaults from the earlier teacher."""
    return side_by_side({"the default": "ddpm_sfd-mnist", "(F), the default before it": "ddpm_sfd-mnist-300-steps",
                         "nearly (F), from the pair (e)": "ddpm_sfd-mnist-longer-pair",
                         "(D), from the earlier teacher": "ddpm_sfd-mnist-earlier-teacher",
                         "the earlier default, likewise": "ddpm_sfd-mnist-earlier",
                         "alpha 1, likewise": "ddpm_sfd-mnist-alpha-1"})


def alphas():
    """FID over the teacher's by digit, seed 1, at three settings of alpha and guidance, each on two machines."""
    trials = json.loads((HERE / "trials-wider.json").read_text())["from_the_pair_that_ships"]
    sets = [("1; 1.1; 1.7", [run for run in read("ddpm_sfd-mnist-alpha-1") if run["seed"] == 1]),
            ("1; 1.1; 1.7", read("ddpm_sfd-mnist-alpha-1-avx2")),
            ("**1.05; 1.05; 2**", [run for run in read("ddpm_sfd-mnist-earlier") if run["seed"] == 1]),
            ("**1.05; 1.05; 2**", read("ddpm_sfd-mnist-avx2")),
            ("1.1; 1.05; 2 (A)", [run for run in trials if "ua" in run]),
            ("1.1; 1.05; 2 (A)", read("ddpm_sfd-mnist-alpha-1.1-avx2"))]
    lines = ["| alpha; guidance; towards the safe class |" + "".join(f" without {k} |" for k in range(10))
             + " mean | lowest UA, % | retained accuracy, % (lowest) | on |", "|---" * 15 + "|"]
    for name, runs in sets:
        ratios = {int(run["command"].split()[3]): run["fid"] / run["teacher_fid"] for run in runs}  # .. --forget 7 ..
        accuracies = [100 * run["retained_accuracy"] for run in runs]
        lines.append(f"| {name} |" + "".join(f" {ratios[k]:.2f} |" for k in range(10))
                     + f" {mean(ratios.values()):.2f} | {100 * min(run['ua'] for run in runs):.1f} "
                     f"| {mean(accuracies):.1f} ({min(accuracies):.1f}) | {processor(runs[0])}, {runs[0]['amp']} |")
    return lines


def vdu():
    """One row a forgotten class: mean and standard deviation over seeds, the worst seed beside it."""
    runs = read("vdu-mnist")
    lines = [
        "| forgotten | PUL, % (worst) | u-FID over that of the teacher's images without the digit (worst) | the same, classes alike "
        "| u-FID over that of all its images "
        "| confidence minus the teacher's, points (worst) | steps | seconds of training |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def row(name, group):
        def ratio(above, below):
            return [run[above] / run[below] for run in group]

        pul, strict = [100 * run["pul"] for run in group], ratio("u_fid", "teacher_fid")
        points = vdu_points(group)
        return (
            f"| {name} | {spread(pul, '{:.1f}')} ({min(pul):.1f}) | {spread(strict, '{:.1f}')} ({max(strict):.1f}) "
            f"| {spread(ratio('balanced_fid', 'teacher_balanced_fid'), '{:.2f}')} | {spread(ratio('u_fid', 'teacher_u_fid'), '{:.2f}')} "
            f"| {spread(points, '{:.1f}')} ({min(points, key=lambda x: -abs(x)):.1f}) "
            f"| {min(run['steps_taken'] for run in group)} to {max(run['steps_taken'] for run in group)} "
            f"| {spread([run['training_seconds'] for run in group], '{:.0f}')} |"
        )

    for k in sorted({run["forget"][0] for run in runs}):
        lines.append(row(k, [run for run in runs if run["forget"] == [k]]))
    lines.append(row(f"**all {len(runs)} runs**", runs))
    first, config = runs[0], runs[0]["config"]
    lines += [
        "",
        f"{seeds(runs).capitalize()}; gamma {config['gamma']}, batches of {config['batch_size']}, end at growth "
        f"{config['stop_at']}; {first['images']:,} images each, from the same noise before and after; {where(runs)}. "
        f"FID of the teacher's retained images: "
        f"{min(r['teacher_fid'] for r in runs):.3f} to {max(r['teacher_fid'] for r in runs):.3f}; u-FID of all its images: "
        f"{min(r['teacher_u_fid'] for r in runs):.3f} to {max(r['teacher_u_fid'] for r in runs):.3f}. "
        f"Made by `python results/all_classes.py vdu --seeds {' '.join(map(str, sorted({r['seed'] for r in runs})))}`, "
        f"raw numbers in `results/vdu-mnist/`.",
    ]
    return lines


VDU_SETTINGS = ("vdu-mnist", "vdu-mnist-64-probes", "vdu-mnist-gamma-0.5", "vdu-mnist-gamma-0.7")


def vdu_settings():
    """One row a folder of runs, the present settings first: how many runs reach each aim, and by how much."""
    lines = [
        "| (V3) | gamma | undesired images | batch | end at growth, judged on | precision | runs | PUL at least 90% (worst) "
        "| u-FID at most twice the teacher's | confidence within 4 points | all three | PUL, % "
        "| u-FID over the teacher's (worst) |",
        "|---" * 13 + "|",
    ]
    for folder in VDU_SETTINGS:
        runs = read(folder)
        config, pul = runs[0]["config"], [100 * run["pul"] for run in runs]
        ratios, gone, fid, sure, all_three = vdu_aims(runs)
        probes = "128 images" if folder == VDU_SETTINGS[0] else "64, at random steps"
        lines.append(
            f"| {'by its tangent' if config.get('plasticity') == 'tangent' else 'as it is'} | {config['gamma']} "
            f"| {runs[0]['undesired_images'] if config['images'] else 'all'} | {config['batch_size']} "
            f"| {config['stop_at']}, {probes} | {runs[0]['amp']} | {len(runs)} | {gone} ({min(pul):.1f}%) | {fid} | {sure} "
            f"| {all_three} | {spread(pul, '{:.1f}')} | {spread(ratios, '{:.2f}')} ({max(ratios):.2f}) |")
    return lines


def concepts():
    """One row a concept: mean and standard deviation over seeds, the worst seed beside it; accuracies beside the
    teacher's."""
    runs = read("sd_sfd-tiny")
    lines = [
        "| forgotten | UA, % (worst) | near accuracy, % (worst) | teacher's | far accuracy, % (worst) | teacher's "
        "| FID (worst) | teacher's | worst ratio | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]

    def row(name, group):
        def accuracy(key):
            values = [100 * run[key] for run in group if run[key] is not None]
            if not values:
                return "no such prompts | "
            teacher = mean(100 * run[f"teacher_{key}"] for run in group if run[key] is not None)
            return f"{spread(values, '{:.1f}')} ({min(values):.1f}) | {teacher:.1f}"

        ua, fid = [100 * run["ua"] for run in group], [run["fid"] for run in group]
        return (
            f"| {name} | {spread(ua, '{:.1f}')} ({min(ua):.1f}) | {accuracy('near')} | {accuracy('far')} "
            f"| {spread(fid, '{:.3f}')} ({max(fid):.3f}) | {mean(run['teacher_fid'] for run in group):.3f} "
            f"| {max(run['fid'] / run['teacher_fid'] for run in group):.2f} | {spread([run['seconds'] for run in group], '{:.0f}')} |"
        )

    for concept in sorted({run["forget"] for run in runs}, key=lambda concept: (len(concept.split()), concept)):
        lines.append(row(concept, [run for run in runs if run["forget"] == concept]))
    first = runs[0]
    lines += [
        row(f"**all {len(runs)} runs**", runs),
        "",
        f"{seeds(runs).capitalize()}; {first['images']:,} pictures a run, {first['images_per_pair']} of each digit in each "
        f"colour; {first['config']['steps']} steps; {where(runs)}. Near: prompts that share a word with the concept; "
        f"teacher: 50 DDIM steps, guidance 4.5, where the generator learned {first['config']['k_teacher']}. "
        f"Made by `python results/all_classes.py sd_sfd`, raw numbers in `results/sd_sfd-tiny/`.",
    ]
    return lines


def one_stage_or_two():
    """One row a way: mean and standard deviation over seeds."""
    lines = ["| forgetting 0 | UA, % | retained accuracy, % | FID |", "|---|---|---|---|"]
    for way, name in (("one-stage", "one stage, {} steps"), ("two-stage", "distilled first, as many steps in all")):
        runs = read("two-stage", f"{way}-forget0-*.json")
        columns = [("ua", 100, "{:.1f}"), ("retained_accuracy", 100, "{:.1f}"), ("fid", 1, "{:.3f}")]
        cells = [spread([scale * run[key] for run in runs], form) for key, scale, form in columns]
        lines.append(f"| {name.format(runs[0]['total_steps'])} | {' | '.join(cells)} |")
    accuracy, fid = (mean(run[f"teacher_{key}"] for run in runs) for key in ("retained_accuracy", "fid"))
    config = runs[0]["config"] | {"guidance": 1, "guidance_safe": 1}  # runs from before these options had none
    names = ("ema", "lr_end", "lambda_generator", "lambda_fake_score", "t_min", "t_max", "guidance", "guidance_safe")
    flags = " ".join(f"--{name.replace('_', '-')} {config[name]:g}" for name in names)
    return [
        *lines,
        "",
        f"{len(runs)} seeds; the teacher: {100 * accuracy:.1f}% and {fid:.3f}; the earlier network and settings (commit efd2915). Made by "
        f"`python results/two_stage.py --steps {runs[0]['total_steps']} -- {flags}`, raw numbers in `results/two-stage/`.",
    ]


def step_time():
    """One row a file of benchmarks/step_time.py."""
    lines = [
        "| network, machine, precision of ours | batch | plain float32, two passes | `ddpm_sfd.py` | times as fast | images a second "
        "| share of the chip's peak | peak memory, plain → ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    runs = [json.loads(path.read_text()) for path in sorted(HERE.glob("step_time-*.json"))]

    def on_gpu(r):
        return r["memory_is"] == "allocated on the GPU"

    for r in sorted(runs, key=on_gpu):
        memory, batch, share = r["peak_memory_bytes"], r["batch"], r.get("share_of_peak")
        name = f"{r['network']}, {processor(r)}, {r['precision'].removeprefix('torch.')}{', compiled' * r['compiled']}"
        name += f" ({r['note']})" if "note" in r else ""
        lines.append(
            f"| {name} | {batch[0]} + {batch[1]}, {len(r['seconds']['ours'])} steps "
            f"| {r['median']['plain']:.3f} s | {r['median']['ours']:.3f} s | {r['speedup']:.2f} "
            f"| {sum(batch) / r['median']['ours']:,.1f} | {f'{share:.1%}' if share else 'not measured'} "
            f"| {memory['plain'] / 2**20:,.0f} → {memory['ours'] / 2**20:,.0f} MiB |"
        )
    if not any(map(on_gpu, runs)):
        lines.append("| cifar10 on a CUDA GPU | 128 + 128 |" + " not measured |" * 6)
    return [
        *lines,
        "",
        "Median over the timed steps (their times are in the JSON), both loops in turn in one process; on CPUs two threads. "
        "Memory, in a process of its own each: resident set of the process, torch included; on a GPU what is "
        "allocated there. Float32 there has TF32 inside convolutions, as PyTorch has "
        "it. Made by `python benchmarks/step_time.py`.",
    ]


def sampling():
    """One row a sampler, one column a machine: a file of benchmarks/sampling.py each."""
    runs = [json.loads(path.read_text()) for path in (HERE / "sampling.json", *sorted(HERE.glob("sampling-*.json")))]
    names = [" ".join(r["machine"].split(",")[0].replace("(R)", "").split()[:3]) for r in runs]
    lines = [f"| sampler | network calls |{''.join(f' images a second, {name} |' for name in names)}", "|---" * (2 + len(runs)) + "|"]
    for name, row in runs[0]["rows"].items():
        rates = "".join(f" {r['rows'][name]['images_per_second']:,.1f} |" for r in runs)
        lines.append(f"| {name} | {row['network_calls']:,} |{rates}")
    for r in runs:
        rounds = len(r["rows"]["generator, 1 call"]["seconds"])
        note = f"; {r['note']}" if "note" in r else ""
        lines += ["", f"{r['machine']}, {r['precision']}, batches of {r['batch']}, median of {rounds} rounds{note}."]
    return [*lines[:-1], lines[-1] + " Made by `python benchmarks/sampling.py`."]


def speed():
    """What step_time and sampling say, in a few lines."""
    times = {name: json.loads((HERE / f"step_time-{name}.json").read_text())["speedup"]
             for name in ("mnist", "cifar10", "mnist-avx512", "cifar10-avx512", "mnist-avx2", "cifar10-h100-compile")}
    rows = json.loads((HERE / "sampling.json").read_text())["rows"]
    one, fifty, thousand = (row["images_per_second"] for row in rows.values())
    text = (
        "Against the loop that one would write first (float32, retained and forgotten images in a pass each, drawn anew for each "
        "of the two updates) a training step is {mnist:.2f} times as fast on two CPU cores with bfloat16 and AMX ({cifar10:.2f} with "
        "CIFAR-10's network), {mnist-avx512:.2f} with bfloat16 and AVX512 ({cifar10-avx512:.2f}), {mnist-avx2:.2f} with AVX2 alone, and {cifar10-h100-compile:.2f} on an NVIDIA H100, compiled, "
        "with CIFAR-10's network at an earlier commit. ".format(**times) +
        f"An image takes one network call: two cores draw {one:.0f} a second, where the teacher draws {fifty:.0f} in 50 DDIM steps, "
        f"and {thousand:.1f} in 1,000 ancestral ones ([tables, with memory](results/README.md#speed)).")
    return textwrap.wrap(text, 128, break_on_hyphens=False)


PAGES = {
    HERE.parent / "README.md": {"glance": glance, "all-classes": all_classes, "speed": speed},
    HERE / "README.md": {"stages": stages, "one-stage-or-two": one_stage_or_two, "thirty": thirty, "alphas": alphas, "concepts": concepts,
                         "vdu": vdu, "vdu-settings": vdu_settings, "step-time": step_time, "sampling": sampling},
}


def render(page):
    """The text of a page, with its tables made anew."""
    text = page.read_text(encoding="utf-8")
    for name, table in PAGES[page].items():
        block = "\n".join([f"<!-- {name}: made by results/tables.py -->", *table(), f"<!-- end {name} -->"])
        text, found = re.subn(
            rf"<!-- {name}: .*?<!-- end {name} -->", lambda _, block=block: block, text, flags=re.DOTALL
        )
        assert found == 1, f"{page} has no place for the table {name}"
    return text


if __name__ == "__main__":
    for page in PAGES:
        text = render(page)
        if "--check" not in sys.argv:
            page.write_text(text, encoding="utf-8")
        elif text != page.read_text(encoding="utf-8"):
            sys.exit(f"{page} is not what results/ says; run python results/tables.py")
