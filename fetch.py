"""What lies elsewhere, fetched once: a URL, or a model of Hugging Face's hub, into torch's cache."""

import hashlib
import http.client
import os
import re
import urllib.parse
import urllib.request
from pathlib import Path

import torch
from tqdm import tqdm

HUB = "https://huggingface.co"


def download(url, path):
    """Fetch `url` to `path`, unless that exists already. An incomplete download leaves nothing behind.

    url may end in #sha256=DIGITS, which the file must then match. OSError when the download fails."""
    url, _, digits = url.partition("#sha256=")
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part, seen = path.with_name(f"{path.name}.{os.getpid()}.part"), hashlib.sha256()  # other processes fetch it too
    try:
        with urllib.request.urlopen(url, timeout=30) as answer, open(part, "wb") as file:
            length = int(answer.headers.get("Content-Length") or 0)
            with tqdm(total=length or None, unit="B", unit_scale=True, desc=path.name) as bar:
                while piece := answer.read(1 << 20):
                    file.write(piece)
                    seen.update(piece)
                    bar.update(len(piece))
        if length and part.stat().st_size != length:
            raise OSError(f"{url} broke off after {part.stat().st_size:,} of {length:,} bytes; try again")
        if digits and seen.hexdigest() != digits.lower():
            raise OSError(f"{url} has the SHA-256 {seen.hexdigest()}, not {digits}")
        os.replace(part, path)
    except (OSError, http.client.HTTPException) as error:  # what urllib raises is an OSError, mostly
        raise OSError(str(error) if url in str(error) else f"{url}: {error}") from None
    finally:
        part.unlink(missing_ok=True)
    return path


def fetch(source):
    """The Path of what the user named: a URL, or hub:ORG/NAME, is fetched into torch's hub cache; all else is a path
    already. OSError when it cannot be had."""
    source = str(source)
    cache = Path(torch.hub.get_dir()) / "minunlearn"
    if source.startswith("hub:"):
        name, hub = source.removeprefix("hub:"), os.environ.get("HF_ENDPOINT", HUB)
        for file in ("config.json", "diffusion_pytorch_model.safetensors"):
            download(f"{hub}/{name}/resolve/main/{file}", cache / name.replace("/", "--") / file)
        return cache / name.replace("/", "--")
    if re.match(r"(https?|file)://", source):
        url = urllib.parse.urlparse(source)
        return download(source, cache / hashlib.sha256(source.encode()).hexdigest()[:12] / Path(url.path).name)
    return Path(source)
