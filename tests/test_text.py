"""Text: which document goes where, that the splits never overlap, and what the token windows are."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, story
from datasets import Dataset
from transformers import AutoTokenizer

from prune_lab.errors import Refused
from prune_lab.models.load import TINY, Loaded
from prune_lab.text import corpus as corpora
from prune_lab.text import joined
from prune_lab.text.corpus import Corpus, Documents, LongDocument
from prune_lab.text.files import TextFiles
from prune_lab.text.source import Calibration
from prune_lab.text.splits import SPLITS, by_position
from prune_lab.text.stdlib import Stdlib
from prune_lab.text.tokens import Tokens, sha256

LEFT_OUT = [
    "site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "ensurepip", "turtledemo",
]  # fmt: skip


def digest_mod_20(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 20


def read(path: Path, **keys: str) -> Corpus:
    return TextFiles(path=str(path), **keys).corpus()


def everything(corpus: Corpus) -> list[str]:
    return [text for split in SPLITS for text in corpus.split(split)]


def test_the_standard_library_is_split_by_the_hash_of_each_path() -> None:
    """The rule of the design: 0 is test, 1 is validation, the rest is for training and calibration."""
    library, found = Path(sysconfig.get_paths()["stdlib"]), Stdlib().corpus()
    expected: dict[str, set[str]] = {"test": set(), "validation": set(), "rest": set()}
    for path in library.rglob("*.py"):
        below = path.relative_to(library)
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip() and not set(LEFT_OUT) & set(below.parts):
            expected[{0: "test", 1: "validation"}.get(digest_mod_20(below.as_posix()), "rest")].add(text)
    assert set(found.test) == expected["test"]
    assert set(found.validation) == expected["validation"]
    assert set(found.train) | set(found.calibration) == expected["rest"]
    assert not set(found.train) & set(found.calibration)
    assert len(found.test) > 10
    assert len(found.calibration) > 5


def test_the_standard_library_is_in_one_order_and_names_its_python() -> None:
    one, two = Stdlib().corpus(), Stdlib(seq_len=64).corpus()
    assert one.fingerprint() == two.fingerprint()
    assert one.facts["python"].count(".") == 2


def test_every_text_has_one_split(corpus: Path) -> None:
    found = read(corpus)
    assert sorted(everything(found)) == sorted(path.read_text() for path in corpus.glob("*.txt"))
    for split, buckets in {"test": [0], "validation": [1]}.items():
        assert list(found.split(split))
        assert all(digest_mod_20(text) in buckets for text in found.split(split))
    assert all(digest_mod_20(text) > 1 for split in ("train", "calibration") for text in found.split(split))


def test_a_document_stays_in_its_split_when_others_come_and_go(corpus: Path, tmp_path: Path) -> None:
    before = read(corpus)
    for path in sorted(corpus.glob("*.txt"))[::3]:
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "new.txt").write_text(story(999))
    after = read(tmp_path)
    for split in SPLITS:
        assert set(after.split(split)) - {story(999)} <= set(before.split(split))


def test_one_document_is_cut_by_position() -> None:
    """18:1:1 as training, validation, test, and of the eighteen the last is for calibration; at line ends."""
    lines = [f"line {number:04}" for number in range(2000)]
    cut = by_position("\n".join(lines) + "\n")
    assert "".join(cut[split][0] for split in SPLITS) == "\n".join(lines) + "\n"
    sizes = [len(cut[split][0].splitlines()) for split in SPLITS]
    assert sizes == pytest.approx([1700, 100, 100, 100], abs=1)
    for split in SPLITS:
        assert set(cut[split][0].splitlines()) <= set(lines)


def test_one_long_line_is_cut_between_characters() -> None:
    text = "".join(chr(97 + number % 26) for number in range(4000))
    cut = by_position(text)
    assert "".join(cut[split][0] for split in SPLITS) == text
    assert [len(cut[split][0]) for split in SPLITS] == [3400, 200, 200, 200]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_rows_are_documents(corpus: Path, tmp_path: Path, kind: str) -> None:
    """The same texts give the same splits, whatever holds them."""
    texts = [path.read_text() for path in sorted(corpus.glob("*.txt"))]
    path = tmp_path / f"texts.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"id": i, "body": text}) + "\n" for i, text in enumerate(texts)))
    else:
        Dataset.from_dict({"id": list(range(len(texts))), "body": texts}).to_parquet(path)
    found, as_txt = read(path, column="body"), read(corpus)
    for split in SPLITS:
        assert sorted(found.split(split)) == sorted(as_txt.split(split))


@pytest.mark.parametrize("form", ["folder", "glob", "deep glob", "file"])
def test_a_path_is_a_file_a_folder_or_a_glob(corpus: Path, tmp_path: Path, form: str) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("a.txt", "b.txt", "deep/c.txt"):
        (tmp_path / name).write_text(f"{name} " + story(len(name)))
    (tmp_path / "notes.md").write_text("not a text of the corpus")
    place = {"folder": "", "glob": "*.txt", "deep glob": "**/*.txt", "file": "a.txt"}[form]
    expected = {"folder": 3, "glob": 2, "deep glob": 3, "file": 4}[form]  # one file is cut into four
    assert len(everything(read(tmp_path / place))) == expected


def test_a_test_text_of_its_own_leaves_the_rest_to_training(corpus: Path, tmp_path: Path) -> None:
    """A document that is in both is in the test split alone."""
    held_out = [story(3), story(500)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in held_out))
    found, without = read(corpus, test_path=str(tmp_path / "test.jsonl")), read(corpus)
    assert list(found.split("test")) == held_out
    others = [text for split in ("train", "calibration", "validation") for text in found.split(split)]
    assert set(others) == set(everything(without)) - {story(3)}
    assert set(without.split("test")) - {story(3)} <= set(found.split("train"))


def test_blank_documents_are_left_out(tmp_path: Path) -> None:
    rows = ["", "  \n", *(story(seed, sentences=3) for seed in range(5))]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    assert sorted(everything(read(tmp_path / "a.jsonl"))) == sorted(rows[2:])


def test_the_fingerprint_is_of_texts_and_splits() -> None:
    one = Documents("a", ("x",), ("y",), ("z",), ("w",))
    assert one.fingerprint() == Documents("b", ("x",), ("y",), ("z",), ("w",), {"k": "v"}).fingerprint()
    others = [(("y",), ("x",), ("z",), ("w",)), (("x", ""), ("y",), ("z",), ("w",)), (("xy",), ("",), ("z",), ("w",))]
    assert len({one.fingerprint(), *(Documents("a", *other).fingerprint() for other in others)}) == 4


def tokens_of(loaded: Loaded, **splits: tuple[str, ...]) -> Tokens:
    return Tokens(Documents("text", **{**dict.fromkeys(SPLITS, ("",)), **splits}), loaded.tokenizer)


def test_documents_are_joined_by_a_blank_line_and_tokenised_once(loaded: Loaded) -> None:
    stream = tokens_of(loaded, test=("the cat", "a dog")).stream("test")
    assert stream.tolist() == loaded.tokenizer("the cat\n\na dog")["input_ids"]


def test_bytes_per_token_counts_bytes_not_characters(loaded: Loaded) -> None:
    tokens = tokens_of(loaded, test=("naïve", "日本"))
    joined = "naïve\n\n日本"
    assert tokens.bytes_per_token("test") == len(joined.encode()) / len(loaded.tokenizer(joined)["input_ids"])
    assert len(joined.encode()) > len(joined)


def test_calibration_windows_lie_inside_their_documents(loaded: Loaded) -> None:
    texts = tuple(story(seed, sentences=length) for seed, length in ((1, 40), (2, 1), (3, 30)))
    tokens = tokens_of(loaded, calibration=texts)
    windows, places = tokens.calibration_windows(12, 16, seed=4)
    assert windows.shape == (12, 16)
    assert len({tuple(place) for place in places}) == 12
    for window, (document, start) in zip(windows.tolist(), places, strict=True):
        assert window == loaded.tokenizer(texts[document])["input_ids"][start : start + 16]
    assert {document for document, _ in places} == {0, 2}  # the second is too short
    again, other = tokens.calibration_windows(12, 16, seed=4), tokens.calibration_windows(12, 16, seed=5)
    assert again[1] == places
    assert other[1] != places


def test_too_little_calibration_text_is_refused(loaded: Loaded) -> None:
    with pytest.raises(Refused, match=r"dataset\.calibration: .* 128 are asked for"):
        tokens_of(loaded, calibration=("the cat sees a dog",)).calibration_windows(128, 16, seed=0)


def test_calibration_defaults_are_those_of_the_papers_count() -> None:
    assert Calibration().n_samples == 128


def test_the_stamp_tells_token_ids_apart(loaded: Loaded) -> None:
    stream = tokens_of(loaded, test=(story(1),)).stream("test")
    changed = stream.clone()
    changed[5] += 1
    assert sha256(stream) == hashlib.sha256(b"".join(int(t).to_bytes(8, "little") for t in stream)).hexdigest()
    assert sha256(changed) != sha256(stream)


# One long file, in pieces.


@pytest.mark.parametrize("piece", [7, 64, 1000, 2**20])
@pytest.mark.parametrize("kind", ["lines", "one line", "two bytes a character", "four bytes a character"])
def test_a_long_file_is_read_in_pieces_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, piece: int
) -> None:
    monkeypatch.setattr(corpora, "PIECE", piece)
    letters = {"two bytes a character": "äöü", "four bytes a character": "😀😁😂"}.get(kind, "abc")
    text = "".join(letters[i % 3] for i in range(5000))
    if kind == "lines":
        text = "".join(f"{text[i : i + 23]}\n" for i in range(0, 5000, 23))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    long = LongDocument("a", tmp_path / "a.txt")
    assert "".join("".join(long.pieces(split)) for split in SPLITS) == text
    sizes = [len("".join(long.pieces(split))) / len(text) for split in SPLITS]
    assert sizes == pytest.approx([0.85, 0.05, 0.05, 0.05], abs=0.01)
    if kind == "lines":
        assert all(part.endswith("\n") for split in SPLITS for part in long.split(split) if len(part) > 23)


def test_a_long_file_and_its_text_in_memory_are_cut_alike(tmp_path: Path) -> None:
    text = "\n".join(story(seed) for seed in range(30))
    (tmp_path / "a.txt").write_text(text)
    found = read(tmp_path / "a.txt")
    assert isinstance(found, LongDocument)
    assert {split: ["".join(found.pieces(split))] for split in SPLITS} == by_position(text)


def test_a_long_file_with_a_test_text_of_its_own(tmp_path: Path) -> None:
    text = "\n".join(story(seed) for seed in range(30))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": story(seed)}) + "\n" for seed in (80, 81)))
    found = read(tmp_path / "a.txt", test_path=str(tmp_path / "b.jsonl"))
    cut = by_position(text)
    assert "".join(found.pieces("test")) == story(80) + "\n\n" + story(81)
    assert "".join(found.pieces("train")) == cut["train"][0] + cut["test"][0]
    assert "".join(found.pieces("validation")) == cut["validation"][0]


def test_a_long_file_is_not_its_own_test_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(story(1))
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    for test_path in (tmp_path / "a.txt", tmp_path / "link.txt", tmp_path):
        with pytest.raises(Refused, match=r"^dataset\.test_path=.* is the text of dataset\.path too"):
            read(tmp_path / "a.txt", test_path=str(test_path))


class Counting:
    """A tokenizer without a fast backend, which counts how often it is called."""

    backend_tokenizer = None

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.calls = tokenizer, 0

    def __call__(self, *arguments: Any, **keys: Any) -> Any:
        self.calls += 1
        return self._tokenizer(*arguments, **keys)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def with_special_tokens(tokenizer: Any) -> Any:
    """The tokenizer, putting token 5 before and token 6 after every text, as Llama's puts its BOS."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tokenizer)
    names = [(tokenizer.convert_ids_to_tokens(i), i) for i in (5, 6)]
    template = f"{names[0][0]} $A {names[1][0]}"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=names)
    return tokenizer


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("at_once", [1000, 5000, 2**22])
def test_a_text_in_pieces_has_the_tokens_of_one_go(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch, at_once: int, special: bool
) -> None:
    """Source code, with its blank lines and indents, by the shipped tokenizer."""
    monkeypatch.setattr(joined, "AT_ONCE", at_once)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer = with_special_tokens(tokenizer) if special else tokenizer
    text = "\n\n".join(Stdlib().corpus().test)[:60_000]
    pieces = [text[i : i + 777] for i in range(0, len(text), 777)]
    runs = list(joined.tokenise_joined(tokenizer, iter(pieces)))
    expected = tokenizer(text, verbose=False)["input_ids"]
    assert [token for ids, _ in runs for token in ids] == expected
    assert sum(size for _, size in runs) == len(text.encode())
    assert (len(runs) > 5) is (at_once < 60_000)
    assert (expected[0], expected[-1]) == (5, 6) or not special


def test_a_text_that_cannot_be_cut_is_not_cut(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    """One endless line: right comes before small."""
    monkeypatch.setattr(joined, "AT_ONCE", 1000)
    text = "the cat sees " * 400
    runs = list(joined.tokenise_joined(loaded.tokenizer, iter([text])))
    assert [token for ids, _ in runs for token in ids] == loaded.tokenizer(text, verbose=False)["input_ids"]


def test_tokens_are_kept_and_found_again_by_what_they_are(loaded: Loaded, corpus: Path, tmp_path: Path) -> None:
    counting = Counting(loaded.tokenizer)
    first = Tokens(read(corpus), counting)
    streams = {split: first.stream(split).tolist() for split in SPLITS}
    places = first.calibration_windows(5, 8, seed=1)[1]
    asked = counting.calls
    assert asked > 0
    again = Tokens(read(corpus), counting)
    assert {split: again.stream(split).tolist() for split in SPLITS} == streams
    assert again.calibration_windows(5, 8, seed=1)[1] == places
    assert again.bytes_per_token("test") == first.bytes_per_token("test")
    assert counting.calls == asked
    (tmp_path / "other").mkdir()
    for path in corpus.glob("*.txt"):
        (tmp_path / "other" / path.name).write_text(path.read_text() + ".")
    assert Tokens(read(tmp_path / "other"), counting).stream("test").tolist() != streams["test"]
    assert counting.calls > asked
    longer = copy.deepcopy(loaded.tokenizer)
    longer.add_tokens(["thing"])
    assert Tokens(read(corpus), longer).stream("test").tolist() != streams["test"]


@pytest.mark.parametrize("damage", ["a changed token", "cut short", "no facts", "broken facts"])
def test_damaged_tokens_are_made_again(
    loaded: Loaded, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    tokens = Tokens(Documents("text", ("",), ("",), ("",), (story(1),)), loaded.tokenizer)
    expected = tokens.stream("test").tolist()
    (entry,) = (tmp_path / "cache" / "tokens").iterdir()
    content = bytearray((entry / "tokens.i32").read_bytes())
    if damage == "a changed token":
        content[40] ^= 1
    if damage == "cut short":
        content = content[:-4]
    if "facts" not in damage:
        (entry / "tokens.i32").unlink()  # not in place: the first stream is still read from that file
        (entry / "tokens.i32").write_bytes(content)
    elif damage == "no facts":
        (entry / "facts.json").unlink()
    else:
        (entry / "facts.json").write_text("{")
    again = Tokens(tokens.corpus, loaded.tokenizer)
    assert again.stream("test").tolist() == expected
    assert "are damaged" in caplog.text
    caplog.clear()
    assert Tokens(tokens.corpus, loaded.tokenizer).stream("test").tolist() == expected
    assert "damaged" not in caplog.text


def peak_mb(code: str, *arguments: str) -> float:
    """Peak memory that a fresh process reports of itself after `code`, less what it held before."""
    program = (
        "import resource, sys\nfrom prune_lab.models.load import TINY\nfrom prune_lab.text.files import TextFiles\n"
        "from prune_lab.text.tokens import Tokens\nfrom transformers import AutoTokenizer\nimport datasets\n"
        "tokenizer = AutoTokenizer.from_pretrained(TINY)\ntokenizer(['warm up'] * 100)\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3\nbefore = peak()\n"
        f"{code}\nprint(peak() - before)\n"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], env=env, capture_output=True, text=True, check=True
    )
    return float(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_memory_does_not_grow_with_the_text(tmp_path: Path, kind: str) -> None:
    """All splits of 40 MB and of 120 MB, tokenised."""
    page, found = "\n".join(story(seed) for seed in range(50)), []
    for megabytes in (40, 120):  # beyond what is held at once in every split
        path = tmp_path / f"{megabytes}.{kind}"
        with path.open("w") as file:
            for number in range(megabytes * 10**6 // len(page)):
                text = f"page {number}\n{page}\n"
                file.write(text if kind == "txt" else json.dumps({"text": text}) + "\n")
        code = (
            "tokens = Tokens(TextFiles(path=sys.argv[1]).corpus(), tokenizer)\n"
            "for split in ('train', 'calibration', 'validation', 'test'):\n    assert len(tokens.stream(split)) > 9\n"
            "tokens.calibration_windows(16, 64, 0)"
        )
        found.append(peak_mb(code, str(path)))
    assert found[1] < found[0] + 80, found
