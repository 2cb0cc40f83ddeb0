"""What a method begins with: the teacher that the user named, and in two-stage SFD the pair distilled from it."""

from convert import Config, locate, read
from fetch import fetch
from record import checksum
from unet import load_unet, shipped_names, weights_path


def load_teacher(source):
    """The U-Net that the user named: a shipped name, one of our files, or anything that this file can fetch and read;
    no converted copy is written. ValueError or OSError if it is not a U-Net, or is a one-step generator."""
    found = fetch(source)
    if str(source) in shipped_names() or not found.exists():
        unet = load_unet(source)  # or says what would be right
    else:
        try:
            path = locate(found)
            unet, facts = read(Config(str(found)), path)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
        unet.path, unet.card = path, getattr(unet, "card", facts)
    if "t_init" in unet.card:
        raise ValueError(f"{source} is a one-step generator, no teacher; give the diffusion model that it is made from")
    return unet.eval()


def read_pair(config, teacher):
    """The generator and the fake score that theta and psi start from: in two-stage SFD, what --forget none runs left;
    in one-stage SFD, None and None, since both start as copies of the teacher.

    ValueError if only one is given, if they are not from the same run or lack the teacher's configuration, or if their
    cards say that they were made for another t_init or from another teacher."""
    flags = {"--init-generator": config.init_generator, "--init-fake-score": config.init_fake_score}
    one_stage = "--preset mnist-one-stage" if config.preset == "mnist" else " ".join(f"{flag} none" for flag in flags)
    instead = f"; {one_stage} begins with the teacher itself"
    if set(flags.values()) == {"none"}:
        return None, None
    if "none" in flags.values():
        raise ValueError("--init-generator and --init-fake-score: give the two files of one run" + instead)
    generator, fake_score = pair = [load_unet(source) for source in flags.values()]
    for (flag, source), network in zip(flags.items(), pair):
        if network.config != teacher.config:
            raise ValueError(f"{flag} {source} is no network of the teacher's configuration{instead}")
        if ("t_init" in network.card) != (network is generator):
            raise ValueError(f"{flag} {source} is {'a' if 't_init' in network.card else 'no'} generator, by its card")
    if generator.card["t_init"] != config.t_init:
        made = generator.card["t_init"]
        raise ValueError(f"{config.init_generator} was made for --t-init {made}, not {config.t_init}{instead}")
    own = ("t_init", "what", "method", "network", "weights")  # what a card says of the file, not of the run
    run, other = ({k: v for k, v in network.card.items() if k not in own} for network in pair)
    if run != other:
        raise ValueError(f"{' and '.join(flags.values())} are not of one run, by their cards")
    if not made_from(run, teacher):
        its = run.get("teacher") or run["sd"]
        raise ValueError(f"{config.init_generator} was distilled from {its} as it was then, another teacher{instead}")
    return generator, fake_score


def made_from(card, teacher):
    """Whether a network with this card was made from the file of `teacher`, as far as the card tells: by the checksum
    of its teacher or, on cards from before there was one, by the name of one that ships."""
    name = card.get("teacher")
    its = card.get("teacher_sha256") or (checksum(weights_path(name)) if name in shipped_names() else None)
    return not its or its == checksum(teacher.path)
