"""Text: which document goes where, that the splits never overlap, and what the token windows are."""

from __future__ import annotations

import copy
import datetime
import decimal
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, story
from datasets import Dataset
from transformers import AutoTokenizer

from prune_lab.errors import Refused
from prune_lab.models.load import TINY, Loaded
from prune_lab.text import corpus as corpora
from prune_lab.text import joined
from prune_lab.text import rows as row_files
from prune_lab.text.corpus import Corpus, Documents, LongDocument
from prune_lab.text.source import Calibration
from prune_lab.text.splits import SPLITS, by_position
from prune_lab.text.stdlib import Stdlib
from prune_lab.text.text_files import TextFiles
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
    assert one.provenance["python"].count(".") == 2


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
    drawn = tokens.calibration_windows(12, 16, seed=4)
    windows, places = drawn.windows, drawn.places
    assert windows.shape == (12, 16)
    assert len({tuple(place) for place in places}) == 12
    for window, (document, start) in zip(windows.tolist(), places, strict=True):
        assert window == loaded.tokenizer(texts[document])["input_ids"][start : start + 16]
    assert {document for document, _ in places} == {0, 2}  # the second is too short
    again, other = tokens.calibration_windows(12, 16, seed=4), tokens.calibration_windows(12, 16, seed=5)
    assert again.places == places
    assert other.places != places


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


# Rows as they lie about.

DOCS = [story(seed, sentences=4) for seed in range(120)]


def lines(*rows: object) -> bytes:
    return b"".join(row + b"\n" if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)


def rows(**more: Any) -> list[dict[str, Any]]:
    return [{"text": text} | more for text in DOCS]


def parquet(path: Path, **columns: Any) -> None:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


OTHER_FIELDS: dict[str, Callable[[Path], object]] = {
    "one more in the second file": lambda place: (
        (place / "a.jsonl").write_bytes(lines(*rows()[:60])),
        (place / "b.jsonl").write_bytes(lines(*rows(source="web")[60:])),
    ),
    "one more in the second table": lambda place: (
        parquet(place / "a.parquet", text=DOCS[:60]),
        parquet(place / "b.parquet", source=[{"a": 1}] * 60, text=DOCS[60:]),
    ),
    "of another type in each table": lambda place: (
        parquet(place / "a.parquet", text=DOCS[:60], source=[1] * 60),
        parquet(place / "b.parquet", text=pyarrow.array(DOCS[60:], pyarrow.large_string()), source=["web"] * 60),
    ),
    "of another type further on": lambda place: (place / "a.jsonl").write_bytes(
        lines(*rows(meta={"a": 1})[:60], *rows(meta="none")[60:90], *rows(meta=[1, "a", {}])[90:])
    ),
    "late": lambda place: (place / "a.jsonl").write_bytes(lines(*rows()[:119], *rows(language="en")[119:])),
    "numbers that no type holds": lambda place: (place / "a.jsonl").write_bytes(
        lines(*rows(n=2**70)[:60]) + b"".join(b'{"n": %s, "text": %s}\n' % (b"9" * 5000, json.dumps(text).encode())
                                              for text in DOCS[60:])
    ),
    "dates, and text that looks like them": lambda place: (place / "a.jsonl").write_bytes(
        lines(*rows(date="2020-01-01")[:60], *rows(date="soon")[60:])
    ),
    "in one array": lambda place: (place / "a.jsonl").write_text(json.dumps(rows(id=3))),
    "a mark, CRLF and empty lines": lambda place: (place / "a.jsonl").write_bytes(
        b"\xef\xbb\xbf" + lines(*rows()).replace(b"\n", b"\r\n\r\n")
    ),
}  # fmt: skip


@pytest.mark.parametrize("other", OTHER_FIELDS)
def test_other_fields_do_not_matter(tmp_path: Path, other: str) -> None:
    """The documents are those of rows with nothing else in them."""
    (tmp_path / "mixed").mkdir()
    OTHER_FIELDS[other](tmp_path / "mixed")
    (tmp_path / "alone.jsonl").write_bytes(lines(*rows()))
    found, expected = read(tmp_path / "mixed"), read(tmp_path / "alone.jsonl")
    assert everything(found) == everything(expected)
    assert sorted(everything(found)) == sorted(DOCS)
    assert found.fingerprint() == expected.fingerprint()


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz", "a.json.gz"])
def test_json_by_other_names_is_read_where_it_is_named(tmp_path: Path, name: str) -> None:
    content = lines(*rows())
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert sorted(everything(read(tmp_path / name))) == sorted(DOCS)
    (tmp_path / "b.jsonl").write_bytes(lines(*rows()[:7]))
    assert len(everything(read(tmp_path))) == 7  # a folder's own .json is seldom text


def test_an_array_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "_CHARACTERS", 50)
    (tmp_path / "a.json").write_text(json.dumps(rows(), indent=1))
    assert sorted(everything(read(tmp_path / "a.json"))) == sorted(DOCS)


WITHOUT_TEXT: dict[str, Callable[[Path], object]] = {
    "null": lambda path: path.write_bytes(lines(*({"text": t if i % 10 else None} for i, t in enumerate(DOCS)))),
    "absent": lambda path: path.write_bytes(lines(*({"text": t} if i % 10 else {"u": 1} for i, t in enumerate(DOCS)))),
    "blank": lambda path: path.write_bytes(lines(*({"text": t if i % 10 else " \n"} for i, t in enumerate(DOCS)))),
    "null in a table": lambda path: parquet(
        path.with_suffix(".parquet"), text=[t if i % 10 else None for i, t in enumerate(DOCS)]
    ),
    "a table without the column": lambda path: (
        parquet(path.with_suffix(".parquet"), other=["x"] * 12),
        path.write_bytes(lines(*(row for i, row in enumerate(rows()) if i % 10))),
    ),
}


@pytest.mark.parametrize("kind", WITHOUT_TEXT)
def test_rows_without_text_are_left_out_and_counted(tmp_path: Path, kind: str) -> None:
    WITHOUT_TEXT[kind](tmp_path / "a.jsonl")
    found = read(tmp_path)
    assert sorted(everything(found)) == sorted(text for i, text in enumerate(DOCS) if i % 10)
    stamp = found.stamp
    assert (stamp["rows"], stamp["rows_without_text"]) == (120, 12)
    assert "rows" not in read_all_of(tmp_path, found).stamp


def read_all_of(place: Path, found: Corpus) -> Corpus:
    """A corpus of the same documents, in which nothing is missing."""
    (place / "all.jsonl").write_bytes(lines(*({"text": text} for text in everything(found))))
    return read(place / "all.jsonl")


def test_one_row_with_text_among_others(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"text": None}, {"text": "\n".join(DOCS)}, {"text": ""}))
    found = read(tmp_path / "a.jsonl")
    assert "".join(everything(found)) == "\n".join(DOCS)
    assert (found.stamp["rows"], found.stamp["rows_without_text"]) == (3, 2)


HELD: dict[str, tuple[Any, str]] = {
    "a list of strings": ([DOCS[0]], "join each into one text"),
    "a list of lists of strings": ([[DOCS[0]]], "dataset.column=..."),
    "a list of objects with the fields a": ([{"a": 1}], "dataset.column=..."),
    "an object with the fields a, b": ({"a": 1, "b": "x"}, "dataset.column=..."),
    "a number": (3, "dataset.column=..."),
    "true or false": (True, "dataset.column=..."),
}


@pytest.mark.parametrize("kind", HELD)
def test_what_a_column_holds_is_said_with_the_row(tmp_path: Path, kind: str) -> None:
    value, way = HELD[kind]
    (tmp_path / "a.jsonl").write_bytes(lines(*rows()[:6], {"text": value, "id": 4}, *rows()))
    with pytest.raises(Refused) as caught:
        everything(read(tmp_path / "a.jsonl"))
    message = str(caught.value)
    assert f"dataset.column='text' is not text: line 7 of a.jsonl holds {kind} in it" in message
    assert way in message
    assert message.endswith("the columns are text, id")


@pytest.mark.parametrize(
    ("value", "kind"),
    [(b"text", "bytes"), (datetime.datetime(2020, 1, 1), "a date or time"), (datetime.date(2020, 1, 1), "a date or"),
     (1.5, "a number"), (decimal.Decimal("1.5"), "a number"), ({"a": 1}, "an object with the fields a")],
)  # fmt: skip
def test_what_a_tables_column_holds_is_said(tmp_path: Path, value: Any, kind: str) -> None:
    parquet(tmp_path / "a.parquet", text=[None, value])
    with pytest.raises(Refused, match=f"row 2 of a.parquet holds {kind}"):
        read(tmp_path / "a.parquet")


def test_text_that_looks_like_a_date_is_text(tmp_path: Path) -> None:
    dates = [f"2020-01-0{n}" for n in range(1, 9)]
    (tmp_path / "a.jsonl").write_bytes(lines(*({"text": date} for date in dates)))
    assert sorted(everything(read(tmp_path / "a.jsonl"))) == dates


def test_half_a_character_becomes_a_replacement_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(*rows(), b'{"text": "one \\ud83d two"}', b'{"text": "\\ud83d\\ude00"}'))
    found = everything(read(tmp_path / "a.jsonl"))
    assert sorted(found) == sorted([*DOCS, "one \ufffd two", "\U0001f600"])


@pytest.mark.parametrize(
    ("more", "says"),
    [(b'{"text": "tw', "a.jsonl: line 121 is not a complete JSON object (Invalid control character"),
     (b'{"text": "caf\xe9"}', "a.jsonl: line 121 holds the byte 0xe9, which is not utf-8"),
     (b"3", "a.jsonl: line 121 is no object with columns but a number"),
     (b"\0" * 9, "a.jsonl: line 121 is not a complete JSON object")],
)  # fmt: skip
def test_a_broken_line_is_named(tmp_path: Path, more: bytes, says: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(*rows(), more))
    with pytest.raises(Refused, match=re.escape(f"cannot be read as json: {says}")):
        everything(read(tmp_path / "a.jsonl"))


def test_a_byte_that_is_no_text_is_named(tmp_path: Path) -> None:
    """In a long file by its place, in one of several by its line."""
    (tmp_path / "a.txt").write_bytes(b"hello\n" * 300_000 + b"caf\xe9\n")
    with pytest.raises(Refused, match=r"byte 1,800,003 is 0xe9, not utf-8: .* iconv"):
        everything(read(tmp_path / "a.txt"))
    (tmp_path / "b.txt").write_text("hello")
    with pytest.raises(Refused, match=r"a.txt: line 300001 holds the byte 0xe9"):
        everything(read(tmp_path))


def test_marks_and_line_ends_are_no_text(tmp_path: Path) -> None:
    text = "\n".join(DOCS)
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert "".join(everything(read(tmp_path / "a.txt"))) == text
    (tmp_path / "b.txt").write_bytes(b"other")
    assert sorted(everything(read(tmp_path))) == sorted([text, "other"])


# Conversations.

TEMPLATE = (
    "{{ bos_token }}{{ strftime_now('%d %b %Y') }}{% for m in messages %}<|turn|>{{ m.role }}: {{ m.content }}"
    "{% if m.tool_calls is defined %}!{% endif %}<|end|>{% endfor %}"
)
AS_TEXT = "<s>26 Jul 2024<|turn|>user: {}<|end|><|turn|>assistant: {}<|end|>"


@pytest.fixture
def chatting(loaded: Loaded) -> Any:
    """The small tokenizer with a chat template, and a BOS of its own accord as Llama's has."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<|end|>"], "bos_token": "<s>"})
    bos = [("<s>", tokenizer.convert_tokens_to_ids("<s>"))]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=bos)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def conversation(kind: str, said: str, answer: str) -> list[dict[str, Any]]:
    if kind == "from and value":
        return [{"from": "human", "value": said}, {"from": "gpt", "value": answer}]
    content: Any = [{"type": "text", "text": answer[:9]}, {"type": "text", "text": answer[9:]}]
    return [{"role": "user", "content": said}, {"role": "assistant", "content": content if kind == "parts" else answer}]


@pytest.mark.parametrize("kind", ["role and content", "parts", "from and value", "a table"])
def test_messages_are_rendered_by_the_chat_template(tmp_path: Path, chatting: Any, kind: str) -> None:
    """Their special tokens are tokens, and the template's BOS is the only one."""
    values = [conversation(kind, text, f"yes, {text}") for text in DOCS]
    if kind == "a table":  # whose rows have every field of any row, if only as null
        values[0][1]["tool_calls"] = []
        parquet(tmp_path / "a.parquet", messages=pyarrow.array(values[1:], CHAT))
    else:
        (tmp_path / "a.jsonl").write_bytes(lines(*({"messages": value, "id": 3} for value in values[1:])))
    tokens = Tokens(read(tmp_path, column="messages"), chatting)
    expected = [AS_TEXT.format(text, f"yes, {text}") for text in DOCS[1:]]
    assert sorted(everything(tokens.corpus)) == sorted(expected)
    names = {name: chatting.convert_tokens_to_ids(name) for name in ("<s>", "<|turn|>", "<|end|>")}
    for split in SPLITS:
        stream, texts = tokens.stream(split).tolist(), list(tokens.corpus.split(split))
        assert stream[0] == names["<s>"]
        assert [stream.count(names[name]) for name in names] == [len(texts), 2 * len(texts), 2 * len(texts)]
        joined = texts if split == "calibration" else [text + "\n\n" for text in texts]
        whole = "".join(joined) if split in ("train", "calibration") else "\n\n".join(texts)
        assert chatting.decode(stream) == whole


CHAT = pyarrow.list_(
    pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string()), ("tool_calls", pyarrow.string())])
)


def test_a_conversation_stays_in_its_split_whatever_renders_it(tmp_path: Path, chatting: Any) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(*({"messages": conversation("", text, text)} for text in DOCS)))
    other = copy.deepcopy(chatting)
    other.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    one, two = (Tokens(read(tmp_path / "a.jsonl", column="messages"), by).corpus for by in (chatting, other))
    assert [name for name, _ in one.everything()] == [name for name, _ in two.everything()]
    assert one.fingerprint() != two.fingerprint()


@pytest.mark.parametrize(
    ("messages", "says"),
    [([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "a part of type 'image'"),
     ([{"role": "user", "content": 3}], "whose content is no text"),
     ([{"role": 3, "content": "x"}], "whose role is 3"),
     ([{"role": "refuse", "content": "x"}], "template does not take: no such role")],
)  # fmt: skip
def test_messages_that_cannot_be_rendered_are_refused(
    tmp_path: Path, chatting: Any, messages: list[dict[str, Any]], says: str
) -> None:
    chatting.chat_template = "{% if messages[0].role == 'refuse' %}{{ raise_exception('no such role') }}{% endif %}x"
    good = conversation("", DOCS[0], DOCS[1])
    (tmp_path / "a.jsonl").write_bytes(lines({"messages": good}, {"messages": []}, {"messages": messages}))
    with pytest.raises(Refused, match=rf"^dataset\.column='messages' .*, line 3 of a\.jsonl\) .*{says}"):
        Tokens(read(tmp_path / "a.jsonl", column="messages"), chatting).stream("train")


def test_messages_without_a_chat_template_are_refused(tmp_path: Path, loaded: Loaded) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"messages": conversation("", DOCS[0], DOCS[1])}))
    with pytest.raises(Refused, match=r"line 1 of a\.jsonl\) holds chat messages, and the model's tokenizer has no"):
        Tokens(read(tmp_path / "a.jsonl", column="messages"), loaded.tokenizer).stream("test")


# Too few documents.


def test_too_few_documents_for_four_splits(tmp_path: Path, loaded: Loaded) -> None:
    """Five long ones, of which none comes into the test split: more text or shorter windows would be no help."""
    texts = [next(t for n in range(999) if digest_mod_20(t := f"{i} {n}\n{story(i)}") > 2) for i in range(5)]
    (tmp_path / "a.jsonl").write_bytes(lines(*({"text": text} for text in texts)))
    tokens = Tokens(read(tmp_path / "a.jsonl"), loaded.tokenizer)
    ways = {"test": "dataset.test_path=", "validation": "recovery.validate_every=0", "calibration": "source=text"}
    for split, way in ways.items():
        with pytest.raises(
            Refused, match=rf"the {split} split of .* its 5 documents are too few .*{way}.*one txt file"
        ):
            tokens.enough(split, 16)
    with pytest.raises(Refused, match=r"the calibration split of .* has no text: its 5 documents are too few"):
        tokens.calibration_windows(2, 16, 0)
    assert len(tokens.windows("train", 16)) > 5
    with pytest.raises(Refused, match=r"^dataset.seq_len=99999: the train split .* give more text or a smaller"):
        tokens.enough("train", 99_999)


def test_test_text_that_is_all_the_text(tmp_path: Path, loaded: Loaded) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(*rows()))
    tokens = Tokens(read(tmp_path / "a.jsonl", test_path=str(tmp_path / "a.jsonl")), loaded.tokenizer)
    assert len(tokens.windows("test", 16)) > 5
    with pytest.raises(Refused, match=r"the train split of .* all its documents are in dataset\.test_path as well"):
        tokens.enough("train", 16)


# One long file, in pieces.


@pytest.mark.parametrize(
    ("kind", "piece"),
    [("lines", 7), ("lines", 64), ("lines", 2**20), ("one line", 1000), ("two bytes a character", 7),
     ("four bytes a character", 7), ("four bytes a character", 64)],
)  # fmt: skip
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


@pytest.mark.parametrize(("at_once", "special"), [(1000, False), (5000, True), (2**22, False)])
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
    places = first.calibration_windows(5, 8, seed=1).places
    asked = counting.calls
    assert asked > 0
    again = Tokens(read(corpus), counting)
    assert {split: again.stream(split).tolist() for split in SPLITS} == streams
    assert again.calibration_windows(5, 8, seed=1).places == places
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
        "import resource, sys\nfrom prune_lab.models.load import TINY\n"
        "from prune_lab.text.text_files import TextFiles\n"
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


def test_the_end_of_a_name_may_be_in_capitals(tmp_path: Path) -> None:
    (tmp_path / "A.TXT").write_text("one")
    (tmp_path / "b.Jsonl").write_text(json.dumps({"text": "two"}))
    with gzip.open(tmp_path / "C.JSONL.GZ", "wt") as file:
        file.write(json.dumps({"text": "three"}))
    assert sorted(text for _, text in TextFiles(path=str(tmp_path)).corpus().everything()) == ["one", "two"]
    assert "".join(TextFiles(path=str(tmp_path / "C.JSONL.GZ")).corpus().as_one()) == "three"


@pytest.mark.parametrize(("ending", "encoding"), [(".txt", "utf-16"), (".jsonl", "utf-32")])
def test_a_file_of_wide_characters_is_called_so(ending: str, encoding: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{ending}"
    path.write_text(json.dumps({"text": "é" * 300}), encoding=encoding)
    with pytest.raises(Refused, match=rf"it is {encoding.upper()}, not utf-8: .* iconv -f {encoding} -t utf-8"):
        list(TextFiles(path=str(path)).corpus().everything())
