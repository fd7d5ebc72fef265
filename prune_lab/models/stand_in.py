"""Another class of stock transformers that computes the same from the same weights, whose config refuses less.

LlamaConfig wants the query heads to divide hidden_size, MistralConfig does not: a Llama that is left with another
number of heads, or of channels of its states, becomes a Mistral without a sliding window. That the logits are the same
is tried on the model itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from prune_lab.errors import Refused
from prune_lab.models.families import FAMILIES

if TYPE_CHECKING:
    from prune_lab.models.anatomy import Anatomy

STAND_INS = {"llama": "mistral"}
_OF_STAND_IN: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": None}}  # else it would be its default
_UNUSED = {"pretraining_tp"}  # fields that transformers computes nothing with


def held(config: Any, kind: str, present: int) -> list[int]:
    """Counts of units of a kind, up to the present one, that a described family or its stand-in can have."""
    own = FAMILIES[config.model_type].kinds[kind].possible(config, present)
    other = STAND_INS.get(config.model_type)
    if other is None or obstacle(config) is not None:
        return own
    return sorted({*own, *FAMILIES[other].kinds[kind].possible(config, present)})


def obstacle(config: Any) -> str | None:
    """The setting of a config that its stand-in has no place for, as "field=value"; None where there is none such."""
    other = _class_of(STAND_INS[config.model_type])
    theirs = {field.name for field in dataclasses.fields(other)}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in theirs | _UNUSED and value != field.default:
            return f"{field.name}={value}"
    return None


def needs_stand_in(anatomy: Anatomy, kind: str, counts: Iterable[int]) -> bool:
    """True where one of the counts of units of a described family can be held by its stand-in alone."""
    if anatomy.found is not None:
        return False
    own = anatomy.family.kinds[kind].possible(anatomy.config, anatomy.unit_count(kind))
    return any(count not in own for count in counts)


def why_held_no_more(config: Any, kind: str) -> str:
    """Reason that a described family's config holds no other counts of a kind, as "reason; ", or nothing."""
    why = FAMILIES[config.model_type].kinds[kind].limit.format(**config.to_dict())
    other = STAND_INS.get(config.model_type)
    if why and other is not None and (setting := obstacle(config)) is not None:
        why += f", and a {other} config, which could, has no {setting}"
    return why and f"{why}; "


def _class_of(model_type: str) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[model_type]


def config_of_stand_in(config: Any) -> Any:
    """The config of the stand-in for a model of this config, with the same sizes and rotary frequencies."""
    other = STAND_INS[config.model_type]
    made = _class_of(other)
    dropped = {field.name for field in dataclasses.fields(config)} - {field.name for field in dataclasses.fields(made)}
    data = {key: value for key, value in config.to_dict().items() if key not in dropped | {"model_type"}}
    data["architectures"] = None  # save_pretrained writes it
    return made.from_dict(data | _OF_STAND_IN[other])


def check_stand_in(model: Any) -> None:
    """Raises Refused where the stand-in does not compute what a model computes."""
    _checked(model, config_of_stand_in(model.config))


def take_stand_in(anatomy: Anatomy) -> None:
    """Turns a model, the object stays, into its stand-in; raises Refused where that computes something else."""
    from prune_lab.models.found import forget_layout
    from prune_lab.models.rebuild import rebuild, tensors_of

    model = anatomy.model
    config = config_of_stand_in(model.config)
    _checked(model, config)
    rebuild(model, config, tensors_of(model))
    forget_layout(model)
    anatomy.look()


def _checked(model: Any, config: Any) -> None:
    from prune_lab.models.found import evaluating, is_same, probe_tokens
    from prune_lab.models.rebuild import rebuilt, tensors_of

    tokens, second = probe_tokens(model)[:1], rebuilt(model, config, tensors_of(model))
    with evaluating(model), evaluating(second):
        wanted, found = (one(input_ids=tokens, use_cache=False).logits for one in (model, second))
    if not is_same(found, wanted):
        raise Refused(
            f"method.units: a {model.config.model_type} config cannot hold what is left, and as a "
            f"{config.model_type} this model computes something else; give an amount whose counts its own config can "
            "hold, or method.physical=false, which leaves zeros"
        )


def note_of(before: str, now: str, name: str) -> str:
    """Note of a run whose model has become its stand-in. before, now: types; name: of the class."""
    return (
        f"the compressed model is a {name}: a {before} config wants query heads that divide hidden_size, a {now} "
        f"config does not, and its class computes the same from the same weights; it loads wherever a {now} model does"
    )
