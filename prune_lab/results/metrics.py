"""Table of metrics: name, unit, direction, dense value, title and format of each; and the functions that read it.

A metric that is not in the table cannot be logged. One that a stored run of another version has can still be drawn; no
direction of it is better.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import product
from typing import Literal

Direction = Literal["lower", "higher"]
Values = Mapping[str, float]  # by name of the metric
MEASURED: Literal["measured"] = "measured"  # the dense model's value is logged too, by `dense_name`

# Placeholders in the name of a family of metrics: those that are one of a few words, and those that are any number or
# name, with the letters that docs/metrics.md has for them.
_WORDS = {
    "stage": ("prefill", "decode"),
    "bound": ("low", "high"),
    "phase": ("prune", "recover", "post", "measure"),
    "accuracy": ("acc", "acc_norm"),
    "likelihood": ("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"),
}
_ANY = {"batch": ("B", r"\d+"), "length": ("L", r"\d+"), "task": ("TASK", r".+"), "score": ("SCORE", r".+")}


@dataclass(frozen=True)
class Metric:
    """A metric, or a family of metrics whose names have placeholders: `latency/{stage}_speedup`."""

    name: str  # as in summary.json and MLflow
    unit: str  # empty for a plain number
    better: Direction | None  # what fronts, objectives and bounds use; None where the metric is only shown
    # Value of the dense model: MEASURED where a run logs it too, by `dense_name`; a number where it is always the same;
    # a function of the dense model's other values; None where it has none.
    dense: float | Literal["measured"] | Callable[[Values], float | None] | None
    measured: str  # how, as Markdown for docs/metrics.md
    title: str = ""  # on the axis of a plot; empty: the name
    row: str = ""  # title of its row in the table of a run; empty: no row
    form: str = ".4g"  # format of its value in tables
    stage: str = ""  # of a time in the table of a run: the stage whose speed-up stands as its change
    millions: bool = False  # plots divide it by 10^6
    logarithmic: bool = False  # plots have it on a log scale
    by_step: bool = False  # logged by step while a model trains, to the tracker alone

    def words_of(self, name: str) -> dict[str, str] | None:
        """Values of the placeholders by which `name` belongs to this family, or None where it does not."""
        found = self._pattern.fullmatch(name)
        return found.groupdict() if found else None

    @property
    def names(self) -> list[str]:
        """Names as docs/metrics.md lists them: every word of a placeholder; letters where it may be anything."""
        names = []
        for words in product(*(_WORDS.get(key) or _ANY[key][:1] for key in self._placeholders)):
            names.append(self.name.format(**dict(zip(self._placeholders, words, strict=True))))
        return names

    @cached_property
    def _placeholders(self) -> list[str]:
        return re.findall(r"\{(\w+)\}", self.name)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        pattern = re.escape(self.name)
        for key in self._placeholders:
            words = "|".join(_WORDS[key]) if key in _WORDS else _ANY[key][1]
            pattern = pattern.replace(re.escape(f"{{{key}}}"), f"(?P<{key}>{words})")
        return re.compile(pattern)


def _tokens_per_s(dense: Values) -> float | None:
    ms = dense.get("latency/decode_ms_per_token_p50")
    return 1e3 / ms if ms else None


# Engines of measure.engine: the word that figures of each begin with, its name, and what it runs.
ENGINES = {"llama_cpp": ("llama.cpp", "GGUF file"), "onnxruntime": ("ONNX Runtime", "ONNX graph")}


def _in_engine(engine: str) -> tuple[Metric, ...]:
    """Metrics of both models in an engine."""
    title, file = ENGINES[engine]
    return (
        Metric(f"{engine}/perplexity", "", "lower", MEASURED, title=f"perplexity in {title}",
               row=f"perplexity in {title}", form=".3f", logarithmic=True,
               measured=f"of the {file}, on the first `measure.engine_windows` test windows "
                        f"([below](#in-another-engine)). All metrics of `{engine}/` need `measure.engine={engine}`"),
        Metric(f"{engine}/perplexity_ratio", "times dense", "lower", 1.0, form=".3f", logarithmic=True,
               title=f"perplexity in {title}, times the dense model's", measured="that perplexity / the dense model's"),
        Metric(f"{engine}/perplexity_vs_torch", "times PyTorch's", "lower", MEASURED, form=".4f",
               title=f"perplexity in {title}, times PyTorch's",
               measured="perplexity in the engine / perplexity in PyTorch, of the same model and windows: what the "
                        "type of the file and the engine cost"),
        Metric(f"{engine}/file_mb", "MB", "lower", MEASURED, title=f"{file} (MB)", row=f"{file}, MB", form=".2f",
               measured=f"bytes of the {file}"),
        Metric(f"{engine}/peak_mb", "MB", "lower", MEASURED, title=f"peak memory of {title} (MB)",
               row=f"peak memory of {title}, MB", form=".1f",
               measured="peak of loading and inference in a fresh process; `measure.memory`"),
        Metric(f"{engine}/prefill_ms_p50", "ms", "lower", MEASURED, title=f"prefill in {title} (ms, median)",
               stage="prefill", row=f"prefill in {title}, ms (speed-up)", form=".2f",
               measured="time of the same prompt as `latency/prefill_ms_p50`, median over pairs; `measure.latency`"),
        Metric(f"{engine}/prefill_ms_p95", "ms", "lower", None, measured="95th percentile"),
        Metric(f"{engine}/decode_ms_per_token_p50", "ms per token", "lower", MEASURED, stage="decode",
               title=f"decode in {title} (ms per token, median)", row=f"decode in {title}, ms per token (speed-up)",
               form=".2f", measured="`measure.decode_tokens` after that prompt, greedily; median over pairs"),
        Metric(f"{engine}/decode_ms_per_token_p95", "ms per token", "lower", None, measured="95th percentile"),
        Metric(f"{engine}/{{stage}}_speedup", "times dense", "higher", 1.0, title=f"{{stage}} speed-up in {title}",
               measured="median over pairs of dense time / compressed time: above 1 is faster"),
        Metric(f"{engine}/{{stage}}_speedup_{{bound}}", "times dense", "higher", 1.0,
               measured="its 95 % bootstrap interval"),
    )  # fmt: skip


# In the order of docs/metrics.md and of the rows of a run's table. A name belongs to the first entry that it fits.
METRICS = (
    Metric("quality/perplexity", "", "lower", MEASURED, title="perplexity", row="perplexity", form=".3f",
           logarithmic=True,  # a bad run is many times a good one
           measured="exp of the mean cross-entropy of the next token, over all test windows ([below](#quality))"),
    Metric("quality/perplexity_ratio", "times dense", "lower", 1.0, title="perplexity, times the dense model's",
           form=".3f", logarithmic=True, measured="perplexity / the dense model's perplexity"),
    Metric("quality/perplexity_ratio_{bound}", "times dense", "lower", 1.0, form=".3f",
           measured="95 % interval of that ratio, from the losses of the same tokens in both models "
                    "([below](#quality))"),
    Metric("quality/kl", "nats", "lower", 0.0, title="KL divergence from the dense model (nats)", form=".4f",
           measured="KL(dense || compressed) of the next token, mean over the targets of the first "
                    "`measure.kl_windows` test windows ([below](#quality))"),
    Metric("quality/kl_p50", "nats", "lower", 0.0, title="median KL divergence (nats)", form=".4f",
           measured="median of the KL divergence over these targets"),
    Metric("quality/kl_p99", "nats", "lower", 0.0, title="99th percentile of the KL divergence (nats)", form=".4f",
           measured="99th percentile of the KL divergence over these targets: the worst ones, which a mean hides"),
    Metric("quality/same_top", "fraction", "higher", 1.0, title="same likeliest token as the dense model", form=".4f",
           measured="share of these targets at which both models find the same token likeliest; if several are "
                    "equally likely, the first one counts"),
    Metric("quality/bits_per_byte", "bits", "lower", MEASURED, title="bits per byte", row="bits per byte", form=".4f",
           measured="the mean cross-entropy in bits, for each byte of the test text instead of each token"),
    Metric("generation/repetition", "fraction", "lower", MEASURED, title="repeated 4-grams of continuations",
           row="repeated 4-grams", form=".4f",
           measured="1 - different 4-grams / all 4-grams of a greedy continuation, mean over the prompts "
                    "([below](#generation)). All metrics of `generation/` need `measure.generation_prompts`"),
    Metric("generation/loops", "fraction", "lower", MEASURED, title="continuations that end in a loop",
           row="continuations in a loop", form=".3f",
           measured="share of continuations whose last half only repeats one n-gram, for any n"),
    Metric("generation/common_prefix", "tokens", "higher", MEASURED, title="first tokens as the dense model's",
           row="first tokens as the dense model's", form=".1f",
           measured="number of first tokens that a continuation has in common with the dense model's, mean over the "
                    "prompts; the dense value is the length of the dense continuation"),
    Metric("generation/ended", "fraction", None, MEASURED, title="continuations that ended", form=".3f",
           measured="share of continuations that the model ended with an end-of-text token"),
    Metric("amount/requested", "fraction", "higher", 0.0,  # of two equally good runs, removing more is better
           measured="`method.amount`; 0 where the method does not use it"),
    Metric("amount/realized", "fraction", "higher", 0.0,
           measured="weights removed or zeroed in the pruned scope / weights in it before; counts are exact, even if "
                    "scores are tied. For `method=active_experts`, which removes no weights, the fraction of a "
                    "token's experts"),
    Metric("scope/share", "fraction", None, None,
           measured="weights of the matrices that unstructured methods prune / all weights of the decoder blocks. "
                    "The rest is left unpruned, such as norms, biases, routers of experts, convolutions"),
    Metric("params/total", "parameters", "lower", MEASURED, title="parameters (millions)", millions=True,
           row="parameters", form=",.0f", measured="all parameters; a tied matrix counts once"),
    Metric("params/nonzero", "parameters", "lower", MEASURED, title="non-zero parameters (millions)", millions=True,
           row="non-zero parameters", form=",.0f", measured="those that are not zero"),
    Metric("params/active", "parameters", "lower", MEASURED, title="active parameters (millions)", millions=True,
           row="active parameters", form=",.0f",
           measured="of a mixture: parameters without those of the experts that a token does not use"),
    Metric("params/reduction", "fraction", "higher", 0.0,
           measured="1 - non-zero parameters / the dense model's non-zero parameters: what this run removed or set "
                    "to zero"),
    Metric("params/physical_reduction", "fraction", "higher", 0.0,
           measured="1 - parameters / the dense model's parameters: only what was removed"),
    Metric("compute/macs_per_token", "multiply-accumulates", "lower", MEASURED,
           row="multiply-accumulates per token", form=",.0f",
           measured="of linear layers, attention and output layer, computed from their shapes, at a context of "
                    "`measure.prompt_tokens`: what could be saved, whereas `latency/` is what was saved. Experts "
                    "count by the number of tokens that they get. For types that `models/families.py` does not "
                    "describe, without the products of attention"),
    Metric("compute/effective_macs_per_token", "multiply-accumulates", "lower", None,
           measured="the same, without those of zero weights"),
    Metric("routing/same_experts", "fraction", "higher", 1.0, title="same choices of experts as the dense model",
           form=".4f",
           measured="of a mixture: share of the dense model's choices (a token, an expert) that the compressed model "
                    "makes as well, over all blocks, on the windows of the KL divergence"),
    Metric("experts/least_tokens", "tokens", None, None,
           measured="of a mixture: number of calibration tokens of the expert that got the fewest"),
    Metric("experts/under_128_tokens", "experts", None, None,
           measured="of a mixture: number of experts that got fewer than 128 calibration tokens, so that their "
                    "scores are hardly known"),
    Metric("shape/kl", "nats", "lower", None, form=".4f",
           measured="of `method=shape` with `method.held_out`: KL divergence from the dense model on the held-out "
                    "calibration windows, before any recovery. A search chooses by it"),
    Metric("size/disk_mb", "MB", "lower", MEASURED, title="bytes on disk (MB)", row="on disk, MB", form=".2f",
           measured="size of the saved files with weights: safetensors, the GGUF file, or the ONNX graph and its data"),
    Metric("size/reduction", "fraction", "higher", 0.0, measured="1 - bytes on disk / the dense model's bytes"),
    Metric("memory/weights_mb", "MB", "lower", MEASURED, title="weights in memory (MB)", row="weights in memory, MB",
           form=".2f", measured="bytes of parameters and buffers in memory; a tied one counts once"),
    Metric("memory/weights_read_mb", "MB", "lower", MEASURED, title="weights read per decoded token (MB)",
           row="weights read per token, MB", form=".2f",
           measured="bytes of weights that are read to decode one token of one sequence: of the experts only those "
                    "that the token uses; of an embedding that is not tied to the output layer only one row"),
    Metric("memory/kv_cache_bytes_per_token", "bytes", "lower", MEASURED, title="KV cache (bytes per token)",
           row="KV cache, bytes per token", form=",.0f",
           measured="keys and values of a token in all blocks, from the shapes of the linear layers and the number "
                    "type; with a sliding window, while the token is within it"),
    Metric("memory/peak_mb", "MB", "lower", MEASURED, title="peak memory (MB)", row="peak memory, MB", form=".1f",
           measured="peak of loading and inference ([below](#memory)); `measure.memory`"),
    Metric("memory/reduction", "fraction", "higher", 0.0, measured="1 - peak / the dense model's peak"),
    Metric("energy/joules_per_token", "J per token", "lower", MEASURED, row="energy, J per token", form=".4f",
           measured="for each decoded token, including its share of the prefill ([below](#energy)); `measure.energy`"),
    Metric("tasks/{task}_{accuracy}", "fraction", "higher", MEASURED, form=".4f",
           measured="lm-eval's own scores ([below](#tasks)); `measure.tasks`"),
    Metric("tasks/{task}_{likelihood}", "", "lower", MEASURED, form=".4f",
           measured="scores of tasks that measure likelihood; in bits where the name says so"),
    Metric("tasks/{task}_flips", "fraction", "lower", 0.0, title="{task}: answers that flipped", form=".4f",
           measured="share of documents that exactly one of the two models answers correctly ([below](#tasks))"),
    Metric("tasks/{task}_n", "documents", None, MEASURED, measured="number of documents that were scored"),
    Metric("tasks/{task}_truncated", "documents", None, MEASURED,
           measured="number of documents of which only the end fits into the model's context (absent if all fit)"),
    Metric("tasks/{task}_{score}_stderr", "as the score", None, MEASURED,
           measured="standard error of a score: a change that is smaller means little"),
    Metric("tasks/{task}_{score}", "as lm-eval has it", None, MEASURED, form=".4f",
           measured="other scores of a task, such as `exact_match`, by lm-eval's names"),
    Metric("latency/prefill_ms_p50", "ms", "lower", MEASURED, title="prefill (ms, median)", stage="prefill",
           row="prefill, ms (speed-up)", form=".2f",
           measured="time of a prompt of `measure.prompt_tokens`, median over pairs ([below](#time)). All metrics of "
                    "`latency/` need `measure.latency`"),
    Metric("latency/prefill_ms_p95", "ms", "lower", None, measured="95th percentile"),
    Metric("latency/decode_ms_per_token_p50", "ms per token", "lower", MEASURED, stage="decode",
           title="decode (ms per token, median)", row="decode, ms per token (speed-up)", form=".2f",
           measured="time of each of `measure.decode_tokens` tokens decoded greedily after that prompt, median over "
                    "pairs"),
    Metric("latency/decode_ms_per_token_p95", "ms per token", "lower", None, measured="95th percentile"),
    Metric("latency/{stage}_speedup", "times dense", "higher", 1.0, title="{stage} speed-up",
           measured="median over pairs of dense time / compressed time: above 1 is faster"),
    Metric("latency/{stage}_speedup_{bound}", "times dense", "higher", 1.0,
           measured="95 % bootstrap interval of the speed-up"),
    Metric("latency/aa_{stage}_speedup", "times dense", "higher", 1.0,
           measured="the dense model against a copy of itself, which shows the noise alone; `measure.aa`"),
    Metric("latency/aa_{stage}_speedup_{bound}", "times dense", "higher", 1.0,
           measured="95 % bootstrap interval of that; the run warns if it does not contain 1.00"),
    Metric("latency/prefill_ms_p50_b{batch}_l{length}", "ms", "lower", MEASURED,
           measured="as without the suffix, for B prompts of L tokens at once; `measure.batch_sizes`, "
                    "`measure.lengths`"),
    Metric("latency/decode_ms_per_token_p50_b{batch}_l{length}", "ms per step", "lower", MEASURED,
           measured="time of a step, which decodes one token for each of the B prompts"),
    Metric("latency/{stage}_speedup_b{batch}_l{length}", "times dense", "higher", 1.0,
           measured="as without the suffix"),
    Metric("latency/{stage}_speedup_b{batch}_l{length}_{bound}", "times dense", "higher", 1.0,
           measured="its interval"),
    Metric("throughput/decode_tokens_per_s", "tokens per s", "higher", _tokens_per_s,
           title="decode (tokens per second)", measured="1000 / `latency/decode_ms_per_token_p50`"),
    *(metric for engine in ENGINES for metric in _in_engine(engine)),
    Metric("time/{phase}_s", "s", "lower", None,
           measured="elapsed time of calibration and pruning, of training, of post-compression, and of measuring and "
                    "checking the saved model; without waiting for other jobs"),
    Metric("train/loss", "nats, or of `recovery`'s own loss", None, None, by_step=True,
           measured="loss of the batch of that step, every 10 steps and at the last one"),
    Metric("train/router_aux_loss", "", None, None, by_step=True,
           measured="load-balance loss of that batch before it is multiplied by its coefficient, if a mixture of "
                    "experts is trained on it. It equals the number of experts for each token (2 for top-2) if the "
                    "routers distribute tokens evenly, and is larger otherwise"),
    Metric("train/lr", "", None, None, by_step=True, measured="the learning rate of that step"),
    Metric("train/sparsity", "fraction", None, None, by_step=True,
           measured="the value of `amount/realized` at that step"),
    Metric("validation/perplexity", "", "lower", None, by_step=True,
           measured="on `recovery.validate_windows` windows of validation text, every `recovery.validate_every` steps"),
)  # fmt: skip


@cache
def find(name: str) -> Metric | None:
    """Entry of a metric, by its name; None for a figure of the dense model and for what the table lacks."""
    return None if is_dense(name) else _entry(name)


def _entry(name: str) -> Metric | None:
    return next((metric for metric in METRICS if metric.words_of(name) is not None), None)


def members(family: str, metrics: Values) -> Iterable[tuple[dict[str, str], float]]:
    """Values of the placeholders, and value, of each of a run's metrics that belongs to the entry of this name."""
    (entry,) = (metric for metric in METRICS if metric.name == family)
    return [(entry.words_of(name) or {}, value) for name, value in metrics.items() if find(name) is entry]


def check_known(names: Iterable[str]) -> None:
    """Raises ValueError where a name is neither a metric of the table nor the dense figure of one that has it."""
    for name in names:
        entry = _entry(without_dense(name))
        if entry is None or (is_dense(name) and entry.dense != MEASURED):
            raise ValueError(f"{name!r} is not a metric: METRICS in prune_lab/results/metrics.py has no entry of it")


# Names of the dense model's figures.


def dense_name(metric: str) -> str:
    """Name of the dense model's figure beside a metric: `quality/dense_perplexity`."""
    return metric.replace("/", "/dense_", 1)


def is_dense(name: str) -> bool:
    """True for the name of a figure of the dense model."""
    return "/dense_" in name


def without_dense(name: str) -> str:
    """Name of the metric that a figure of the dense model stands beside; other names as they are."""
    return name.replace("/dense_", "/")


def dense_figures(metrics: Values) -> dict[str, float]:
    """Values of the dense model among a run's metrics."""
    return {name: value for name, value in metrics.items() if is_dense(name)}


def of_dense(metrics: Values) -> dict[str, float]:
    """Values of the dense model under the names that a run's metrics have: nothing removed, no faster.

    Metrics that only a run has, such as seconds spent on pruning, are missing.
    """
    found = {without_dense(name): value for name, value in dense_figures(metrics).items()}
    if "params/total" in found:  # records of older versions did not count the dense model's zeros
        found.setdefault("params/nonzero", found["params/total"])
    for entry in METRICS:
        if callable(entry.dense) and (value := entry.dense(found)) is not None:
            found[entry.name] = value
    for name in metrics:
        if (known := find(name)) is not None and isinstance(known.dense, int | float):
            found[name] = known.dense
    return found


# What plots and tables read.


@dataclass(frozen=True)
class Axis:
    """Axis of a plot for one metric. Values are divided by `unit`; `better` is None where no direction is."""

    metric: str
    title: str
    unit: float
    better: Direction | None
    logarithmic: bool


def axis(metric: str) -> Axis:
    """Axis of a metric, by its name; one that the table lacks has its name as title and no direction."""
    entry = find(metric)
    if entry is None:
        return Axis(metric, metric, 1.0, None, False)
    title = entry.title.format(**(entry.words_of(metric) or {})) or metric
    if entry.better:
        title += f", {entry.better} is better"
    return Axis(metric, title, 1e6 if entry.millions else 1.0, entry.better, entry.logarithmic)


def formatted(metrics: Values, name: str) -> str:
    """Value of a metric as tables show it; "-" where a run does not have it."""
    entry = find(name)
    if name not in metrics:
        return "-"
    return format(metrics[name], entry.form if entry else Metric.form)


@dataclass(frozen=True)
class Interval:
    """A value between two bounds; formatted as `value [low, high]`, each by the given format."""

    value: float
    low: float
    high: float

    def __format__(self, form: str) -> str:
        return f"{self.value:{form}} {self.bounds(form)}"

    def bounds(self, form: str) -> str:
        """The bounds alone: `[low, high]`."""
        return f"[{self.low:{form}}, {self.high:{form}}]"

    def contains(self, value: float) -> bool:
        """True for a value between the bounds or on one."""
        return self.low <= value <= self.high


def interval(metrics: Values, name: str) -> Interval | None:
    """Value of a metric between its `_low` and `_high`; None where a run lacks one of the three."""
    names = [f"{name}{end}" for end in ("", "_low", "_high")]
    return Interval(*(metrics[one] for one in names)) if metrics.keys() >= set(names) else None


def speedup_interval(metrics: Values, stage: str, at: str = "", of: str = "latency") -> Interval | None:
    """Speed-up of a stage with its 95 % interval, None where it was not timed.

    stage: prefill or decode; after aa_ that of the dense model against itself. at: one shape, such as _b4_l128. of:
    latency, of PyTorch, or one of ENGINES.
    """
    return interval(metrics, f"{of}/{stage}_speedup{at}")


def speedup(metrics: Values, stage: str, at: str = "", of: str = "latency") -> str:
    """Speed-up as tables show it: "no change" where its interval contains 1, "-" where it was not timed."""
    found = speedup_interval(metrics, stage, at, of)
    if found is None:
        return "-"
    return f"no change {found.bounds('.2f')}" if found.contains(1) else f"{found:.2f}"
