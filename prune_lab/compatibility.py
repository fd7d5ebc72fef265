"""Compatibility of a run's parts, and its pruning events: checked before anything is imported or loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from prune_lab.config.parts import Parts
from prune_lab.errors import Refused
from prune_lab.measure.engine import check_engine
from prune_lab.methods.depth import Depth
from prune_lab.methods.sensitivity import Sensitivity
from prune_lab.methods.shape import Shape
from prune_lab.methods.structured import Structured
from prune_lab.post.none import NoPost
from prune_lab.schedules import Event, Rewind
from prune_lab.system import launch

if TYPE_CHECKING:
    from prune_lab.methods.base import Method
    from prune_lab.models.found import Layout


def check_parts(parts: Parts, choices: Mapping[str, str]) -> None:
    """Raises Refused for parts that do not fit together; `choices` are the names of the options chosen by group."""
    pruning_events(parts)
    _check_streaming(parts, choices)
    _check_target(parts)
    _check_reconstruction(parts, choices)
    if (name := getattr(parts.tracking, "register", None)) is not None and not parts.export.is_kept:
        raise Refused(
            f"tracking.register={name} registers an export, and export={choices.get('export')} keeps none: give "
            "export=hf, or tracking.register=null"
        )
    check_engine(parts.measure.engine, str(choices.get("export")), parts.export.measured_in)
    if parts.post.is_low_bit and not parts.export.takes_low_bits:
        raise Refused(
            f"export={choices.get('export')} cannot hold quantized weights, which post={choices.get('post')} makes: "
            "give export=hf, or post=none"
        )


def check_low_bit_model(parts: Parts, choices: Mapping[str, str], name: str) -> None:
    """Raises Refused for what cannot be done to a model, called `name`, whose weights are quantized already."""
    if any(choices.get(group) != "none" for group in ("method", "recovery", "post")):
        raise Refused(
            f"model.name={name!r} has quantized weights already: it can be measured (method=none recovery=none "
            "post=none); to compress it further, give the model that it was made from"
        )
    if not parts.export.takes_low_bits:
        raise Refused(
            f"export={choices.get('export')} cannot hold quantized weights, which model.name={name!r} has: give "
            "export=hf or export=none"
        )


def check_found_layout(
    parts: Parts, choices: Mapping[str, str], family: str, layout: Layout, checkpointing: bool
) -> None:
    """Raises Refused for what cannot be done to a model of a `family` whose layout was found, not described.

    checkpointing: whether its blocks can be computed again in the backward pass.
    """
    method, recovery, measure = choices.get("method"), choices.get("recovery"), parts.measure
    for is_wanted, reason in (
        (parts.recovery.follows_pruning, f"recovery={recovery} trains attention and MLP apart; give recovery=finetune"),
        (getattr(parts.recovery, "dropout", 0.0) > 0, "recovery.dropout is of attention and MLP; give 0"),
        (
            getattr(parts.recovery, "gradient_checkpointing", False) and not checkpointing,
            "transformers has no gradient checkpointing for them; give recovery.gradient_checkpointing=false",
        ),
        (
            launch.size() > 1 and parts.recovery.training_steps > 0,
            "a training in several processes is for families that are described; start one",
        ),
        (
            isinstance(parts.method, Sensitivity) and bool({"mlp", "heads"} & {*parts.method.parts}),
            f"method={method} of units is for families that are described; give method.parts=[weights,block]",
        ),
        (
            not layout.decodes and (measure.latency or measure.memory or measure.generation_prompts > 0),
            "a text cannot be gone on with from their cache, so that neither time nor memory of decoding can be "
            "measured and nothing is generated; give measure=quality_only",
        ),
        (
            layout.is_fused and not isinstance(parts.post, NoPost) and not parts.post.is_low_bit,
            f"post={choices.get('post')} is for Linears, and its experts are none; give post=none",
        ),
    ):
        if is_wanted:
            raise Refused(f"models of the type {family}: {reason}")


def pruning_events(parts: Parts) -> tuple[list[Event], Rewind | None]:
    """Pruning events of the training that recovery does, and what is rewound after each of them."""
    method, steps = parts.method, parts.recovery.training_steps
    events = parts.schedule.events(method.amount, steps)
    pattern = None if "pattern" in method.not_applicable else getattr(method, "pattern", None)
    if pattern is not None and len(events) > 1:
        raise Refused(
            f"method.pattern={pattern} fixes the amount, which leaves nothing to spread over {len(events)} prunings: "
            "give schedule=one_shot, whose schedule.start says when, or method.pattern=null"
        )
    rewinding = parts.schedule.rewinding(steps)
    if isinstance(method, Shape) and (len(events) > 1 or rewinding is not None):
        raise Refused(
            "method=shape cuts to its shape at once, and nothing is rewound: give schedule=one_shot, whose "
            "schedule.start says when"
        )
    refit = _refit_of(parts)
    if refit != "none" and rewinding is not None and rewinding.what != "lr":
        raise Refused(
            f"schedule.rewind={rewinding.what} puts earlier weights and biases in place of those that "
            f"method.refit={refit} sets: give method.refit=none, or schedule.rewind=lr or null"
        )
    if _is_of_hidden(method) and rewinding is not None and rewinding.what != "lr":
        raise Refused(
            f"schedule.rewind={rewinding.what} puts earlier weights in place of those of the norms, which "
            "method.units=[hidden] multiplies: give schedule.rewind=lr or null"
        )
    return events, rewinding


def _check_target(parts: Parts) -> None:
    """Refuses a refit's target that differs from the inputs behind pruned blocks alone, where there are none."""
    refit = _refit_of(parts)
    if refit in ("dense", "residual") and parts.dataset.calibration.propagate == "dense":
        raise Refused(
            f"method.refit={refit} with dataset.calibration.propagate=dense: it makes up for what the pruned blocks "
            "before have changed, and behind dense blocks nothing has: give "
            f"method.refit={'none' if isinstance(parts.method, Depth) else 'inputs'}, or "
            "dataset.calibration.propagate=pruned"
        )


def _check_reconstruction(parts: Parts, choices: Mapping[str, str]) -> None:
    """Refuses what a recovery cannot follow that goes through the blocks of a pruned model once."""
    if not parts.recovery.follows_pruning:
        return
    events, rewinding = pruning_events(parts)
    for is_wanted, reason in (
        (
            any(event.step > 0 for event in events) or rewinding is not None,
            f"schedule={choices.get('schedule')} prunes while a model trains; give schedule=one_shot schedule.start=0",
        ),
        (isinstance(parts.method, Depth), "the blocks that method=depth leaves are whole; give recovery=finetune"),
        (
            _is_of_hidden(parts.method),
            "it compares states with the dense model's, which have more channels than method.units=[hidden] leaves; "
            "give recovery=finetune",
        ),
        (launch.size() > 1, "it is computed by one process; start one"),
    ):
        if is_wanted:
            raise Refused(f"recovery={choices.get('recovery')}: {reason}")


def _is_of_hidden(method: Method) -> bool:
    return isinstance(method, Structured) and method.is_of_hidden


def _refit_of(parts: Parts) -> str:
    method = parts.method
    return "none" if "refit" in method.not_applicable else getattr(method, "refit", "none")


def _check_streaming(parts: Parts, choices: Mapping[str, str]) -> None:
    """Refuses what needs a whole model in memory, where model.stream=true says that it need not fit."""
    if not parts.model.stream:
        return
    measure = parts.measure
    for is_wanted, reason in (
        (parts.recovery.training_steps > 0, "training needs the whole model in memory; give recovery=none"),
        (not isinstance(parts.post, NoPost), "post-compression works on a model in memory; give post=none"),
        (measure.latency, "a model that is read while it runs cannot be timed; give measure=quality_only"),
        (measure.memory, "peak memory is that of a model in memory; give measure.memory=false"),
        (bool(measure.tasks), "tasks put short texts through the model one batch at a time; give measure.tasks=[]"),
        (
            measure.generation_prompts > 0,
            "every generated token would read all blocks from disk; give measure.generation_prompts=0",
        ),
        (
            not parts.export.takes_streamed,
            f"export={choices.get('export')} is made of a model in memory; give export=hf or export=none",
        ),
        (launch.size() > 1, "several processes would each read all blocks from the same disk; start one"),
    ):
        if is_wanted:
            raise Refused(f"model.stream=true: {reason}")
    if parts.method.needs_whole_model is not None:
        raise Refused(f"model.stream=true: {parts.method.needs_whole_model}")
