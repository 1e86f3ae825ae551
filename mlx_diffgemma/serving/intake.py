"""Turns an HTTP request into a job: reads the body, bounds its size, and prepares the job."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar, cast

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest

from mlx_diffgemma.serving import bodies
from mlx_diffgemma.serving.amounts import PromptBounds, has_images
from mlx_diffgemma.serving.engine import Engine
from mlx_diffgemma.serving.errors import GoneError
from mlx_diffgemma.serving.keys import asker
from mlx_diffgemma.serving.mailbox import disconnected
from mlx_diffgemma.serving.preparation import Preparation
from mlx_diffgemma.serving.protocols.body import Body
from mlx_diffgemma.serving.settings import Settings
from mlx_diffgemma.serving.tasks import AnswerTask, Conversation, InfillTask, Task
from mlx_diffgemma.serving.tidying import Tidying

T = TypeVar("T")
B = TypeVar("B", bound=Body)


class Intake:
    """Prepares requests on threads of ``preparation``; the engine's thread is for the model."""

    def __init__(self, engine: Engine, settings: Settings, preparation: Preparation) -> None:
        self._engine = engine
        self._settings = settings
        self._preparation = preparation
        # The number of requests by client, without those in the patient lane.
        self._preparing = Counter[str]()
        self._tidying = Tidying()

    @functools.cached_property
    def _bounds(self) -> PromptBounds:
        engine = self._engine
        return PromptBounds(engine.model.config, engine.tokenizer, self._settings.max_prompt_tokens)

    async def read(self, kind: type[B], http: HTTPRequest) -> B:
        """Read the body of a request.

        Raises:
            GoneError: the client hangs up meanwhile.
            Exception: as ``bodies.read`` raises.
        """

        async def off_loop(task: Callable[[], B], is_heavy: bool) -> B:
            return await self.attended(http, task, is_heavy, self._check_patience)

        limit = self._settings.max_body
        try:
            return await bodies.read(http, kind, limit, cast(bodies.OffLoop, off_loop))
        except ClientDisconnect:
            raise GoneError from None

    async def prepared(
        self, http: HTTPRequest, is_heavy: bool, prepare: Callable[..., T], *arguments: Any
    ) -> T:
        """Prepare a request before it is submitted.

        Args:
            http: the request.
            is_heavy: it takes much memory, so it waits in the lane in which few run at once.
            prepare: the work.
            arguments: the arguments of ``prepare``.

        Returns:
            What ``prepare`` returns.

        Raises:
            BusyError: the queue has no place for the request.
            GoneError: the client hangs up meanwhile.
        """
        client = asker(http.scope)
        self._engine.check_queue(self._preparing.total(), client, self._preparing[client])
        is_counted = True

        def leave() -> None:
            nonlocal is_counted
            self._preparing[client] -= is_counted
            if not self._preparing[client]:
                del self._preparing[client]
            is_counted = False

        def wait_longer() -> None:
            leave()  # a long preparation does not hold a place in the queue
            self._check_patience()

        self._preparing[client] += 1
        try:
            task = functools.partial(prepare, *arguments)
            return await self.attended(http, task, is_heavy, wait_longer)
        finally:
            leave()

    async def attended(
        self,
        http: HTTPRequest,
        task: Callable[[], T],
        is_heavy: bool = False,
        patiently: Callable[[], None] | None = None,
    ) -> T:
        """Run ``task`` as ``Preparation.run`` does, as long as the client waits for it.

        Args:
            http: the request it is for.
            task: the work.
            is_heavy: it takes much memory.
            patiently: called before the task begins in the patient lane.

        Raises:
            GoneError: the client hangs up meanwhile.  The task is then cancelled.
        """
        gone = threading.Event()
        work = asyncio.ensure_future(
            self._preparation.run(asker(http.scope), gone.is_set, task, patiently, is_heavy)
        )
        watching = asyncio.ensure_future(disconnected(http))
        try:
            await asyncio.wait({work, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise GoneError
            return work.result()
        finally:
            gone.set()
            work.cancel()
            watching.cancel()
            if is_heavy:
                self._tidying.soon()

    def _check_patience(self) -> None:
        self._engine.check_patience(len(self._preparation.patient.turns))

    async def is_heavy(self, task: Task, http: HTTPRequest) -> bool:
        """Whether the prompt of ``task`` takes much memory.

        Raises:
            ContextError: more text or images than fit.
            UserError: more pixels than a request may have, or images that the model cannot see.
        """
        if isinstance(task, InfillTask):
            return self._bounds.check_text([task.before, task.after, task.instruction])
        if isinstance(task, AnswerTask):
            if not isinstance(task.prompt, Conversation):
                return self._bounds.check_text(task.prompt)
            messages = task.prompt.messages
            budget = task.options.get("image_tokens")
        else:
            messages = task.messages
            budget = task.image_tokens
        has_much_text = self._bounds.check_text(messages)
        if not has_images(messages):
            return has_much_text
        check = functools.partial(self._bounds.check_media, messages, budget)
        has_much_to_see = await self.attended(http, check)
        return has_much_text or has_much_to_see
