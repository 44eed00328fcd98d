"""The package's own face: names that programs import from `shoulders` itself."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import shoulders


@pytest.mark.parametrize("name", shoulders.__all__)
def test_public_names_are_there(name: str) -> None:
    assert getattr(shoulders, name).__doc__
    assert name in dir(shoulders)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(shoulders.__file__).read_text(encoding="utf-8"))
    seen = {
        (alias.asname, node.module.removeprefix("shoulders."))
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert seen == set(shoulders._HOMES.items())


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'load_ml'"):
        shoulders.load_ml  # noqa: B018


def test_importing_it_imports_no_torch() -> None:
    script = "import sys, shoulders; print('torch' in sys.modules, shoulders.__version__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == f"False {shoulders.__version__}\n"
