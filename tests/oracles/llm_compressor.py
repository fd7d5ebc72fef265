"""llm-compressor as an oracle: prunes a model on given tokens. Run by its own environment's Python.

ENVIRONMENT/bin/python tests/oracles/llm_compressor.py KIND AMOUNT MODEL TOKENS OUT

KIND: wanda or sparsegpt; AMOUNT of each Linear of the blocks becomes zero. MODEL: a Hugging Face folder, computed in
float32. TOKENS: a safetensors file with `windows`, shape (windows, tokens). OUT: the folder that is written, dense.
Prints the seconds of pruning.
"""

from __future__ import annotations

import sys
import time

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(kind: str, amount: float, folder: str, tokens: str, out: str) -> None:
    """Prunes and saves."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    windows = load_file(tokens)["windows"]
    data = Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()})
    recipe = {
        "wanda": lambda: WandaPruningModifier(sparsity=amount, targets=["Linear"], ignore=["re:.*lm_head"]),
        "sparsegpt": lambda: SparseGPTModifier(
            sparsity=amount, block_size=128, dampening_frac=0.01, targets=["Linear"], ignore=["re:.*lm_head"]
        ),
    }[kind]()
    began = time.perf_counter()
    oneshot(
        model=model, tokenizer=AutoTokenizer.from_pretrained(folder), recipe=recipe, dataset=data,
        num_calibration_samples=len(windows), max_seq_length=windows.shape[1],
    )  # fmt: skip
    print(f"seconds {time.perf_counter() - began:.1f}")
    model.save_pretrained(out, save_compressed=False)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), *sys.argv[3:])
