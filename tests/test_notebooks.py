"""Every notebook in notebooks/: executed as it stands, fit to be read, and still true."""

import copy
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

nbformat = pytest.importorskip("nbformat", reason="needs requirements-dev.txt")
pytest.importorskip("nbclient", reason="needs requirements-dev.txt")
sys.path.insert(0, str(ROOT / "notebooks"))

from execute import code_hash, execute, picture  # noqa: E402
from mixture import Mixture, same, three_classes  # noqa: E402

from unet import VPSchedule  # noqa: E402

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def stale(notebook):
    """What shows that the notebook was not executed as it stands; None if nothing does."""
    cells = code_cells(notebook)
    if notebook.metadata.get("code_sha256") != code_hash(notebook):
        return "its code cells are not those that were executed"
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        return "its cells were not executed once each, from first to last"
    if any(output.output_type == "error" for cell in cells for output in cell.outputs):
        return "a cell has raised"
    return None


def key_numbers(notebook):
    """name -> (value, how far another machine may be off), from the output of the one cell tagged `numbers`."""
    [cell] = [cell for cell in code_cells(notebook) if "numbers" in cell.metadata.get("tags", [])]
    [output] = cell.outputs
    return json.loads(output.text)


def test_there_are_notebooks():
    assert [path.name[:2] for path in PATHS] == ["01", "02", "03", "04", "05"]


@each_notebook
def test_it_was_executed_as_it_stands(path):
    problem = stale(read(path))
    assert problem is None, f"{problem}; run: python notebooks/execute.py notebooks/{path.name}"


def test_an_edit_is_noticed():
    """The check above, checked: each of these must not pass."""
    good = read(PATHS[0])
    assert stale(good) is None
    edited, moved, added, again, raised, cleared = (copy.deepcopy(good) for _ in range(6))
    code_cells(edited)[1].source += "\n"
    i, j = [n for n, cell in enumerate(moved.cells) if cell.cell_type == "code"][:2]
    moved.cells[i], moved.cells[j] = moved.cells[j], moved.cells[i]
    added.cells.append(nbformat.v4.new_code_cell("1 + 1"))
    code_cells(again)[-1].execution_count += 1
    code_cells(raised)[0].outputs = [nbformat.v4.new_output("error")]
    for cell in code_cells(cleared):
        cell.outputs, cell.execution_count = [], None
    assert all(stale(notebook) for notebook in (edited, moved, added, again, raised, cleared))
    good.cells[0].source += " Words may be mended without executing."
    assert stale(good) is None


@each_notebook
def test_it_reads_well(path):
    notebook = read(path)
    cells, words = code_cells(notebook), [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    longest = max(cells, key=lambda cell: len(cell.source.splitlines()))
    assert len(longest.source.splitlines()) < 15, longest.source
    amount = [sum(len(cell.source) for cell in kind) for kind in (cells, words)]
    assert 0.4 < amount[1] / sum(amount) < 0.75, "about half words, half code"
    assert sum("**Question.**" in cell.source for cell in words) >= 4
    assert "<details>" in words[-1].source and "Exercises" in words[-1].source
    assert cells[0].source == code_cells(read(PATHS[0]))[0].source, "the first cell finds the clone, in all notebooks alike"
    assert path.stat().st_size < 500_000


@each_notebook
def test_its_picture_for_the_readme_is_the_one_in_it(path):
    png = path.with_suffix(".png")
    assert png.read_bytes() == picture(read(path)), f"run: python notebooks/execute.py notebooks/{path.name}"
    assert png.stat().st_size < 60_000
    assert f"(notebooks/{png.name})" in (ROOT / "README.md").read_text(encoding="utf-8")


@each_notebook
def test_its_outputs_say_nothing_of_the_machine(path):
    notebook = read(path)
    assert set(notebook.metadata) == {"kernelspec", "language_info", "code_sha256"}
    assert not any("execution" in cell.metadata for cell in notebook.cells)
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    text = path.read_text(encoding="utf-8")
    pictures_gone = re.sub(r'"image/png": "[^"]*"', "", text)
    for place in (str(ROOT), str(Path.home()), "/tmp/", "/home/", "/root/", "/Users/", "site-packages"):
        assert place not in pictures_gone, place


@each_notebook
def test_its_labels_are_those_of_the_code(path):
    """Equation labels such as (S3) are the ones that stand on lines of code, or before a formula of the derivation in
    vdu.py's docstring; the papers' own numbers are not used."""
    scripts = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("unet.py", "ddpm_sfd.py", "vdu.py"))
    text = "".join(cell.source for cell in read(path).cells)
    for label in set(re.findall(r"\([DSVL]\d\)", text)):
        assert re.search(rf"(# |^    ){re.escape(label)} ", scripts, re.MULTILINE), label
    assert not re.search(r"\b(Eq|Equation)\b\.? ?\(?\d", text)


@pytest.mark.slow
@each_notebook
def test_it_runs_and_its_key_numbers_are_still_true(path, tmp_path):
    """From any folder inside the clone; leaves nothing behind in it."""
    stored = read(path)
    before = {p for p in (ROOT / "notebooks").rglob("*") if "__pycache__" not in p.parts}
    numbers, expected = key_numbers(execute(stored)), key_numbers(stored)
    assert {p for p in (ROOT / "notebooks").rglob("*") if "__pycache__" not in p.parts} == before
    assert set(numbers) == set(expected)
    off = {name: (numbers[name][0], value, within) for name, (value, within) in expected.items()
           if not abs(numbers[name][0] - value) <= within}
    assert not off, f"now, stored, tolerance: {off}"


# -- what the notebooks stand on


def test_the_first_cell_finds_the_clone_or_says_what_to_do(tmp_path, monkeypatch):
    source, calls = code_cells(read(PATHS[0]))[0].source, []
    monkeypatch.setattr("subprocess.run", lambda words, check: calls.append([str(word) for word in words]))
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "clone").symlink_to(ROOT)
    for folder in (ROOT, ROOT / "notebooks", tmp_path):  # in the clone, below it, beside it
        monkeypatch.chdir(folder)
        found = {}
        exec(source, found)
        assert found["clone"].resolve() == ROOT and sys.path[:2] == [str(found["clone"]), str(found["clone"] / "notebooks")]
    assert not calls  # nothing is installed where nothing is missing
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    exec(source, {})
    assert calls[0][1:3] == ["-m", "pip"] and calls[0][-1].endswith("requirements.txt")
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(FileNotFoundError, match="clone the repository first"):
        exec(source, {})


def test_the_mixture_is_the_perfect_teacher():
    """Its noise gives the gradient of its density (automatic differentiation), and that density is the mixture's."""
    torch.manual_seed(0)
    teacher = three_classes(VPSchedule.linear()).double()
    t, c = torch.randint(0, 1000, (50,)), torch.randint(0, 4, (50,))
    x = torch.randn(50, 2, 1, 1, dtype=torch.float64, requires_grad=True)
    [slope] = torch.autograd.grad(teacher.log_density(x, t, c).sum(), x)
    score = teacher.schedule.score(teacher(x, t, c), t)
    assert torch.allclose(score, slope, rtol=1e-4, atol=1e-5)
    a, s = teacher.schedule.a(t).flatten(), teacher.schedule.s(t).flatten()
    for i in range(10):  # by torch.distributions, one noised Gaussian at a time
        of_class = [m for m, k in zip(teacher.means, teacher.classes) if c[i] in (k, teacher.null_label)]
        std = (a[i] ** 2 * teacher.std**2 + s[i] ** 2).sqrt()
        p = sum(torch.distributions.Normal(a[i] * m, std).log_prob(x[i].flatten()).sum().exp() for m in of_class)
        assert teacher.log_density(x, t, c)[i].item() == pytest.approx((p / len(of_class)).log().item(), abs=1e-4)


def test_a_mixture_draws_from_its_density():
    torch.manual_seed(0)
    teacher = three_classes(VPSchedule.linear())
    x = teacher.draw(torch.full((20_000,), 1))
    assert torch.allclose(x.mean(0).flatten(), teacher.means[2:4].mean(0), atol=0.02)
    assert (teacher.class_probabilities(x).argmax(1) == 1).float().mean() > 0.98
    points = Mixture(teacher.schedule, x[:5].flatten(1), torch.zeros(5, dtype=torch.long), std=0)
    assert {tuple(p) for p in points.draw(same(0, x)).flatten(1).tolist()} == {tuple(p) for p in x[:5].flatten(1).tolist()}
