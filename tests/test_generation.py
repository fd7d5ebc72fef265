"""Greedy continuations beside the dense model's: figures by hand, tokens as stock transformers has them, texts."""

from __future__ import annotations

import json
import math
from dataclasses import astuple, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ALL_FAMILIES, CPU, Cli, copied, make_folder, story
from test_bos import with_bos
from test_report import STAMP, finished, report_of
from test_report import sweep as sweep_of
from test_sweep import run_sweep
from transformers import AutoModelForCausalLM, AutoTokenizer

from prune_lab.compare import compare
from prune_lab.errors import Refused
from prune_lab.evaluator import Evaluator
from prune_lab.export.bitmask import Bitmask
from prune_lab.export.hf import HuggingFace
from prune_lab.export.none import NoExport
from prune_lab.measure.beginnings import BEGINNINGS
from prune_lab.measure.continuations import (
    Continuation,
    common_prefix,
    generation_of,
    is_loop,
    repetition,
)
from prune_lab.measure.generation import Prompts, continuation, continue_prompts, prepare_prompts, samples_of, text_of
from prune_lab.measure.settings import Measure
from prune_lab.methods.depth import Depth
from prune_lab.methods.magnitude import Magnitude
from prune_lab.methods.none import NoPruning
from prune_lab.methods.structured import Structured
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.load import HubModel, Loaded, Tiny
from prune_lab.post.quantize import Int4WeightOnly, Int8Dynamic, Int8WeightOnly
from prune_lab.pruning.calibration import Calibrator
from prune_lab.pruning.pruned import Pruned
from prune_lab.report import page
from prune_lab.results.samples import LONGEST, Sample, markdown, printable
from prune_lab.results.summary import Summary
from prune_lab.system.console import Console
from prune_lab.text.bos import NO_BOS, Bos
from prune_lab.text.text_files import TextFiles
from prune_lab.text.train_tokenizer import train_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")

QUIET = Console(quiet=True)
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# Figures by hand.

CYCLE = [5, 6, 7, 5, 6, 7, 5, 6, 7, 8]  # by numpy, outside of this package: .6, .5556, .5, .4286


@pytest.mark.parametrize(("n", "expected"), [(1, 0.6), (2, 0.5556), (3, 0.5), (4, 0.4286)])
def test_golden_repetition(n: int, expected: float) -> None:
    assert repetition(CYCLE, n) == pytest.approx(expected, abs=5e-5)


def test_repetition_at_its_ends() -> None:
    assert repetition([3] * 64, 4) == pytest.approx(60 / 61)
    assert repetition(range(64), 4) == 0
    assert [repetition([3] * length, 4) for length in (0, 3, 4, 5)] == [0, 0, 0, 0.5]


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        ([*range(100, 132), *[7] * 32], True),
        ([*range(100, 132), *[7] * 31, 8], False),  # it came out of it
        ([*range(100, 132), 9, *[7] * 31], False),  # not all of the last half
        ([*range(100, 131), 9, *[7] * 32], True),
        ([*range(100, 132), *[1, 2, 3] * 10, 1, 2], True),  # cut off in the middle
        ([*range(100, 132), *range(16), *range(16)], True),  # the longest that is there twice
        ([*range(100, 132), *range(17), *range(15)], False),
        ([*[7] * 32, *range(100, 132)], False),  # of the first half
        (list(range(64)), False),
        ([7] * 16, True),
        ([7] * 15, False),  # too short to say
        ([1, 2, 3, 4, 5, 6, 7, 8, *[1, 2, 3, 4] * 2], True),
        ([*range(10, 18), 9, *[1, 2] * 4], False),  # the last half of 17 is 9
        ([*range(10, 18), 2, *[1, 2] * 4], True),
        ([], False),
    ],
)
def test_loops_by_hand(ids: list[int], expected: bool) -> None:
    assert is_loop(ids) is expected
    assert is_loop(tuple(ids)) is expected


def test_common_prefixes_by_hand() -> None:
    assert common_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert common_prefix([1, 2, 3], [2, 2, 3]) == 0
    assert common_prefix([1, 2], [1, 2, 3]) == common_prefix([1, 2, 3], [1, 2]) == 2
    assert common_prefix([], [1]) == common_prefix([1], []) == common_prefix([], []) == 0
    assert common_prefix((4, 5), [4, 5]) == 2


def ended(*ids: int) -> Continuation:
    return Continuation(ids, "eos")


def cut(*ids: int) -> Continuation:
    return Continuation(ids, "length")


def test_figures_by_hand() -> None:
    """The token that ends a text counts for the common prefix, and not for what repeats itself."""
    dense = [ended(1, 2, 3, 0), cut(*range(10, 30)), cut(*[7] * 20)]
    found = [cut(1, 2, 3, *range(50, 67)), cut(*range(10, 28), 5, 5), ended(*[7] * 6, 0)]
    of_found, of_dense = generation_of(found, dense), generation_of(dense, dense)
    assert astuple(of_found) == pytest.approx(((0 + 0 + 2 / 3) / 3, 0, (3 + 18 + 6) / 3, 1 / 3))
    assert astuple(of_dense) == pytest.approx(((0 + 0 + 16 / 17) / 3, 1 / 3, (4 + 20 + 20) / 3, 1 / 3))


def test_logits_that_are_nan_are_no_good_text() -> None:
    """A model whose first logits are NaN would otherwise repeat nothing and end at once."""
    dense, broken = [cut(1, 2), cut(3, 4)], [cut(1, 2), Continuation((), "nan")]
    assert all(map(math.isnan, astuple(generation_of(broken, dense))))
    beside = generation_of(dense, broken)
    assert math.isnan(beside.common_prefix)
    assert (beside.repetition, beside.loops, beside.ended) == (0, 0, 0)


# Tokens as stock transformers has them.


def prompts_of(loaded: Loaded, bos: Bos = NO_BOS, **changes: Any) -> Prompts:
    settings = Measure(**{"generation_prompts": 3, "generation_tokens": 20, **changes})
    found = prepare_prompts(settings, loaded, bos, loaded.model.config.max_position_embeddings)
    assert found is not None
    return found


@torch.no_grad()
def naive(model: Any, ids: tuple[int, ...], tokens: int, ends: tuple[int, ...] = ()) -> tuple[int, ...]:
    """The whole text anew for each token, without a cache."""
    text = list(ids)
    for _ in range(tokens):
        text.append(int(model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1].argmax()))
        if text[-1] in ends:
            break
    return tuple(text[len(ids) :])


def all_naive(model: Any, prompts: Prompts) -> list[tuple[int, ...]]:
    return [naive(model, ids, prompts.tokens, prompts.ends) for ids in prompts.ids]


def found_by(model: Any, prompts: Prompts) -> list[tuple[int, ...]]:
    return [one.ids for one in continue_prompts(model, prompts, CPU, QUIET)]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_greedy_as_without_a_cache_and_as_generate(tmp_path: Path, family: str) -> None:
    loaded = HubModel(name=str(make_folder(tmp_path / "m", family, tie_word_embeddings=False))).load(CPU, seed=0)
    prompts, stock = prompts_of(loaded), AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    found = found_by(loaded.model, prompts)
    assert found == all_naive(stock, prompts)
    assert len(set(found[0])) > 1  # not the prompt's last token again and again
    for ids, text in zip(prompts.ids, found, strict=True):
        made = stock.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=prompts.tokens, pad_token_id=0)
        assert tuple(made[0, len(ids) :].tolist()) == text


def test_a_sliding_window_is_respected(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "tie_word_embeddings": False}
    folders = [make_folder(tmp_path / str(width), "gemma3_text", sliding_window=width, **keys) for width in (8, 100)]
    near, far = (HubModel(name=str(folder)).load(CPU, seed=0) for folder in folders)
    prompts = prompts_of(near)
    found = found_by(near.model, prompts)
    assert found == all_naive(near.model, prompts) != found_by(far.model, prompts)


def test_the_shipped_model() -> None:
    loaded = Tiny().load(CPU, seed=0)
    prompts = prompts_of(loaded, generation_prompts=2)
    found = found_by(loaded.model, prompts)
    assert found == all_naive(loaded.model, prompts)
    assert len({*found[0], *found[1]}) > 6


WINDOWS = torch.randint(1, 300, (4, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a head of its own: one that is tied and not trained says the last token again and again."""
    return make_folder(tmp_path_factory.mktemp("untied") / "m", tie_word_embeddings=False)


@pytest.fixture
def lively(untied: Path) -> Loaded:
    """That model, loaded."""
    return HubModel(name=str(untied)).load(CPU, seed=0)


def changed(loaded: Loaded, change: Any) -> Loaded:
    found = copied(loaded)
    if hasattr(change, "compress"):
        change.compress(Anatomy(found.model))
    else:
        change.prune(Anatomy(found.model), change.amount, 0, Calibrator(WINDOWS))
    return found


@pytest.mark.parametrize(
    "change",
    [Depth(amount=0.5), Structured(amount=0.5, units=("mlp", "heads")), Int8WeightOnly(), Int8Dynamic(),
     Int4WeightOnly(group_size=16), Magnitude(amount=0.5)],
    ids=lambda change: type(change).__name__,
)  # fmt: skip
def test_compressed_models_and_their_exports(lively: Loaded, change: Any, tmp_path: Path) -> None:
    model, prompts = changed(lively, change), prompts_of(lively)
    found = found_by(model.model, prompts)
    assert found == all_naive(model.model, prompts)
    for export in [HuggingFace(), *([Bitmask()] if isinstance(change, Magnitude) else [])]:
        place = tmp_path / type(export).__name__
        export.write(model, place)
        assert found_by(export.read(place, model.model), prompts) == found


# How a text ends.


def test_it_ends_at_the_first_of_several_tokens(lively: Loaded) -> None:
    """Which the generation config names; as `generate` has it."""
    free = prompts_of(lively)
    whole = found_by(lively.model, replace(free, ends=()))
    end = next(token for token in whole[0][2:] if token not in whole[0][:2])
    lively.model.generation_config.eos_token_id = [299, end]
    prompts = prompts_of(lively)
    assert prompts.ends == (299, end)
    found = continue_prompts(lively.model, prompts, CPU, QUIET)
    assert found[0].end == "eos"
    assert found[0].ids == whole[0][: whole[0].index(end) + 1]
    assert found[0].text_ids == found[0].ids[:-1]
    made = lively.model.generate(torch.tensor([prompts.ids[0]]), do_sample=False, max_new_tokens=20, pad_token_id=0)
    assert tuple(made[0, len(prompts.ids[0]) :].tolist()) == found[0].ids


def test_which_tokens_end_a_text(loaded: Loaded) -> None:
    """The generation config goes before the config, and the tokenizer comes last."""
    model = loaded.model
    model.generation_config.eos_token_id, model.config.eos_token_id = 7, 8
    assert prompts_of(loaded).ends == (7,)
    model.generation_config.eos_token_id = None
    assert prompts_of(loaded).ends == (8,)
    model.config.eos_token_id = [9, 10]
    assert prompts_of(loaded).ends == (9, 10)
    model.config.eos_token_id = None
    assert prompts_of(loaded).ends == (loaded.tokenizer.eos_token_id,)
    loaded.tokenizer.eos_token = None
    assert prompts_of(loaded).ends == ()


def test_an_end_at_once_and_at_the_last_token() -> None:
    """Of a model that always says its place: 0, 1, 2 ..."""

    def model(input_ids: torch.Tensor, **options: Any) -> Any:
        seen = options.get("past_key_values", 0) + input_ids.shape[1]
        return SimpleNamespace(logits=torch.eye(50)[None, None, seen - 3], past_key_values=seen)

    prompt = torch.tensor([[9, 9, 9]])
    assert continuation(model, prompt, 5, (0,)) == ended(0)
    assert continuation(model, prompt, 5, (9, 4)) == ended(0, 1, 2, 3, 4)
    assert continuation(model, prompt, 5, (5,)) == continuation(model, prompt, 5, ()) == cut(0, 1, 2, 3, 4)


def test_logits_that_are_nan_stop_it(loaded: Loaded) -> None:
    with torch.no_grad():
        loaded.model.model.norm.weight[0] = math.nan
    found = continue_prompts(loaded.model, prompts_of(loaded), CPU, QUIET)
    assert {(one.ids, one.end) for one in found} == {((), "nan")}


# Prompts.


def test_the_beginnings_are_plain_text() -> None:
    assert len(set(BEGINNINGS)) == 8
    for text in BEGINNINGS:
        assert text.isascii()
        assert 50 < len(text) < 130
        assert printable(text) == text


@pytest.fixture
def roomy(tmp_path: Path) -> Loaded:
    """A model whose context holds every prompt."""
    folder = make_folder(tmp_path / "roomy", max_position_embeddings=512)
    train_tokenizer(tuple(story(seed) for seed in range(20)), 300, folder, context=512)
    return HubModel(name=str(with_bos(folder))).load(CPU, seed=0)


def test_plain_text_with_and_without_bos(roomy: Loaded) -> None:
    plain, begun = prompts_of(roomy), prompts_of(roomy, Bos(0))
    stock = AutoTokenizer.from_pretrained(roomy.name)
    expected = [tuple(stock(text, add_special_tokens=False).input_ids) for text in BEGINNINGS[:3]]
    assert list(plain.ids) == expected
    assert list(begun.ids) == [(0, *ids) for ids in expected]
    assert plain.texts == begun.texts == BEGINNINGS[:3]
    assert plain.stamp["chat_template"] is False
    assert plain.stamp["prompts_sha256"] != begun.stamp["prompts_sha256"]


@pytest.mark.parametrize(("template", "bos", "begins"), [
    (TEMPLATE, NO_BOS, False), (TEMPLATE, Bos(0), True), ("{{ bos_token }}" + TEMPLATE, Bos(0), True),
])  # fmt: skip
def test_a_chat_template_is_used(roomy: Loaded, template: str, bos: Bos, begins: bool) -> None:
    """With the beginning of an answer, as transformers renders it, and one BOS token where one is needed."""
    roomy.tokenizer.chat_template = template
    found = prompts_of(roomy, bos)
    for text, ids in zip(BEGINNINGS[:3], found.ids, strict=True):
        said = [{"role": "user", "content": text}]
        whole = roomy.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        assert whole.endswith("<|assistant|>")
        expected = roomy.tokenizer(whole.removeprefix("<|endoftext|>"), add_special_tokens=False).input_ids
        assert ids == tuple([0] * begins + expected)
    assert found.stamp["chat_template"] is True
    assert "chat template" in found.said


def test_a_template_that_takes_no_prompt_is_refused(roomy: Loaded) -> None:
    roomy.tokenizer.chat_template = "{{ raise_exception('no system message') }}"
    with pytest.raises(
        Refused, match=r"measure\.generation_prompts=3: .*chat template does not take: no system message"
    ):
        prompts_of(roomy)
    roomy.tokenizer.chat_template = "{# nothing #}"
    with pytest.raises(Refused, match=r"gives a prompt no token: give measure\.generation_prompts=0"):
        prompts_of(roomy)
    roomy.tokenizer.chat_template = None
    roomy.model.config.vocab_size = 5
    with pytest.raises(Refused, match="the model's vocabulary has 5 entries"):
        prompts_of(roomy)


@pytest.mark.parametrize("context", [2, 3, 20, 33, 64, 128, 300, None])
@pytest.mark.parametrize("chat", [False, True])
def test_prompts_and_tokens_fit_the_context(roomy: Loaded, context: int | None, chat: bool) -> None:
    """Prompts lose their last words; where the template alone is too long, that is said."""
    settings = Measure(generation_tokens=64)
    roomy.tokenizer.chat_template = TEMPLATE if chat else None
    if context is not None and context < (64 if chat else 20):
        with pytest.raises(Refused, match=r"has \d+ tokens, and the model's context has room for \d+ before"):
            prepare_prompts(settings, roomy, Bos(0), context)
        return
    found = prepare_prompts(settings, roomy, Bos(0), context)
    assert found is not None
    assert found.tokens == min(64, (context or 1000) // 2)
    for text, short, ids in zip(BEGINNINGS, found.texts, found.ids, strict=True):
        assert text.startswith(short)
        assert context is None or len(ids) + found.tokens <= context
        assert (text == short) or (context or 1000) < 300
        assert short in roomy.tokenizer.decode(ids)


def test_none_are_made_where_none_are_asked_for(loaded: Loaded) -> None:
    assert prepare_prompts(Measure(generation_prompts=0), loaded, NO_BOS, 1) is None
    assert continue_prompts(None, None, CPU, QUIET) == ()
    assert samples_of(None, None, (), ()) == []


# The evaluator.


def evaluator_of(folder: Path, corpus: Path, **changes: Any) -> Evaluator:
    text = TextFiles(path=str(corpus), seq_len=24)
    keys = {"max_windows": 2, "kl_windows": 0, "generation_prompts": 2, "generation_tokens": 16, **changes}
    return Evaluator(
        HubModel(name=str(folder)), text, Measure(latency=False, memory=False, prompt_tokens=9, **keys), CPU, 0, QUIET
    )


def figures(evaluator: Evaluator, loaded: Loaded, place: Path) -> dict[str, float]:
    found = evaluator.evaluate(loaded, place, NoExport(), QUIET)
    metrics = compare(NoPruning(), evaluator.baseline(None, QUIET), found, None, Pruned())
    return {name: value for name, value in metrics.items() if name.startswith("generation/")}


def test_the_dense_model_beside_itself(untied: Path, corpus: Path, tmp_path: Path) -> None:
    """All tokens are common ones."""
    evaluator = evaluator_of(untied, corpus)
    for loaded in (evaluator.dense, evaluator.copy_of_dense(tmp_path)):
        found = figures(evaluator, loaded, tmp_path)
        assert len(found) == 8
        for name in ("repetition", "loops", "common_prefix", "ended"):
            assert found[f"generation/{name}"] == found[f"generation/dense_{name}"]
        lengths = [len(text) for text in all_naive(loaded.model, evaluator.prompts or prompts_of(loaded))]
        assert found["generation/common_prefix"] == sum(lengths) / 2


def test_figures_are_those_of_naive_texts(untied: Path, corpus: Path, tmp_path: Path) -> None:
    evaluator = evaluator_of(untied, corpus)
    loaded = changed(evaluator.dense, Magnitude(amount=0.3))
    assert evaluator.prompts is not None
    texts = [
        [Continuation(ids, "eos" if ids[-1] == 0 else "length") for ids in all_naive(one.model, evaluator.prompts)]
        for one in (loaded, evaluator.dense)
    ]
    found = figures(evaluator, loaded, tmp_path)
    names = ("repetition", "loops", "common_prefix", "ended")
    assert [found[f"generation/{name}"] for name in names] == list(astuple(generation_of(*texts)))
    dense = generation_of(texts[1], texts[1])
    assert [found[f"generation/dense_{name}"] for name in names] == list(astuple(dense))
    assert found["generation/common_prefix"] < found["generation/dense_common_prefix"]


def test_dense_continuations_are_kept(
    untied: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the cache, for other sweeps too; in the sweep's folder; equal to those computed, and not for other prompts."""
    from prune_lab import evaluator as module

    calls: list[str] = []
    monkeypatch.setattr(module, "continue_prompts", lambda *args: calls.append("run") or continue_prompts(*args))
    first = evaluator_of(untied, corpus)
    kept = first.baseline(tmp_path, QUIET).continuations
    assert kept == continue_prompts(first.dense.model, first.prompts, CPU, QUIET)
    again = evaluator_of(untied, corpus)
    assert again.baseline(tmp_path, QUIET).continuations == kept  # the sweep's
    other = evaluator_of(untied, corpus)
    assert other.baseline(None, QUIET).continuations == kept  # the cache's
    assert calls == ["run"]
    longer = evaluator_of(untied, corpus, generation_tokens=17).baseline(None, QUIET).continuations
    assert [one.ids[:16] for one in longer] == [one.ids for one in kept]
    ending = evaluator_of(untied, corpus)
    assert ending.prompts is not None
    ending.prompts = replace(ending.prompts, ends=(kept[0].ids[0],))
    assert ending.baseline(None, QUIET).continuations[0] == Continuation(kept[0].ids[:1], "eos")
    assert calls == ["run"] * 3


def test_a_diverged_model_has_no_figures(untied: Path, corpus: Path, tmp_path: Path) -> None:
    evaluator = evaluator_of(untied, corpus)
    broken = copied(evaluator.dense)
    with torch.no_grad():
        broken.model.model.norm.weight[0] = math.nan
    summary = Summary("RUNNING")
    summary.set_metrics(figures(evaluator, broken, tmp_path))
    assert set(summary.diverged) == {f"generation/{name}" for name in ("repetition", "loops", "common_prefix", "ended")}
    (first, _) = evaluator.samples(
        evaluator.baseline(None, QUIET), evaluator.evaluate(broken, tmp_path, NoExport(), QUIET)
    )
    assert first.compressed == ""
    assert first.compressed_length.startswith("0 tokens, then NaN")


# Texts.


def test_texts_are_those_of_the_tokenizer(loaded: Loaded) -> None:
    """With special tokens in words, and by number those that the tokenizer lacks."""
    ids = loaded.tokenizer("the cat sees thing A1. ", add_special_tokens=False).input_ids
    assert text_of(loaded.tokenizer, ids) == "the cat sees thing A1. "
    assert text_of(loaded.tokenizer, [0, *ids, 0]) == "<|endoftext|>the cat sees thing A1. <|endoftext|>"
    assert text_of(loaded.tokenizer, [99999, 99999, *ids[:1], 10**12]) == (
        "<id 99999><id 99999>" + loaded.tokenizer.decode(ids[:1]) + "<id 1000000000000>"
    )
    assert text_of(loaded.tokenizer, []) == ""
    for token in range(len(loaded.tokenizer)):  # bytes by themselves are no UTF-8
        printable(text_of(loaded.tokenizer, [token])).encode()


EVIL = "\x1b[2J\x00\r\x07\udcff\ud800\ufffe\u2028\u2029\u202egnp.exe\x85\ue000\U0010ffff"


def test_no_letter_breaks_a_file() -> None:
    shown = printable(EVIL)
    assert shown == (r"\x1b[2J\x00\r\x07\udcff\ud800\ufffe\u2028\u2029\u202egnp.exe\x85\ue000\U0010ffff")
    plain = "Grüße, 你好, 👩‍🚀, a\tb\nc \ufffd שלום"
    assert printable(plain) == plain
    assert len(printable("x" * (LONGEST + 1))) == LONGEST + 4
    assert len(printable("\x00" * 10**6)) == LONGEST + 4


def test_every_letter_can_be_written() -> None:
    every = [chr(code) for code in range(0x110000)]
    shown = "".join(printable("".join(every[begin : begin + 1000])) for begin in range(0, len(every), 1000))
    assert shown.encode()
    assert [letter for letter in dict.fromkeys(shown) if ord(letter) < 32] == ["\t", "\n"]


def test_fences_are_longer_than_what_they_hold() -> None:
    text = markdown([Sample("a```b", "````\n# no head", "<b>", "1 token", "2 tokens")], "Said.")
    assert "\n````text\na```b\n````\n" in text
    assert "\n`````text\n````\n# no head\n`````\n" in text
    assert "\n```text\n<b>\n```\n" in text
    assert text.startswith("# Greedy continuations\n\nSaid.\n\n## Prompt 1\n")


# The page of a sweep.

EVIL_SAMPLE = {
    "prompt": "Say <b>&amp;", "dense": "</pre></script><script>alert(1)</script>", "compressed": EVIL,
    "dense_length": "3 tokens", "compressed_length": "<i>",
}  # fmt: skip


def test_texts_are_text_in_the_page(tmp_path: Path) -> None:
    """Also those of a file that something else wrote; a dense text stands once."""
    runs = [finished(amount, 11, samples=[EVIL_SAMPLE]) for amount in (0.1, 0.2)]
    place = sweep_of(tmp_path / "sweep", [*runs, finished(0.3, 12)])
    text = (place / "report.html").read_text(encoding="utf-8")
    ours = text[text.index('id="samples"') : text.index('id="data"')]
    assert ours.count("<th>prompt</th>") == ours.count("<td>dense</td>") == 1
    assert ours.count("<script") == 1  # of the data that follow
    assert "Say &lt;b&gt;&amp;amp;" in ours
    assert "&lt;/pre&gt;&lt;/script&gt;&lt;script&gt;alert(1)" in ours
    assert printable(EVIL) + "\n(&lt;i&gt;)" in ours
    assert "magnitude 0.1 (0)<br>magnitude 0.2 (1)" in ours.replace("job ", "")
    assert "0.3" not in ours
    page.write(report_of(place), tmp_path / "again.html")  # read back
    text = (tmp_path / "again.html").read_text(encoding="utf-8")
    assert text[text.index('id="samples"') : text.index('id="data"')] == ours
    assert 'id="samples"' not in (sweep_of(tmp_path / "none", [finished(0.3, 12)]) / "report.html").read_text()


@pytest.mark.parametrize("samples", [["text"], "text", [{"prompt": "a"}], [{**EVIL_SAMPLE, "dense": 1}], {"a": 1}, 7])
def test_a_file_with_other_texts_is_no_source(tmp_path: Path, samples: Any) -> None:
    place = sweep_of(tmp_path / "sweep", [finished(0.3, 12)])
    (entry,) = json.loads((place / "results.json").read_text())
    (place / "results.json").write_text(json.dumps([{**entry, "samples": samples}]))
    with pytest.raises(Refused, match=r"it is not the results\.json of a sweep"):
        report_of(place)


def test_other_prompts_are_other_stamps(tmp_path: Path) -> None:
    stamps = [{"prompts": 8, "tokens": tokens, "prompts_sha256": "ab" * 32} for tokens in (64, 32)]
    places = [
        sweep_of(tmp_path / str(number), [finished(0.6, 9 + number, protocol={**STAMP, "generation": stamp})])
        for number, stamp in enumerate([*stamps, None])
    ]
    (warning,) = report_of(*places).warnings
    assert "generation is prompts 8, tokens 64, prompts_sha256 abababab in " in warning
    assert ", prompts 8, tokens 32, prompts_sha256 abababab in " in warning


# The command line.

OWN = ("measure.generation_prompts=3", "measure.generation_tokens=16")


def test_a_sweep_leaves_texts_in_its_files_its_page_and_mlflow(folder: Path, corpus: Path, tmp_path: Path) -> None:
    sweep = run_sweep(tmp_path, folder, corpus, "measure=quality_only", "amount=0.3,0.6", *OWN)
    assert (sweep.done.returncode, sweep.done.stderr) == (0, "")
    text = (sweep.folder / "report.html").read_text()
    assert text.count("<th>prompt</th>") == 2  # of three
    (baseline,) = sweep.folder.glob("baseline-*.json")
    assert len(json.loads(baseline.read_text())["continuations"]) == 3
    for job, run in enumerate(sweep.children):
        summary, text = sweep.summary(job), (sweep.folder / str(job) / "generation.md").read_text()
        assert sweep.artifacts(run) == {"config.yaml", "summary.json", "layers.csv", "generation.md"}
        assert len(summary["samples"]) == 2
        assert text.count("## Prompt ") == 3
        for sample in summary["samples"]:
            assert sample["prompt"] in text
            assert sample["compressed"] in text
        metrics = {name for name in run.data.metrics if name.startswith("generation/")}
        assert len(metrics) == 8
        stamp = summary["protocol"]["generation"]
        assert (stamp["prompts"], stamp["tokens"], stamp["chat_template"], stamp["ends"]) == (3, 16, False, [0])
        assert len(stamp["prompts_sha256"]) == 64


def test_other_settings_are_other_runs(small: list[str], cli: Cli, tmp_path: Path) -> None:
    words = [*small, "measure=quality_only", "method=magnitude", "amount=0.5", "tracking=none"]
    asked = [
        "measure.generation_prompts=0", "measure.generation_prompts=1 measure.generation_tokens=16",
        "measure.generation_prompts=1", "measure.generation_prompts=1 measure.generation_tokens=16",
    ]  # fmt: skip
    found = []
    for number, keys in enumerate(asked):
        done = cli(*words, *keys.split(), f"hydra.run.dir=run{number}")
        assert (done.returncode, done.stderr) == (0, "")
        assert ("repeated 4-grams" in done.stdout) == (number > 0)
        found.append(json.loads((tmp_path / f"run{number}" / "summary.json").read_text()))
        assert (tmp_path / f"run{number}" / "generation.md").exists() == (number in (1, 2))
    assert len({one["fingerprint"] for one in found}) == 3
    assert found[3]["samples"] == found[1]["samples"]
    assert found[3]["reused_from"] is not None
    off = found[0]
    assert (off["samples"], off["protocol"]["generation"]) == ([], None)
    assert not [name for name in off["metrics"] if name.startswith("generation/")]
    for name in off["metrics"].keys() - {name for name in off["metrics"] if name.startswith("time/")}:
        assert off["metrics"][name] == found[1]["metrics"][name], name
