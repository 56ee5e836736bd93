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
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
OWN_FLAGS = {field.name for field in fields(CommandLine)}
OTHERS_FLAGS = {"help", "logdir", "samples_per_plugin"}  # everyone's, and of TensorBoard
OF_RAY = {"head", "port", "include_dashboard", "block", "num_cpus", "num_gpus", "memory", "grace_period"}
OF_SLURM = {"nodes", "ntasks", "ntasks_per_node", "overlap", "exclusive", "gpus_per_node"}
OF_SLURM |= {"time", "requeue", "signal", "mem"}
OF_ONE_PAGE = {
    "developing.md": {"noise_scale"},  # of the alternative that it adds
    "sweeps.md": OF_RAY | OF_SLURM | {"arm"},  # --arm is taken off the command line by hand
}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def text_of(path):
    return path.read_text(encoding="utf-8")


def commands(page):
    """The commands in a page's blocks of bash, one each."""
    blocks = re.findall(r"```bash\n(.*?)```", text_of(page), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        for command in line.split("&&"):
            without_comment = command.split(" #")[0].strip()
            if without_comment:
                found.append(without_comment)
    return found


def commands_of(script):
    """The commands of all pages that start this script, in words."""
    found = []
    for page in PAGES:
        for command in commands(page):
            if script in command:
                found.append(shlex.split(command))
    return found


def headings(page):
    return re.findall(r"^#+ (.*)$", text_of(page), re.MULTILINE)


def slug(heading):
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def tables_in(text):
    """The tables in a text, each a list of lines: its head, a ruler, and its rows."""
    return [table.splitlines() for table in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)]


def in_tables(page, pattern):
    """What `pattern` finds in the first cells of a page's tables."""
    found = []
    for first_cell in re.findall(r"^\|([^|]*)\|", text_of(page), re.MULTILINE):
        found += re.findall(pattern, first_cell)
    return found


def flags_of_other_scripts():
    """Names of the fields that compare.py, sweep.py and the benchmarks take from their command lines."""
    sources = [ROOT / "compare.py", ROOT / "sweep.py"]
    for folder in ("analysis", "orchestration", "benchmarks"):
        sources += (ROOT / folder).glob("*.py")
    names = set()
    for path in sources:
        names.update(re.findall(r"^    (\w+): ", text_of(path), re.MULTILINE))
    return names


def test_there_is_a_page_per_question_and_the_readme_links_to_each():
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)\)", text_of(README)))
    assert linked == {f"docs/{page.name}" for page in PAGES[1:]}
    assert len(linked) == 12


@each_page
def test_no_line_is_wider_than_400_columns(page):
    for number, line in enumerate(text_of(page).splitlines(), start=1):
        assert len(line) <= 400, f"line {number}: {line[:60]}..."


def test_the_readme_has_one_short_table_of_results_each_with_its_link():
    results = text_of(README).partition("\n## Results so far\n")[2].partition("\n## ")[0]
    (table,) = tables_in(results)
    _head, _ruler, *rows = table
    assert 1 <= len(rows) <= 6
    for row in rows:
        words = row.replace("|", " ").split()
        assert len(words) <= 25, row
        assert "](docs/" in row, row


def test_every_training_command_parses(monkeypatch):
    settings = {
        "runs/FOLDER/run.json": Args(),
        "runs/FOLDER/checkpoint-100000/manifest.json": Args(injection_step=(100_000,)),
        "runs/FOLDER/checkpoint-5000000/manifest.json": Args(injection_step=(5_000_000,)),
        "runs/FOLDER/checkpoint-12500000/manifest.json": Args(**PRESETS["paper"]),
    }
    for name, args in settings.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(json.dumps({"run": "abc", "args": asdict(args)}), encoding="utf-8")
    trainings = [words for words in commands_of("dqn_injection_atari.py") if "--help" not in words]
    assert len(trainings) >= 20
    for words in trainings:
        monkeypatch.setattr(sys, "argv", words[words.index("dqn_injection_atari.py") :])
        parse_args()


def test_every_comparing_command_parses():
    comparisons = commands_of("compare.py")
    assert len(comparisons) >= 4
    for words in comparisons:
        tyro.cli(compare.Settings, args=words[words.index("compare.py") + 1 :])


@each_page
def test_every_other_command_is_one_that_a_reader_has(page):
    tools = r"python3? |\. \.venv/bin/activate|pip install -r |pytest( |$)|tensorboard --logdir runs|#"
    begins = rf"(OMP_NUM_THREADS=1 )?({tools})"
    for command in commands(page):
        assert re.match(begins, command), command
        for name in re.findall(r"(?<![\w/])(?!runs/)[\w./-]+\.(?:txt|py)\b", command):
            assert (ROOT / name).exists(), command


@each_page
def test_every_flag_that_is_named_exists(page):
    flags = re.findall(r"(?<![\w-])--([a-z][\w-]+)", text_of(page))
    named = {flag.replace("-", "_") for flag in flags}
    switched_off = {f"no_{name}" for name in OWN_FLAGS}
    known = OWN_FLAGS | switched_off | flags_of_other_scripts() | OTHERS_FLAGS
    assert named <= known | OF_ONE_PAGE.get(page.name, set())


@each_page
def test_every_file_and_section_that_is_linked_exists(page):
    for in_markdown, in_html in re.findall(r"\]\(((?!http)[^)]+)\)|src=\"((?!http)[^\"]+)\"", text_of(page)):
        target = in_markdown or in_html
        name, _, section = target.partition("#")
        path = page.parent / name if name else page
        assert path.exists(), target
        if section:
            assert section in map(slug, headings(path)), target


@each_page
def test_no_placeholder_is_left(page):
    assert not re.search(r"^[A-Z_]{4,}$|TODO|FIXME", text_of(page), re.MULTILINE)


@each_page
def test_every_row_of_a_table_has_as_many_cells_as_its_head(page):
    for table in tables_in(text_of(page)):
        widths = {len(re.findall(r"(?<!\\)\|", row)) for row in table}
        assert len(widths) == 1, table[0]


def test_what_a_fork_may_change_is_listed_as_in_the_script():
    text = text_of(ROOT / "docs/nothing-is-lost.md")
    listed = text.partition("Only these may differ:")[2].partition(".\n")[0]
    assert tuple(re.findall(r"`(\w+)`", listed)) == FORKABLE


def test_every_curve_of_training_and_evaluation_is_explained_and_no_other():
    learner = make_learner()
    learner.update(random_batch())
    paths = [ROOT / "dqn_injection_atari.py", *(ROOT / "support").glob("*.py")]
    sources = "".join(text_of(path) for path in paths)
    logged = set(re.findall(r'"((?:charts|injection|eval)/\w+)"', sources))
    logged |= {f"losses/{name}" for name in learner.losses.means(4, 4)}
    assert len(logged) == 12
    assert set(in_tables(ROOT / "docs/metrics.md", r"`((?:charts|injection|eval|losses)/\w+)`")) == logged


def test_every_measure_of_plasticity_is_explained_and_no_other():
    explained = in_tables(ROOT / "docs/metrics.md", r"`plasticity/([\w/{}]+)`")
    patterns = [re.compile(re.sub(r"\{\w+\}", r"\\w+", name)) for name in explained]
    learner = make_learner()
    measured = set(plasticity_measures(learner, random_batch()))
    learner.inject(10)
    measured |= set(plasticity_measures(learner, random_batch()))
    assert len(measured) > 20
    measured.add("policy_churn")  # is measured by itself, before a sync
    for name in measured:
        assert any(pattern.fullmatch(name) for pattern in patterns), name
    for pattern in patterns:
        assert any(pattern.fullmatch(name) for name in measured), pattern


@pytest.mark.parametrize("folder", ["alternatives", "support", "analysis", "orchestration", "benchmarks"])
def test_the_readmes_map_names_every_module_and_no_other(folder):
    row = re.search(rf"^\| \[`{folder}/`\]\({folder}\) \|(.*)\|$", text_of(README), re.MULTILINE)
    assert row is not None
    named = set(re.findall(r"`(\w+\.py)`", row.group(1)))
    assert named == {path.name for path in (ROOT / folder).glob("*.py")} - {"__init__.py"}


def test_the_presets_numbers_are_those_of_the_page_on_deviations():
    text = text_of(ROOT / "docs/deviations.md")
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
    assert paper["total_timesteps"] == 50_000_000
    assert paper["injection_step"] == (12_500_000,)
    assert paper["learning_rate"] == 2.5e-4
    assert paper["target_network_frequency"] == 30_000
    assert paper["learning_starts"] == 50_000
    assert paper["eval_frequency"] == 250_000
    assert paper["eval_steps"] == 125_000
    assert paper["moments"] == "keep"
    assert paper["exploration_fraction"] * paper["total_timesteps"] == 1_000_000


def test_the_first_run_of_the_readme_takes_as_long_as_it_says_and_has_every_part_in_it(monkeypatch):
    """On two cores with AVX2 alone: 91 steps/s while learning with 8 games, 71 after an injection."""
    section = text_of(README).partition("\n## In two minutes\n")[2].partition("\n## ")[0]
    (command,) = re.findall(r"```bash\n(.*?)\n```", section)
    monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
    args = parse_args()
    (injection,) = args.injection_step
    assert args.learning_starts < injection < args.total_timesteps
    assert args.intervention == "injection"
    assert args.save_model
    assert args.num_envs == 8
    # beside half a minute to start, and to play before learning starts
    seconds = (injection - args.learning_starts) / 91 + (args.total_timesteps - injection) / 71
    assert seconds < 90
    for words in (
        f"step {injection:,}: plasticity injected",
        f"of {args.total_timesteps:,}",
        f"checkpoint-{args.total_timesteps}",
        "--evaluate runs/",
    ):
        assert words in section
