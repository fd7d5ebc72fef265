"""Estimate of the seconds that the stages of a run take, from a few timed forward passes of the dense model."""

from __future__ import annotations

import time

from prune_lab.compatibility import pruning_events
from prune_lab.config.parts import Parts
from prune_lab.evaluator import Evaluator
from prune_lab.measure.inference import decode, prefill
from prune_lab.measure.perplexity import measure_losses
from prune_lab.models.anatomy import Anatomy
from prune_lab.models.families import context_of
from prune_lab.models.offload.on_disk import weights_on_disk
from prune_lab.pruning.calibration import Calibrator
from prune_lab.system.console import Console

DENSE, COMPRESSION, MEASURES, TIMING = "dense model", "compression", "measures", "timing"
STAGES = (DENSE, COMPRESSION, MEASURES, TIMING)
# Seconds until a fresh Python has imported what loads a model, on two cores. It need not be exact.
FRESH_PROCESS = 8.0
PROMPT, DECODED = 16, 4  # tokens
TOKENS = 1024  # of the test text in a timed pass


def expected_seconds(parts: Parts, evaluator: Evaluator, calibrator: Calibrator | None) -> dict[str, float] | None:
    """Expected seconds of each stage of a run; None for a streamed model, of which a trial takes as long as a run.

    Results that are in a cache are counted as if they were not. It takes two forward passes of about a thousand tokens
    of the test text, and decodes four tokens where a measure decodes: nothing that the measures do not do.
    """
    if weights_on_disk(evaluator.dense.model) is not None:
        return None
    measure, windows = parts.measure, evaluator.windows
    token = _seconds_of_a_token(evaluator)
    decodes = measure.memory or measure.latency or measure.generation_prompts > 0
    step = _seconds_of_a_step(evaluator) if decodes else 0.0  # not every type has a cache to decode with
    dense, memory = windows.numel() / evaluator.processes, 0.0
    beside = 0 if evaluator.dense_states is not None else evaluator.compared
    compared = beside * windows.shape[1] / evaluator.processes
    if measure.memory and not evaluator.device.is_cuda:
        memory = FRESH_PROCESS + measure.prompt_tokens * token + measure.decode_tokens * step
    continuing = measure.generation_prompts * measure.generation_tokens * step
    times = 2 * (measure.warmup + measure.pairs)
    shapes = [tuple(evaluator.prompt.shape), *evaluator.grid]
    timed = sum(rows * length * token + measure.decode_tokens * step for rows, length in shapes)
    return {
        DENSE: dense * token + memory + continuing,
        COMPRESSION: token * (_pruning(parts, evaluator, calibrator) + _training(parts, evaluator)),
        MEASURES: (dense + compared) * token + memory + continuing,
        TIMING: times * (timed + measure.aa * timed / len(shapes)) * measure.latency,
    }


def _seconds_of_a_token(evaluator: Evaluator) -> float:
    """Seconds for a token of a window of the test text."""
    length, quiet, forward = evaluator.windows.shape[1], Console(quiet=True), 0.0
    several = max(1, min(evaluator.measure.batch_size, TOKENS // length))  # one alone would be slower for each token
    windows = evaluator.windows[:several]
    for _ in range(2):  # the first warms up
        began = time.perf_counter()
        measure_losses(evaluator.dense.model, windows, several, evaluator.device, quiet, evaluator.bos)
        evaluator.device.synchronize()
        forward = time.perf_counter() - began
    return forward / windows.numel()


def _seconds_of_a_step(evaluator: Evaluator) -> float:
    """Seconds for a decoding step, of tokens that fit into the model's context."""
    model, device = evaluator.dense.model, evaluator.device
    context = context_of(model.config) or PROMPT + DECODED
    prompt = evaluator.windows[:1, : max(1, min(PROMPT, context - DECODED))]
    output = prefill(model, prompt.long().to(device.torch_device))
    decode(model, output, 1)
    device.synchronize()
    began = time.perf_counter()
    decode(model, output, DECODED - 1)
    device.synchronize()
    return (time.perf_counter() - began) / (DECODED - 1)


def _pruning(parts: Parts, evaluator: Evaluator, calibrator: Calibrator | None) -> float:
    """Tokens that pass the model in this process while it is pruned, about."""
    if calibrator is None:
        return 0.0
    passes = parts.method.forward_passes(len(Anatomy(evaluator.dense.model).blocks))
    return len(pruning_events(parts)[0]) * passes * calibrator.mine.numel()


def _training(parts: Parts, evaluator: Evaluator) -> float:
    """Tokens that pass the model while it is trained, about, in forward passes."""
    recovery = parts.recovery  # a reconstruction's steps are those of each block, which is one of so many
    return recovery.training_steps * recovery.batch_size * evaluator.seq_len * recovery.forward_passes
