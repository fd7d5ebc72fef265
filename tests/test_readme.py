"""The README says what is so: its commands compose, its layout exists, CI runs its test command."""

from __future__ import annotations

import re
import shlex

from conftest import ROOT
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from prune_lab.config import parts as config

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"python -m prune_lab ([^\n#`]+)", README)


def test_every_command_composes() -> None:
    assert len(COMMANDS) == README.count("python -m prune_lab ")
    config.register_schema()
    for command in COMMANDS:
        words = [word for word in shlex.split(command) if word != "-m"]
        if "--help" in words:
            continue
        if "-cn" in words:
            assert (ROOT / "experiments" / f"{words[words.index('-cn') + 1]}.yaml").is_file(), command
            continue
        overrides = [word.split(",")[0] if word.startswith("amount=") else word for word in words]
        with initialize_config_dir(config.CONF_DIR, version_base="1.3"):
            assert "amount" in OmegaConf.to_container(compose("config", overrides)), command


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


def test_it_names_every_option() -> None:
    """In its group's row of the table of groups, in a row of its own where that row says so, or as GROUP=NAME."""
    rows = dict[str, str]()
    for line in README.splitlines():
        if line.startswith("| `"):
            rows.setdefault(line.split("|")[1].strip(" `"), line)
    for path in sorted((ROOT / "conf").glob("*/*.yaml")):
        group, name = path.parent.name, path.stem
        own = group == "method" and name in rows
        assert own or f"`{name}`" in rows[group] or re.search(rf"\b{group}={name}\b", README), f"{group}={name}"


def test_ci_runs_the_test_command() -> None:
    block = README.split("<!-- tests: begin -->")[1].split("<!-- tests: end -->")[0]
    command = block.strip().strip("`").removeprefix("bash").strip()
    assert command.endswith("pytest")
    assert "tests: begin" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
