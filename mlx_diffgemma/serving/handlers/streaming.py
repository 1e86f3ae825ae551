"""Responses that are sent while the answer is written."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncGenerator

from fastapi.responses import StreamingResponse

from mlx_diffgemma.serving.errors import status_of
from mlx_diffgemma.serving.formats import AnswerStream

log = logging.getLogger(__name__)


def streamed(stream: AnswerStream, events: AsyncGenerator[str, None]) -> StreamingResponse:
    """A response made of ``events``.  After an error, ``stream`` writes its end."""
    return StreamingResponse(
        _until_error(stream, events),
        media_type=stream.media_type,
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def _until_error(
    stream: AnswerStream, events: AsyncGenerator[str, None]
) -> AsyncGenerator[str, None]:
    try:
        async with contextlib.aclosing(events):
            async for event in events:
                yield event
    except Exception as error:  # the status has been sent, so the error goes into the stream
        if status_of(error) == 500:
            log.error("A stream failed", exc_info=error)
        yield stream.error(error)
    yield stream.done()
