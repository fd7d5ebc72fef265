"""Warnings for results that are easy to misread."""

from __future__ import annotations

from typing import Any

from prune_lab.results.metrics import ENGINES, members, speedup_interval
from prune_lab.results.summary import Summary

_STAGES = ("prefill", "decode")
_IN_ENGINE = tuple(f"{engine}/{figure}" for engine in ENGINES for figure in ("prefill_speedup", "peak_mb"))
LOAD = 0.25  # cores; what a system does by itself is a tenth of it
SPARSE = 0.005  # of the parameters; a row of zeros for padding is less
OVERLAP = 2  # calibration windows that may share a token before it is said
SAME_TEXT = 32  # tokens in a row that two texts do not share by chance
TOKENS_PER_INPUT = 10  # distinct ones, of what is solved for
LEAST_SHARE = 0.9  # of the blocks' weights, under which an amount is of something else than a reader expects
PASSES = 4  # over training text (Muennighoff et al., 2305.16264)
KNOWS_NOTHING = 4.5  # bits per byte; letters and spaces of English by their frequency alone take 4.1 (Shannon, 1951)


def of_run(summary: Summary) -> list[str]:
    """All warnings of a run: on its text, calibration, training, metrics, energy and the load of the machine."""
    protocol, metrics = summary.protocol, summary.metrics
    warnings = (
        of_rows(protocol) + of_calibration(protocol, metrics) + of_calibration_windows(protocol) + of_training(protocol)
    )
    warnings += of_scope(summary.model["scope"]) + of_figures(metrics) + of_energy(protocol, metrics)
    return warnings + of_load(summary.environment)


def of_scope(scope: dict[str, Any] | None) -> list[str]:
    """Warning where much of a model's blocks is in no matrix that is pruned."""
    if scope is None or scope["share"] >= LEAST_SHARE:
        return []
    reasons = ", ".join(f"{reason} ({len(names)})" for reason, names in scope["left_alone"].items())
    return [
        f"amounts of single weights are of {scope['share']:.1%} of the weights of the decoder blocks; the rest is left "
        f"alone: {reasons or 'norms and biases'}"
    ]


def of_calibration(protocol: dict[str, Any], metrics: dict[str, float]) -> list[str]:
    """Warning where calibration and test text are of one dataset, or share documents, and something was pruned."""
    seen = protocol["calibration"]
    tested_apart = "test_path" in protocol["dataset_facts"]
    if seen is None or tested_apart or not metrics.get("amount/realized"):
        return []
    parts = _parts(seen)
    near = [part for part in parts if part["own"] or part["text"]["also_in_the_run"]]
    if not near:
        return []
    windows = sum(part["n_samples"] for part in near)
    some = "" if len(near) == len(parts) else f" ({windows:,} of {seen['n_samples']:,} windows)"
    return [
        f"calibrated on text of {protocol['dataset']}{some}, apart from its test split: in-domain, which flatters "
        "perplexity"
    ]


def _parts(seen: dict[str, Any]) -> list[dict[str, Any]]:
    """The stamps of the texts that a calibration was drawn from: of a mix, of each part."""
    found: list[dict[str, Any]] = seen["mix"] or [seen]
    return found


def of_rows(protocol: dict[str, Any]) -> list[str]:
    """Warnings about rows and documents left out: without text, repeated, or in another text of the run."""
    found, warnings = protocol["dataset_facts"], []
    if blank := found.get("rows_without_text", 0):
        warnings.append(f"{blank:,} of {found['rows']:,} rows of {protocol['dataset']} have no text and were left out")
    seen = protocol["calibration"]
    if seen is None:
        return warnings
    return warnings + [note for part in _parts(seen) if part["text"] is not None for note in _of_text_rows(part)]


def _of_text_rows(part: dict[str, Any]) -> list[str]:
    """Warnings about rows and documents of a named text that are left out."""
    text, name, warnings = part["text"], part["source"], []
    if blank := text["rows_without_text"]:
        rows = text["documents"] + blank
        warnings.append(f"{blank:,} of {rows:,} rows of {name} have no text and were left out")
    if also := text["also_in_the_run"]:
        warnings.append(
            f"{also:,} of {text['documents']:,} documents of {name} were left out: they are in the training, "
            "validation or test text of this run as well"
        )
    if elsewhere := text["in_other_parts"]:
        warnings.append(
            f"{elsewhere:,} of {text['documents']:,} documents of {name} were left out: they are in another part of "
            "the mix as well"
        )
    if again := text["repeated"]:
        warnings.append(f"{again:,} of {text['documents']:,} documents of {name} repeat another one and were left out")
    return warnings


def of_calibration_windows(protocol: dict[str, Any]) -> list[str]:
    """Warnings about calibration windows that overlap, or hold few tokens for what is solved from them."""
    seen, warnings = protocol["calibration"], []
    if seen is None:
        return []
    parts = _parts(seen)
    for part in parts:
        of = f" ({part['source']})" if len(parts) > 1 else ""
        if part["overlap"] > OVERLAP:
            warnings.append(
                f"calibration windows overlap{of}: {part['n_samples']:,} windows of {seen['seq_len']:,} tokens are "
                f"{_held(part)}, and some tokens are in {part['overlap']} windows; {_more([part])}"
            )
        if tested := part["windows_tested_on"]:
            warnings.append(
                f"{tested:,} of {part['n_samples']:,} calibration windows{of} hold text that is tested on as well "
                f"({SAME_TEXT} tokens in a row or more), which flatters perplexity: give other text"
            )
    width = seen["solved_width"]
    if width is not None and seen["distinct_tokens"] < TOKENS_PER_INPUT * width:
        warnings.append(
            f"little calibration text for what is solved: the widest Linear has {width:,} inputs, and {_held(seen)} "
            f"are fewer than {TOKENS_PER_INPUT} for each, so that the solution may fit them and not other text; "
            f"{_more(parts)}"
        )
    return warnings


def _held(seen: dict[str, Any]) -> str:
    """Amount of text that windows are made of."""
    distinct, documents = seen["distinct_tokens"], seen["documents"]
    return f"{distinct:,} distinct tokens of {documents:,} document{'s' * (documents != 1)}"


def _more(parts: list[dict[str, Any]]) -> str:
    """Ways to have more text."""
    where = "in the mix" if "share" in parts[0] else "dataset.calibration.source=text dataset.calibration.name=..."
    more = f"give more text, {where}"
    if any(part["sampling"] == "at random" or part["documents_too_short"] for part in parts):
        more += ", or dataset.calibration.join=true: windows side by side, in short documents too"
    return more


def of_training(protocol: dict[str, Any]) -> list[str]:
    """Warning about training text that is passed over often."""
    training = protocol["training"]
    if training is None or training["passes"] <= PASSES:
        return []
    return [
        f"training passes {training['passes']:.1f} times over its {training['tokens']:,} tokens of text, if it goes on "
        f"to its last step; up to {PASSES} passes are about as good as new text (2305.16264), more gain less and less"
    ]


def of_energy(protocol: dict[str, Any], metrics: dict[str, float]) -> list[str]:
    """Reason why a run that was asked for its energy has none."""
    if not protocol["energy"] or "energy/joules_per_token" in metrics:
        return []
    if protocol["device"].startswith("cuda"):
        return ["no energy: NVML has no counter of this GPU, or is not installed (pip install 'prune-lab[energy]')"]
    return ["no energy: /sys/class/powercap has no CPU package whose energy_uj this user may read"]


def of_load(environment: dict[str, Any]) -> list[str]:
    """Warning where other work used the machine while something was timed."""
    cores = environment.get("cores_used_by_others", 0.0)
    if cores <= LOAD:
        return []
    return [
        f"timed under load: other work took {cores:.2f} cores of this machine meanwhile, which can make milliseconds "
        "too high and speed-ups less sure than their intervals say"
    ]


def of_elsewhere(finished: Summary, environment: dict[str, Any]) -> list[str]:
    """Warning where a finished result is served again whose times and memory are of another machine."""
    timed = {"latency/prefill_speedup", "memory/peak_mb", *_IN_ENGINE} & finished.metrics.keys()
    there, here = (_machine(of) for of in (finished.environment, environment))
    if not timed or there == here:
        return []
    return [f"times and memory are of the machine that computed this result ({there}), not of this one ({here})"]


def _machine(environment: dict[str, Any]) -> str:
    return f"{environment.get('gpu') or environment.get('cpu')}, {environment.get('threads')} threads"


def of_figures(metrics: dict[str, float]) -> list[str]:
    """Warnings where one metric promises what another does not keep, with the measured values."""
    return [
        *_of_text(metrics),
        *_of_input(metrics),
        *_of_amount(metrics),
        *_of_zeros(metrics),
        *(note for of in ("latency", *ENGINES) for stage in _STAGES for note in _of_time(metrics, stage, of)),
        *_of_disk_and_memory(metrics),
        *_of_noise(metrics),
        *_of_tasks(metrics),
    ]


def _of_text(m: dict[str, float]) -> list[str]:
    """Warning about a dense model that predicts the text no better than counting letters."""
    bits = m.get("quality/dense_bits_per_byte", 0.0)
    if bits <= KNOWS_NOTHING:
        return []
    return [
        f"the dense model predicts this text badly ({bits:.1f} bits per byte; English takes 4.1 by the frequency of "
        "its letters alone), so what pruning costs it says little: unless it has yet to be trained, give text like "
        "that which it was trained on, dataset=text dataset.path=..."
    ]


def _of_input(m: dict[str, float]) -> list[str]:
    """Warning about a dense model that had zeros already."""
    zeros = m["params/dense_total"] - m["params/dense_nonzero"]
    if zeros < SPARSE * m["params/dense_total"]:
        return []
    return [
        f"{zeros:,.0f} of the model's {m['params/dense_total']:,.0f} parameters "
        f"({zeros / m['params/dense_total']:.1%}) were zero before this run: params/reduction leaves them out, and an "
        "amount of single weights includes them"
    ]


def _of_amount(m: dict[str, float]) -> list[str]:
    """Warning about an amount of units that is less than one of them."""
    asked = m.get("amount/requested", 0.0)
    if not asked or m["amount/realized"]:
        return []
    return [
        f"nothing was removed: amount={asked:g} is less than one of the units that there are, or one has to stay; give "
        "a larger amount, or other units"
    ]


def _of_zeros(m: dict[str, float]) -> list[str]:
    """Warning about zeros in dense tensors, which count as a reduction and save neither bytes nor time."""
    zeros = m["params/total"] - m["params/nonzero"]
    before = m["params/dense_total"] - m["params/dense_nonzero"]
    if zeros - before <= 0.01 * m["params/dense_total"]:
        return []
    weights = 1 - m["memory/weights_mb"] / m["memory/dense_weights_mb"]
    figures = [f"disk {0 - m['size/reduction']:+.1%}", f"weights in memory {0 - weights:+.1%}"]
    if "memory/reduction" in m:
        figures.append(f"peak memory {0 - m['memory/reduction']:+.1%}")
    figures += [f"{stage} {found:.3f}" for stage in _STAGES if (found := speedup_interval(m, stage))]
    share = zeros / m["params/total"]
    note = f"{share:.0%} of the parameters are zeros; measured beside the dense model: {', '.join(figures)}"
    # Packed or narrower tensors, in memory or on disk, are smaller than their number of parameters explains.
    gone = m["params/physical_reduction"]
    dense = abs(weights - gone) < 0.02 and abs(m["size/reduction"] - gone) < 0.02
    return [f"{note}: the tensors are dense, zeros save neither bytes nor time in them" if dense else note]


def _of_time(m: dict[str, float], stage: str, of: str) -> list[str]:
    """Warning about fewer parameters without a measured speed-up, or with a slow-down; `of` as of speedup_interval."""
    found, gone = speedup_interval(m, stage, of=of), m["params/physical_reduction"]
    where = f" in {ENGINES[of][0]}" if of in ENGINES else ""
    if found is None:
        return []
    if found.high < 1:
        return [f"{stage} is slower than the dense model's{where}: speed-up {found:.3f}"]
    if gone > 0.01 and found.contains(1):
        return [f"{gone:.0%} of the parameters are gone, but no {stage} speed-up{where}: {found:.3f} contains 1"]
    return []


def _of_disk_and_memory(m: dict[str, float]) -> list[str]:
    """Warning where bytes on disk and peak memory fell by different shares."""
    if "memory/reduction" not in m or abs(m["size/reduction"] - m["memory/reduction"]) <= 0.2:
        return []
    disk, peak = 0 - m["size/reduction"], 0 - m["memory/reduction"]
    return [f"disk and memory disagree: {disk:+.0%} on disk, {peak:+.0%} at the peak of memory; quote both"]


def _of_noise(m: dict[str, float]) -> list[str]:
    """Warning where the dense model, timed against a copy of itself, differs from it."""
    return [
        f"the machine is not quiet: {stage} of the dense model against itself is {found:.3f}, "
        "without 1.00; differences of that size are noise here (1 such interval in 20 misses 1.00 by chance)"
        for stage in _STAGES
        if (found := speedup_interval(m, f"aa_{stage}")) and not found.contains(1)
    ]


def _of_tasks(m: dict[str, float]) -> list[str]:
    """Warning about documents that are longer than the model's context."""
    return [
        f"{words['task']}: {count:.0f} documents are longer than the model's context and lost their beginning"
        for words, count in members("tasks/{task}_truncated", m)
    ]
