"""The oracle must not lean on what it judges."""

import ast
from pathlib import Path

import sda_fast.reference


def test_reference_imports_nothing_else_of_the_package():
    for path in Path(sda_fast.reference.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not any(a.name.split(".")[0] == "sda_fast" for a in node.names), path.name
            if isinstance(node, ast.ImportFrom):
                own = node.level == 1 or (node.module or "").startswith("sda_fast.reference")
                assert own or (node.level == 0 and not (node.module or "").startswith("sda_fast")), path.name
