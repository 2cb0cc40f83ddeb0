import torch


def posterior(checkpoints):
    names = checkpoints[0].keys()
    stacks = {k: torch.stack([c[k].double() for c in checkpoints]) for k in names}
    return {k: s.mean(0).float() for k, s in stacks.items()}, {k: s.var(0).float() for k, s in stacks.items()}
