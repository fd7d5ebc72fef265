"""Process that runs GGUF files in llama.cpp: `python -m prune_lab.measure.llama_cpp_process`, without PyTorch.

It answers requests, a line of JSON each, with a line of JSON. The first one names the `files` that are loaded, with the
`settings` of Model, and the others a method of Model to `do`, the number of the `model`, and the method's arguments; or
the first and only one has the arguments of peak_of. Errors of llama.cpp's log go to the standard error, and so does the
reason where the process ends: by an exception here, or by an abort there.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from prune_lab.system.resident import peak, reset_peak

Floats = NDArray[np.float32]
_ERROR, _CONTINUED = 4, 5  # levels of llama.cpp's log; the package's own names for them are of an older one
_LOGITS_AT_ONCE = 2**24  # numbers; a window's logits of a large vocabulary would be gigabytes


class Model:
    """A file that llama.cpp has loaded onto the processor.

    context: tokens that it has room for. threads: of all its work. exact: keys and values of attention are kept in
    float32 and multiplied as they are; else in float16 and by the kernels of flash attention, as llama.cpp does it by
    itself. repack: weights of few bits may be laid out anew for the processor, as it does by itself.
    """

    def __init__(self, file: str, context: int, threads: int, exact: bool, repack: bool = True) -> None:
        settings = llama.llama_model_default_params()
        settings.n_gpu_layers = 0
        settings.use_extra_bufts = repack
        self._model = llama.llama_model_load_from_file(file.encode(), settings)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {file}")
        self._vocabulary = int(llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model)))
        sizes = llama.llama_context_default_params()
        sizes.n_ctx = context
        sizes.n_batch = min(sizes.n_batch, context)
        sizes.n_threads = sizes.n_threads_batch = threads
        sizes.offload_kqv = sizes.op_offload = False  # a build for GPUs would send large batches there
        if exact:
            sizes.n_batch = min(sizes.n_batch, max(1, _LOGITS_AT_ONCE // self._vocabulary))
            sizes.type_k = sizes.type_v = llama.GGML_TYPE_F32
            sizes.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = llama.llama_init_from_model(self._model, sizes)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context of {context} tokens for {file}")
        self._at_once = int(sizes.n_batch)
        self._batch = llama.llama_batch_init(self._at_once, 0, 1)

    def timed(self, ids: list[int], tokens: int) -> dict[str, Any]:
        """Milliseconds of a prefill of `ids`, and of one of the `tokens` decoded greedily after it; and their ids."""
        self._forget()
        began = time.perf_counter()
        logits = self._run(ids)
        prefill = time.perf_counter() - began
        written, began = list[int](), time.perf_counter()
        for _ in range(tokens):
            written.append(int(logits.argmax()))
            logits = self._run(written[-1:], len(ids) + len(written) - 1)
        return {
            "prefill_ms": prefill * 1e3,
            "decode_ms": (time.perf_counter() - began) * 1e3 / max(1, tokens),
            "ids": written,
        }

    def losses(self, ids: list[int], prefix: int) -> list[float]:
        """Cross-entropy in nats of each token of `ids` after the first `prefix` + 1, from those before it."""
        found = list[float]()
        for start, logits in self._logits(ids, range(prefix, len(ids) - 1)):
            targets = ids[start + 1 : start + 1 + len(logits)]
            largest = logits.max(1, keepdims=True)
            sums = np.exp(logits - largest).sum(1, dtype=np.float64)
            of_targets = (logits - largest)[np.arange(len(logits)), targets]
            found += (np.log(sums) - of_targets).tolist()
        return found

    def logits(self, ids: list[int]) -> Floats:
        """Logits after each token of `ids`, shape (tokens, vocabulary)."""
        return np.concatenate([rows.copy() for _, rows in self._logits(ids, range(len(ids)))])

    def _logits(self, ids: list[int], wanted: range) -> Iterator[tuple[int, Floats]]:
        """Parts of the logits at the positions `wanted`, each with its first position; good until the next part."""
        self._forget()
        for start in range(0, wanted.stop, self._at_once):
            part = ids[start : min(start + self._at_once, wanted.stop)]
            first = max(start, wanted.start)
            rows = start + len(part) - first
            self._decode(part, start, rows)
            if rows > 0:
                found = llama.llama_get_logits(self._context)
                yield first, np.ctypeslib.as_array(found, (rows, self._vocabulary))

    def _run(self, ids: list[int], start: int = 0) -> Floats:
        """Logits after the last of `ids`, which stand at positions from `start` on."""
        for place in range(0, len(ids), self._at_once):
            self._decode(ids[place : place + self._at_once], start + place, 1)
        return np.ctypeslib.as_array(llama.llama_get_logits_ith(self._context, -1), (self._vocabulary,))

    def _forget(self) -> None:
        llama.llama_memory_clear(llama.llama_get_memory(self._context), False)

    def _decode(self, ids: list[int], start: int, rows: int) -> None:
        """Runs tokens that stand at positions from `start` on, with the logits of the last `rows` of them."""
        batch, count = self._batch, len(ids)
        batch.n_tokens = count
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place] = token, start + place
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
            batch.logits[place] = place >= count - rows
        if (code := llama.llama_decode(self._context, batch)) != 0:
            raise RuntimeError(f"llama_decode of {count} tokens at {start} ended with {code}")
        llama.llama_synchronize(self._context)


def peak_of(file: str, ids: list[int], tokens: int, threads: int, repack: bool) -> int:
    """Bytes by which loading a file, a prefill and a decode raised this process's peak resident memory."""
    llama.llama_backend_init()
    reset_peak()
    before = peak()
    Model(file, len(ids) + tokens, threads, exact=False, repack=repack).timed(ids, tokens)
    return peak() - before


@llama.llama_log_callback
def _log(level: int, text: bytes, _: Any) -> None:
    """Writes a part of llama.cpp's log if it is of an error."""
    if level != _CONTINUED:
        _log_level[0] = level
    if _log_level[0] >= _ERROR:
        sys.stderr.write(text.decode(errors="replace"))
        sys.stderr.flush()


_log_level = [0]  # of the part before


def _main() -> None:
    llama.llama_log_set(_log, None)
    first = json.loads(sys.stdin.readline())
    if "peak" in first:
        _say(peak_of(**first["peak"]))
        return
    models = [Model(file, **first["settings"]) for file in first["files"]]
    _say(llama.llama_print_system_info().decode())
    for line in sys.stdin:
        request = json.loads(line)
        _say(getattr(models[request.pop("model")], request.pop("do"))(**request))


def _say(reply: Any) -> None:
    sys.stdout.write(json.dumps(reply, default=np.ndarray.tolist) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        _main()
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")
