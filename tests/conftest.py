import contextlib
import importlib
import io
import os
import pickle
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from concepts import every_prompt
from run import parse
from stable_diffusion import Autoencoder, StableDiffusion, save_stable_diffusion
from text import TextEncoder, word_tokenizer
from unet import UNet, VPSchedule, ddim_sample, save_unet

if "PYTEST_XDIST_WORKER" in os.environ:  # several tests at a time: one thread each, or they wait for one another
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
TINY = {"image_size": 28, "in_channels": 1, "channels": 8, "multipliers": (1, 2), "blocks": 1, "attention_at": (14,)}
TINY |= {"num_classes": 10, "dropout": 0.1, "groups": 4}
SMALL_TEXT = {"image_size": 4, "in_channels": 4, "attention_at": (4,), "num_classes": None, "text_dim": 12, "heads": 2}
SMALL_TEXT |= {"dropout": 0.0}


def random_unet(seed=0, **config):
    """A tiny U-Net whose zero-initialised layers are random too, so that nothing in it is trivially zero."""
    torch.manual_seed(seed)
    unet = UNet(**(TINY | config))
    for p in unet.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.1)
    return unet.eval()


def tensors(*arrays):
    return [torch.from_numpy(np.asarray(a)) for a in arrays]


def column(v):
    return v[:, None, None, None]


@pytest.fixture
def tiny():
    return random_unet()


@pytest.fixture
def tiny_file(tmp_path):
    """A teacher of 8 px images, on disk: small enough that hundreds of steps are a matter of seconds."""
    path = tmp_path / "tiny.safetensors"
    save_unet(random_unet(image_size=8, attention_at=(4,)), path, what="test")
    return path


@pytest.fixture(scope="session")
def sd_folder(tmp_path_factory):
    """A model of random weights, of 16 px pictures, in the layout of the hub."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer(every_prompt(), 16)
    text_encoder = TextEncoder(vocab_size=len(tokenizer.vocabulary), hidden_size=12, intermediate_size=24,
                               num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=16)
    vae = Autoencoder(block_out_channels=(8, 8, 8), norm_num_groups=4, sample_size=16, scaling_factor=1.0)
    path = tmp_path_factory.mktemp("sd") / "model"
    unet = random_unet(**SMALL_TEXT)
    save_stable_diffusion(StableDiffusion(tokenizer, text_encoder, vae, unet, VPSchedule.scaled_linear()), path)
    (path.parent / "prompts.txt").write_text("\n".join(every_prompt()))
    return path


def write_mnist(folder, images, labels, test=slice(None)):
    """MNIST's files as torchvision lays them out: these images (N, 28, 28) and labels (N,), uint8; the test split has
    only the part `test` of them."""
    raw = folder / "MNIST/raw"
    raw.mkdir(parents=True)
    for split, part in (("train", slice(None)), ("t10k", test)):
        x, y = images[part], labels[part]
        header = b"".join(n.to_bytes(4, "big") for n in (0x803, *x.shape))
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + x.tobytes())
        header = b"".join(n.to_bytes(4, "big") for n in (0x801, len(y)))
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(header + y.tobytes())


@pytest.fixture
def data(tmp_path):
    """MNIST's files as torchvision lays them out, with four images a class: a bar whose place tells the digit."""
    labels = np.arange(40, dtype=np.uint8) % 10
    images = np.random.default_rng(0).integers(0, 60, (40, 28, 28)).astype(np.uint8)
    for image, label in zip(images, labels):
        image[:, 2 * label + 4 : 2 * label + 7] = 255
    write_mnist(tmp_path / "data", images, labels, test=slice(0, 20))
    return tmp_path / "data"


def write_cifar10(folder, monkeypatch):
    """CIFAR-10's files as torchvision lays them out: 30 training images and 20 test images, the classes in turn."""
    inner = folder / "cifar-10-batches-py"
    inner.mkdir(parents=True)
    g = np.random.default_rng(0)
    for name, first in [*((f"data_batch_{i + 1}", 6 * i) for i in range(5)), ("test_batch", 0)]:
        n = 20 if name == "test_batch" else 6
        labels = [(first + i) % 10 for i in range(n)]
        content = {"data": g.integers(0, 256, (n, 3072)).astype(np.uint8), "labels": labels}
        (inner / name).write_bytes(pickle.dumps(content))
    (inner / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda path, md5: Path(path).is_file())
    return folder


def argv_of(command, processes=1):
    """'ddpm_sfd.py --forget 0' as a list for subprocess: one of the project's scripts, or several under torchrun."""
    script, *rest = shlex.split(command)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(processes)]
    return [sys.executable, *(torchrun if processes > 1 else []), str(ROOT / script), *rest]


def python(command, cwd, processes=1, **kwargs):
    """Run one of the project's scripts as a user would, to its end."""
    return subprocess.run(argv_of(command, processes), cwd=cwd, capture_output=True, text=True, timeout=240, **kwargs)


def inside(command, cwd):
    """As `python`, but in this process, which has torch imported already. Exceptions other than SystemExit come through."""
    script, *rest = shlex.split(command)
    module, out, err = importlib.import_module(Path(script).stem), io.StringIO(), io.StringIO()
    argv, folder, code = sys.argv, os.getcwd(), 0
    sys.argv = [str(ROOT / script), *rest]
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            module.main(parse(module.Config, module.__doc__, getattr(module, "PRESETS", None)))
    except SystemExit as leaving:
        code = leaving.code
    finally:
        sys.argv = argv
        os.chdir(folder)
    return subprocess.CompletedProcess(command, code, out.getvalue(), err.getvalue())


@pytest.fixture
def few_calls(monkeypatch):
    """DDIM in 4 steps in place of 20, 50 or 100, in this process: for tests of what is done with images, not of images."""
    def short(unet, schedule, z, c=None, steps=50, *rest, **words):
        return ddim_sample(unet, schedule, z, c, min(steps, 4), *rest, **words)

    for module in map(importlib.import_module, ("ddpm_sfd", "mnist_statistics", "samples", "vdu")):
        monkeypatch.setattr(module, "ddim_sample", short)


@pytest.fixture(autouse=True)
def seeded():
    """Whatever ran before it, a test draws the same numbers."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_gpu(request, monkeypatch):
    """What is not marked cuda is a test of the CPU, also where there is a GPU: neither it nor its processes see one."""
    if "cuda" not in request.keywords:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: "slow" not in item.keywords)  # long ones first: with -n 2 the short ones fill the gaps
    for item in items:
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))
