"""Reading of request bodies.  No field is ignored silently.

A field is used, or accepted because its value changes nothing, or refused by name, or noted in the
answer's ``warnings``.
"""

from __future__ import annotations

from typing import Any, ClassVar, TypeAlias

from pydantic import (
    BaseModel,
    ConfigDict,
    ModelWrapValidatorHandler,
    PrivateAttr,
    model_validator,
)

from mlx_diffgemma.serving.protocols.fields import NOTES, STRICT, has_surrogate, note

Values: TypeAlias = dict[str, tuple[Any, ...] | str]
Names: TypeAlias = dict[str, str]


class Strict(BaseModel):
    """A part of a request.

    Null means absent.  Unknown fields are dropped and noted (see ``Body.notes``); in the history of
    a conversation they are dropped without a note.  In strict mode they are refused.

    Attributes:
        NEUTRAL: fields that are accepted with these values, which change nothing; "any" accepts
            every value.
        REFUSED: fields that are never accepted, and why.
        RENAMED: other servers' names of our fields.
        HISTORY: whether the part belongs to the history of a conversation.
    """

    model_config = ConfigDict(extra="forbid")

    NEUTRAL: ClassVar[Values] = {}
    REFUSED: ClassVar[Names] = {}
    RENAMED: ClassVar[Names] = {}
    HISTORY: ClassVar[bool] = False

    @model_validator(mode="before")
    @classmethod
    def sift(cls, data: Any) -> Any:
        """Remove fields that change nothing.  Refuse fields that would change something but are not
        supported.
        """
        if not isinstance(data, dict):
            return data
        strict = STRICT.get()
        kept = dict(data)
        if not strict:
            kept = {name: value for name, value in data.items() if value is not None}
        for name, reason in cls.REFUSED.items():
            if kept.pop(name, None) is not None:
                raise ValueError(f"{name}: not supported, {reason}.")
        if not strict:
            cls._rename(kept)
        known = set(cls.model_fields)
        known |= {field.alias for field in cls.model_fields.values() if field.alias}
        for name in list(kept):
            if name in cls.NEUTRAL:
                cls._check_neutral(name, kept.pop(name))
            elif name not in known and not strict:
                del kept[name]
                if not cls.HISTORY:
                    note(f"{name}: not known here; it was ignored.")
        return kept

    @classmethod
    def _rename(cls, kept: dict[str, Any]) -> None:
        for name, our_name in cls.RENAMED.items():
            if name not in kept:
                continue
            if our_name in kept:
                raise ValueError(f"{name}: is {our_name} here; send one of them.")
            kept[our_name] = kept.pop(name)

    @classmethod
    def _check_neutral(cls, name: str, value: Any) -> None:
        """Note a value that would change something.

        Raises:
            ValueError: there is such a value, in strict mode.
        """
        allowed = cls.NEUTRAL[name]
        if allowed == "any" or value is None or any(_same(value, item) for item in allowed):
            return
        if STRICT.get():
            instead = f" or send {' or '.join(map(repr, allowed))}" if allowed else ""
            raise ValueError(f"{name}: {value!r:.100} cannot be honoured; leave it out{instead}.")
        if not cls.HISTORY:
            note(f"{name}: {value!r:.100} has no effect here.")


class Body(Strict):
    """A whole request."""

    _notes: list[str] = PrivateAttr(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """The notes about dropped fields of the request, for the ``warnings`` of the answer."""
        return list(dict.fromkeys(self._notes))

    @model_validator(mode="wrap")
    @classmethod
    def collect_notes(cls, data: Any, handler: ModelWrapValidatorHandler[Body]) -> Body:
        notes = list[str]()
        token = NOTES.set(notes)
        try:
            body = handler(data)
        finally:
            NOTES.reset(token)
        body._notes = notes
        return body

    @model_validator(mode="before")
    @classmethod
    def check_characters(cls, data: Any) -> Any:
        for name, value in data.items() if isinstance(data, dict) else ():
            if has_surrogate(name):
                raise ValueError(
                    f"The field name {name!r:.100} holds half a character (a surrogate without its "
                    "other half)."
                )
            if has_surrogate(value):
                raise ValueError(
                    f"{name}: holds half a character (a surrogate without its other half); send "
                    "whole ones."
                )
        return data


def _same(value: Any, allowed: Any) -> bool:
    """Whether two values are equal and of the same kind, since 0 == False."""
    same_kind = isinstance(value, bool) == isinstance(allowed, bool)
    return bool(value == allowed) and same_kind
