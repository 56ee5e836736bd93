"""The example on the page on developing, done as the page says."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "developing.md").read_text(encoding="utf-8")
RUN = """--no-cuda --total-timesteps 160 --buffer-size 200 --learning-starts 40 --batch-size 4 --head-width 8
--injection-step 100 --intervention noise --noise-scale 0.2 --plasticity-frequency 0""".split()


def example():
    """The path and text of the file in the example, and the line that goes into the list."""
    (file,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    line = re.search(r"of `alternatives/__init__.py`:\n\n```text\n(.*?)```", PAGE, re.DOTALL).group(1)
    path = re.search(r"The file, `(.*)`:", PAGE).group(1)
    return path, file, line


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with the example's alternative in it."""
    project = tmp_path_factory.mktemp("project")
    for name in ("support", "alternatives", "analysis"):
        shutil.copytree(ROOT / name, project / name)
    for name in ("dqn_injection_atari.py", "requirements.txt"):
        shutil.copy(ROOT / name, project)
    path, file, line = example()
    (project / path).write_text(file, encoding="utf-8")
    names = project / "alternatives" / "__init__.py"
    before = names.read_text(encoding="utf-8")
    assert before.count("FILES = (\n") == 1
    names.write_text(before.replace("FILES = (\n", f"FILES = (\n{line}"), encoding="utf-8")
    return project


def python(project, *words):
    ended = subprocess.run(
        [sys.executable, *words], cwd=project, capture_output=True, encoding="utf-8", check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.slow
def test_a_setting_of_ones_own_keeps_no_other_arms_apart(project):
    """Also where it does not say with which intervention it has an effect."""
    path, file, _ = example()
    annotated = 'Annotated[Positive, OnlyWith("intervention", ("noise", "none"))]'
    assert file.count(annotated) == 1
    code = """
import dqn_injection_atari as script
from analysis.arms import setting
for intervention in ("noise", "injection", "none"):
    args = script.Args(intervention=intervention, injection_step=(5,), noise_scale=0.3)
    print(setting(args)["noise_scale"])
"""
    (project / path).write_text(file.replace(annotated, "float"), encoding="utf-8")
    try:
        assert python(project, "-c", code).split() == ["0.3", "None", "None"]
    finally:
        (project / path).write_text(file, encoding="utf-8")


@pytest.mark.slow
def test_the_pages_alternative_takes_its_file_and_one_line_and_runs(project):
    printed = python(project, "dqn_injection_atari.py", *RUN)
    (delta,) = re.findall(
        r"^step 100: noise added to the encoder, largest change of Q over \d+ observations: (\S+)$",
        printed,
        re.M,
    )
    assert float(delta) > 0


@pytest.mark.slow
def test_flags_forks_and_comparisons_know_the_pages_alternative(project):
    code = """
import dqn_injection_atari as script
from analysis import arms, audited_arms
print("noise" in audited_arms.arms())
args = script.Args(intervention="noise", injection_step=(5,), noise_scale=0.3)
print(args.noise_scale, "noise_scale" in script.FORKABLE, arms.at_steps("noise", (5,)))
"""
    assert python(project, "-c", code).strip() == "True\n0.3 True noise at 5"
