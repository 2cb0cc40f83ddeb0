"""The README: its commands are ones that the scripts take, its tables are what the files in results/ say."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands():
    docs = README + "".join((ROOT / name).read_text(encoding="utf-8") for name in ("ddpm_sfd.py", "sd_sfd.py", "vdu.py", "eval.py", "convert.py", "pretrain.py"))
    docs = re.sub(r"\\+\n", "", docs)  # commands of several lines
    found = re.findall(r"^    .*?((?:python|torchrun --nproc-per-node \d) [\w/]+\.py[^\n#]*)", docs, flags=re.MULTILINE)
    return sorted({command.strip() for command in found if not {"WHAT", "SOURCE"} & set(command.split()) and "{" not in command})


def test_there_are_commands_to_check():
    assert len(commands()) > 8 and "python ddpm_sfd.py --forget 0" in commands()


@pytest.mark.parametrize("command", commands())
def test_commands_name_scripts_and_flags_that_exist(command, monkeypatch):
    words = shlex.split(command)
    i = next(i for i, w in enumerate(words) if w.endswith(".py"))
    script, arguments = words[i], words[i + 1 :]
    assert (ROOT / script).exists()
    if "/" in script:
        return
    module = __import__(script.removesuffix(".py"))
    module.parse(module.Config, module.__doc__, getattr(module, "PRESETS", None), arguments)  # leaves if it cannot


@pytest.mark.parametrize("page", ["README.md", "results/README.md"])
def test_files_that_the_readmes_name_exist(page):
    named = re.findall(r"`([\w/.-]+\.(?:py|json|txt))`|\]\(([\w.][\w/.-]+\.\w+)\)", (ROOT / page).read_text(encoding="utf-8"))
    assert named
    for command, link in named:
        path = ROOT / command if command else (ROOT / page).parent / link
        assert path.exists() or command in ("metrics.json", "config.json"), path


def test_tables_are_what_the_results_say():
    """Also where the locale's encoding is not UTF-8, as on Windows."""
    plain = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    words = [sys.executable, str(ROOT / "results/tables.py"), "--check"]
    process = subprocess.run(words, capture_output=True, text=True, env=plain)
    assert process.returncode == 0, process.stderr


def test_every_equation_label_stands_in_the_code_that_the_readme_says():
    named = re.findall(r"^\| (\([DSVL]\d\)) \|.*\| `(\w+\.py)` \|$", README, flags=re.MULTILINE)
    assert {f"({label})" for label in "D1 D2 D3 S1 S2 S3 S4 S5 L1 V3 V4 V5 V6".split()} == {label for label, _ in named}
    for label, file in named:
        code = [
            line
            for line in (ROOT / file).read_text(encoding="utf-8").splitlines()
            if f"# {label}" in line and line.split("#")[0].strip()
        ]
        assert code, f"{label} stands on no line of code in {file}"
