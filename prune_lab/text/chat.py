"""Conversations as text: lists of messages, rendered by a tokenizer's chat template."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from prune_lab.errors import Refused

_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}  # of ShareGPT and its like
# Of templates that write today's date: text must be the same every day. What a template defines goes before what it is
# given.
_TODAY = (
    "{%- macro strftime_now(format) -%}{%- if format == '%Y-%m-%d' -%}2024-07-26{%- else -%}26 Jul 2024{%- endif -%}"
    "{%- endmacro -%}"
)


@dataclass(frozen=True)
class Chat:
    """One conversation: messages of role and content. `place` is where it was found, for refusals."""

    messages: list[dict[str, Any]]
    place: str

    @property
    def key(self) -> str:
        """Identity of the conversation, whatever template renders it."""
        return json.dumps(self.messages, sort_keys=True, default=str)

    @property
    def is_blank(self) -> bool:
        """True where no message has text."""
        return not any(message.keys() - {"role", "content"} or message["content"] for message in self.messages)

    def rendered(self, tokenizer: Any, answered: bool = False) -> str:
        """Its text by the tokenizer's chat template; raises Refused where there is none or it does not take it.

        answered: with what begins the model's answer at the end.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise Refused(
                f"{self.place} holds chat messages, and the model's tokenizer has no chat template: give a model that "
                "has one, such as an instruct model, or a column in which each conversation is one text"
            )
        try:
            template = tokenizer.get_chat_template()
            template = _TODAY + template if "strftime_now" in template else template
            text: str = tokenizer.apply_chat_template(
                self.messages, chat_template=template, tokenize=False, add_generation_prompt=answered
            )
        except Exception as error:  # what a template raises is its own
            why = " ".join(str(error).split())[:120] or type(error).__name__
            raise Refused(f"{self.place} holds what the tokenizer's chat template does not take: {why}") from error
        return text


def as_chat(value: Any, place: str) -> Chat | None:
    """The conversation that a column's value is, or None where it is none.

    Messages are {role, content} or, as ShareGPT has them, {from, value}; a content may be parts of text. Raises Refused
    where a message is of another kind.
    """
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        return None
    if all("role" in message for message in value):
        return Chat([_message(message, "role", "content", place) for message in value], place)
    if all("from" in message and "value" in message for message in value):
        return Chat([_message(message, "from", "value", place) for message in value], place)
    return None


def _message(found: dict[str, Any], role_key: str, content_key: str, place: str) -> dict[str, Any]:
    role, content = found[role_key], found.get(content_key)
    if not isinstance(role, str):
        raise Refused(f"{place} holds a message whose {role_key} is {role!r}: give user, assistant or system")
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        if other := [part.get("type") for part in content if not isinstance(part.get("text"), str)]:
            raise Refused(f"{place} holds a message with a part of type {other[0]!r}: only text can be read")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str | None):
        raise Refused(f"{place} holds a message whose {content_key} is no text: give a string, or parts of text")
    # A table's rows all have the fields that any of them has: templates ask whether a field is there.
    more = {key: value for key, value in found.items() if key not in (role_key, content_key) and value is not None}
    return {**more, "role": _ROLES.get(role, role), "content": content or ""}
