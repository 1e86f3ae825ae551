"""Clients take turns at the threads that prepare requests, and what takes long is stopped."""

import asyncio
import os
import threading
import time

import pytest

from mlx_diffgemma.grammar import budget, elsewhere, regex
from mlx_diffgemma.grammar.automaton import compile_language
from mlx_diffgemma.grammar.budget import AbandonedError, TooLongError
from mlx_diffgemma.serving import preparation, tidying
from mlx_diffgemma.serving.engine import BusyError
from mlx_diffgemma.serving.errors import GoneError
from mlx_diffgemma.serving.intake import Intake
from mlx_diffgemma.serving.preparation import Preparation, Turns
from mlx_diffgemma.serving.settings import Settings


def never():
    return False


def spin():
    """Work without end, such as the compilation of some constraints."""
    while True:
        budget.check()
        time.sleep(0.001)


class TestTurns:
    def order(self, places, each, asked):
        """The clients as they get their places, each of which is given back at once."""

        async def run():
            turns, taken = Turns(places, each), []

            async def one(client):
                await turns.take(client)
                taken.append(client)
                await asyncio.sleep(0)
                turns.give_back(client)

            await asyncio.gather(*map(one, asked))
            assert len(turns) == 0
            return taken

        return asyncio.run(run())

    def test_clients_in_turn(self):
        assert self.order(1, 1, "aaaabc") == list("aabcaa")

    def test_one_client_leaves_a_place(self):
        async def run():
            turns = Turns(3, 2)
            for client in "aa":
                await turns.take(client)
            third = asyncio.ensure_future(turns.take("a"))
            await asyncio.sleep(0)
            assert not third.done()
            await asyncio.wait_for(turns.take("b"), 1)
            turns.give_back("a")
            await asyncio.wait_for(third, 1)

        asyncio.run(run())

    def test_who_no_longer_waits_takes_no_place(self):
        async def run():
            turns = Turns(1, 1)
            await turns.take("a")
            gone = asyncio.ensure_future(turns.take("b"))
            late = asyncio.ensure_future(turns.take("b"))
            await asyncio.sleep(0)
            gone.cancel()
            turns.give_back("a")
            await asyncio.wait_for(late, 1)
            late_cancelled = asyncio.ensure_future(turns.take("c"))
            await asyncio.sleep(0)
            turns.give_back("b")
            late_cancelled.cancel()  # it was granted and cancelled in one turn of the loop
            await asyncio.wait_for(turns.take("d"), 1)

        asyncio.run(run())


class TestPreparation:
    def test_what_takes_long_stops_nobody(self):
        """Slow constraints of one client, more than there are threads, beside another's request."""

        def slow():
            compile_language(regex.parse("(a|b)*a(a|b){300}"))

        async def run():
            ready = Preparation(seconds=30)
            gone = threading.Event()
            hostile = [asyncio.ensure_future(ready.run("a", gone.is_set, slow)) for _ in range(8)]
            await asyncio.sleep(0.2)
            began = time.monotonic()
            for _ in range(5):
                assert await ready.run("b", never, lambda: 7) == 7
            waited = time.monotonic() - began
            gone.set()
            for task in hostile:
                with pytest.raises((AbandonedError, ValueError)):
                    await task
            return waited

        assert asyncio.run(run()) < 5

    def test_lanes(self, monkeypatch):
        """What is not ready soon begins again in the patient lane, and ends there at the limit."""
        monkeypatch.setattr(preparation, "QUICK_SECONDS", 0.05)
        threads, told = [], []

        def task():
            threads.append(threading.current_thread().name.partition("_")[0])
            spin()

        with pytest.raises(TooLongError, match="more than the 0.2 seconds allowed"):
            asyncio.run(Preparation(seconds=0.2).run("a", never, task, lambda: told.append(1)))
        assert threads == ["prepare", "compile"]
        assert told == [1]

    def test_constraints_and_long_bodies_are_for_another_process(self, monkeypatch):
        monkeypatch.setattr(preparation, "QUICK_SECONDS", 60.0)  # it has to start first

        async def run():
            ready = Preparation()
            task = lambda: elsewhere.run(os.getpid)  # noqa: E731
            quick = await ready.run("a", never, task)
            patient = await ready.run("a", never, task, is_heavy=True)
            again = await ready.run("a", never, task)
            ready.close()
            return quick, patient, again

        quick, patient, again = asyncio.run(run())
        assert quick != os.getpid()
        assert quick == patient == again, "both lanes share the worker that is kept"

    def test_a_place_is_free_only_when_its_thread_is(self):
        async def run():
            ready, end = Preparation(), threading.Event()
            held = [
                asyncio.ensure_future(ready.run("a", never, end.wait))
                for _ in range(preparation.QUICK_THREADS)
            ]
            await asyncio.sleep(0.05)
            assert len(ready.quick.turns) == 1  # one client leaves a thread
            for task in held:
                task.cancel()
            await asyncio.gather(*held, return_exceptions=True)
            assert ready.quick.turns._free == 1
            end.set()
            while ready.quick.turns._free < preparation.QUICK_THREADS:
                await asyncio.sleep(0.01)

        asyncio.run(asyncio.wait_for(run(), 10))


class FakeEngine:
    """A queue of two, and nothing behind it."""

    def check_queue(self, more, client, own):
        if more >= 2:
            raise BusyError(1)

    def check_patience(self, waiting):
        if waiting >= 2:
            raise BusyError(1)


class FakeRequest:
    client = None
    scope = {"client": None}  # noqa: RUF012

    def __init__(self):
        self.gone = asyncio.Event()

    async def receive(self):
        await self.gone.wait()
        return {"type": "http.disconnect"}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(preparation, "QUICK_SECONDS", 0.05)
    return Intake(FakeEngine(), Settings("nano"), Preparation(seconds=20))


def test_work_of_a_client_that_left_is_given_up(server):
    ended = threading.Event()

    def task():
        try:
            spin()
        except AbandonedError:
            ended.set()
            raise

    async def run():
        http = FakeRequest()
        work = asyncio.ensure_future(server.prepared(http, False, task))
        await asyncio.sleep(0.15)  # it is in the patient lane
        assert server._preparing.total() == 0
        http.gone.set()
        with pytest.raises(GoneError):
            await asyncio.wait_for(work, 5)
        while not ended.is_set():
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(run(), 10))


def test_what_waits_in_the_patient_lane_is_bounded_and_holds_no_place_of_the_queue(server):
    async def run():
        https = [FakeRequest() for _ in range(5)]
        works = []
        for http in https:
            works.append(asyncio.ensure_future(server.prepared(http, False, spin)))
            await asyncio.sleep(0.2)
        refused = [work for work in works if work.done()]
        assert len(refused) == 2  # one runs, two wait
        for work in refused:
            assert isinstance(work.exception(), BusyError)
        assert await server.prepared(FakeRequest(), False, lambda: 7) == 7
        for http in https:
            http.gone.set()
        await asyncio.gather(*works, return_exceptions=True)

    asyncio.run(asyncio.wait_for(run(), 20))


def test_memory_of_heavy_requests_is_returned_once_for_all(server, monkeypatch):
    returned = threading.Semaphore(0)
    monkeypatch.setattr(tidying, "TIDY_SECONDS", 0.05)
    monkeypatch.setattr(tidying, "trim_heap", returned.release)

    async def run(*heavy):
        for is_heavy in heavy:
            await server.attended(FakeRequest(), lambda: 7, is_heavy)
        await asyncio.sleep(0.2)

    asyncio.run(run(False, False))
    assert not returned.acquire(blocking=False)
    asyncio.run(run(True, False, True, True))
    assert returned.acquire(timeout=10)
    assert not returned.acquire(blocking=False)
    asyncio.run(run(True))
    assert returned.acquire(timeout=10)
