"""What post-compression does to speed: a Llama of 60M random weights, timed beside its dense self by the lab itself.

python tests/benchmarks/post.py [FURTHER OVERRIDES]      # such as measure.pairs=10 for a first look

Each line is one run of the command line: dense and compressed in alternating pairs, the median of their ratios with its
95 % interval. The target: channels 0.4 + int8_dynamic at least 2.5 times as fast in prefill on two cores.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import LlamaConfig

from prune_lab.models.load import TINY

CASES = {
    "channels 0.4 + int8_dynamic": ["method=structured", "amount=0.4", "method.round_to=32", "post=int8_dynamic"],
    "channels 0.4": ["method=structured", "amount=0.4", "method.round_to=32"],
    "int8_dynamic": ["method=none", "post=int8_dynamic"],
    "int4_weight_only": ["method=none", "post=int4_weight_only"],
    "int8_weight_only, bfloat16": ["method=none", "post=int8_weight_only", "dtype=bfloat16"],
    "int8_dynamic, bfloat16": ["method=none", "post=int8_dynamic", "dtype=bfloat16"],
}
COMMON = [
    "model=hf", "model.weights=random", "measure=quick", "measure.max_windows=1", "measure.pairs=20",
    "measure.prompt_tokens=256", "measure.decode_tokens=16", "tracking=none", "resume=false", "quiet=true",
    "device=cpu",
]  # fmt: skip


def make_folder(folder: Path) -> None:
    """The config of the model, and the shipped model's tokenizer."""
    LlamaConfig(
        vocab_size=8192, hidden_size=768, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=12,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
    ).save_pretrained(folder)  # fmt: skip
    for file in TINY.glob("tokenizer*"):
        shutil.copy(file, folder)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        make_folder(Path(temporary) / "model")
        for number, (name, overrides) in enumerate(CASES.items()):
            place = Path(temporary) / str(number)
            where = [f"model.name={temporary}/model", f"hydra.run.dir={place}"]
            command = [sys.executable, "-m", "prune_lab", *COMMON, *where, *overrides, *sys.argv[1:]]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            figures = json.loads((place / "summary.json").read_text(encoding="utf-8"))["metrics"]
            for stage, unit in (("prefill", "ms"), ("decode", "ms_per_token")):
                low, high = (figures[f"latency/{stage}_speedup_{end}"] for end in ("low", "high"))
                ratio = figures[f"latency/{stage}_speedup"]
                times = [figures[f"latency/{which}{stage}_{unit}_p50"] for which in ("dense_", "")]
                print(
                    f"{name:28} {stage:7} {ratio:.2f} times as fast [{low:.2f}, {high:.2f}]"
                    f"   {times[0]:.1f} ms -> {times[1]:.1f} ms"
                )
