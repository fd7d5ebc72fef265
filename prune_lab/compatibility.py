"""When a run prunes how much, and what its parts cannot do together: known before anything is imported or loaded."""

from __future__ import annotations

from prune_lab.config.parts import Parts
from prune_lab.errors import Refused
from prune_lab.post.none import NoPost
from prune_lab.schedules import Event, Rewind
from prune_lab.system import launch


def check_parts(parts: Parts) -> None:
    """Raises Refused for parts that do not fit together."""
    pruning_events(parts)
    _check_streaming(parts)


def pruning_events(parts: Parts) -> tuple[list[Event], Rewind | None]:
    """When to prune how much, and what to go back to, in the training that recovery does."""
    method, steps = parts.method, parts.recovery.training_steps
    events = parts.schedule.events(method.amount, steps)
    pattern = None if "pattern" in method.not_applicable else getattr(method, "pattern", None)
    if pattern is not None and len(events) > 1:
        raise Refused(
            f"method.pattern={pattern} fixes the amount, which leaves nothing to spread over {len(events)} prunings: "
            "give schedule=one_shot, whose schedule.start says when, or method.pattern=null"
        )
    return events, parts.schedule.rewinding(steps)


def _check_streaming(parts: Parts) -> None:
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
        (launch.size() > 1, "several processes share a training, and there is none; start one"),
    ):
        if is_wanted:
            raise Refused(f"model.stream=true: {reason}")
    if parts.method.needs_whole_model is not None:
        raise Refused(f"model.stream=true: {parts.method.needs_whole_model}")
