"""The documents say what is so: their commands are composed, their links lead somewhere, the README's layout exists."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, Cli
from gguf_files import make_gguf
from hydra._internal import hydra as hydra_of_main
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from prune_lab.__main__ import SUBCOMMANDS
from prune_lab.compatibility import check_parts
from prune_lab.config import command_line, composing, recipes
from prune_lab.config import parts as config
from prune_lab.config.overrides import parse
from prune_lab.report.__main__ import _parser as report_parser

README = (ROOT / "README.md").read_text(encoding="utf-8")
# Pages of docs/ about a topic: each shows how to try it.
TOPICS = ("training", "processes", "offloading", "exports", "sweeps")
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    *sorted(f"{folder}/{path.name}" for folder in ("docs", "experiments") for path in (ROOT / folder).glob("*.md")),
)


# Commands.

PROGRAM = re.compile(r"(?:-m +prune_lab(?P<module>\.report)?|(?<![\w./-])prune-lab)(?![\w.\[/-])")
CODE = re.compile(r"^```(?P<language>\w*)\n(?P<block>.*?)^```|(?<!`)`(?P<span>[^`]+)`", re.DOTALL | re.MULTILINE)


def commands_of(text: str) -> list[str]:
    """Commands that run prune_lab, in blocks and within sentences: from the program's name on."""
    found = []
    for code in CODE.finditer(text):
        if code["block"] is None:
            lines = [" ".join(code["span"].split())]
        else:
            lines = code["block"].replace("\\\n", " ").splitlines() if code["language"] in ("", "bash") else []
        for line in lines:
            found += [line[match.start() :] for match in PROGRAM.finditer(line)]
    return found


def words_of(command: str) -> tuple[str, list[str]]:
    """The program (prune_lab, or prune_lab.report) and its arguments, as a shell gives them."""
    match = PROGRAM.match(command)
    assert match is not None
    arguments = command[match.end() :]
    if command.count(")") > command.count("("):  # eval "$(prune-lab -sc install=bash)"
        arguments = arguments[: arguments.index(")")]
    words = shlex.split(arguments, comments=True)
    end = next((at for at, word in enumerate(words) if word in ("|", "&&", ">", ";")), len(words))
    return f"prune_lab{match['module'] or ''}", words[:end]


CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
# Options of the worked examples, which are there in a copy alone: tests/test_contributing.py runs them.
EXAMPLES = {f"{group}={name}" for group, name in re.findall(r"`conf/(\w+)/(\w+)\.yaml`:\n", CONTRIBUTING)}
COMMANDS = [
    (name, command)
    for name in DOCUMENTS
    for command in dict.fromkeys(commands_of((ROOT / name).read_text(encoding="utf-8")))
    if not EXAMPLES & set(command.split())
]


@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_every_command_of_the_documents_is_understood(
    name: str, command: str, cli: Cli, gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run's jobs are composed and their parts built; what only answers, answers. No command is skipped."""
    program, words = words_of(command)
    words = [re.sub(r"^(model\.name|recovery\.teacher)=.+\.gguf$", rf"\1={gguf}", word) for word in words]
    if program == "prune_lab.report":
        report_parser().parse_args(words)
    elif words[:1] == ["suggest"]:
        build_jobs(words[1:], monkeypatch)
    elif words and words[0] in SUBCOMMANDS:
        for word in words[1:]:
            if words[0] == "sync":  # it wants a folder that is there
                (tmp_path / word).mkdir(parents=True)
        answered(cli, words)
    elif {"--help", "--version", "--cfg", "-sc"} & set(words):
        answered(cli, words)
    else:
        build_jobs(words, monkeypatch)


def answered(cli: Cli, words: list[str]) -> None:
    done = cli(*words)
    assert (done.returncode, bool(done.stdout)) == (0, True), done.stderr


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model in the place of the GGUF files that commands name: it must be there."""
    return make_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf")


def build_jobs(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Composes what a command line would run as the program does, and builds its parts: all jobs of a typed sweep, of
    a recipe's the first (tests/test_recipes.py has the others)."""
    monkeypatch.chdir(ROOT)
    # Commands name llama.cpp, which is compiled for minutes and is not among the packages of the tests.
    monkeypatch.setattr("prune_lab.measure.engine.find_spec", bool)
    arguments = command_line.in_order(words)
    recipes.check(arguments)
    command_line.check_overrides(arguments)
    config.register_schema()
    known, _ = get_args_parser().parse_known_args(arguments)
    path = create_config_search_path(config.CONF_DIR)
    if known.config_dir is not None:
        path.prepend("command-line", f"file://{ROOT / known.config_dir}", SearchPathQuery(provider="schema"))
    name = known.config_name or "config"
    monkeypatch.setattr(hydra_of_main, "ConfigLoaderImpl", composing.Loader)
    try:
        hydra = hydra_of_main.Hydra.create_main_hydra2("prune_lab", path)
        mode = RunMode.MULTIRUN if known.multirun else hydra.get_mode(name, known.overrides)
        loader = hydra.config_loader
        master = loader.load_configuration(name, known.overrides, mode or RunMode.RUN)
        if mode != RunMode.MULTIRUN:
            check(master)
            return
        params = [f"{key}={value}" for key, value in (master.hydra.sweeper.get("params") or {}).items()]
        asked = [first_of_interval(parse(word)) for word in [*params, *master.hydra.overrides.task]]
        jobs = BasicSweeper.split_arguments(asked, None)[0]
        for job in jobs if known.config_name is None else jobs[:1]:
            check(loader.load_sweep_config(master, list(job)))
    finally:
        GlobalHydra.instance().clear()


def check(composed: DictConfig) -> None:
    """Raises Refused where a job's parts cannot be built, or do not fit together."""
    OmegaConf.set_struct(composed, False)
    choices = {str(group): str(option) for group, option in composed.hydra.runtime.choices.items()}
    del composed["hydra"]  # as Hydra does before it calls the job
    check_parts(config.build_parts(composed), choices)


def first_of_interval(override: Override) -> Override:
    """Optuna's intervals have no list of values: one of them stands for all."""
    if not override.is_interval_sweep():
        return override
    return parse(f"{override.get_key_element()}={override.value().start}")


def test_only_the_examples_of_contributing_are_left_to_another_test() -> None:
    left = {command for name in DOCUMENTS for command in commands_of((ROOT / name).read_text(encoding="utf-8"))}
    left -= {command for _, command in COMMANDS}
    assert left
    assert left <= set(commands_of(CONTRIBUTING))


@pytest.mark.parametrize("name", sorted(set(DOCUMENTS) - {"docs/keys.md"}))  # its generated rows are no commands
def test_no_command_is_overlooked(name: str) -> None:
    """As often as the words stand in a document, counted without looking at its blocks."""
    text = (ROOT / name).read_text(encoding="utf-8")
    python = re.sub(r"^```(?:python|yaml|diff)\n.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    named = len(re.findall(r"-m\s+prune_lab(?:\.report)?(?![\w.])|(?<![\w./-])prune-lab(?![\w\[/-])", python))
    assert len(commands_of(text)) == named


@pytest.mark.parametrize("name", ["README.md", *(f"docs/{topic}.md" for topic in TOPICS)])
def test_a_page_about_something_to_do_shows_a_command_for_it(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert commands_of("".join(re.findall(r"^```bash\n.*?^```\n", text, flags=re.DOTALL | re.MULTILINE)))


# Links.


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```|`[^`\n]+`", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found: Counter[str] = Counter()
    slugs = set()
    for heading in re.findall(r"^#+ +(.+?) *$", text, flags=re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        slugs.add(slug if not found[slug] else f"{slug}-{found[slug]}")
        found[slug] += 1
    return slugs


def broken_links(path: Path) -> list[str]:
    """Links of a page to files that are not there, or to headings that their page does not have."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(path.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = path.parent / file if file else path
        if not there.exists() or (anchor and (there.suffix != ".md" or anchor not in anchors(there))):
            broken.append(f"{path.relative_to(ROOT)}: {target}")
    return broken


def test_every_link_within_the_project_leads_to_a_file_and_a_heading() -> None:
    pages = [*DOCUMENTS, "CHANGELOG.md", "tests/benchmarks/README.md"]
    assert [link for name in pages for link in broken_links(ROOT / name)] == []


def test_broken_links_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "# A *page*: `x`, and [more](other.md)\n## Twice\n## Twice\n"
        "[1](#a-page-x-and-more) [2](#twice-1) [3](https://a.b/#c) `[4](gone.md)` [5](page.md#twice) ![6](page.md)\n"
        "[7](gone.md) [8](#twice-2) [9](page.md#A-page-x-and-more)\n```\n# No heading\n```\n"
        "[10](#no-heading) [11](other.md#x)\n"
    )
    targets = ["other.md", "gone.md", "#twice-2", "page.md#A-page-x-and-more", "#no-heading", "other.md#x"]
    assert broken_links(page) == [f"page.md: {target}" for target in targets]


# The README.

LAYOUT = re.findall(r"(?<![\w.])([a-z_]+\.(?:py|yaml|md)|[a-z_]+/)", README.split("## Layout")[1].split("```")[1])


def test_what_the_layout_lists_exists() -> None:
    for name in LAYOUT:
        places = [ROOT / folder / name for folder in ("", "prune_lab", "conf", "docs", "tests")]
        places += (ROOT / "prune_lab").glob(f"*/{name}")
        assert any(place.exists() for place in places), name


def test_the_layout_lists_every_folder_and_every_module_of_the_root_once() -> None:
    package = ROOT / "prune_lab"
    there = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    there |= {f"{path.parent.name}/" for path in [*package.glob("*/__init__.py"), *ROOT.glob("*/*.py")]}
    there |= {f"{name}/" for name in ("conf", "docs", "experiments")}
    assert {name: LAYOUT.count(name) for name in there} == dict.fromkeys(there, 1)


def test_it_names_every_option_in_the_row_of_its_group() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*)$", README.split("## Options")[1].split("\n## ")[0], re.MULTILINE))
    options = [(path.parent.name, path.stem) for path in sorted((ROOT / "conf").glob("*/*.yaml"))]
    missing = [f"{group}={name}" for group, name in options if f"`{name}`" not in rows.get(group, "")]
    assert missing == []


def test_ci_runs_the_test_command() -> None:
    block = README.split("<!-- tests: begin -->")[1].split("<!-- tests: end -->")[0]
    command = block.strip().strip("`").removeprefix("bash").strip()
    assert command.endswith("pytest")
    assert "tests: begin" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
