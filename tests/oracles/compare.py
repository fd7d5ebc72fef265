"""Wanda and SparseGPT beside llm-compressor: perplexity of both on the same windows, and the seconds of pruning.

bash tests/oracles/make_llm_compressor_env.sh FOLDER
python tests/oracles/compare.py FOLDER/bin/python MODEL CALIBRATION TEST [SAMPLES [WINDOWS]]

MODEL: a folder in the Hub's layout or a GGUF file. CALIBRATION and TEST: files of text (.txt, .jsonl). SAMPLES windows
of 1024 tokens to calibrate on (32), the first WINDOWS of the test text (16). Everything in float32, half of all weights
of the blocks' Linears; ours and theirs see the same token ids.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from prune_lab.evaluator import Evaluator
from prune_lab.measure.perplexity import measure_losses, perplexity_of
from prune_lab.measure.settings import Measure
from prune_lab.methods.sparsegpt import SparseGPT
from prune_lab.methods.wanda import Wanda
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.export import save_model
from prune_lab.models.load import HubModel
from prune_lab.system.console import Console
from prune_lab.system.device import Device
from prune_lab.text.source import Calibration
from prune_lab.text.text_files import TextFiles

SEQ_LEN, AMOUNT = 1024, 0.5
CLOSE = {"wanda": 0.005, "sparsegpt": 0.01}  # the largest difference that is expected, of the perplexity
DEVICE = Device(torch.device("cpu"), torch.float32)


def main(python: str, model: str, calibration: str, test: str, samples: int, windows: int) -> int:
    """Prints a line for each method; 1 where one is farther apart than expected."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "none.txt").write_text("Nothing is trained.")
        seen = Calibration(n_samples=samples, seq_len=SEQ_LEN, source="text", name=calibration, batch_size=4)
        text = TextFiles(path=str(place / "none.txt"), test_path=test, seq_len=SEQ_LEN, calibration=seen)
        measure = Measure(max_windows=windows, latency=False, memory=False, generation_prompts=0)
        evaluator = Evaluator(HubModel(name=model), text, measure, DEVICE, 0, Console())
        return _compare(python, evaluator, place)


def _compare(python: str, evaluator: Evaluator, place: Path) -> int:
    calibrator, _ = evaluator.calibrator(0, Console())

    def perplexity(of: object) -> float:
        losses = measure_losses(of, evaluator.windows, 4, DEVICE, Console(), evaluator.bos)
        return perplexity_of(float(losses.double().mean()))

    counts = f"{len(calibrator.windows)} windows to calibrate on, {len(evaluator.windows)} to measure on"
    print(f"dense {perplexity(evaluator.dense.model):.3f}; {counts}, of {SEQ_LEN} tokens, float32", flush=True)
    too_far, dense, tokens = 0, place / "dense", place / "tokens.safetensors"
    save_model(evaluator.dense, dense)
    save_file({"windows": calibrator.windows.contiguous()}, tokens)
    for name, method in (("wanda", Wanda(amount=AMOUNT)), ("sparsegpt", SparseGPT(amount=AMOUNT))):
        pruned = evaluator.copy_of_dense(place / name)
        began = time.perf_counter()
        method.prune(Anatomy(pruned.model), AMOUNT, 0, calibrator)
        seconds, mine = time.perf_counter() - began, perplexity(pruned.model)
        del pruned
        out = place / f"{name}-theirs"
        script = [python, str(Path(__file__).with_name("llm_compressor.py")), name, str(AMOUNT)]
        paths = [str(path) for path in (dense, tokens, out)]
        done = subprocess.run([*script, *paths], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        their_seconds = float(done.stdout.rsplit("seconds ", 1)[1].split()[0])
        theirs = perplexity(HubModel(name=str(out)).load(DEVICE, seed=0).model)
        apart = mine / theirs - 1
        too_far += abs(apart) > CLOSE[name]
        print(
            f"{name} {AMOUNT}: {mine:.3f} in {seconds:.1f} s, llm-compressor {theirs:.3f} in {their_seconds:.1f} s: "
            f"{apart:+.2%}, expected within {CLOSE[name]:.1%}",
            flush=True,
        )
    return int(too_far > 0)


if __name__ == "__main__":
    paths, numbers = sys.argv[1:5], [int(number) for number in sys.argv[5:]]
    sys.exit(main(*paths, *(numbers + [32, 16][len(numbers) :])))
