"""Models and corpora by their Hub id: from the Hub, from its cache, from a folder in its layout, and its refusals."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import CPU, ROOT, story
from datasets import Dataset
from hub_server import COMMIT, Hub

from prune_lab.errors import Refused
from prune_lab.models.load import HubModel
from prune_lab.text.corpus import Documents
from prune_lab.text.hub_datasets import C4, Wikitext2
from prune_lab.text.splits import SPLITS
from prune_lab.text.tokens import Tokens

WIKITEXT, C4_NAME = "Salesforce/wikitext", "allenai/c4"


def article(number: int) -> list[str]:
    """Rows as WikiText has them: a heading, a section, paragraphs, and empty rows between."""
    rows = ["", f" = Article {number} = \n", "", f" {story(number, sentences=4).replace(chr(10), ' ')} \n"]
    return [*rows, "", " = = Section = = \n", "", f" {story(number + 500, sentences=3)} \n".replace("\n", " ") + "\n"]


def wikitext_rows(start: int, articles: int) -> list[str]:
    return [row for number in range(start, start + articles) for row in article(number)]


@pytest.fixture(scope="module")
def wikitext(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the layout of Salesforce/wikitext."""
    folder = tmp_path_factory.mktemp("wikitext")
    (folder / "wikitext-2-raw-v1").mkdir()
    for split, start, count in (("train", 0, 60), ("validation", 100, 4), ("test", 200, 5)):
        rows = Dataset.from_dict({"text": wikitext_rows(start, count)})
        rows.to_parquet(folder / "wikitext-2-raw-v1" / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def c4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the layout of allenai/c4."""
    folder = tmp_path_factory.mktemp("c4")
    (folder / "en").mkdir()
    for name, start, count in (("train.00000-of-01024", 0, 50), ("validation.00000-of-00008", 900, 30)):
        lines = [json.dumps({"text": story(start + i), "url": "x"}) for i in range(count)]
        (folder / "en" / f"c4-{name}.json.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return folder


def test_wikitext_rows_are_its_test_text(wikitext: Path) -> None:
    """The published protocol: every row, the empty ones too, joined by a blank line."""
    found = Wikitext2(name=str(wikitext)).corpus()
    assert list(found.test) == wikitext_rows(200, 5)
    assert list(found.validation) == wikitext_rows(100, 4)
    assert found.provenance["revision"] == "local folder"


def test_wikitext_training_text_is_its_articles(wikitext: Path) -> None:
    found = Wikitext2(name=str(wikitext)).corpus()
    # An article ends where the next heading stands, with the empty row before that.
    rows = wikitext_rows(0, 60)
    starts = [0, *(i for i, row in enumerate(rows) if row.startswith(" = Article") and i > 1), len(rows)]
    expected = ["\n\n".join(rows[a:b]) for a, b in itertools.pairwise(starts)]
    assert sorted(found.train + found.calibration) == sorted(expected)
    assert found.calibration
    assert len(found.train) > len(found.calibration)


def test_the_real_text_gives_the_published_number_of_tokens(tmp_path: Path) -> None:
    """GPT-2's tokenizer on the WikiText-2 test split: 287,644 tokens, which are 140 windows of 2048 and 280 of 1024."""
    data = ROOT.parent / "shared" / "data"
    if not data.is_dir():
        pytest.skip("the real text does not lie beside this clone")
    from transformers import GPT2Tokenizer

    tokenizer = GPT2Tokenizer(str(data / "gpt2-tokenizer/vocab.json"), str(data / "gpt2-tokenizer/merges.txt"))
    lines = (data / "wikitext-2/test.raw.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    rows = [line if line.strip() else "" for line in lines]
    (tmp_path / "wikitext-2-raw-v1").mkdir()
    for split in ("train", "validation", "test"):
        of = rows if split == "test" else wikitext_rows(0, 30)
        Dataset.from_dict({"text": of}).to_parquet(
            tmp_path / "wikitext-2-raw-v1" / f"{split}-00000-of-00001.parquet"
        )  # fmt: skip
    tokens = Tokens(Wikitext2(name=str(tmp_path)).corpus(), tokenizer)
    assert len(tokens.stream("test")) == 287_644
    assert [len(tokens.windows("test", length)) for length in (2048, 1024)] == [140, 280]


def test_c4_takes_the_first_documents_of_each_shard(c4: Path) -> None:
    source = C4(name=str(c4), train_documents=20, calibration_documents=5, test_documents=7)
    found = source.corpus()
    assert list(found.calibration) == [story(i) for i in range(5)]
    assert list(found.train) == [story(i) for i in range(5, 25)]
    assert list(found.test) == [story(900 + i) for i in range(7)]
    assert list(found.validation) == [story(900 + i) for i in range(7, 14)]
    with pytest.raises(ValueError, match="test_documents=0 must be at least 1"):
        C4(test_documents=0)


def test_a_folder_without_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"dataset\.name=.* has no file wikitext-2-raw-v1/train-00000"):
        Wikitext2(name=str(tmp_path)).corpus()


# With the real client, in processes of their own, for it reads the environment once.


def ask(code: str, tmp_path: Path, **environment: str) -> Any:
    """What a fresh process prints as JSON, with an empty Hub cache of its own unless HF_HOME is given."""
    env = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    env |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "HF_HOME": str(tmp_path / "home"), **environment}
    prelude = (
        "import json\nfrom conftest import CPU\nfrom prune_lab.models.load import HubModel\n"
        "from prune_lab.text.hub_datasets import C4, Wikitext2\n"
        "def outcome(work):\n"
        "    try:\n        return work()\n    except ValueError as error:\n        return str(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", prelude + code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def hub(folder: Path, wikitext: Path, c4: Path) -> Iterator[Hub]:
    """A Hub with the small Llama, both corpora, and one repository behind a gate."""
    repositories = {"models/me/llama": folder, f"datasets/{WIKITEXT}": wikitext, f"datasets/{C4_NAME}": c4}
    served = Hub(repositories, gated=("models/me/gated", "datasets/me/gated"))
    yield served
    served.close()


def test_a_model_is_fetched_by_its_id_and_its_commit_recorded(hub: Hub, folder: Path, tmp_path: Path) -> None:
    code = (
        "loaded = HubModel(name='me/llama').load(CPU, 0)\n"
        "print(json.dumps([loaded.fingerprint()['weights'], loaded.describe()]))"
    )
    weights, facts = ask(code, tmp_path, HF_ENDPOINT=hub.url)
    assert weights == HubModel(name=str(folder)).load(CPU, 0).fingerprint()["weights"]
    assert facts["revision"] == COMMIT
    assert facts["name"] == "me/llama"
    # What was fetched once is there without the Hub.
    asked = len(hub.requests)
    again, facts = ask(code, tmp_path, HF_ENDPOINT=hub.url, HF_HUB_OFFLINE="1")
    assert (again, facts["revision"], len(hub.requests)) == (weights, COMMIT, asked)


def test_the_hubs_refusals_say_what_to_do(hub: Hub, tmp_path: Path) -> None:
    code = (
        "print(json.dumps([outcome(lambda: HubModel(**keys).load(CPU, 0).name) for keys in (dict(name='me/gated'), "
        "dict(name='me/nothing'), dict(name='me/llama', revision='v9'))] + "
        "[outcome(lambda: Wikitext2(name='me/gated').corpus().name)]))"
    )
    gated, absent, revision, gated_text = ask(code, tmp_path, HF_ENDPOINT=hub.url)
    assert gated.startswith("model.name='me/gated'")
    assert gated_text.startswith("dataset.name='me/gated'")
    for message in (gated, gated_text):
        assert "gated: accept its licence" in message
        assert "hf auth login" in message
    assert "there is no me/nothing on the Hub" in absent
    assert "no such revision" in revision
    assert all(len(message) < 300 for message in (gated, absent, revision, gated_text))


def test_corpora_are_fetched_or_streamed_and_their_commit_recorded(hub: Hub, tmp_path: Path) -> None:
    code = (
        "texts = [Wikitext2().corpus(), C4(train_documents=20, calibration_documents=5, test_documents=7)"
        ".corpus()]\nprint(json.dumps([[d.fingerprint(), d.provenance] for d in texts]))"
    )
    (wikitext, facts), (c4, c4_facts) = ask(code, tmp_path, HF_ENDPOINT=hub.url)
    assert facts == {"repository": WIKITEXT, "config": "wikitext-2-raw-v1", "revision": COMMIT}
    assert c4_facts == {"repository": C4_NAME, "config": "en", "revision": COMMIT}
    assert wikitext == Wikitext2(name=str(fixture_folder(hub, WIKITEXT))).corpus().fingerprint()
    sizes = {"train_documents": 20, "calibration_documents": 5, "test_documents": 7}
    assert c4 == C4(name=str(fixture_folder(hub, C4_NAME)), **sizes).corpus().fingerprint()
    # Streamed: the shard is in no cache; fetched: it is.
    kept = {path.name for path in (tmp_path / "home" / "hub").rglob("*-of-*")}
    assert kept == {f"{split}-00000-of-00001.parquet" for split in ("train", "validation", "test")}


def fixture_folder(hub: Hub, name: str) -> Path:
    return hub.repositories[f"datasets/{name}"]


def in_cache(folder: Path, home: Path, name: str) -> None:
    """`folder` in the Hub's cache, in the cache's own layout, as the main revision."""
    repository = home / "hub" / f"datasets--{name.replace('/', '--')}"
    shutil.copytree(folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


def test_corpora_are_read_from_the_hubs_cache(wikitext: Path, c4: Path, tmp_path: Path) -> None:
    in_cache(wikitext, tmp_path / "home", WIKITEXT)
    in_cache(c4, tmp_path / "home", C4_NAME)
    code = (
        "texts = [Wikitext2().corpus(), C4(train_documents=9, calibration_documents=5, test_documents=7)"
        ".corpus()]\nprint(json.dumps([[d.fingerprint(), d.provenance['revision']] for d in texts]))"
    )
    sizes = {"train_documents": 9, "calibration_documents": 5, "test_documents": 7}
    expected: list[Documents] = [Wikitext2(name=str(wikitext)).corpus(), C4(name=str(c4), **sizes).corpus()]
    assert ask(code, tmp_path, HF_HUB_OFFLINE="1") == [[d.fingerprint(), COMMIT] for d in expected]


def test_offline_and_not_in_the_cache_is_refused(tmp_path: Path) -> None:
    code = "print(json.dumps([outcome(lambda: source().corpus().name) for source in (Wikitext2, C4)]))"
    for message, name in zip(ask(code, tmp_path, HF_HUB_OFFLINE="1"), (WIKITEXT, C4_NAME), strict=True):
        assert message.startswith(f"dataset.name={name!r} is no folder here and is not in the Hub's cache")
        assert "HF_HUB_OFFLINE is set" in message


def test_no_split_shares_text_with_another(wikitext: Path, c4: Path) -> None:
    for documents in (Wikitext2(name=str(wikitext)).corpus(), C4(name=str(c4), train_documents=20).corpus()):
        texts = [{text for text in documents.split(split) if len(text) > 40} for split in SPLITS]
        assert sum(map(len, texts)) == len(set().union(*texts))
