"""Whole blocks leave: the ones that a plain computation names, and what is left is a stock model of fewer blocks."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALL_FAMILIES, CPU, copied, make_folder
from torch import Tensor
from transformers import AutoModelForCausalLM

from prune_lab.errors import Refused
from prune_lab.measure.size import measure_size
from prune_lab.methods.depth import Depth
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.blocks import bypassed
from prune_lab.models.export import check_reload, save_model
from prune_lab.models.load import HubModel, Loaded
from prune_lab.models.resize import keep_blocks, original_blocks
from prune_lab.pruning.calibration import Calibrator
from prune_lab.pruning.depth_refit import refit_before
from prune_lab.pruning.pruned import Pruned

BLOCKS = 4
WINDOWS = torch.randint(1, 300, (5, 24), generator=torch.Generator().manual_seed(4))  # 0 is padding


def deep(family: str) -> dict[str, Any]:
    return {"n_layer": BLOCKS} if family == "gpt2" else {"num_hidden_layers": BLOCKS}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    """A model of four blocks of each family, in float32, each block of another strength; to be copied."""
    place = tmp_path_factory.mktemp("depth")
    made = {}
    for family in ALL_FAMILIES:
        loaded = HubModel(name=str(make_folder(place / family, family, **deep(family)))).load(CPU, seed=0)
        with torch.no_grad():
            for linears, strength in zip(Anatomy(loaded.model).linears_by_block(), (0.6, 0.3, 1.0, 0.1), strict=True):
                for _, linear in linears:
                    linear.weight.mul_(strength)
        made[family] = loaded
    return made


def prune(model: Any, amount: float, by: str = "bi", batch_size: int = 16, refit: str = "none") -> Pruned:
    method = Depth(amount=amount, by=by, refit=refit)
    return method.prune(Anatomy(model), amount, 0, Calibrator(WINDOWS, batch_size=batch_size))


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(input_ids=WINDOWS, use_cache=False).logits


def stock_without(model: Any, dropped: list[int]) -> Any:
    """A new stock model of fewer blocks, from a config written by hand, with the weights of the blocks that stay."""
    kept = [index for index in range(BLOCKS) if index not in dropped]
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = len(kept)
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = [config.layer_types[index] for index in kept]
    prefix, weights = Anatomy(model).family.blocks + ".", {}
    for name, value in model.state_dict().items():
        if name.startswith(prefix):
            number, _, rest = name.removeprefix(prefix).partition(".")
            if int(number) in dropped:
                continue
            name = f"{prefix}{kept.index(int(number))}.{rest}"
        weights[name] = value
    made = AutoModelForCausalLM.from_config(config).eval()
    made.load_state_dict(weights)
    return made


@torch.no_grad()
def naive_influence(model: Any) -> list[float]:
    """1 - the mean cosine of what enters and leaves each block, in a stock forward pass, token by token."""
    model, found = copy.deepcopy(model), list[float]()

    def look(block: Any, args: Any, kwargs: Any, out: Any) -> None:
        before = (args[0] if args else kwargs["hidden_states"]).flatten(0, 1).double()
        after = (out[0] if isinstance(out, tuple) else out).flatten(0, 1).double()
        cosines = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(before, after, strict=True)]
        found.append(1 - sum(cosines) / len(cosines))

    for block in model.get_submodule(Anatomy(model).family.blocks):
        block.register_forward_hook(look, with_kwargs=True)
    model(input_ids=WINDOWS, use_cache=False)
    return found


@torch.no_grad()
def naive_loss(model: Any) -> float:
    return sum(float(model(input_ids=w[None], labels=w[None], use_cache=False).loss) for w in WINDOWS) / len(WINDOWS)


def said(pruned: Pruned) -> list[int]:
    """The blocks that the run's note names."""
    (note,) = pruned.warnings
    assert note.startswith(f"blocks removed of {BLOCKS}, counted from 0: ")
    return [int(part) for part in note.rpartition(": ")[2].split(", ")]


@pytest.mark.parametrize(
    ("family", "amount", "count"),
    [*((family, 0.5, 2) for family in ALL_FAMILIES), ("llama", 0.25, 1), ("gemma2", 0.75, 3)],
)
def test_the_blocks_of_least_influence_go(models: dict[str, Loaded], family: str, amount: float, count: int) -> None:
    """What is left computes what a stock model built without them does."""
    dense, model = models[family].model, copied(models[family]).model
    influence = naive_influence(dense)
    expected = sorted(sorted(range(BLOCKS), key=lambda index: influence[index])[:count])
    pruned = prune(model, amount, batch_size=2)
    assert said(pruned) == expected
    torch.testing.assert_close(logits(model), logits(stock_without(dense, expected)), atol=1e-5, rtol=1e-5)
    assert len(Anatomy(model).blocks) == model.config.num_hidden_layers == BLOCKS - count


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
def test_by_perplexity_each_step_drops_the_block_that_is_missed_least(models: dict[str, Loaded], family: str) -> None:
    """Greedily, by building every smaller stock model and measuring it with its own loss."""
    dense, model = models[family].model, copied(models[family]).model
    dropped: list[int] = []
    for _ in range(2):
        left = [index for index in range(BLOCKS) if index not in dropped]
        dropped.append(min(left, key=lambda index: naive_loss(stock_without(dense, [*dropped, index]))))
    assert said(prune(model, 0.5, by="perplexity", batch_size=2)) == sorted(dropped)
    torch.testing.assert_close(logits(model), logits(stock_without(dense, dropped)), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def naive_divergence(dense: Any, model: Any) -> float:
    """KL(dense || model) of every next token but the first of a window, from whole logits, in float64."""
    p, q = (logits(of)[:, :-1].double().log_softmax(-1) for of in (dense, model))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "opt"])
def test_by_kl_each_step_drops_the_block_that_is_missed_least(models: dict[str, Loaded], family: str) -> None:
    dense, model = models[family].model, copied(models[family]).model
    dropped: list[int] = []
    for _ in range(2):
        left = [index for index in range(BLOCKS) if index not in dropped]
        dropped.append(min(left, key=lambda index: naive_divergence(dense, stock_without(dense, [*dropped, index]))))
    assert said(prune(model, 0.5, by="kl", batch_size=2)) == sorted(dropped)


@pytest.mark.parametrize("family", ALL_FAMILIES)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_by_angle_a_run_of_blocks_goes(models: dict[str, Loaded], family: str, count: int) -> None:
    """The run whose entrance and exit are nearest in angle, from the hidden states of a stock forward pass."""
    dense, model = models[family].model, copied(models[family]).model
    places: list[Tensor] = []

    def look(block: Any, args: Any, kwargs: Any, out: Any) -> None:
        if not places:
            places.append((args[0] if args else kwargs["hidden_states"])[:, -1].double())
        places.append((out[0] if isinstance(out, tuple) else out)[:, -1].double())

    hooks = [block.register_forward_hook(look, with_kwargs=True) for block in Anatomy(dense).blocks]
    logits(dense)
    for hook in hooks:
        hook.remove()
    angles = [
        float(torch.cosine_similarity(places[first], places[first + count]).arccos().mean())
        for first in range(BLOCKS - count + 1)
    ]
    first = angles.index(min(angles))
    assert said(prune(model, count / BLOCKS, by="angle", batch_size=2)) == list(range(first, first + count))


@pytest.mark.parametrize(
    ("family", "dropped"), [*((family, [1, 2]) for family in ALL_FAMILIES), ("llama", [0]), ("gpt2", [3])], ids=str
)
def test_a_bypassed_block_is_as_if_it_were_not_there(
    models: dict[str, Loaded], family: str, dropped: list[int]
) -> None:
    """And is there again afterwards."""
    model = models[family].model
    before = logits(model)
    with bypassed(Anatomy(model), dropped):
        without = logits(model)
    torch.testing.assert_close(without, logits(stock_without(model, dropped)), atol=1e-5, rtol=1e-5)
    assert (without - before).abs().max() > 1e-3
    assert torch.equal(logits(model), before)
    assert not any(block._forward_hooks for block in Anatomy(model).blocks)


@pytest.mark.parametrize(("by", "amount"), [("bi", 0.9), ("perplexity", 0.99), ("kl", 0.8), ("angle", 0.9)])
def test_one_block_always_stays(models: dict[str, Loaded], by: str, amount: float) -> None:
    model = copied(models["llama"]).model
    pruned = prune(model, amount, by)
    assert len(said(pruned)) == BLOCKS - 1
    assert model.config.num_hidden_layers == 1
    assert pruned.realized == pytest.approx(0.75)
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("refit", ["none", "residual"])
@pytest.mark.parametrize(("by", "amount"), [("bi", 0.1), ("perplexity", 0.0), ("kl", 0.1), ("angle", 0.0)])
def test_less_than_half_a_block_changes_nothing(models: dict[str, Loaded], by: str, amount: float, refit: str) -> None:
    """Nor is there anything to refuse where what is added is normed."""
    model = copied(models["gemma2"]).model
    before = model.config.to_dict()
    pruned = prune(model, amount, by, refit=refit)
    assert pruned.realized == 0
    assert pruned.warnings == []
    assert torch.equal(logits(model), logits(models["gemma2"].model))
    assert model.config.to_dict() == before


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_blocks_are_renumbered_and_generate_alike_with_and_without_cache(
    models: dict[str, Loaded], family: str, tmp_path: Path
) -> None:
    """The cache goes by a block's number; the export is a stock model, with nothing of what left."""
    loaded = copied(models[family])
    prune(loaded.model, 0.5)
    for number, block in enumerate(Anatomy(loaded.model).blocks):
        numbers = {module.layer_idx for module in block.modules() if getattr(module, "layer_idx", None) is not None}
        assert numbers == {number}
    save_model(loaded, tmp_path / "export")
    check_reload(loaded.model, tmp_path / "export", WINDOWS[:1])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32).eval()
    assert again.config.num_hidden_layers == 2
    torch.testing.assert_close(logits(again), logits(loaded.model), atol=1e-6, rtol=1e-6)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    prompt = WINDOWS[:2, :9]
    for model in (loaded.model, again):
        with_cache, without = (
            model.generate(prompt, attention_mask=torch.ones_like(prompt), use_cache=use, **options)
            for use in (True, False)
        )
        assert with_cache.shape == (2, 21)
        assert torch.equal(with_cache, without)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "qwen2", "mistral"])
def test_settings_of_each_block_leave_with_it(models: dict[str, Loaded], family: str, tmp_path: Path) -> None:
    """Each kept block is of the kind it was, in the config that is saved too; a list of as many tokens stays."""
    loaded = copied(models[family])
    kinds = getattr(loaded.model.config, "layer_types", None)
    ends = loaded.model.config.eos_token_id = [5, 6, 7, 8]
    dropped = said(prune(loaded.model, 0.5))
    assert loaded.model.config.eos_token_id == ends
    if kinds is None:
        assert getattr(loaded.model.config, "layer_types", None) is None
        return
    expected = [kind for index, kind in enumerate(kinds) if index not in dropped]
    assert list(loaded.model.config.layer_types) == expected
    save_model(loaded, tmp_path / "export")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    assert list(again.config.layer_types) == expected


@pytest.mark.parametrize("kept", [(0,), (3,), (1, 2), (0, 2), (1, 2, 3)])
def test_a_window_of_attention_stays_with_its_block(models: dict[str, Loaded], kept: tuple[int, ...]) -> None:
    """Gemma 2 alternates: with a window shorter than the text, a block of the other kind computes something else."""
    model = copied(models["gemma2"]).model
    model.config.sliding_window = 5
    for block in Anatomy(model).blocks:
        for module in block.modules():
            if isinstance(getattr(module, "sliding_window", None), int):
                module.sliding_window = 5
    dropped = [index for index in range(BLOCKS) if index not in kept]
    expected = logits(stock_without(model, dropped))
    with bypassed(Anatomy(model), dropped):
        torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    keep_blocks(Anatomy(model), list(kept))
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    apart = float((expected - logits(stock_without(models["gemma2"].model, dropped))).abs().max())
    assert (apart > 1e-4) == ("sliding_attention" in model.config.layer_types)  # there is something to lose


def test_a_model_whose_blocks_compute_with_their_number_is_refused(tmp_path: Path) -> None:
    """And is as it was."""
    folder = make_folder(tmp_path / "scaled", "gpt2", n_layer=BLOCKS, scale_attn_by_inverse_layer_idx=True)
    model = HubModel(name=str(folder)).load(CPU, seed=0).model
    before = logits(model)
    with pytest.raises(Refused, match="scale_attn_by_inverse_layer_idx=true"):
        prune(model, 0.5)
    assert len(Anatomy(model).blocks) == model.config.num_hidden_layers == BLOCKS
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings_are_counted_once(tmp_path: Path, tied: bool) -> None:
    """By hand: 4 blocks of 7 matrices and 2 norms, a last norm, an embedding, and a head where it is its own."""
    keys = {"tie_word_embeddings": tied, **deep("llama")}
    loaded = HubModel(name=str(make_folder(tmp_path / "model", **keys))).load(CPU, seed=0)
    block = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32
    rest = 300 * 32 * (1 if tied else 2) + 32
    pruned = prune(loaded.model, 0.5)
    save_model(loaded, tmp_path / "export")
    size = measure_size(loaded.model, [tmp_path / "export" / "model.safetensors"])
    assert size.params == 2 * block + rest
    assert (loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight) == tied
    assert sum(row.before for row in pruned.rows) == 4 * (block - 2 * 32)  # what could be pruned: the matrices
    assert sum(row.removed for row in pruned.rows) == 2 * (block - 2 * 32)
    assert pruned.realized == 0.5
    held = size.disk_mb * 1e6 - 4 * size.params
    assert 0 <= held < 10_000  # float32, and a header


@pytest.mark.parametrize("by", ["bi", "perplexity", "kl"])
def test_more_blocks_go_beside_those_that_went_before(models: dict[str, Loaded], by: str) -> None:
    """A larger amount of the dense model drops what a smaller one dropped."""
    gone = [set(said(prune(copied(models["llama"]).model, amount, by))) for amount in (0.25, 0.5, 0.75)]
    assert gone[0] < gone[1] < gone[2]


@pytest.mark.parametrize("by", ["perplexity", "kl"])
def test_the_block_that_overflows_goes_and_two_are_refused(models: dict[str, Loaded], by: str) -> None:
    """NaN is neither below nor above anything: the block that makes it goes, not the first one. Two are refused."""
    broken = copied(models["llama"]).model
    with torch.no_grad():
        Anatomy(broken).blocks[3].mlp.down_proj.weight.fill_(float("nan"))
        Anatomy(broken).blocks[2].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(Refused, match="not finite"):
        prune(broken, 0.25, by=by)
    one_nan = copied(models["llama"]).model
    with torch.no_grad():
        Anatomy(one_nan).blocks[3].mlp.down_proj.weight.fill_(float("nan"))
    if by == "perplexity":
        assert said(prune(one_nan, 0.25, by=by)) == [3]


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(ValueError, match=r"by='nope' is not one of bi, angle, perplexity, kl"):
        Depth(by="nope")
    with pytest.raises(ValueError, match=r"refit='inputs' is not one of none, residual"):
        Depth(refit="inputs")


ADDED = [family for family in ALL_FAMILIES if family not in ("gemma2", "gemma3_text")]  # these norm what is added
WRITERS = {"gpt2": "mlp.c_proj", "opt": "fc2", "gpt_neox": "mlp.dense_4h_to_h"}


def writer_of(model: Any, family: str, block: int) -> Any:
    return Anatomy(model).blocks[block].get_submodule(WRITERS.get(family, "mlp.down_proj"))


@torch.no_grad()
def seen(model: Any, family: str, block: int) -> tuple[Tensor, Tensor]:
    """Rows of what the MLP's last matrix of a block is given, and of what leaves the block, in a stock forward pass."""
    found: list[Tensor] = []

    def look(_: Any, args: Any, out: Any) -> None:
        found.append(out[0] if isinstance(out, tuple) else out)

    hooks = [
        writer_of(model, family, block).register_forward_hook(lambda _, args, out: found.append(args[0])),
        Anatomy(model).blocks[block].register_forward_hook(look),
    ]
    model(input_ids=WINDOWS, use_cache=False)
    for hook in hooks:
        hook.remove()
    inputs, outputs = (rows.reshape(-1, rows.shape[-1]).double() for rows in found)
    return inputs, outputs


@torch.no_grad()
def naive_refit(model: Any, family: str, dropped: list[int]) -> Any:
    """A stock model without these blocks, refitted in float64: least squares over rows, a ridge as further rows."""
    dense, changed = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    kept = [index for index in range(BLOCKS) if index not in dropped]
    for block, following in zip(kept, [*kept[1:], BLOCKS], strict=True):
        if following == block + 1:
            continue
        inputs, given = seen(stock_without(changed, dropped).double(), family, kept.index(block))
        wanted = seen(dense, family, following - 1)[1] - given
        writer = writer_of(changed, family, block)
        mean_in, mean_out = inputs.mean(0), wanted.mean(0)
        if writer.bias is None:
            mean_in, mean_out = torch.zeros_like(mean_in), torch.zeros_like(mean_out)
        inputs, wanted = inputs - mean_in, wanted - mean_out
        ridge = (0.01 * inputs.square().sum(0).mean()).sqrt() * torch.eye(inputs.shape[1])
        rows, targets = torch.cat([inputs, ridge]), torch.cat([wanted, torch.zeros(len(ridge), wanted.shape[1])])
        change = torch.linalg.lstsq(rows, targets).solution  # (in, out), as GPT-2 has it
        writer.weight += change if family == "gpt2" else change.T
        if writer.bias is not None:
            writer.bias += mean_out - mean_in @ change
    return stock_without(changed, dropped)


def refitted(model: Any, dropped: list[int], batch_size: int = 2) -> list[str]:
    warnings = refit_before(Anatomy(model), dropped, Calibrator(WINDOWS, batch_size=batch_size))
    keep_blocks(Anatomy(model), [index for index in range(BLOCKS) if index not in dropped])
    return warnings


def check_refitted(weight: Tensor, expected: Tensor, plain: Tensor) -> None:
    """As expected but for the rounding of sums in float32, of which the means are a part."""
    largest = float((expected - plain).abs().max()) + float(plain.abs().max()) * (not torch.equal(expected, plain))
    torch.testing.assert_close(weight, expected, rtol=0, atol=5e-3 * largest)


@pytest.mark.parametrize("family", ADDED)
@pytest.mark.parametrize("dropped", [[1, 2], [3, 1], [2, 3], [2, 0]], ids=str)
def test_a_refit_is_the_least_squares_of_two_models_side_by_side(
    models: dict[str, Loaded], family: str, dropped: list[int]
) -> None:
    """One run of blocks or two, at the end, and at the beginning, for which nothing makes up: every weight, by hand."""
    dense, model = models[family].model, copied(models[family]).model
    warnings = refitted(model, dropped)
    first = ["method.refit=residual: no block stands before 0 that could make up for them"]
    assert warnings == (first if 0 in dropped else [])
    expected, plain = naive_refit(dense, family, dropped).state_dict(), stock_without(dense, dropped).state_dict()
    for name, weight in model.state_dict().items():
        check_refitted(weight, expected[name], plain[name])
    changed = {name.rpartition(".")[0] for name in expected if not torch.equal(expected[name], plain[name])}
    assert len(changed) == sum(index > 0 and index - 1 not in dropped for index in dropped)


@pytest.mark.parametrize(
    ("family", "keys"), [("llama", {"mlp_bias": True}), ("gpt_neox", {"use_parallel_residual": False})]
)
def test_a_bias_takes_part_and_so_does_a_block_of_another_order(
    family: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    loaded = HubModel(name=str(make_folder(tmp_path / family, family, **deep(family), **keys))).load(CPU, seed=0)
    model = copied(loaded).model
    assert refitted(model, [1, 2]) == []
    expected = naive_refit(loaded.model, family, [1, 2])
    of_each = [writer_of(one, family, 0).state_dict() for one in (model, expected, loaded.model)]
    for name in ("weight", "bias"):
        one, other, before = (of_one[name] for of_one in of_each)
        assert (other - before).abs().max() > 1e-3
        check_refitted(one, other, before)


@pytest.mark.parametrize("by", ["bi", "angle", "perplexity", "kl"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_whichever_blocks_go_the_states_come_nearer(tmp_path: Path, family: str, by: str) -> None:
    """The same blocks go; behind the last of them, the states of calibration text are nearer to the dense model's."""
    loaded = HubModel(name=str(make_folder(tmp_path / family, family, **deep(family)))).load(CPU, seed=0)
    with torch.no_grad():
        for linears, strength in zip(Anatomy(loaded.model).linears_by_block(), (1, 0.7, 0.5, 0.6), strict=True):
            for _, linear in linears:
                linear.weight.mul_(strength)
    errors, gone = {}, {}
    for refit in ("none", "residual"):
        model = copied(loaded).model
        pruned = prune(model, 0.5, by, refit=refit)
        gone[refit] = said(Pruned(warnings=pruned.warnings[:1]))
        last = max(gone[refit])
        assert last >= len(gone[refit])  # one before it stays
        behind = seen(model, family, last - len(gone[refit]))[1]
        errors[refit] = float((behind - seen(loaded.model, family, last)[1]).square().sum())
    assert gone["none"] == gone["residual"]
    assert errors["residual"] < 0.9 * errors["none"]


def test_nothing_makes_up_for_the_first_blocks_and_the_run_says_so(models: dict[str, Loaded]) -> None:
    """By their numbers in the dense model, also where others went in an earlier pruning."""
    model = copied(models["llama"]).model
    keep_blocks(Anatomy(model), [1, 2, 3])
    calibrator = Calibrator(WINDOWS)
    before = copy.deepcopy(model.state_dict())
    assert refit_before(Anatomy(model), [0, 1], calibrator) == [
        "method.refit=residual: no block stands before 1, 2 that could make up for them"
    ]
    assert all(torch.equal(before[name], weight) for name, weight in model.state_dict().items())


def test_a_second_pruning_is_refitted_to_the_model_before_it(models: dict[str, Loaded]) -> None:
    once, twice = copied(models["llama"]).model, copied(models["llama"]).model
    prune(once, 0.25, refit="residual")
    prune(twice, 0.25, refit="residual")
    kept = original_blocks(Anatomy(once))
    before = copy.deepcopy(once)
    pruned = prune(twice, 0.5, refit="residual")
    (gone,) = set(kept) - set(original_blocks(Anatomy(twice)))
    where = kept.index(gone)
    assert where > 0
    assert len(pruned.warnings) == 1
    refit_before(Anatomy(before), [where], Calibrator(WINDOWS))
    keep_blocks(Anatomy(before), [index for index in range(3) if index != where])
    assert all(torch.equal(weight, before.state_dict()[name]) for name, weight in twice.state_dict().items())


@pytest.mark.parametrize("by", ["bi", "kl"])
@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "opt"])
def test_a_model_that_norms_what_is_added_repairs_no_states(
    models: dict[str, Loaded], family: str, by: str, tmp_path: Path
) -> None:
    """Gemma 2 and 3, and an OPT whose norms stand behind the blocks: refused before anything is changed."""
    model = copied(models[family]).model
    if family == "opt":
        folder = make_folder(tmp_path / "opt", "opt", do_layer_norm_before=False, **deep("opt"))
        model = HubModel(name=str(folder)).load(CPU, seed=0).model
    before = logits(model)
    with pytest.raises(Refused, match=r"not added to the states as they are.*give method.refit=none"):
        prune(model, 0.5, by, refit="residual")
    assert torch.equal(logits(model), before)
    assert len(Anatomy(model).blocks) == BLOCKS


def test_activations_that_overflow_are_not_refitted(models: dict[str, Loaded]) -> None:
    model = copied(models["llama"]).model
    with torch.no_grad():
        Anatomy(model).blocks[3].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(Refused, match="not finite"):
        prune(model, 0.25, "perplexity", refit="residual")
