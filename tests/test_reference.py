"""docs/keys.md is what conf/ says: written anew it is the same, and Hydra composes no key that it lacks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir

from prune_lab.commands.reference import read_option, write_reference
from prune_lab.config import parts as config
from prune_lab.results.summary import flatten

PAGE = (ROOT / "docs" / "keys.md").read_text(encoding="utf-8")
CELLS = [line.replace("\\|", "¦").strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| `")]
ROWS = {cells[0].strip("`"): cells for cells in CELLS if len(cells) == 4}


def test_the_page_is_up_to_date() -> None:
    assert write_reference() == PAGE, "run: python -m prune_lab.commands.reference > docs/keys.md"


def test_every_key_has_a_type_a_default_and_a_meaning() -> None:
    assert len(ROWS) > 80
    for key, (_, kind, default, meaning) in ROWS.items():
        assert kind, key
        assert default, key
        assert meaning, key


@pytest.mark.parametrize("group", config.GROUPS)
def test_hydra_composes_no_key_that_the_page_lacks(group: str) -> None:
    config.register_schema()
    with initialize_config_dir(config.CONF_DIR, version_base="1.3"):
        for path in sorted(Path(config.CONF_DIR, group).glob("*.yaml")):
            assert f"| `{path.stem}` | " in PAGE
            composed = flatten({group: _plain(compose("config", [f"{group}={path.stem}"])[group])})
            for key, value in composed.items():
                assert key in ROWS, key
                if not str(value).startswith("$"):
                    assert _yaml(value) in ROWS[key][2], f"{key}={value!r} of {path.name}"


def test_the_root_keys() -> None:
    for field in dataclasses.fields(config.Settings):
        assert ROWS[field.name][1:3] == [str(field.type), f"`{_yaml(field.default)}`"]


def test_a_preset_has_the_keys_of_what_it_builds_on(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "# The base.\n_target_: prune_lab.post.none.NoPost\ngroup_size: 32   # of groups\nname: ???\n"
    )
    (tmp_path / "preset.yaml").write_text('# A preset.\ndefaults: [base]\nname: "a # b"\n')
    option = read_option(tmp_path / "preset.yaml")
    assert (option.says, option.target) == ("A preset.", "prune_lab.post.none.NoPost")
    assert option.keys == {"group_size": ("32", "of groups"), "name": ('"a # b"', "")}
    assert option.hint("group_size") is int


def _plain(node: object) -> dict[str, object]:
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(node)  # type: ignore[arg-type]
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _yaml(value: object) -> str:
    """A value as YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{', '.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)
