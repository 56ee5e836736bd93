"""The workflow is one that GitHub can read, and covers what the README says; what it calls does its work."""

import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

import dqn_injection_atari

ROOT = Path(dqn_injection_atari.__file__).parent
(JOB,) = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"].values()
SYSTEMS = {system["runner"]: system["arguments"] for system in JOB["strategy"]["matrix"]["system"]}
PYTHONS = JOB["strategy"]["matrix"]["python"]


def test_linux_runs_the_whole_suite_and_macos_that_of_daily_work():
    assert SYSTEMS == {"ubuntu-latest": "", "macos-latest": '-m "not slow"'}
    assert JOB["runs-on"] == "${{ matrix.system.runner }}"
    versions = [
        step["with"]["python-version"] for step in JOB["steps"] if "setup-python" in step.get("uses", "")
    ]
    assert versions == ["${{ matrix.python }}"]
    assert [step["run"] for step in JOB["steps"] if "run" in step] == [
        ".ci/run ${{ matrix.system.arguments }}"
    ]


def test_the_readme_names_the_pythons_that_the_workflow_runs():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    oldest, newest = PYTHONS
    assert f"Python {oldest} to {newest}" in readme
    assert f"Linux and macOS, each with {oldest} and {newest}" in readme


@pytest.fixture
def checks(tmp_path):
    """Runs a copy of .ci/run with these arguments. Its commands are stand-ins, of which `broken` fails.

    Returns its exit status and the commands that it gave.
    """
    shutil.copytree(ROOT / ".ci", tmp_path / "project/.ci")
    tools = tmp_path / "tools"
    tools.mkdir()
    calls = tmp_path / "calls"
    runs = itertools.count()

    def run(*arguments, broken=None):
        temporary = tmp_path / f"temporary-{next(runs)}"
        temporary.mkdir()
        for name in ("python3", "pip", "ruff", "mypy", "pytest"):
            lines = ["#!/bin/sh", f'echo "{name} $# $*" >> "{calls}"']
            if name == "python3":
                lines += ['mkdir -p "$3/bin"', 'touch "$3/bin/activate"']
            if name == broken:
                lines += ["exit 1"]
            (tools / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
            (tools / name).chmod(0o755)
        calls.write_text("", encoding="utf-8")
        environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", "TMPDIR": str(temporary)}
        status = subprocess.run([tmp_path / "project/.ci/run", *arguments], env=environment).returncode
        assert list(temporary.iterdir()) == [], "the environment is removed"
        return status, calls.read_text(encoding="utf-8").splitlines()

    return run


def test_the_checks_are_style_types_and_tests_and_arguments_go_to_pytest(checks):
    status, calls = checks("-m", "not slow")
    assert status == 0 and re.fullmatch(r"python3 3 -m venv /.+", calls[0])
    assert calls[1:] == [
        "pip 5 install --quiet --disable-pip-version-check -r requirements-dev.txt",
        "ruff 3 format --check .",
        "ruff 2 check .",
        "mypy 0 ",
        "pytest 2 -m not slow",
    ]
    assert checks()[1][-1] == "pytest 0 "


@pytest.mark.parametrize("broken", ["python3", "pip", "ruff", "mypy", "pytest"])
def test_the_first_check_that_fails_ends_them(checks, broken):
    status, calls = checks(broken=broken)
    assert status != 0 and calls[-1].startswith(f"{broken} ")
