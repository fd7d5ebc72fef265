"""The auto class of transformers that builds and reads a model: for text alone, or for images with text."""

from __future__ import annotations

from typing import Any

from prune_lab.errors import Refused


def auto_class(config: Any) -> Any:
    """AutoModelForCausalLM where it has the model of a config, else AutoModelForImageTextToText.

    Raises Refused for a config whose model neither of them builds.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            return auto
    raise Refused(
        f"model family {config.model_type!r} (model_type in config.json) is no language model: transformers has it "
        "neither in AutoModelForCausalLM nor in AutoModelForImageTextToText; give the folder of a model that is"
    )


def model_class(config: Any) -> Any:
    """The class of transformers that the auto class of a config builds its model of."""
    return auto_class(config)._model_mapping[type(config)]
