"""Text: which document goes where, that the splits never overlap, and what the token windows are."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from pathlib import Path

import pytest
from conftest import story
from datasets import Dataset

from prune_lab.errors import Refused
from prune_lab.models.load import Loaded
from prune_lab.text.files import TextFiles
from prune_lab.text.source import Calibration
from prune_lab.text.splits import SPLITS, Documents, by_position
from prune_lab.text.stdlib import Stdlib
from prune_lab.text.tokens import Tokens, sha256

LEFT_OUT = [
    "site-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "ensurepip", "turtledemo",
]  # fmt: skip


def digest_mod_20(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest(), 16) % 20


def read(path: Path, **keys: str) -> Documents:
    return TextFiles(path=str(path), **keys).documents()


def everything(documents: Documents) -> list[str]:
    return [text for split in SPLITS for text in documents.split(split)]


def test_the_standard_library_is_split_by_the_hash_of_each_path() -> None:
    """The rule of the design: 0 is test, 1 is validation, the rest is for training and calibration."""
    library, found = Path(sysconfig.get_paths()["stdlib"]), Stdlib().documents()
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
    one, two = Stdlib().documents(), Stdlib(seq_len=64).documents()
    assert one.fingerprint() == two.fingerprint()
    assert one.facts["python"].count(".") == 2


def test_every_text_has_one_split(corpus: Path) -> None:
    found = read(corpus)
    assert sorted(everything(found)) == sorted(path.read_text() for path in corpus.glob("*.txt"))
    for split, buckets in {"test": [0], "validation": [1]}.items():
        assert found.split(split)
        assert all(digest_mod_20(text) in buckets for text in found.split(split))
    assert all(digest_mod_20(text) > 1 for text in found.train + found.calibration)


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
    assert list(found.test) == held_out
    others = found.train + found.calibration + found.validation
    assert set(others) == set(everything(without)) - {story(3)}
    assert set(without.test) - {story(3)} <= set(found.train)


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
