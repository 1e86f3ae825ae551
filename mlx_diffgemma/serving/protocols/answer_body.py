"""The interface of a request for an answer, the same for every protocol."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from mlx_diffgemma.serving.formats import AnswerFormat
from mlx_diffgemma.serving.protocols.body import Body
from mlx_diffgemma.serving.protocols.fields import Text
from mlx_diffgemma.serving.tasks import AnswerTask, Delivery, InfillTask


class AnswerBody(Body):
    """A request whose answer is text, whole or as a stream."""

    model: Text

    @property
    @abstractmethod
    def salts(self) -> Sequence[str]:
        """The salts.  Requests with different salts do not share cached prompts."""

    @property
    @abstractmethod
    def delivery(self) -> Delivery:
        """How the answer is to be sent."""

    @abstractmethod
    def task(self) -> AnswerTask | InfillTask:
        """The task that the request asks for."""

    @abstractmethod
    def answer_format(self) -> AnswerFormat:
        """The format in which the answer is written."""
