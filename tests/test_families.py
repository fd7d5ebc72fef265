"""Every architecture: what is pruned is what was meant, whatever its matrices are called and however they lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ALL_FAMILIES, CPU, OTHER_FAMILIES, copied, logits, make_folder
from torch import Tensor
from transformers import AutoModelForCausalLM

from prune_lab.errors import Refused
from prune_lab.measure.inference import decode, prefill
from prune_lab.methods.base import Method
from prune_lab.methods.magnitude import Magnitude
from prune_lab.methods.structured import Structured
from prune_lab.models.anatomy import Anatomy, check_matrices
from prune_lab.models.export import check_reload, save_model
from prune_lab.models.families import FAMILIES
from prune_lab.models.load import HubModel, Loaded
from prune_lab.models.loss import window_losses
from prune_lab.pruning.calibration import Calibrator

HIDDEN, MLP, HEADS, HEAD_DIM = 32, 48, 4, 8
FIXED_HEADS = ("gpt2", "opt", "gpt_neox")  # their head_dim is hidden_size / heads
WINDOWS = torch.randint(300, (6, 24), generator=torch.Generator().manual_seed(7))  # to calibrate on
Parts = tuple[list[Tensor], list[Tensor]]  # weights and biases of one unit, as views into the model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Loaded]:
    """One small model of each family, in float32; to be copied, never changed."""
    place = tmp_path_factory.mktemp("families")
    return {
        family: HubModel(name=str(make_folder(place / family, family))).load(CPU, seed=0) for family in ALL_FAMILIES
    }


def prune(loaded: Loaded, method: Method) -> Any:
    return method.prune(Anatomy(loaded.model), method.amount, 0, Calibrator(WINDOWS) if method.calibrated else None)


# One MLP channel or KV group of a block, by plain indexing as the architecture's own forward pass reads it.


def head(number: int) -> slice:
    return slice(number * HEAD_DIM, (number + 1) * HEAD_DIM)


def phi3_mlp(block: Any, i: int) -> Parts:
    fused, down = block.mlp.gate_up_proj.weight, block.mlp.down_proj.weight
    return [fused[i], fused[MLP + i], down[:, i]], []


def phi3_group(block: Any, g: int) -> Parts:
    """2 KV groups: queries of heads 2g and 2g + 1, then key g, then value g."""
    fused, out = block.self_attn.qkv_proj.weight, block.self_attn.o_proj.weight
    query = slice(2 * g * HEAD_DIM, (2 * g + 2) * HEAD_DIM)
    keys, values = fused[HIDDEN : HIDDEN + 16], fused[HIDDEN + 16 :]
    return [fused[query], keys[head(g)], values[head(g)], out[:, query]], []


def gpt2_mlp(block: Any, i: int) -> Parts:
    """Conv1D holds (in, out)."""
    return [block.mlp.c_fc.weight[:, i], block.mlp.c_proj.weight[i]], [block.mlp.c_fc.bias[i : i + 1]]


def gpt2_group(block: Any, g: int) -> Parts:
    weight, bias = block.attn.c_attn.weight, block.attn.c_attn.bias
    thirds = [slice(third * HIDDEN + g * HEAD_DIM, third * HIDDEN + (g + 1) * HEAD_DIM) for third in range(3)]
    return [*(weight[:, part] for part in thirds), block.attn.c_proj.weight[head(g)]], [bias[part] for part in thirds]


def opt_mlp(block: Any, i: int) -> Parts:
    return [block.fc1.weight[i], block.fc2.weight[:, i]], [block.fc1.bias[i : i + 1]]


def opt_group(block: Any, g: int) -> Parts:
    inputs = [block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj]
    weights = [*(linear.weight[head(g)] for linear in inputs), block.self_attn.out_proj.weight[:, head(g)]]
    return weights, [linear.bias[head(g)] for linear in inputs]


def neox_mlp(block: Any, i: int) -> Parts:
    up, down = block.mlp.dense_h_to_4h, block.mlp.dense_4h_to_h
    return [up.weight[i], down.weight[:, i]], [up.bias[i : i + 1]]


def neox_group(block: Any, g: int) -> Parts:
    """Query, key and value of one head lie beside each other."""
    fused, rows = block.attention.query_key_value, slice(g * 3 * HEAD_DIM, (g + 1) * 3 * HEAD_DIM)
    return [fused.weight[rows], block.attention.dense.weight[:, head(g)]], [fused.bias[rows]]


Reader = Callable[[Any, int], Parts]
BY_HAND: dict[str, tuple[str, Reader, Reader, int]] = {  # blocks, a channel, a group, how many groups
    "phi3": ("model.layers", phi3_mlp, phi3_group, 2),
    "gpt2": ("transformer.h", gpt2_mlp, gpt2_group, 4),
    "opt": ("model.decoder.layers", opt_mlp, opt_group, 4),
    "gpt_neox": ("gpt_neox.layers", neox_mlp, neox_group, 4),
}


@torch.no_grad()
def zero_by_hand(model: Any, family: str, kind: str, drop: int) -> None:
    """Zeroes the `drop` units of lowest L2 norm in each block."""
    blocks, channel, group, groups = BY_HAND[family]
    read, count = (channel, MLP) if kind == "mlp" else (group, groups)
    for block in model.get_submodule(blocks):
        norms = torch.stack([torch.cat([w.flatten() for w in read(block, i)[0]]).norm() for i in range(count)])
        for i in norms.argsort(stable=True)[:drop].tolist():
            weights, biases = read(block, i)
            for part in weights + biases:
                part.zero_()


def test_every_family_has_a_reading_by_hand() -> None:
    assert set(BY_HAND) == set(OTHER_FAMILIES)


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_masked_and_sliced_channels_are_those_zeroed_by_hand(models: dict[str, Loaded], family: str) -> None:
    sliced, masked, by_hand = (copied(models[family]) for _ in range(3))
    prune(sliced, Structured(amount=0.5))
    prune(masked, Structured(amount=0.5, physical=False))
    zero_by_hand(by_hand.model, family, "mlp", drop=24)
    expected = logits(by_hand.model)
    torch.testing.assert_close(logits(sliced.model), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(masked.model), expected, atol=1e-5, rtol=1e-5)
    assert (expected - logits(models[family].model)).abs().max() > 0.01
    assert sum(p.numel() for p in sliced.model.parameters()) < sum(p.numel() for p in masked.model.parameters())


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_masked_groups_are_those_zeroed_by_hand(models: dict[str, Loaded], family: str) -> None:
    """Sliced too, where the family's config can hold fewer heads."""
    masked, by_hand = copied(models[family]), copied(models[family])
    prune(masked, Structured(amount=0.5, units=("heads",), physical=False))
    zero_by_hand(by_hand.model, family, "heads", drop=BY_HAND[family][3] // 2)
    expected = logits(by_hand.model)
    torch.testing.assert_close(logits(masked.model), expected, atol=1e-5, rtol=1e-5)
    assert (expected - logits(models[family].model)).abs().max() > 0.01
    if family not in FIXED_HEADS:
        sliced = copied(models[family])
        prune(sliced, Structured(amount=0.5, units=("heads",)))
        torch.testing.assert_close(logits(sliced.model), expected, atol=1e-5, rtol=1e-5)


SCORED: list[tuple[str, dict[str, Any]]] = [
    (family, {"score": score, "units": ("mlp", "heads")}) for family in ALL_FAMILIES for score in ("wanda", "obs")
]
SCORED += [
    (family, keys)
    for family in ("llama", "gpt2")
    for keys in ({"score": "taylor"}, {"score": "wifv"}, {"score": "wifv", "refit": "bias"})
]


@pytest.mark.parametrize(("family", "keys"), SCORED, ids=str)
def test_sliced_equals_masked_by_every_kind_of_score(
    models: dict[str, Loaded], family: str, keys: dict[str, Any]
) -> None:
    """Both calibrated on the same text; the sliced model may not depend on what is no longer there."""
    if "units" in keys and family in FIXED_HEADS:
        keys = keys | {"units": ("mlp",)}
    sliced, masked = copied(models[family]), copied(models[family])
    prune(masked, Structured(amount=0.5, physical=False, **keys))
    pruned = prune(sliced, Structured(amount=0.5, **keys))
    expected = logits(masked.model)
    torch.testing.assert_close(logits(sliced.model), expected, atol=1e-5, rtol=1e-5)
    assert (expected - logits(models[family].model)).abs().max() > 0.01
    assert pruned.realized == pytest.approx(0.5)
    assert sum(p.numel() for p in sliced.model.parameters()) < sum(p.numel() for p in masked.model.parameters())


@pytest.mark.parametrize("family", FIXED_HEADS)
def test_heads_that_a_config_cannot_hold_are_refused_with_what_it_can(models: dict[str, Loaded], family: str) -> None:
    loaded = copied(models[family])
    with pytest.raises(Refused, match=rf"2 of 4 KV groups, which a stock {family} config cannot hold: .* 4 \(amount=0"):
        prune(loaded, Structured(amount=0.5, units=("heads",)))
    assert torch.equal(logits(loaded.model), logits(models[family].model))


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_a_smaller_model_reloads_and_generates_alike_with_and_without_cache(
    models: dict[str, Loaded], family: str, tmp_path: Path
) -> None:
    """Those named as Llama's: test_structured.py."""
    loaded = copied(models[family])
    units = ("mlp",) if family in FIXED_HEADS else ("mlp", "heads")
    prune(loaded, Structured(amount=0.5, units=units))
    save_model(loaded, tmp_path / "export")
    prompt = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(1))
    check_reload(loaded.model, tmp_path / "export", prompt)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32).eval()
    torch.testing.assert_close(logits(again), logits(loaded.model), atol=1e-6, rtol=1e-6)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    mask = torch.ones_like(prompt)
    with_cache = again.generate(prompt, attention_mask=mask, use_cache=True, **options)
    without = again.generate(prompt, attention_mask=mask, use_cache=False, **options)
    assert with_cache.shape == (2, 21)
    assert torch.equal(with_cache, without)


def test_a_pattern_runs_along_the_inputs_of_a_transposed_matrix(models: dict[str, Loaded]) -> None:
    """GPT-2's Conv1D holds (in, out): its inputs are rows."""
    loaded = copied(models["gpt2"])
    prune(loaded, Magnitude(pattern="1:4"))
    weight = loaded.model.transformer.h[1].mlp.c_fc.weight
    assert weight.shape == (HIDDEN, MLP)
    assert ((weight.reshape(HIDDEN // 4, 4, MLP) != 0).sum(1) == 1).all()


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_losses_and_steps_are_those_of_the_whole_model(models: dict[str, Loaded], family: str) -> None:
    """The head over a few positions at a time, soft caps too; and a decode with a cache runs."""
    model, batch = models[family].model, torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        log = model(input_ids=batch, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    expected = -log.gather(-1, batch[:, 1:, None])[..., 0].mean(1)
    torch.testing.assert_close(window_losses(model, batch).double(), expected, atol=1e-5, rtol=1e-5)
    decode(model, prefill(model, batch[:1]), 3)


# What is no weight of a Linear.


@pytest.mark.parametrize("shape", [(4, 6), (2, 4, 6)])
def test_a_matrix_that_nothing_would_prune_is_refused(
    loaded: Loaded, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as experts that are fused into one parameter; one that the family names as left alone is none."""
    check_matrices(loaded.model)
    block = Anatomy(loaded.model).blocks[1]
    block.mlp.register_parameter("experts", torch.nn.Parameter(torch.zeros(shape)))
    with pytest.raises(Refused, match=r"model\.layers\.1\.mlp\.experts of shape .* no method would prune it"):
        check_matrices(loaded.model)
    named = replace(FAMILIES["llama"], left_alone=("mlp.experts",))
    monkeypatch.setitem(FAMILIES, "llama", named)
    check_matrices(loaded.model)


def test_a_vector_is_no_matrix(loaded: Loaded) -> None:
    Anatomy(loaded.model).blocks[0].register_parameter("scale", torch.nn.Parameter(torch.zeros(4)))
    check_matrices(loaded.model)
