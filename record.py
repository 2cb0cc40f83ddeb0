"""What a result is recorded with: the machine, the command, the commit, a file's checksum; and files written whole.

It knows neither runs nor methods, and imports nothing of this project.
"""

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

# ---------------------------------------------------------------------------- where numbers come from


def cpu_name():
    """What the processor calls itself, as far as the system tells."""
    try:
        if sys.platform == "darwin":
            return subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
        return Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].split("\n")[0]
    except (OSError, IndexError, subprocess.SubprocessError):
        return platform.processor() or f"{platform.machine()} CPU"


def machine(device=torch.device("cpu")):
    """One line that says what this ran on, for metrics.json."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    return f"{name}{threads}, torch {torch.__version__}, Python {platform.python_version()}"


def precision(dtype):
    """The name of a run's precision, for its record: float32 for None."""
    return str(dtype or torch.float32).removeprefix("torch.")


def launcher():
    """What starts this program: python, or torchrun for several processes."""
    world = os.environ.get("WORLD_SIZE", "1")
    return "python" if world == "1" else f"torchrun --nproc-per-node {world}"


def command():
    """What was typed, as one would type it again."""
    return f"{launcher()} {shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])}"


def commit():
    """The commit this code stands at ('+' when files differ from it), or 'unknown' outside a clone."""
    words = ["git", "-C", Path(__file__).parent, "describe", "--always", "--exclude=*", "--abbrev=12", "--dirty=+"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def checksum(path):
    """SHA-256 of a file, as hexadecimal digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


# ---------------------------------------------------------------------------- files


def write_atomically(path, write):
    """write(temporary path), then move it to `path`: whoever reads `path` sees the old file or the new one, whole."""
    handle, temporary = tempfile.mkstemp(dir=Path(path).parent, suffix=".tmp")
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "r+b") as file:  # "+": Windows flushes no file that is open for reading alone
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def check_out(path):
    """ValueError unless a JSON file can be written to `path`; call it before the work whose results go there. With ""
    or None no file is wanted."""
    if not path:
        return
    path = Path(path)
    if path.suffix != ".json" or path.is_dir():
        raise ValueError(f"--out {path}: give the name of a .json file to write")
    if not path.parent.is_dir():
        raise ValueError(f"--out {path}: there is no folder {path.parent}; make it first")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--out {path}: the folder {path.parent} may not be written in")


def write_json(path, content):
    write_atomically(path, lambda temporary: Path(temporary).write_text(json.dumps(content, indent=2) + "\n"))
