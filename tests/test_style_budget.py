"""Sizes of files and functions, and the direction of imports (see CONTRIBUTING.md)."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diffusers_fastdiff"
FILES = sorted(PACKAGE.rglob("*.py"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

# Which parts of the package a part may import.
MAY_IMPORT = {
    "numerics": set(),
    "models": {"numerics"},
    "schedulers": {"numerics", "models", "hooks", "errors"},
    "hooks": {"numerics", "models", "errors"},
    "training": {"numerics", "models", "schedulers", "hooks", "errors"},
    "pipelines": {"numerics", "models", "schedulers", "hooks", "errors"},
    "evaluation": {"training", "numerics", "errors"},
    "conversion": {"models", "numerics", "errors"},
    "pretrained": {"models", "schedulers", "pipelines"},
}


def functions(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            docstring = ast.get_docstring(node, clean=False)
            lines = node.end_lineno - node.lineno + 1 - (docstring.count("\n") + 1 if docstring else 0)
            yield node, lines


def test_files_are_short():
    lengths = {path.name: len(path.read_text().splitlines()) for path in FILES}
    assert max(lengths.values()) <= 400, max(lengths, key=lengths.get)
    assert sorted(lengths.values())[len(lengths) // 2] <= 150
    for path in (PACKAGE / "numerics").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 200, path.name


def test_functions_are_short():
    sizes = sorted(lines for path in FILES for _, lines in functions(path))
    assert sizes[len(sizes) // 2] <= 12
    assert sizes[int(0.9 * len(sizes))] <= 35
    for path in (*FILES, *EXAMPLES):
        for node, lines in functions(path):
            assert lines <= (150 if node.name in ("main", "__call__", "parse_args") else 60), f"{path.name}: {node.name}"


def test_numerics_are_typed_and_documented():
    for path in (PACKAGE / "numerics").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                assert node.returns is not None, f"{path.name}: {node.name}"
                assert ast.get_docstring(node), f"{path.name}: {node.name}"


def test_imports_go_one_way():
    for path in FILES:
        part = path.relative_to(PACKAGE).parts[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level == 2 and part in MAY_IMPORT:
                target = (node.module or "").partition(".")[0]
                assert target in MAY_IMPORT[part], f"{path.name} imports {target}"
            if isinstance(node, ast.Import | ast.ImportFrom) and part == "numerics":
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
                assert not [name for name in names if name.startswith("diffusers")], path.name


def test_no_file_is_called_utils():
    assert not [path for path in FILES if path.stem in ("utils", "helpers", "common", "misc")]
