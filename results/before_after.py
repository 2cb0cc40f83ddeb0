"""The pictures of the README: a run's samples_before.png and samples_after.png, side by side.

    python results/before_after.py runs/ddpm_sfd-mnist-forget0 before_after.png
    python results/before_after.py runs/vdu-mnist-forget1 vdu_before_after.png
"""
import sys
from pathlib import Path

import numpy as np
from matplotlib.image import imread, imsave

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    before, after = (imread(Path(sys.argv[1]) / f"samples_{word}.png")[..., :3] for word in ("before", "after"))
    imsave(HERE / sys.argv[2], np.concatenate([before, after], axis=1))
