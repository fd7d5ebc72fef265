"""model.name=FILE.gguf: the weights that the package gguf has of it, and from there a model as any other."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from conftest import CPU, ROOT, Cli, logits, story
from gguf_files import TEMPLATE, dequantised, make_gguf
from test_models import WITHOUT_PACKAGES
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from prune_lab import cache
from prune_lab.errors import Refused
from prune_lab.models.gguf_folder import check_tokenizer
from prune_lab.models.gguf_header import check_gguf, read_header
from prune_lab.models.load import HubModel, Loaded
from prune_lab.system.device import Device

BF16 = Device(torch.device("cpu"), torch.bfloat16)


def load(path: Path, device: Device = CPU, **keys: Any) -> Loaded:
    return HubModel(name=str(path), **keys).load(device, seed=0)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file in 8 bits."""
    return make_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf")


@pytest.mark.parametrize("device", [CPU, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
def test_weights_are_the_dequantised_ones(kind: str, device: Device, tmp_path: Path) -> None:
    """In float32 to the last bit; in bfloat16 those of float32, rounded once."""
    path = make_gguf(tmp_path / "m.gguf", kind)
    found = load(path, device).model.state_dict()
    expected = dequantised(path.with_suffix(".hub"), kind)
    assert {key for key in found if key != "lm_head.weight"} == expected.keys()
    for key, values in expected.items():
        assert torch.equal(found[key], torch.from_numpy(values).to(device.dtype)), key


def test_logits_are_those_of_stock_transformers(file: Path) -> None:
    stock = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    torch.testing.assert_close(logits(load(file).model), logits(stock.eval()), rtol=0, atol=0)


def test_the_tokenizer_is_the_files(file: Path) -> None:
    loaded, own = load(file), AutoTokenizer.from_pretrained(file.with_suffix(".hub"))
    text = story(3) + " 12 34\n\n"
    assert loaded.tokenizer(text, add_special_tokens=False).input_ids == own(text, add_special_tokens=False).input_ids
    assert loaded.tokenizer("a").input_ids[0] == loaded.tokenizer.bos_token_id == 0
    assert loaded.tokenizer.eos_token_id == 0
    assert loaded.tokenizer.chat_template == TEMPLATE
    assert loaded.tokenizer_config["add_bos_token"] is True
    assert loaded.licence == "apache-2.0"


def test_a_tokenizer_of_another_algorithm_than_the_files_is_refused(file: Path) -> None:
    """As transformers 5.17 makes of Gemma's: another model of the same vocabulary."""
    made = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    header = read_header(file)
    check_tokenizer(made, header, "small.gguf")
    scores = [(token, 0.0) for token in made.convert_ids_to_tokens(range(len(made)))]
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(tokenizers.models.Unigram(scores, 0)))
    with pytest.raises(Refused, match=r"'small.gguf' has a tokenizer of the kind BPE.* makes Unigram"):
        check_tokenizer(other, header, "small.gguf")


def test_a_run_says_what_was_measured_and_exports_it(file: Path, small: list[str], cli: Cli, tmp_path: Path) -> None:
    """The export opens in stock transformers, with the chat template; nothing of it is zero but what was pruned."""
    words = [*small, f"model.name={file}", "measure=quality_only", "export=hf", "tracking=none", "hydra.run.dir=run"]
    done = cli(*words, "amount=0.25")
    assert done.returncode == 0, done.stderr
    assert f"a GGUF file of {file.stat().st_size / 1e6:,.1f} MB (Q8_0)" in done.stdout
    export = tmp_path / "run" / "export"
    assert AutoTokenizer.from_pretrained(export).chat_template == TEMPLATE
    stock = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32)
    dense, left = load(file).model, stock.state_dict()
    for key, weight in dense.state_dict().items():
        kept = left[key] != 0 if key.endswith("_proj.weight") else slice(None)
        assert torch.equal(left[key][kept], weight[kept])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["model"]["licence"] == "apache-2.0"
    assert cli(*words, "amount=0.25", "model.stream=true").returncode == 0  # the same run, on disk


def test_what_is_kept_is_made_once_and_never_stale(tmp_path: Path) -> None:
    """Of each content and number type; the file's name and the time of its change do not matter."""
    path = make_gguf(tmp_path / "m.gguf")
    first = load(path).fingerprint()
    made = cache.entries("gguf")
    assert len(made) == 2  # with weights, and config and tokenizer alone
    times = {folder: (folder / "config.json").stat().st_mtime_ns for folder in made}
    renamed = path.rename(tmp_path / "other.gguf")
    os.utime(renamed)
    assert load(renamed).fingerprint() == first
    assert {folder: (folder / "config.json").stat().st_mtime_ns for folder in cache.entries("gguf")} == times
    load(renamed, BF16)
    assert len(cache.entries("gguf")) == 3
    status = renamed.stat()
    content = bytearray(renamed.read_bytes())
    content[-5] ^= 1  # a weight: as many bytes, and the time is put back
    renamed.write_bytes(content)
    os.utime(renamed, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert load(renamed).fingerprint()["weights"] != first["weights"]


def test_a_damaged_entry_is_made_again(file: Path) -> None:
    first = load(file).fingerprint()
    for folder in cache.entries("gguf"):
        for path in folder.glob("*.safetensors"):
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
    assert load(file).fingerprint() == first


@pytest.mark.parametrize("limit", ["1", "0"])
def test_streamed_it_is_the_same_and_its_files_stay(file: Path, limit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing is kept: in a temporary folder, which goes with the model."""
    monkeypatch.setenv("PRUNE_LAB_CACHE_GB", limit)
    streamed = load(file, stream=True)
    place = next(iter(streamed.model._weights_on_disk.source.spans.values())).file.parent
    assert len(cache.entries("gguf")) == (2 if limit == "1" else 0)
    assert any("PRUNE_LAB_CACHE_GB" in note for note in streamed.warnings) == (limit == "0")
    if limit == "1":
        assert not cache.remove(place)
    assert streamed.fingerprint() == load(file).fingerprint()
    del streamed
    gc.collect()
    assert cache.remove(place) if limit == "1" else not place.parent.exists()


def test_of_random_weights_only_config_and_tokenizer_are_read(file: Path) -> None:
    model = load(file, weights="random").model
    assert len(cache.entries("gguf")) == 1
    assert model.config.rms_norm_eps == pytest.approx(1e-6)
    assert not torch.equal(model.model.norm.weight, load(file).model.model.norm.weight)


def test_other_files_of_its_folder_are_not_read(tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "m.gguf")
    expected = load(path)
    (tmp_path / "chat_template.jinja").write_text("another")
    for name in ("config", "generation_config", "tokenizer_config", "adapter_config"):
        (tmp_path / f"{name}.json").write_text('{"eos_token_id": 7, "tokenizer_class": "Mine", "bos_token": "x"}')
    for folder in cache.entries("gguf"):
        assert cache.remove(folder)
    found = load(path)
    assert (found.fingerprint(), found.carried_sha256()) == (expected.fingerprint(), expected.carried_sha256())


def test_a_link_without_the_ending_is_read(file: Path, tmp_path: Path) -> None:
    """As the Hub's cache has its files: by what it begins with."""
    (tmp_path / "blob").symlink_to(file)
    assert load(tmp_path / "blob").fingerprint() == load(file).fingerprint()


def test_notes_say_what_transformers_does_not_read(tmp_path: Path) -> None:
    path = make_gguf(tmp_path / "m.gguf", tokenizer__ggml__pre="strange", llama__attention__sliding_window=9,
                     llama__novelty=3)  # fmt: skip
    notes = " ".join(load(path).warnings)
    assert "tokenizer.ggml.pre=strange" in notes
    assert "llama.attention.sliding_window=9 is not read by transformers" in notes
    assert "not looked at: llama.novelty=3" in notes
    assert "tokenizer.ggml.pre" not in " ".join(load(make_gguf(tmp_path / "n.gguf")).warnings)


def test_tensors_that_transformers_leaves_out_are_refused(tmp_path: Path) -> None:
    """It would read the file without a word, and compute with other rotations than the model was trained with."""
    path = make_gguf(tmp_path / "m.gguf", tensors={"rope_freqs.weight": (4,)})
    AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name)
    with pytest.raises(Refused, match=r"holds rope_freqs\.weight, which transformers \S+ does not read"):
        load(path)


@pytest.mark.parametrize("hidden", ["gguf", "accelerate", "gguf,accelerate"])
def test_packages_that_are_missing_are_named(hidden: str, file: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGES, hidden, str(file)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"name={str(file)!r} is a GGUF file, and {hidden.replace(',', ' and ')}" in done.stdout, done.stderr
    assert done.stdout.strip().endswith('pip install "prune-lab[gguf]"')


def test_every_cut_of_a_file_is_refused(file: Path, tmp_path: Path) -> None:
    """Wherever it ends; and wherever a byte of its header is another, it is refused or read, and nothing else."""
    content, cut = file.read_bytes(), tmp_path / "cut.gguf"
    for size in [*range(0, 200, 7), *range(200, len(content), len(content) // 60), len(content) - 1]:
        cut.write_bytes(content[:size])
        with pytest.raises(ValueError, match=r"^name='cut' "):
            check_gguf(cut, "cut")
    for place in range(4, 3000, 13):
        cut.write_bytes(content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :])
        try:
            check_gguf(cut, "cut")
        except ValueError:
            continue


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from prune_lab.models import gguf_folder

    path, write = make_gguf(tmp_path / "m.gguf"), gguf_folder._write_config

    def meanwhile(*arguments: Any) -> dict[str, Any]:
        found = write(*arguments)
        path.write_bytes(path.read_bytes() + b"x")
        return found

    monkeypatch.setattr(gguf_folder, "_write_config", meanwhile)
    with pytest.raises(Refused, match="was changed while it was read"):
        load(path)
    assert cache.entries("gguf") == []


def test_it_can_be_a_teacher(file: Path, small: list[str], cli: Cli) -> None:
    words = [*small, f"model.name={file}", "measure=quality_only", "measure.max_windows=2", "tracking=none"]
    done = cli(*words, "recovery=distill", "recovery.steps=2", "recovery.batch_size=2", f"recovery.teacher={file}")
    assert done.returncode == 0, done.stderr


def test_the_header_is_that_of_the_package(file: Path) -> None:
    from gguf import GGUFReader

    from prune_lab.models.gguf_header import read_header

    header, reader = read_header(file), GGUFReader(file)
    assert {name: (of.offset, of.kind, of.shape) for name, of in header.tensors.items()} == {
        tensor.name: (tensor.data_offset, int(tensor.tensor_type), tuple(reversed(tensor.shape.tolist())))
        for tensor in reader.tensors
    }
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            said = field.contents()
            assert header.metadata[key] == (len(said) if isinstance(said, list) else said)
