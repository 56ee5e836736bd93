"""The house: imports go one way, files are UTF-8 wherever they are read, training needs what is required."""

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# what may be imported from what: each from those before it, and from itself
ORDER = {
    "support": 0,
    "alternatives": 1,
    "dqn_injection_atari": 2,
    "analysis": 3,
    "compare": 4,
    "examples": 4,
    "orchestration": 4,
    "sweep": 5,
}
FOLDERS = ("support", "alternatives", "analysis", "orchestration", "examples", "benchmarks", "tests", "img")
SOURCES = sorted(ROOT.glob("*.py"))
for folder in FOLDERS:
    SOURCES += sorted((ROOT / folder).rglob("*.py"))
OPTIONAL = {"wandb"}  # imported where it is asked for, and refused by name where it is missing

each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))


def home(path):
    """The name by which others import a file, or the package that it is in."""
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imported(path):
    """First names of all that a file imports, also in functions; a relative one is its own package's."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0] if node.level == 0 else home(path))
    return names


def test_the_modules_of_the_order_are_there():
    assert {home(path) for path in SOURCES} >= ORDER.keys()
    assert imported(ROOT / "dqn_injection_atari.py") >= {"support", "torch", "tyro"}
    assert "dqn_injection_atari" in set.union(*(imported(path) for path in (ROOT / "analysis").glob("*.py")))


@each_source
def test_imports_go_one_way(path):
    folder_name = home(path)
    if folder_name not in ORDER:  # tests, benchmarks and figures may import what they like
        return
    for name in imported(path) - {folder_name}:
        assert name not in ("tests", "conftest", "benchmarks", "img"), name
        assert ORDER.get(name, -1) < ORDER[folder_name], f"{folder_name} imports {name}"


@each_source
def test_support_and_alternatives_know_no_args(path):
    if home(path) not in ("support", "alternatives"):
        return
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {node.value for node in nodes if isinstance(node, ast.Constant)}  # annotations may be strings
    assert not names & {"Args", "Experiment", "InjectableHead", "QNetwork", "Learner"}


@each_source
def test_text_is_read_and_written_in_utf_8_whatever_the_locale(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        given = {keyword.arg for keyword in node.keywords}
        assert "text" not in given, (
            f"line {node.lineno}: the locale decides on a process's text, give encoding instead"
        )
        if name in ("read_text", "write_text"):
            assert "encoding" in given, f"line {node.lineno}: give encoding"
        if isinstance(node.func, ast.Name) and name == "open":
            binary = any("b" in str(getattr(mode, "value", "")) for mode in node.args[1:2])
            assert binary or "encoding" in given, f"line {node.lineno}: give encoding"


def test_every_module_has_a_test_file_of_its_name():
    there = {path.name for path in (ROOT / "tests").glob("test_*.py")}
    for folder in ("support", "alternatives", "analysis", "orchestration"):
        modules = [path for path in (ROOT / folder).glob("*.py") if path.stem != "__init__"]
        assert modules, folder
        for path in modules:
            assert {f"test_{path.name}", f"test_{folder}_{path.name}"} & there, path


def test_training_imports_only_what_requirements_name():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
    required = {line.partition("==")[0] for line in lines}
    owners = importlib.metadata.packages_distributions()
    known = sys.stdlib_module_names | OPTIONAL | {"support", "alternatives"}
    for path in SOURCES:
        if home(path) not in ("dqn_injection_atari", "support", "alternatives"):
            continue
        for name in imported(path) - known:
            distributions = {re.sub(r"[-_.]+", "-", owner).lower() for owner in owners[name]}
            assert distributions & required, f"{path.name} imports {name}"


def test_every_required_version_is_pinned():
    for path in ROOT.glob("requirements*.txt"):
        for line in path.read_text(encoding="utf-8").split("\n"):
            assert re.fullmatch(r"[\w-]+==[\w.+]+|-r requirements(-sweep)?\.txt|", line), line
