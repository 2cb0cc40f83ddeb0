"""How the rooms are cut: arrows run one way, a method is in one file, and what all stand on stands on nothing."""

import ast
import graphlib

import pytest
from conftest import ROOT

MODULES = {path.stem for path in ROOT.glob("*.py")}
METHODS = {"ddpm_sfd", "sd_sfd", "vdu"}


def imports(name):
    """What a file of the project imports of the project, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found & MODULES


def test_nothing_imports_in_a_circle():
    order = list(graphlib.TopologicalSorter({name: imports(name) for name in MODULES}).static_order())
    assert set(order) == MODULES and order.index("unet") < order.index("ddpm_sfd")


@pytest.mark.parametrize("name, may", [("unet", set()), ("record", set()), ("metrics", set()), ("run", {"record"})])
def test_what_all_stand_on_stands_on_nothing(name, may):
    assert imports(name) == may


@pytest.mark.parametrize("name", sorted(METHODS))
def test_methods_never_import_each_other(name):
    assert "unet" in imports(name) and "run" in imports(name) and not imports(name) & METHODS
