"""A text that is named for calibration is used whole, and a run says how much text its windows are made of."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CPU, ROOT, Cli, make_folder, story
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from prune_lab.errors import Refused
from prune_lab.evaluator import Evaluator
from prune_lab.measure.settings import Measure
from prune_lab.models.load import HubModel, Loaded
from prune_lab.results import run_warnings
from prune_lab.system.console import Console
from prune_lab.text.calibration_corpus import calibration_corpora
from prune_lab.text.corpus import Corpus, Documents
from prune_lab.text.sampling import covered, in_turn
from prune_lab.text.source import Calibration
from prune_lab.text.splits import SPLITS
from prune_lab.text.stdlib import Stdlib
from prune_lab.text.text_files import TextFiles
from prune_lab.text.tokens import Tokens

# Windows, each document in turn.


def places_of(lengths: list[int], seq_len: int, n_samples: int, seed: int = 0) -> list[tuple[int, int]]:
    return in_turn(torch.tensor(lengths), seq_len, n_samples, seed)


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    seq_len=st.integers(2, 12),
    share=st.floats(0.01, 1),
    seed=st.integers(0, 9),
)
def test_windows_in_turn(lengths: list[int], seq_len: int, share: float, seed: int) -> None:
    """Each inside its document, none twice, and no token in two of them before all documents are used up."""
    possible = sum(max(0, length - seq_len) for length in lengths)
    if not possible:
        return
    n_samples = max(1, int(possible * share))
    places = places_of(lengths, seq_len, n_samples, seed)
    assert len(places) == len(set(places)) == n_samples
    assert all(0 <= first <= lengths[document] - seq_len for document, first in places)
    assert places == places_of(lengths, seq_len, n_samples, seed)
    holds = {number: length // seq_len for number, length in enumerate(lengths) if length > seq_len}
    counts = Counter(document for document, _ in places)
    if n_samples <= sum(holds.values()):
        tokens = Counter((document, first + n) for document, first in places for n in range(seq_len))
        assert max(tokens.values()) == 1
        most = max(counts.values())  # the others gave as many or one less, or all they hold
        assert all(counts[document] >= min(most - 1, held) for document, held in holds.items())


def test_more_windows_than_fit_side_by_side_lie_in_two_layers() -> None:
    """Two windows on a token at most, for as long as that can be."""
    places = places_of([1050, 330, 90], 100, 20)
    assert Counter(document for document, _ in places) == {0: 14, 1: 6}
    for document in (0, 1):
        assert covered([first for of, first in places if of == document], 100)[1] == 2


def test_windows_in_turn_are_anywhere_in_a_document() -> None:
    """And each document long enough is as likely as any other to give one more."""
    firsts = Counter(places_of([50], 20, 1, seed)[0][1] for seed in range(600))
    assert set(firsts) == set(range(31))
    assert max(firsts.values()) < 50
    given_more = Counter(places_of([30, 30, 30, 5], 20, 1, seed)[0][0] for seed in range(300))
    assert set(given_more) == {0, 1, 2}
    assert min(given_more.values()) > 60


@given(firsts=st.lists(st.integers(0, 50), min_size=1, max_size=20), seq_len=st.integers(1, 10))
def test_what_windows_cover(firsts: list[int], seq_len: int) -> None:
    tokens = Counter(first + n for first in firsts for n in range(seq_len))
    assert covered(firsts, seq_len) == (len(tokens), max(tokens.values()))


# Which text.


def of_files(run: Corpus, name: Path, **keys: Any) -> list[str]:
    (whole,) = calibration_corpora(Calibration(source="text", name=str(name), **keys), run, None)
    assert whole is not None
    return list(whole.split("calibration"))


def jsonl(path: Path, texts: Iterable[str], **more: Any) -> Path:
    path.write_text("".join(json.dumps({"text": text} | more) + "\n" for text in texts))
    return path


def test_a_named_text_is_used_whole(corpus: Path, tmp_path: Path) -> None:
    texts = [story(seed) for seed in range(500, 560)]
    run = TextFiles(path=str(corpus)).corpus()
    assert of_files(run, jsonl(tmp_path / "a.jsonl", texts)) == texts
    one = tmp_path / "a.txt"
    one.write_text("\n".join(texts))
    assert "".join(of_files(run, one)) == "\n".join(texts)
    assert of_files(run, jsonl(tmp_path / "b.jsonl", texts[:1])) == texts[:1]  # not cut by position


def test_what_the_run_trains_or_tests_on_is_left_out(corpus: Path, tmp_path: Path) -> None:
    """Also where blanks or line ends are others; documents of the run's own calibration split stay."""
    run = TextFiles(path=str(corpus)).corpus()
    theirs = {split: list(run.split(split)) for split in SPLITS}
    assert all(theirs.values())
    new = [story(seed) for seed in range(500, 510)]
    shown = [text.replace("\n", "\r\n") + "  \n" for split in SPLITS for text in theirs[split]]
    found = of_files(run, jsonl(tmp_path / "a.jsonl", [*shown, *new, new[3]]))
    assert [text.split() for text in found] == [text.split() for text in [*theirs["calibration"], *new]]
    assert of_files(run, corpus) == theirs["calibration"]


@pytest.mark.parametrize("form", ["the same file", "a copy in a row", "a part of the run's text in a file"])
@pytest.mark.parametrize("apart", [False, True])
def test_one_long_text_is_not_calibrated_on_where_it_is_trained_on(tmp_path: Path, form: str, apart: bool) -> None:
    text = "\n".join(story(seed) for seed in range(30))
    (tmp_path / "a.txt").write_text(text)
    held_out = str(jsonl(tmp_path / "test.jsonl", [story(90), story(91)])) if apart else None
    run = TextFiles(path=str(tmp_path / "a.txt"), test_path=held_out).corpus()
    name = tmp_path / "b.jsonl"
    if form == "the same file":
        name = tmp_path / "a.txt"
    elif form == "a copy in a row":
        jsonl(name, [text])
    else:
        jsonl(name, ["".join(run.pieces("validation"))])
    with pytest.raises(Refused, match=r"^dataset\.calibration\.name=.* all its text is in the run's training"):
        of_files(run, name)


def test_the_test_text_is_not_calibrated_on(corpus: Path, tmp_path: Path) -> None:
    held_out = jsonl(tmp_path / "test.jsonl", [story(seed) for seed in range(700, 720)])
    run = TextFiles(path=str(corpus), test_path=str(held_out)).corpus()
    with pytest.raises(Refused, match=r"dataset\.calibration\.source=own"):
        of_files(run, held_out)


def test_the_standard_library_is_named_whole() -> None:
    other, library = Documents("a", ("x",), (), (), ("y",)), Stdlib().corpus()
    (whole,) = calibration_corpora(Calibration(source="stdlib"), other, None)
    assert whole is not None
    assert set(whole.split("calibration")) == {text for split in SPLITS for text in library.split(split)}
    (own,) = calibration_corpora(Calibration(source="stdlib"), library, None)
    assert own is not None
    elsewhere = {"".join(text.split()) for split in ("train", "validation", "test") for text in library.split(split)}
    kept = {text for text in library.calibration if "".join(text.split()) not in elsewhere}
    assert set(own.split("calibration")) == kept


def test_the_column_of_a_named_text(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": story(500), "text": 3}) + "\n")
    run = TextFiles(path=str(corpus)).corpus()
    assert of_files(run, tmp_path / "a.jsonl", column="body") == [story(500)]
    with pytest.raises(
        Refused, match=r"^dataset\.calibration\.column='title' is not there in dataset\.calibration\.na"
    ):
        of_files(run, tmp_path / "a.jsonl", column="title")
    with pytest.raises(ValueError, match=r"column='body' with source=own"):
        Calibration(column="body")


# Windows of it, by the evaluator.


def evaluator(folder: Path, corpus: Path, **calibration: Any) -> Evaluator:
    text = TextFiles(path=str(corpus), seq_len=32, calibration=Calibration(**calibration))
    measure = Measure(max_windows=4, latency=False, memory=False, prompt_tokens=16, decode_tokens=2)
    return Evaluator(HubModel(name=str(folder)), text, measure, CPU, 0, Console(quiet=True))


@pytest.mark.parametrize("join", [False, True])
def test_windows_of_a_named_text_are_spread_over_its_documents(
    folder: Path, corpus: Path, tmp_path: Path, join: bool
) -> None:
    """40 windows of 20 tokens: one of each of 40 documents; joined, of short ones too. Each lies where it says."""
    texts = [story(seed, sentences=n) for seed, n in zip(range(500, 600), [1] * 60 + [12] * 40, strict=True)]
    name = jsonl(tmp_path / "a.jsonl", texts)
    made = evaluator(folder, corpus, source="text", name=str(name), n_samples=40, seq_len=24, join=join)
    calibrator, stamp = made.calibrator(7, Console(quiet=True))
    rows = [made.dense.tokenizer(text + "\n\n" * join)["input_ids"] for text in texts]
    for window, (document, first) in zip(calibrator.windows.tolist(), stamp["windows"], strict=True):
        following = [token for row in rows[document:] for token in row] if join else rows[document]
        assert window == following[first : first + 24]
    assert (stamp["distinct_tokens"], stamp["overlap"], stamp["own"]) == (40 * 24, 1, False)
    if join:
        assert any(document < 60 for document, _ in stamp["windows"])
        starts = sorted(sum(map(len, rows[:document])) + first for document, first in stamp["windows"])
        assert all(b - a >= 24 for a, b in pairwise(starts))
    else:
        assert sorted(document for document, _ in stamp["windows"]) == list(range(60, 100))
        assert (stamp["documents"], stamp["documents_too_short"]) == (40, 60)
    assert stamp["sampling"] == ("joined" if join else "in turn")


@pytest.mark.parametrize("form", ["one txt", "pieces", "other text", "own, test text apart"])
def test_text_that_is_tested_on_is_found_however_it_is_cut(
    folder: Path, corpus: Path, tmp_path: Path, form: str
) -> None:
    """Compared with the windows that are in the test text, looked for as strings of ids."""
    texts = [path.read_text() for path in sorted(corpus.glob("*.txt"))]
    whole = "\n\n".join(texts)
    step = len(texts[0]) * 3 // 2
    pieces = [whole[first : first + step] for first in range(0, len(whole), step)]
    name, test = tmp_path / "a.txt", tmp_path / "test.txt"
    name.write_text(whole)
    if form != "one txt":
        name = jsonl(tmp_path / "a.jsonl", pieces if form == "pieces" else [story(n) for n in range(500, 600)])
    test.write_text(whole)
    calibration = Calibration(
        n_samples=40, seq_len=48, **({} if "own" in form else {"source": "text", "name": str(name)})
    )
    apart = str(test) if "own" in form else None
    text = TextFiles(path=str(corpus), test_path=apart, seq_len=32, calibration=calibration)
    measure = Measure(max_windows=100, latency=False, memory=False, prompt_tokens=16, decode_tokens=2)
    made = Evaluator(HubModel(name=str(folder)), text, measure, CPU, 0, Console(quiet=True))
    calibrator, stamp = made.calibrator(0, Console(quiet=True))
    tested = " ".join(map(str, ["", *made.windows.flatten().tolist(), ""]))
    held = [
        any(" ".join(map(str, ["", *row[first : first + 32], ""])) in tested for first in range(17))
        for row in calibrator.windows.tolist()
    ]
    assert stamp["windows_tested_on"] == sum(held)
    assert (sum(held) > 0) == (form != "other text")


def test_too_few_long_documents_are_refused_with_the_way_out(folder: Path, corpus: Path, tmp_path: Path) -> None:
    name = jsonl(tmp_path / "a.jsonl", [story(seed, sentences=2) for seed in range(500, 600)])
    keys: dict[str, Any] = {"source": "text", "name": str(name), "n_samples": 8, "seq_len": 100}
    with pytest.raises(Refused, match=r"dataset\.calibration\.name=.* 0 windows .*dataset\.calibration\.join=true"):
        evaluator(folder, corpus, **keys).calibrator(0, Console(quiet=True))
    _, stamp = evaluator(folder, corpus, **keys, join=True).calibrator(0, Console(quiet=True))
    assert stamp["documents"] > 8
    with pytest.raises(Refused, match=r"lower dataset\.calibration\.seq_len or \.n_samples$"):
        evaluator(folder, corpus, **keys | {"n_samples": 10**6}).calibrator(0, Console(quiet=True))


def test_own_windows_are_drawn_as_they_were(loaded: Loaded) -> None:
    """The published way, by a loop of its own: figures that stand in documents must stay."""
    texts = tuple(story(seed, sentences=n) for seed, n in ((1, 40), (2, 1), (3, 30)))
    drawn = Tokens(Documents("a", (), texts, (), ()), loaded.tokenizer).calibration_windows(12, 16, seed=4)
    lengths = [len(loaded.tokenizer(text)["input_ids"]) for text in texts]
    generator, expected = torch.Generator().manual_seed(4), list[list[int]]()
    while len(expected) < 12:
        document = [0, 2][int(torch.randint(2, (1,), generator=generator))]
        place = [document, int(torch.randint(lengths[document] - 16, (1,), generator=generator))]
        expected += [place] if place not in expected else []
    assert drawn.places == expected
    assert drawn.sampling == "at random"


def test_a_thousand_documents_of_c4(tmp_path: Path) -> None:
    """A window of each document that is long enough, where a twentieth had one such document."""
    data = ROOT.parent / "shared" / "data" / "c4" / "sample-1000.jsonl"
    if not data.is_file():
        pytest.skip("the real text does not lie beside this clone")
    model = HubModel(name=str(make_folder(tmp_path / "model"))).load(CPU, 0)
    (whole,) = calibration_corpora(Calibration(source="text", name=str(data)), Documents("a", (), (), (), ("x",)), None)
    assert whole is not None
    drawn = Tokens(whole, model.tokenizer).calibration_windows(128, 2048, 0, spread=True)
    assert drawn.documents == 128
    assert drawn.distinct_tokens == 128 * 2048


# What is said.

KEYS = ["method=sparsegpt", "tracking=none", "measure=quality_only", "hydra.run.dir=run"]


def summary_of(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "run" / "summary.json").read_text())
    return found


def test_a_run_says_what_it_left_out_and_that_it_is_little(
    small: list[str], corpus: Path, tmp_path: Path, cli: Cli
) -> None:
    rows = [*sorted(path.read_text() for path in corpus.glob("*.txt")), *(story(seed) for seed in range(500, 503))]
    name = jsonl(tmp_path / "a.jsonl", [*rows, "", " \n", rows[-1]])
    keys = ["source=text", f"name={name}", "n_samples=6", "seq_len=16"]
    done = cli(*small, *KEYS, *(f"dataset.calibration.{key}" for key in keys))
    assert done.returncode == 0, done.stderr
    found = summary_of(tmp_path)
    own = len(list(TextFiles(path=str(corpus)).corpus().split("calibration")))
    said = " | ".join(found["warnings"])
    assert f"2 of 126 rows of dataset.calibration.name={name} have no text and were left out" in said
    assert f"{120 - own} of 124 documents of dataset.calibration.name={name} were left out: they are in the tr" in said
    assert f"1 of 124 documents of dataset.calibration.name={name} repeat another one" in said
    assert "the widest Linear has 48 inputs, and 96 distinct tokens of 6 documents are fewer than 10 for each" in said
    assert found["protocol"]["calibration"]["solved_width"] == 48
    assert "overlap" not in said
    assert "little calibration text" in done.stdout


STAMP = {
    "own": False, "source": "a", "n_samples": 9, "seq_len": 10, "sampling": "in turn", "documents": 3, "text": None,
    "documents_too_short": 0, "distinct_tokens": 480, "overlap": 2, "solved_width": 48,
    "windows_tested_on": 0, "mix": None,
}  # fmt: skip


def said_of(**changes: Any) -> list[str]:
    return run_warnings.of_calibration_windows({"calibration": STAMP | changes})


def test_notes_of_calibration_windows() -> None:
    """Both sides of each limit."""
    assert run_warnings.of_calibration_windows({"calibration": None}) == []
    assert said_of() == []
    (note,) = said_of(distinct_tokens=479)
    assert "48 inputs, and 479 distinct tokens of 3 documents are fewer than 10 for each" in note
    assert "join=true" not in note  # nothing that it would add
    assert said_of(distinct_tokens=479, solved_width=None) == []
    (note,) = said_of(overlap=3, documents=1, documents_too_short=7)
    assert "9 windows of 10 tokens are 480 distinct tokens of 1 document, and some tokens are in 3 windows" in note
    assert "join=true" in note
    assert "join=true" in said_of(overlap=3, sampling="at random")[0]
    assert "join=true" not in said_of(overlap=3, sampling="joined")[0]
    assert "1 of 9 calibration windows hold text that is tested on as well" in said_of(windows_tested_on=1)[0]


@pytest.mark.parametrize(("passes", "is_much"), [(4.0, False), (4.01, True)])
def test_notes_of_passes_over_training_text(passes: float, is_much: bool) -> None:
    found = run_warnings.of_training({"training": {"tokens": 420_000, "passes": passes}})
    assert len(found) == is_much
    assert run_warnings.of_training({"training": None}) == []
    assert all("over its 420,000 tokens" in note for note in found)


def test_a_training_is_stamped_with_its_passes(small: list[str], corpus: Path, tmp_path: Path, cli: Cli) -> None:
    keys = ["method=none", "recovery=finetune", "recovery.steps=3", "recovery.batch_size=2"]
    done = cli(*small, *KEYS[1:], *keys, "recovery.validate_every=0")
    assert done.returncode == 0, done.stderr
    stamp = summary_of(tmp_path)["protocol"]["training"]
    loaded = HubModel(name=small[1].removeprefix("model.name=")).load(CPU, 0)
    tokens = len(Tokens(TextFiles(path=str(corpus)).corpus(), loaded.tokenizer).stream("train"))
    assert stamp == {"tokens": tokens, "passes": round(3 * 2 * 32 / tokens, 4)}


def test_a_run_without_training_or_calibration_stamps_neither(small: list[str], tmp_path: Path, cli: Cli) -> None:
    done = cli(*small, *KEYS[1:], "method=magnitude")
    assert done.returncode == 0, done.stderr
    protocol = summary_of(tmp_path)["protocol"]
    assert (protocol["training"], protocol["calibration"]) == (None, None)


def test_named_corpora_of_the_hub_are_used_whole(tmp_path: Path) -> None:
    """WikiText-2's training articles, and nothing of its validation and test text."""
    (tmp_path / "wikitext-2-raw-v1").mkdir()
    articles = [["", f" = Article {n} = \n", "", f" {story(n, 4)} \n".replace("\n", " ") + "\n"] for n in range(40)]
    for split, part in (("train", articles[:30]), ("validation", articles[30:35]), ("test", articles[35:])):
        rows = Dataset.from_dict({"text": [row for article in part for row in article]})
        rows.to_parquet(tmp_path / "wikitext-2-raw-v1" / f"{split}-00000-of-00001.parquet")
    (whole,) = calibration_corpora(
        Calibration(source="wikitext2", name=str(tmp_path)), Documents("a", (), (), (), ("x",)), None
    )
    assert whole is not None
    found = list(whole.split("calibration"))
    assert len(found) == 30
    assert [f"Article {n} =" in text for n, text in enumerate(found)] == [True] * 30
    shutil.rmtree(tmp_path / "wikitext-2-raw-v1")
    with pytest.raises(Refused, match=r"^dataset\.calibration\.name=.* has no file wikitext-2-raw-v1/train-00000"):
        calibration_corpora(
            Calibration(source="wikitext2", name=str(tmp_path)), Documents("a", (), (), (), ("x",)), None
        )
