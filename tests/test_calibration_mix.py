"""A mix of calibration texts: how many windows of each, which, in which order, and what is said of them."""

from __future__ import annotations

import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli, story
from hypothesis import given
from hypothesis import strategies as st
from test_calibration_source import evaluator, jsonl, summary_of

from prune_lab.results import run_warnings
from prune_lab.system.console import Console
from prune_lab.text.calibration_corpus import calibration_files
from prune_lab.text.calibration_windows import turns
from prune_lab.text.source import Calibration, MixPart, apportioned
from prune_lab.text.splits import SPLITS
from prune_lab.text.text_files import TextFiles

QUIET = Console(quiet=True)
TENTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@given(total=st.integers(1, 500), tenths=TENTHS)
def test_windows_are_apportioned_by_largest_remainder(total: int, tenths: list[int]) -> None:
    """Each gets its quota, rounded down or up; rounded up are the largest remainders, of equal ones the first."""
    shares = [tenth / sum(tenths) for tenth in tenths]
    counts = apportioned(total, shares)
    assert sum(counts) == total
    exact = [Fraction(str(share)) for share in shares]
    quotas = [total * share / sum(exact) for share in exact]
    assert all(int(quota) <= count <= int(quota) + 1 for count, quota in zip(counts, quotas, strict=True))
    ups = [n for n, (count, quota) in enumerate(zip(counts, quotas, strict=True)) if count > int(quota)]
    by_remainder = sorted(range(len(quotas)), key=lambda n: (int(quotas[n]) - quotas[n], n))
    assert sorted(ups) == sorted(by_remainder[: len(ups)])


@pytest.mark.parametrize(
    ("total", "shares", "counts"),
    [(10, [0.35, 0.35, 0.3], [4, 3, 3]), (128, [0.3333333] * 3, [43, 43, 42]), (100, [0.29, 0.57, 0.14], [29, 57, 14]),
     (3, [0.5, 0.5], [2, 1]), (7, [1.0], [7]), (10, [0.15, 0.35, 0.5], [2, 3, 5])],
)  # fmt: skip
def test_counts_by_hand(total: int, shares: list[float], counts: list[int]) -> None:
    assert apportioned(total, shares) == counts


@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_every_stretch_of_a_mix_is_about_in_its_shares(counts: list[int]) -> None:
    """All windows of each part, in their own order; of the first k each part has its share, less or more than one."""
    order = turns(counts)
    for part, count in enumerate(counts):
        assert [number for of, number in order if of == part] == list(range(count))
    total = sum(counts)
    for k in range(total + 1):
        for part, count in enumerate(counts):
            had = sum(of == part for of, _ in order[:k])
            assert abs(had - k * count / total) <= max(1, len(counts) / 2)


def mixed(*parts: tuple[Any, ...], **keys: Any) -> dict[str, Any]:
    """Keys of a mix of (source, share, name)."""
    return {"source": "mix", "mix": tuple(MixPart(*part) for part in parts), "seq_len": 24, "n_samples": 20} | keys


@pytest.mark.parametrize("join", [False, True])
@pytest.mark.parametrize("source", ["own", "text"])
def test_a_mix_of_one_part_is_that_text(source: str, join: bool, folder: Path, corpus: Path, tmp_path: Path) -> None:
    """Token by token, in the same order."""
    name = str(jsonl(tmp_path / "a.jsonl", [story(n) for n in range(500, 540)])) if source == "text" else None
    keys = {"seq_len": 24, "n_samples": 20, "join": join}
    plain, stamp = evaluator(folder, corpus, source=source, name=name, **keys).calibrator(3, QUIET)
    one, of_mix = evaluator(folder, corpus, **mixed((source, 1.0, name), join=join)).calibrator(3, QUIET)
    assert torch.equal(plain.windows, one.windows)
    assert stamp["tokens_sha256"] == of_mix["tokens_sha256"] == of_mix["mix"][0]["tokens_sha256"]
    assert [place for _, *place in of_mix["windows"]] == stamp["windows"]
    same = ("own", "documents", "documents_too_short", "distinct_tokens", "overlap", "windows_tested_on")
    for name in same:
        assert of_mix[name] == stamp[name] == of_mix["mix"][0][name]
    assert of_mix["mix"][0]["text"] == stamp["text"]


def test_windows_of_a_mix_are_those_of_its_parts(folder: Path, corpus: Path, tmp_path: Path) -> None:
    """Each lies where the stamp says, and each part's are those that it alone would give."""
    texts = {part: [story(n) for n in range(first, first + 30)] for part, first in (("a", 500), ("b", 600))}
    names = {part: str(jsonl(tmp_path / f"{part}.jsonl", rows)) for part, rows in texts.items()}
    parts = ("text", 0.5, names["a"]), ("own", 0.2), ("text", 0.3, names["b"])
    made = evaluator(folder, corpus, **mixed(*parts))
    calibrator, stamp = made.calibrator(5, QUIET)
    assert [part["n_samples"] for part in stamp["mix"]] == [10, 4, 6]
    assert stamp["n_samples"] == 20
    own = list(made.tokens.corpus.split("calibration"))
    of_part = [texts["a"], own, texts["b"]]
    for window, (part, document, first) in zip(calibrator.windows.tolist(), stamp["windows"], strict=True):
        assert window == made.dense.tokenizer(of_part[part][document])["input_ids"][first : first + 24]
    expected_of = ("text", 10, names["a"]), ("own", 4, None), ("text", 6, names["b"])
    for number, (source, count, name) in enumerate(expected_of):
        alone = evaluator(folder, corpus, source=source, name=name, n_samples=count, seq_len=24)
        expected, of_alone = alone.calibrator(5, QUIET)
        rows = torch.tensor([part for part, *_ in stamp["windows"]]) == number
        assert torch.equal(calibrator.windows[rows], expected.windows)
        assert stamp["mix"][number]["tokens_sha256"] == of_alone["tokens_sha256"]
        assert stamp["mix"][number]["distinct_tokens"] == of_alone["distinct_tokens"]
    assert stamp["distinct_tokens"] == sum(part["distinct_tokens"] for part in stamp["mix"])
    again, _ = evaluator(folder, corpus, **mixed(*parts)).calibrator(5, QUIET)
    other, _ = evaluator(folder, corpus, **mixed(*parts)).calibrator(6, QUIET)
    assert torch.equal(again.windows, calibrator.windows)
    assert not torch.equal(other.windows, calibrator.windows)


def test_a_document_is_in_one_part_of_a_mix(folder: Path, corpus: Path, tmp_path: Path) -> None:
    """In the first that has it, and in the dataset's own where that is one; what the run tests on is in none."""
    run = TextFiles(path=str(corpus)).corpus()
    theirs = {split: list(run.split(split)) for split in SPLITS}
    mine, both = [story(n) for n in range(500, 510)], [story(n) for n in range(600, 606)]
    a = str(jsonl(tmp_path / "a.jsonl", [*mine, *both, *theirs["test"]]))
    b = str(jsonl(tmp_path / "b.jsonl", [*both, *theirs["calibration"], *(story(n) for n in range(700, 705))]))
    made = evaluator(folder, corpus, **mixed(("text", 0.4, a), ("text", 0.4, b), ("own", 0.2)))
    _, stamp = made.calibrator(0, QUIET)
    first, second, own = stamp["mix"]
    assert (first["text"]["in_other_parts"], first["text"]["also_in_the_run"]) == (0, len(theirs["test"]))
    assert second["text"]["in_other_parts"] == len(both) + len(theirs["calibration"])
    assert (own["own"], own["text"]) == (True, None)
    assert {document for part, document, _ in stamp["windows"] if part == 1} <= set(range(5))
    _, alone = evaluator(folder, corpus, source="text", name=b, seq_len=24, n_samples=8).calibrator(0, QUIET)
    assert alone["text"]["in_other_parts"] == 0
    assert alone["documents"] == 8


def test_text_that_is_tested_on_is_counted_by_part(folder: Path, corpus: Path, tmp_path: Path) -> None:
    whole = "\n\n".join(path.read_text() for path in sorted(corpus.glob("*.txt")))
    (tmp_path / "test.txt").write_text(whole)
    (tmp_path / "a.txt").write_text(whole[:-200])
    b = str(jsonl(tmp_path / "b.jsonl", [story(n) for n in range(500, 540)]))
    made = evaluator(folder, corpus, **mixed(("text", 0.5, str(tmp_path / "a.txt")), ("text", 0.5, b), seq_len=48))
    tested = " ".join(map(str, ["", *made.windows.flatten().tolist(), ""]))
    calibrator, stamp = made.calibrator(0, QUIET)
    held = [
        any(" ".join(map(str, ["", *row[first : first + 32], ""])) in tested for first in range(17))
        for row, (part, *_) in zip(calibrator.windows.tolist(), stamp["windows"], strict=True)
        if part == 0
    ]
    assert [part["windows_tested_on"] for part in stamp["mix"]] == [sum(held), 0]
    assert stamp["windows_tested_on"] == sum(held)


def test_an_edit_of_any_part_is_seen(tmp_path: Path) -> None:
    """By the files that an open evaluator is compared with; one that is not there is refused where it is needed."""
    names = [str(jsonl(tmp_path / f"{part}.jsonl", [story(n)])) for n, part in enumerate("ab")]
    parts = ("text", 0.5, names[0]), ("own", 0.2), ("text", 0.2, names[1]), ("text", 0.1, str(tmp_path / "none"))
    assert calibration_files(Calibration(**mixed(*parts))) == [Path(name) for name in names]


KEYS = ["method=sparsegpt", "tracking=none", "measure=quality_only", "hydra.run.dir=run"]


def mix_of(*parts: dict[str, Any]) -> list[str]:
    """As it is typed."""
    shown = ",".join("{" + ",".join(f"{key}:{value}" for key, value in part.items()) + "}" for part in parts)
    return ["dataset.calibration.source=mix", f"dataset.calibration.mix=[{shown}]"]


def test_what_a_run_says_of_its_mix(small: list[str], tmp_path: Path, cli: Cli) -> None:
    name = jsonl(tmp_path / "a.jsonl", ["", *(story(n) for n in range(500, 503)), story(500)])
    parts = {"source": "own", "share": 0.25}, {"source": "text", "name": name, "share": 0.75}
    done = cli(*small, *KEYS, *mix_of(*parts), "dataset.calibration.n_samples=8", "dataset.calibration.seq_len=16")
    assert done.returncode == 0, done.stderr
    summary = summary_of(tmp_path)
    stamp, said = summary["protocol"]["calibration"], " | ".join(summary["warnings"])
    assert [(part["share"], part["n_samples"], part["own"]) for part in stamp["mix"]] == [
        (0.25, 2, True),
        (0.75, 6, False),
    ]
    for number, part in enumerate(stamp["mix"]):
        assert len(part["tokens_sha256"]) == 64
        assert part["distinct_tokens"] == 16 * part["n_samples"] or number == 0
    assert f"1 of 5 rows of dataset.calibration.mix[1].name={name} have no text" in said
    assert f"1 of 4 documents of dataset.calibration.mix[1].name={name} repeat another one" in said
    assert "(2 of 8 windows), apart from its test split: in-domain" in said
    assert "little calibration text" in said


def test_a_mix_in_a_recipe_and_a_sweep_over_mixes(small: list[str], tmp_path: Path, cli: Cli) -> None:
    """A file that moved is the same run; another share is another one."""
    a, b = (
        jsonl(tmp_path / f"{part}.jsonl", [story(n) for n in range(first, first + 9)])
        for part, first in (("a", 500), ("b", 600))
    )
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "mixes.yaml").write_text(f"""
defaults: [config, override method: wanda, override tracking: none, override measure: quality_only, _self_]
dataset:
  calibration:
    n_samples: 8
    seq_len: 16
    source: mix
    mix:
      - {{source: text, name: {a}, share: 0.5}}
      - {{source: text, name: {b}, share: 0.5}}
""")
    recipe = ["-cd", str(tmp_path / "recipes"), "-cn", "mixes"]
    words = [word for word in small if not word.startswith("measure=")]
    done = cli(*recipe, *words, "hydra.run.dir=run")
    assert done.returncode == 0, done.stderr
    first = summary_of(tmp_path)
    assert first["reused_from"] is None
    moved = shutil.move(b, tmp_path / "c.jsonl")
    mixes = ",".join(
        f"[{{source:text,name:{a},share:{share}}},{{source:text,name:{moved},share:{1 - share}}}]"
        for share in (0.5, 0.25)
    )
    done = cli(*recipe, *words, f"dataset.calibration.mix={mixes}", "-m", "hydra.sweep.dir=sweep")
    assert done.returncode == 0, done.stderr
    jobs = [json.loads((tmp_path / "sweep" / job / "summary.json").read_text()) for job in "01"]
    assert [job["reused_from"] is None for job in jobs] == [False, True]
    assert jobs[0]["fingerprint"] == first["fingerprint"] != jobs[1]["fingerprint"]
    assert [part["n_samples"] for part in jobs[1]["protocol"]["calibration"]["mix"]] == [2, 6]


def test_notes_name_the_part_of_a_mix() -> None:
    part = {"source": "a", "share": 0.5, "own": False, "n_samples": 4, "overlap": 3, "windows_tested_on": 2,
            "documents": 2, "documents_too_short": 0, "distinct_tokens": 30, "sampling": "in turn"}  # fmt: skip
    other = part | {"source": "b", "overlap": 1, "windows_tested_on": 0}
    stamp = {
        "mix": [part, other],
        "seq_len": 10,
        "n_samples": 8,
        "distinct_tokens": 60,
        "documents": 4,
        "solved_width": None,
    }
    said = run_warnings.of_calibration_windows({"calibration": stamp})
    assert len(said) == 2
    assert (
        "overlap (a): 4 windows of 10 tokens are 30 distinct tokens of 2 documents, and some tokens are in 3" in said[0]
    )
    assert "2 of 4 calibration windows (a) hold text that is tested on" in said[1]
    (note,) = run_warnings.of_calibration_windows({"calibration": stamp | {"mix": [other, other], "solved_width": 7}})
    assert "the widest Linear has 7 inputs, and 60 distinct tokens of 4 documents are fewer than 10" in note
