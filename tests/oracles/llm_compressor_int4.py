"""llm-compressor quantizes a pruned export to 4 bits, zeros kept. Run by its own environment's Python.

ENVIRONMENT/bin/python tests/oracles/llm_compressor_int4.py EXPORT OUT

Weights of the blocks' Linears are rounded to nearest in groups of 32 inputs, symmetric, so that zero stays zero. OUT is
read again by stock transformers; printed are the shares of zeros before and after. OUT-dense holds the rounded weights
as floats, for prune_lab to measure. Exit code 1 where a zero is lost.
"""

from __future__ import annotations

import sys

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

INT4 = {
    "targets": ["Linear"],
    "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32},
}


def linears(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights of the blocks' Linears by name."""
    found = {name: one.weight for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)}
    return {name: weight.detach() for name, weight in found.items() if "lm_head" not in name}


def main(folder: str, out: str) -> int:
    """Quantizes, saves, and compares the zeros."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    zeros = {name: weight == 0 for name, weight in linears(model).items()}
    oneshot(model=model, recipe=QuantizationModifier(config_groups={"group_0": INT4}, ignore=["lm_head"]))
    model.save_pretrained(out, save_compressed=True)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    config = CompressedTensorsConfig(run_compressed=False)
    again = linears(AutoModelForCausalLM.from_pretrained(out, quantization_config=config))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, weight in linears(plain).items():
        weight.copy_(again[name])
    plain.save_pretrained(f"{out}-dense")
    AutoTokenizer.from_pretrained(folder).save_pretrained(f"{out}-dense")
    weights = sum(mask.numel() for mask in zeros.values())
    before = sum(int(mask.sum()) for mask in zeros.values())
    after = sum(int((again[name] == 0).sum()) for name in zeros)
    lost = sum(int((mask & (again[name] != 0)).sum()) for name, mask in zeros.items())
    print(f"zeros {before / weights:.4f} -> {after / weights:.4f} of {weights:,} weights, {lost} lost")
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
