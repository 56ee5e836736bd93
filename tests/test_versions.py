"""Packages that are not those the project is tested with."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gymnasium
import numpy
import pytest
from conftest import BRIEF

import dqn_injection_atari as script
import support.versions as versions
from support.usage import UsageError
from support.versions import installed, refuse_wrong_versions, release, unsupported_versions


def pin(monkeypatch, tmp_path, *lines):
    (tmp_path / "requirements.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    monkeypatch.setattr(versions, "REQUIREMENTS", tmp_path / "requirements.txt")


def test_this_environment_is_supported():
    assert unsupported_versions() == []
    refuse_wrong_versions()


@pytest.mark.parametrize(
    ("package", "pinned"),
    [line.split("==") for line in versions.REQUIREMENTS.read_text(encoding="utf-8").split()],
)
def test_every_required_packages_version_can_be_told(package, pinned):
    assert release(installed(package)) == release(pinned)


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("2.13.0+cpu", (2, 13)),
        ("1.4", (1, 4)),
        ("5", (5, 0)),
        ("1.0rc1", (1, 0)),
        ("0.12.1", (0, 12)),
        ("main", (0, 0)),
    ],
)
def test_a_release_is_its_first_two_numbers(version, expected):
    assert release(version) == expected


@pytest.mark.parametrize(
    ("tested", "supported"),
    [("2.4.6", True), ("2.3.9", True), ("2.5.0", False), ("1.9.0", False), ("3.0.0", False)],
)
def test_older_ones_and_other_major_ones_are_named(monkeypatch, tmp_path, tested, supported):
    monkeypatch.setattr(numpy, "__version__", "2.4.1")
    pin(monkeypatch, tmp_path, f"numpy=={tested}", "tyro==" + installed("tyro"))
    remarks = unsupported_versions()
    if supported:
        assert remarks == []
    else:
        (remark,) = remarks
        next_major = int(tested[0]) + 1
        assert remark.startswith(f"numpy is 2.4.1, supported is {tested[:3]} up to {next_major}: pip install")


def test_lines_that_pin_nothing_and_versions_without_numbers_are_no_error(monkeypatch, tmp_path):
    pin(
        monkeypatch,
        tmp_path,
        "--extra-index-url https://example.org",
        "# numpy==9.0",
        "-r other.txt",
        "numpy>=9",
    )
    assert unsupported_versions() == []
    monkeypatch.setattr(numpy, "__version__", "unknown")
    pin(monkeypatch, tmp_path, "numpy==2.0")
    assert unsupported_versions()[0].startswith("numpy is unknown, supported is 2.0 up to 3")


def test_without_its_requirements_file_the_script_says_nothing_of_versions(monkeypatch, tmp_path):
    monkeypatch.setattr(versions, "REQUIREMENTS", tmp_path / "none")
    assert unsupported_versions() == []


def test_the_first_lines_of_a_run_name_what_is_not_supported(monkeypatch, tmp_path, capsys):
    pin(monkeypatch, tmp_path, "numpy==9.0")
    script.train(replace(BRIEF, total_timesteps=4, checkpoint_frequency=0))
    assert any(line.startswith("warning: numpy is ") for line in capsys.readouterr().out.splitlines()[:3])


@pytest.mark.parametrize(
    ("version", "right"),
    [("0.29.1", False), ("1.2.0", False), ("1.3.9", False), ("1.4.0", True), ("2.0", True)],
)
def test_a_version_that_gives_wrong_returns_is_refused_with_nothing_written(monkeypatch, version, right):
    monkeypatch.setattr(gymnasium, "__version__", version)
    if right:
        refuse_wrong_versions()
        return
    how = "leaves the first step of a game out of its return"
    fix = f"pip install -r requirements.txt, in {versions.REQUIREMENTS.parent.resolve()}"
    for begin in (script.train, script.evaluate_saved):
        with pytest.raises(UsageError) as refusal:
            begin(BRIEF)
        assert str(refusal.value) == f"gymnasium {version} {how}: {fix}"
    assert "runs" not in os.listdir()


@pytest.mark.slow
def test_a_wrong_version_that_lacks_what_the_code_imports_is_refused_in_one_line_too():
    """As gymnasium 0.29, which has no AutoresetMode."""
    code = "import sys, gymnasium as g; g.__version__ = '0.29.1'; del g.vector.AutoresetMode; import runpy; "
    code += f"sys.argv = ['x', '--help']; sys.path.insert(0, {str(versions.REQUIREMENTS.parent)!r}); "
    code += f"runpy.run_path({script.__file__!r}, run_name='__main__')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert ended.returncode == 1
    assert ended.stderr.startswith("error: gymnasium 0.29.1") and ended.stderr.count("\n") == 1


def test_the_projects_version_is_one_wherever_it_stands():
    root = Path(script.__file__).parent
    citation = (root / "CITATION.cff").read_text(encoding="utf-8")
    changelog = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    (cited,) = re.findall(r"^version: (\S+)$", citation, re.MULTILINE)
    (released,) = re.findall(r"^date-released: (\S+)$", citation, re.MULTILINE)
    headings = re.findall(r"^## (.*)$", changelog, re.MULTILINE)
    assert headings[:2] == ["Unreleased", f"{script.__version__} - {released}"]
    assert cited == script.__version__
    folder = script.train(replace(BRIEF, total_timesteps=4, learning_starts=4, checkpoint_frequency=0))
    assert json.loads((folder / "run.json").read_text(encoding="utf-8"))["version"] == script.__version__


def test_the_citation_is_of_the_paper_that_the_readme_names():
    """What the Citation File Format 1.2.0 asks for is there, and the paper is that of the README."""
    root = Path(script.__file__).parent
    cited = (root / "CITATION.cff").read_text(encoding="utf-8")
    readme = (root / "README.md").read_text(encoding="utf-8")
    assert cited.startswith("cff-version: 1.2.0\n")
    keys = set(re.findall(r"^([\w-]+):", cited, re.MULTILINE))
    assert keys >= {"message", "title", "authors", "references"}
    (title,) = re.findall(r'^    title: "(.*)"$', cited, re.MULTILINE)
    (year,) = re.findall(r"^    year: (\d+)$", cited, re.MULTILINE)
    assert f"title     = {{{title}}}" in readme and f"year      = {{{year}}}" in readme
    authors = re.findall(r'- family-names: "(.*)"\n +given-names: "(.*)"', cited)
    assert " and ".join(map(", ".join, authors)).replace("é", "{\\'e}") in readme
