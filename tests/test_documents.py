"""README and docs: their commands work, what they name exists, and their lists are those of the code."""

import json
import re
import shlex
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import tyro
from conftest import make_learner, random_batch

import compare
import dqn_injection_atari
from dqn_injection_atari import FORKABLE, PRESETS, Args, CommandLine, parse_args, plasticity_measures

ROOT = Path(dqn_injection_atari.__file__).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OWN_FLAGS = {field.name for field in fields(CommandLine)}
OTHERS_FLAGS = {"help", "logdir", "samples_per_plugin"}  # of TensorBoard; and everyone's

OF_TOOLS = {  # flags of ruff, of Ray and of Slurm; and --arm, which is taken off the command line by hand
    "developing.md": {"force_exclude", "abort"},
    "sweeps.md": set(
        "arm head port include_dashboard block nodes ntasks overlap exclusive gpus_per_node time requeue signal".split()
    )
    | {"ntasks_per_node"},
}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def commands(page):
    """The commands in a page's blocks of bash, one each."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", "").splitlines()
    return [
        part for line in lines for command in line.split("&&") if (part := command.split(" #")[0].strip())
    ]


def slug(heading):
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def trains(command):
    return "dqn_injection_atari.py" in command and "--help" not in command


def in_tables(page, pattern):
    """What `pattern` finds in the first cells of a page's tables."""
    return [
        found
        for cell in re.findall(r"^\|([^|]*)\|", page.read_text(encoding="utf-8"), re.MULTILINE)
        for found in re.findall(pattern, cell)
    ]


def flags_of_other_scripts():
    """Names of the fields that compare.py and the benchmarks take from their command lines."""
    sources = [
        ROOT / "compare.py",
        ROOT / "sweep.py",
        *(ROOT / "analysis").glob("*.py"),
        *(ROOT / "benchmarks").glob("*.py"),
    ]
    return {
        name
        for path in sources
        for name in re.findall(r"^    (\w+): ", path.read_text(encoding="utf-8"), re.MULTILINE)
    }


def test_there_is_a_page_per_question_and_the_readme_links_to_each():
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)\)", PAGES[0].read_text(encoding="utf-8")))
    assert linked == {f"docs/{page.name}" for page in PAGES[1:]} and len(linked) == 9


def test_every_training_command_parses(monkeypatch):
    run, paper = asdict(Args()), asdict(Args(**PRESETS["paper"]))
    for name in ("run.json", "checkpoint-5000000/manifest.json", "checkpoint-100000/manifest.json"):
        Path("runs/FOLDER", name).parent.mkdir(parents=True, exist_ok=True)
        Path("runs/FOLDER", name).write_text(json.dumps({"args": run}), encoding="utf-8")
    Path("runs/FOLDER/checkpoint-12500000").mkdir()
    Path("runs/FOLDER/checkpoint-12500000/manifest.json").write_text(
        json.dumps({"args": paper}), encoding="utf-8"
    )
    parsed = [shlex.split(command) for page in PAGES for command in commands(page) if trains(command)]
    assert len(parsed) >= 20
    for words in parsed:
        monkeypatch.setattr(sys, "argv", words[words.index("dqn_injection_atari.py") :])
        parse_args()


def test_every_comparing_command_parses():
    parsed = [shlex.split(command) for page in PAGES for command in commands(page) if "compare.py" in command]
    assert len(parsed) >= 4
    for words in parsed:
        tyro.cli(compare.Settings, args=words[words.index("compare.py") + 1 :])


@each_page
def test_every_other_command_is_one_that_a_reader_has(page):
    begins = r"(python3? |\. \.venv/bin/activate|pip install -r |pytest( |$)|tensorboard --logdir runs|#)"
    for command in commands(page):
        assert re.match(begins, command), command
        for name in re.findall(r"(?<![\w/])(?!runs/)[\w./-]+\.(?:txt|py)\b", command):
            assert (ROOT / name).exists(), command


@each_page
def test_every_flag_that_is_named_exists(page):
    named = {
        flag.replace("-", "_")
        for flag in re.findall(r"(?<![\w-])--([a-z][\w-]+)", page.read_text(encoding="utf-8"))
    }
    known = OWN_FLAGS | {f"no_{name}" for name in OWN_FLAGS} | flags_of_other_scripts() | OTHERS_FLAGS
    assert named <= known | OF_TOOLS.get(page.name, set())


@each_page
def test_every_file_and_section_that_is_linked_exists(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(((?!http)[^)]+)\)|src=\"((?!http)[^\"]+)\"", text)
    for target in (a or b for a, b in links):
        name, _, section = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        if section:
            assert section in {
                slug(h) for h in re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            }, target


@each_page
def test_no_placeholder_is_left(page):
    assert not re.search(r"^[A-Z_]{4,}$|TODO|FIXME", page.read_text(encoding="utf-8"), re.MULTILINE)


@each_page
def test_every_row_of_a_table_has_as_many_cells_as_its_head(page):
    for table in re.findall(r"(?:^\|.*\|\n)+", page.read_text(encoding="utf-8"), re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}
        assert len(widths) == 1, table.splitlines()[0]


def test_what_a_fork_may_change_is_listed_as_in_the_script():
    text = (ROOT / "docs/nothing-is-lost.md").read_text(encoding="utf-8")
    listed = text.partition("Only these may differ:")[2].partition(".\n")[0]
    assert tuple(re.findall(r"`(\w+)`", listed)) == FORKABLE


def test_every_curve_of_training_and_evaluation_is_explained_and_no_other():
    page, learner = ROOT / "docs/metrics.md", make_learner()
    learner.update(random_batch())
    sources = "".join(
        path.read_text(encoding="utf-8")
        for path in (ROOT / "dqn_injection_atari.py", *(ROOT / "support").glob("*.py"))
    )
    logged = set(re.findall(r'"((?:charts|injection|eval)/\w+)"', sources))
    logged |= {f"losses/{name}" for name in learner.losses.means(4, 4)}
    assert len(logged) == 12
    assert set(in_tables(page, r"`((?:charts|injection|eval|losses)/\w+)`")) == logged


def test_every_measure_of_plasticity_is_explained_and_no_other():
    explained = in_tables(ROOT / "docs/metrics.md", r"`plasticity/([\w/{}]+)`")
    patterns = [re.compile(re.sub(r"\{\w+\}", r"\\w+", name)) for name in explained]
    learner = make_learner()
    measured = set(plasticity_measures(learner, random_batch()))
    learner.inject(10)
    measured |= set(plasticity_measures(learner, random_batch()))
    assert len(measured) > 20
    for name in measured:
        assert any(pattern.fullmatch(name) for pattern in patterns), name
    for pattern in patterns:
        assert any(pattern.fullmatch(name) for name in measured), pattern


@pytest.mark.parametrize("folder", ["support", "analysis", "benchmarks"])
def test_the_readmes_map_names_every_module_and_no_other(folder):
    row = re.search(
        rf"^\| \[`{folder}/`\]\({folder}\) \|(.*)\|$", PAGES[0].read_text(encoding="utf-8"), re.MULTILINE
    )
    assert row is not None
    named = set(re.findall(r"`(\w+\.py)`", row.group(1)))
    assert named == {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}


def test_the_presets_numbers_are_those_of_the_page_on_deviations():
    text = (ROOT / "docs/deviations.md").read_text(encoding="utf-8")
    named = (
        "50M steps",
        "12.5M steps",
        "2.5e-4",
        "30,000 steps",
        "50,000 steps",
        "250,000 steps",
        "125,000 steps",
        "over 1M steps",
    )
    assert all(name in text for name in named)
    paper = PRESETS["paper"]
    assert (paper["total_timesteps"], paper["injection_step"]) == (50_000_000, (12_500_000,))
    assert (paper["learning_rate"], paper["target_network_frequency"], paper["learning_starts"]) == (
        2.5e-4,
        30_000,
        50_000,
    )
    assert (paper["eval_frequency"], paper["eval_steps"], paper["moments"]) == (
        250_000,
        125_000,
        "keep",
    )
    assert paper["exploration_fraction"] * paper["total_timesteps"] == 1_000_000


def test_the_first_run_of_the_readme_takes_as_long_as_it_says_and_has_every_part_in_it(monkeypatch):
    """On two cores with AVX2 alone, which make 91 steps/s while learning with 8 games, 71 after an injection."""
    (section,) = re.findall(
        r"^## In two minutes\n(.*?)^## ", PAGES[0].read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    (command,) = re.findall(r"```bash\n(.*?)\n```", section)
    monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
    args = parse_args()
    (injection,) = args.injection_step
    learning, injected = injection - args.learning_starts, args.total_timesteps - injection
    assert (
        learning > 0
        and injected > 0
        and args.save_model
        and args.intervention == "injection"
        and args.num_envs == 8
    )
    assert learning / 91 + injected / 71 < 90, (
        "and half a minute to start, and to play before learning starts"
    )
    said = (
        f"step {injection:,}: plasticity injected",
        f"of {args.total_timesteps:,}",
        f"checkpoint-{args.total_timesteps}",
    )
    assert all(words in section for words in (*said, "--evaluate runs/"))
