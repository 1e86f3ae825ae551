"""The exceptions and warnings of this package."""

from collections.abc import Sequence
from typing import Any


class UserError(ValueError):
    """A mistake in the input.

    The message is a sentence that says what was wrong, what was given, what is allowed and what to
    do.  The command line prints it without a traceback and ends with exit code 2.
    """


class ContextError(UserError):
    """A prompt, or a prompt and its answer, that does not fit the context."""


class CheckpointWarning(UserWarning):
    """A checkpoint that runs, but not as well as a user would expect."""


class GenerationWarning(UserWarning):
    """A canvas that did not converge, an empty answer or a malformed tool call."""


class VideoWarning(UserWarning):
    """A video that is sampled with fewer frames a second than requested."""


class NonFiniteLogitsError(RuntimeError):
    """The model returned NaN or infinity, because of a damaged checkpoint or a numerical bug.

    ``sessions`` are the sessions of a batch with such logits.  The loop can continue without them.
    """

    def __init__(self, message: str, sessions: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.sessions = tuple(sessions)
