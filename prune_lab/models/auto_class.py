"""The auto class of transformers that builds and reads a model: for text alone, or for images with text."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from prune_lab.errors import Refused

TEXT_ALONE = ("llama4",)  # types whose class for images with text raises on plain text (seen with transformers 5.24)


def auto_class(config: Any, names: Collection[str] | None = None) -> Any:
    """AutoModelForCausalLM where it has the model of a config, else AutoModelForImageTextToText.

    Of a type that both have with different classes (Qwen3.5, Llama 4) the first builds the text part alone, and would
    drop the other weights: it is the second where the checkpoint is of the whole model, unless that does not run on
    text (TEXT_ALONE). names: those of the model's class, by default those in the config's `architectures`. Raises
    Refused for a config whose model neither builds.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    named = names if names is not None else getattr(config, "architectures", None) or ()
    of_text, of_images = (_made_by(auto, config) for auto in (AutoModelForCausalLM, AutoModelForImageTextToText))
    is_whole = of_images in named and getattr(config, "model_type", None) not in TEXT_ALONE
    if of_images is not None and (of_text is None or is_whole):
        return AutoModelForImageTextToText
    if of_text is not None:
        return AutoModelForCausalLM
    raise Refused(
        f"model family {config.model_type!r} (model_type in config.json) is no language model: transformers has it "
        "neither in AutoModelForCausalLM nor in AutoModelForImageTextToText; give the folder of a model that is"
    )


def model_class(config: Any) -> Any:
    """The class of transformers that the auto class of a config builds its model of."""
    return auto_class(config)._model_mapping[type(config)]


def names_of(model: Any) -> list[str]:
    """Names of a model's class and of those that it derives from, as one that is sharded does."""
    return [made.__name__ for made in type(model).__mro__]


def reads_images(model: Any) -> bool:
    """True for a whole model for images with text, and not for the text part of one."""
    from transformers import AutoModelForImageTextToText

    return _made_by(AutoModelForImageTextToText, model.config) in names_of(model)


def _made_by(auto: Any, config: Any) -> str | None:
    """Name of the class that an auto class builds of a config; None where it builds none."""
    return str(auto._model_mapping[type(config)].__name__) if type(config) in auto._model_mapping else None
