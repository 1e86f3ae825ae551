import itertools
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.decoding import scheduler as scheduler_module
from mlx_diffgemma.decoding import shares
from mlx_diffgemma.decoding.job import ClosedError, Job
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.errors import NonFiniteLogitsError
from mlx_diffgemma.model.recipes import VISION
from mlx_diffgemma.sampling.draws import Draws
from mlx_diffgemma.sampling.policy import ReferencePolicy
from mlx_diffgemma.serving import engine as engine_module
from mlx_diffgemma.serving.engine import BusyError, Engine
from tests.checkpoints import FULL, SHAPES, SLIDING, make_checkpoint, write_checkpoint

STEPS = 5


class Answer(Job):
    """One session, or several; what came of them, and when."""

    def __init__(self, seed=0, size=20, limit=24, sessions=1, rounds=1, ids=None):
        self.seed, self.limit, self.sessions, self.rounds_left = seed, limit, sessions, rounds
        self.ids = (
            np.random.default_rng(seed).integers(0, 300, size).tolist() if ids is None else ids
        )
        self.made, self.steps, self.ended, self.error = [], 0, threading.Event(), None
        self.on_step = lambda session, step: None

    def rounds(self, model):
        policy = ReferencePolicy.from_config(model.config.generation, max_steps=STEPS)
        for turn in range(self.rounds_left):
            new = [
                Session(
                    model,
                    self.ids,
                    policy,
                    Draws(self.seed + 100 * place + turn, model.config.text.vocab_size),
                    (1,),
                    self.limit,
                )
                for place in range(self.sessions)
            ]
            self.made += new
            yield new

    def step(self, session, step):
        self.steps += 1
        self.on_step(session, step)

    def done(self, error):
        self.error = error
        self.ended.set()

    def wait(self):
        assert self.ended.wait(120), "the job never ended"
        if self.error:
            raise self.error
        return [
            np.concatenate([canvas.tokens for canvas in session.canvases]).tolist()
            for session in self.made
        ]


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    """The tiny model with one layer of each kind."""
    shape = SHAPES["five-and-one"] | {"layers": 2, "kinds": [SLIDING, FULL]}
    return write_checkpoint(tmp_path_factory.mktemp("small"), shape, calm=False)


@pytest.fixture
def begin(small_folder):
    """Starts an engine of a small model with some options."""
    engines = []

    def start(load=lambda: (load_model(small_folder, "float32"), None), **options):
        engine = Engine(load, **options)
        engine.start()
        engines.append(engine)
        return engine

    yield start
    for engine in engines:
        engine.close()
        assert not engine.alive


@contextmanager
def hold(engine):
    """The engine's thread does nothing meanwhile."""
    ready, end = threading.Event(), threading.Event()

    class Wait(Answer):
        def rounds(self, model):
            ready.set()
            end.wait(60)
            yield from ()

    engine.submit(Wait())
    ready.wait(60)
    yield
    end.set()


def alone(begin, **asked):
    job = Answer(**asked)
    begin().submit(job)
    return job.wait()


class TestAnswers:
    def test_beside_others_as_alone(self, begin):
        """Mixed lengths, more jobs than rows, and a prompt in many chunks among them."""
        asked = [
            dict(seed=seed, size=[5, 33, 90, 12][seed % 4], limit=[24, 72, 40][seed % 3])
            for seed in range(6)
        ]
        engine = begin(max_batch=3, prefill_step_size=32)
        jobs = [Answer(**own) for own in asked]
        for job in jobs:
            engine.submit(job)
        found = [job.wait() for job in jobs]
        assert engine.stats.finished == 6
        quiet = begin(max_batch=1, prefill_step_size=32, prefix_bytes=0)
        for own, tokens in zip(asked, found):
            job = Answer(**own)
            quiet.submit(job)
            assert job.wait() == tokens

    def test_rounds_and_sessions_of_a_job(self, begin):
        job = Answer(sessions=5, rounds=2)
        begin(max_batch=2).submit(job)
        found = job.wait()
        assert len(found) == 10
        assert found[0] != found[1]

    def test_never_more_rows_than_allowed(self, begin):
        engine = begin(max_batch=2)
        seen = []
        jobs = [Answer(seed=seed, sessions=2) for seed in range(3)]
        for job in jobs:
            job.on_step = lambda session, step: seen.append(len(engine.scheduler.slots))
            engine.submit(job)
        for job in jobs:
            job.wait()
        assert max(seen) == 2

    def test_a_job_of_many_sessions_leaves_room_for_others(self, begin):
        """Its sessions take turns with other jobs."""
        engine, order = begin(max_batch=1), []
        many, one = Answer(seed=1, sessions=6), Answer(seed=2)
        many.on_step = one.on_step = lambda session, step: order.append(session)
        first = Answer(seed=3)
        engine.submit(first)
        engine.submit(many)
        engine.submit(one)
        many.wait()
        one.wait()
        assert order.index(one.made[0]) < order.index(many.made[-1])

    def test_a_client_with_all_rows_gives_some_to_another(self, begin):
        """At its next canvas borders, and goes on later as if it had not."""
        engine, begun, parked = begin(max_batch=4), [], []
        scheduler = engine.scheduler
        park = scheduler._park
        scheduler._park = lambda slot: parked.append(slot.run.job) or park(slot)
        many, one = Answer(seed=1, sessions=8, limit=24 * 4), Answer(seed=2, limit=24 * 2)
        many.client, one.client = "a", "b"

        def step(session, step):
            if many.steps == 4:
                engine.submit(one)

        many.on_step = step
        one.on_step = lambda session, step: begun.append(
            max(len(own.canvases) for own in many.made)
        )
        engine.submit(many)
        found = many.wait(), one.wait()
        # Had it waited for a whole answer, four canvases of some row had come before.
        assert begun[0] <= 2
        assert parked
        assert set(parked) == {many}
        assert found == (
            alone(begin, seed=1, sessions=8, limit=24 * 4),
            alone(begin, seed=2, limit=24 * 2),
        )

    def test_a_row_is_given_up_within_a_canvas(self, begin):
        engine = begin(max_batch=2)
        many, one = Answer(seed=1, sessions=2, limit=24 * 2), Answer(seed=2)
        many.client, one.client = "a", "b"
        committed = []
        many.on_step = lambda session, step: engine.submit(one) if many.steps == 1 else None
        one.on_step = lambda session, step: committed.append(
            sum(len(own.canvases) for own in many.made)
        )
        engine.submit(many)
        found = many.wait(), one.wait()
        assert committed[0] == 0
        assert found == (
            alone(begin, seed=1, sessions=2, limit=24 * 2),
            alone(begin, seed=2),
        )

    @pytest.mark.parametrize("recent", [0.0, 1000.0])
    def test_clients_have_as_many_rows_in_a_step(self, begin, monkeypatch, recent):
        """As many as the one with fewest, all in turn; while that is likely to ask again, too."""
        monkeypatch.setattr(shares, "RECENT", recent)
        engine, turns = begin(max_batch=4), []
        advance = engine.scheduler._loop.advance

        def seen():
            turns.append(
                [
                    engine.scheduler.slots[id(own)].run.job.client
                    for own in engine.scheduler._loop.active
                ]
            )
            return advance()

        monkeypatch.setattr(engine.scheduler._loop, "advance", seen)
        many, one = Answer(seed=1, sessions=3, limit=24 * 3), Answer(seed=2, limit=24 * 2)
        many.client, one.client = "a", "b"
        with hold(engine):
            engine.submit(many)
            engine.submit(one)
        found = many.wait(), one.wait()
        shared = [turn for turn in turns if "b" in turn]
        assert shared
        assert all(sorted(turn) == ["a", "b"] for turn in shared[1:])
        after = turns[1 + max(number for number, turn in enumerate(turns) if "b" in turn) :]
        assert max(map(len, after)) == (1 if recent else 3)
        assert found == (
            alone(begin, seed=1, sessions=3, limit=24 * 3),
            alone(begin, seed=2, limit=24 * 2),
        )

    def test_clients_take_turns(self, begin):
        """The queue of one does not come before another that has no row."""
        engine, order = begin(max_batch=1), []
        jobs = [Answer(seed=seed) for seed in range(5)]
        for job, client in zip(jobs, "aaaab"):
            job.client = client
            job.on_step = lambda session, step, job=job: order.append(job)
        with hold(engine):
            for job in jobs:
                engine.submit(job)
        for job in jobs:
            job.wait()
        assert list(dict.fromkeys(order)).index(jobs[4]) <= 1

    def test_a_session_may_be_ended_by_its_job(self, begin):
        job = Answer(limit=24 * 6)
        job.on_step = lambda session, step: setattr(
            session, "finished", session.finished or len(session.canvases) == 2
        )
        begin().submit(job)
        assert len(job.wait()[0]) == 48

    def test_a_job_may_end_sessions_that_take_no_step(self, begin):
        """Beside another client only one of its sessions takes the step after which all end."""
        many, one = Answer(seed=1, sessions=3, limit=24 * 9), Answer(seed=2, limit=24 * 2)
        many.client, one.client = "a", "b"
        engine = begin(max_batch=4)

        def end(session, step):
            if one.steps:
                for own in many.made:
                    own.finished = True

        many.on_step = end
        with hold(engine):
            engine.submit(many)
            engine.submit(one)
        assert one.wait() == alone(begin, seed=2, limit=24 * 2)
        assert many.ended.wait(120)
        assert many.error is None
        assert not engine.scheduler.slots

    def test_readers_only_read(self, begin):
        class Reader(Answer):
            def rounds(self, model):
                reader = Session.reading(model, self.ids)
                yield [reader]
                self.length = reader.cache.length

        job = Reader(size=100)
        begin(prefill_step_size=16).submit(job)
        job.wait()
        assert (job.length, job.steps) == (100, 0)


class TestPrompts:
    def test_a_long_prompt_does_not_stop_the_others(self, begin, monkeypatch):
        """Between any two steps of another answer no more is read than a chunk."""
        engine, read, between = begin(prefill_step_size=32, prefix_bytes=0), [], []
        real = scheduler_module.encode_chunk
        monkeypatch.setattr(
            scheduler_module,
            "encode_chunk",
            lambda model, sessions, sizes: read.append(sum(sizes)) or real(model, sessions, sizes),
        )
        going, long = Answer(seed=1, limit=24 * 8), Answer(seed=2, size=400)

        def step(session, step):
            if not between:
                engine.submit(long)
            between.append(sum(read))
            read.clear()

        going.on_step = step
        engine.submit(going)
        going.wait()
        long.wait()
        assert max(between) <= 34  # a single token is never left over
        assert between.count(32) >= 3  # and meanwhile it took steps

    def test_short_ones_pass_a_long_one(self, begin):
        engine, ends = begin(prefill_step_size=32), []
        long, short = Answer(seed=1, size=600), Answer(seed=2, size=10)
        with hold(engine):
            for job in (long, short):
                job.done = lambda error, job=job: (ends.append(job), job.ended.set())
                engine.submit(job)
        long.wait()
        short.wait()
        assert ends[0] is short

    def test_short_ones_are_read_together(self, begin, monkeypatch):
        counts, held, began = [], threading.Event(), threading.Event()
        real = scheduler_module.encode_chunk
        monkeypatch.setattr(
            scheduler_module,
            "encode_chunk",
            lambda model, sessions, sizes: (
                counts.append(len(sessions)),
                real(model, sessions, sizes),
            ),
        )
        engine, first = begin(max_batch=4, prefill_step_size=64), Answer()
        first.on_step = lambda session, step: (began.set(), held.wait(60))
        engine.submit(first)
        began.wait(60)
        others = [Answer(seed=seed, size=20) for seed in (1, 2, 3)]
        for job in others:
            engine.submit(job)
        held.set()
        for job in (first, *others):
            job.wait()
        assert counts == [1, 3]

    def test_prompts_are_read_by_clients_in_turn(self, begin, monkeypatch):
        engine, read = begin(max_batch=4, prefill_step_size=32), []
        encode = scheduler_module.encode_chunk

        def seen(model, sessions, sizes):
            read.extend(engine.scheduler.slots[id(session)].run.job.client for session in sessions)
            return encode(model, sessions, sizes)

        monkeypatch.setattr(scheduler_module, "encode_chunk", seen)
        jobs = [Answer(seed=seed, size=128) for seed in range(4)]
        with hold(engine):
            for job, client in zip(jobs, "aaab"):
                job.client = client
                engine.submit(job)
        for job in jobs:
            job.wait()
        assert "".join(read[:8]) in ("abababab", "babababa")

    def test_what_was_read_is_not_read_again(self, begin):
        engine = begin()
        prompt = np.random.default_rng(9).integers(0, 300, 200).tolist()
        for ids, encoded in ((prompt, 200), (prompt, 200), ([*prompt, 5, 6, 7], 203)):
            job = Answer(ids=ids)
            engine.submit(job)
            job.wait()
            assert engine.stats.encoded == encoded

    def test_a_shared_beginning_is_kept_when_it_is_seen_twice(self, begin):
        engine = begin(prefill_step_size=64)
        system = np.random.default_rng(9).integers(0, 300, 100).tolist()
        for user in range(3):
            job = Answer(ids=[*system, user, *range(10, 30)])
            engine.submit(job)
            job.wait()
        assert engine.stats.encoded == 121 + 121 + 21

    def test_and_changes_no_token(self, begin):
        system = np.random.default_rng(9).integers(0, 300, 100).tolist()
        asked = [
            dict(ids=[*system, user, *range(10, 30)], seed=user, limit=48) for user in range(4)
        ]
        with_cache, without = begin(), begin(prefix_bytes=0)
        for own in asked:
            jobs = [Answer(**own), Answer(**own)]
            with_cache.submit(jobs[0])
            without.submit(jobs[1])
            assert jobs[0].wait() == jobs[1].wait()
        assert with_cache.stats.reused >= 200
        assert without.stats.reused == 0


class TestEnds:
    def test_a_cancelled_job_leaves_at_the_next_turn(self, begin):
        engine = begin(max_batch=1)
        job, other = Answer(limit=24 * 40), Answer(seed=1)
        job.on_step = lambda session, step: job.cancel()
        engine.submit(job)
        engine.submit(other)
        with pytest.raises(ClosedError):
            job.wait()
        assert job.steps == 1
        other.wait()
        assert (engine.stats.cancelled, engine.stats.finished) == (1, 1)

    def test_one_whose_prompt_is_read_in_chunks_stops_at_the_next(self, begin, monkeypatch):
        engine, job = begin(max_batch=1, prefill_step_size=32), Answer(size=320)
        encode, chunks = scheduler_module.encode_chunk, []

        def cancelled(model, sessions, sizes):
            chunks.append(sizes)
            if len(chunks) == 2:
                job.cancel()
            return encode(model, sessions, sizes)

        monkeypatch.setattr(scheduler_module, "encode_chunk", cancelled)
        engine.submit(job)
        with pytest.raises(ClosedError):
            job.wait()
        assert chunks == [[32], [32]]
        assert not engine.scheduler.slots
        assert job.made[0].pending.size == 256
        monkeypatch.setattr(scheduler_module, "encode_chunk", encode)
        other = Answer(seed=1)
        engine.submit(other)  # whose row is free
        assert other.wait() == alone(begin, seed=1)

    def test_one_that_waits_is_never_begun(self, begin):
        engine = begin(max_batch=1)
        held = threading.Event()
        first, second = Answer(), Answer(seed=1)
        first.on_step = lambda session, step: held.wait(60)
        engine.submit(first)
        engine.submit(second)
        second.cancel()
        held.set()
        first.wait()
        with pytest.raises(ClosedError):
            second.wait()
        assert not second.made

    @pytest.mark.parametrize("where", ["rounds", "step", "second round", "done"])
    def test_a_job_that_fails_takes_no_other_with_it(self, begin, where):
        class Failing(Answer):
            def rounds(self, model):
                if where == "rounds":
                    raise ZeroDivisionError
                yield from super().rounds(model)
                if where == "second round":
                    raise ZeroDivisionError

            def step(self, session, step):
                if where == "step":
                    raise ZeroDivisionError

            def done(self, error):
                super().done(error)
                if where == "done":
                    raise ZeroDivisionError

        engine = begin()
        failing, others = Failing(sessions=2), [Answer(seed=seed, limit=72) for seed in (1, 2)]
        for job in (others[0], failing, others[1]):
            engine.submit(job)
        if where == "done":
            failing.wait()
        else:
            with pytest.raises(ZeroDivisionError):
                failing.wait()
        found = [job.wait() for job in others]
        assert found == [alone(begin, seed=seed, limit=72) for seed in (1, 2)]
        assert not engine.scheduler.slots

    def test_a_row_without_numbers_takes_no_other_with_it(self, begin):
        class Damaged(Answer):
            def rounds(self, model):
                for new in super().rounds(model):
                    cache = new[0].cache
                    model.encode([mx.array(self.ids)], [cache])
                    cache._entries[0] = cache._entries[0] * mx.array(float("nan"))
                    new[0].use_cache(cache)
                    yield new

        engine = begin()
        damaged, other = Damaged(), Answer(seed=1, limit=72)
        engine.submit(other)
        engine.submit(damaged)
        with pytest.raises(NonFiniteLogitsError):
            damaged.wait()
        assert other.wait() == alone(begin, seed=1, limit=72)

    def test_a_turn_that_fails_is_not_the_end(self, begin, monkeypatch):
        engine = begin()
        lost = Answer()
        monkeypatch.setattr(engine.scheduler._loop, "advance", lambda: 1 / 0)
        engine.submit(lost)
        with pytest.raises(ZeroDivisionError):
            lost.wait()
        assert alone(begin) == (job := Answer(), engine.submit(job), job.wait())[2]

    def test_a_job_that_works_itself_gives_others_their_turns(self, begin):
        """And leaves at the next turn, as any other."""

        class Worker(Answer):
            worked = 0

            def rounds(self, model):
                while self.worked < 3000:
                    self.worked += 1
                    yield ()

        engine, worker, beside = begin(max_batch=2), Worker(), Answer(limit=72)
        beside.on_step = lambda session, step: seen.append(worker.worked)
        seen = []
        engine.submit(worker)
        engine.submit(beside)
        beside.wait()
        assert all(after - before == 1 for before, after in itertools.pairwise(seen)), "a turn each"
        worker.cancel()
        with pytest.raises(ClosedError):
            worker.wait()
        count = worker.worked
        time.sleep(0.1)
        assert worker.worked == count

    def test_prefixes_make_room(self, begin, monkeypatch):
        monkeypatch.setattr(scheduler_module.cost, "run_bytes", lambda *_: 100)
        engine, first, kept = begin(), Answer(size=64), []

        def run(seed):
            job = Answer(size=64, seed=seed)
            job.on_step = lambda session, step: kept.append(
                engine.scheduler.prefix_cache.begin(first.ids)[0].length
            )
            engine.submit(job)
            job.wait()
            return kept[-1]

        engine.submit(first)
        first.wait()
        assert run(1) > 0
        engine.scheduler.room = 100
        assert run(2) == 0

    def test_the_queue_is_bounded(self, begin):
        engine, held, began = begin(max_batch=1, max_queue=2), threading.Event(), threading.Event()
        first = Answer()
        first.on_step = lambda session, step: (began.set(), held.wait(60))
        engine.submit(first)
        began.wait(60)
        waiting = [Answer(seed=seed) for seed in (1, 2)]
        for job in waiting:
            engine.submit(job)
        with pytest.raises(BusyError) as refused:
            engine.submit(Answer(seed=3))
        assert refused.value.retry_after >= 1
        held.set()
        for job in (first, *waiting):
            job.wait()
        engine.submit(job := Answer(seed=3))
        job.wait()

    def test_a_full_queue_has_a_place_for_a_client_with_less(self, begin):
        """In that of the latest job of the client with most."""
        engine = begin(max_batch=1, max_queue=3)
        with hold(engine):
            many = [Answer(seed=seed) for seed in range(3)]
            for job in many:
                job.client = "a"
                engine.submit(job)
            engine.check_queue(0, "b")
            with pytest.raises(BusyError):
                engine.check_queue(0, "a")
            others = [Answer(seed=seed) for seed in (4, 5)]
            for job in others:
                job.client = "b"
            engine.submit(others[0])
            with pytest.raises(BusyError):
                many[2].wait()
            with pytest.raises(BusyError):
                engine.submit(others[1])
        for job in (*many[:2], others[0]):
            job.wait()

    def test_scopes_share_no_prompts(self, begin):
        engine, ids = begin(), np.random.default_rng(0).integers(0, 300, 90).tolist()
        reused = []
        for scope in (b"a", b"b", b"a"):
            job = Answer(ids=ids)
            job.scope = scope
            engine.submit(job)
            job.wait()
            reused.append(job.made[0].reused)
        assert reused == [0, 0, 90]

    def test_jobs_that_do_not_fit_together_run_one_after_the_other(self, begin):
        engine, seen = begin(), []
        engine.scheduler.room = 1  # of bytes: one always runs
        jobs = [Answer(seed=seed) for seed in range(3)]
        for job in jobs:
            job.on_step = lambda session, step: seen.append(len(engine.scheduler.slots))
            engine.submit(job)
        for job in jobs:
            job.wait()
        assert set(seen) == {1}

    def test_closing_lets_finish_what_runs(self, begin):
        engine, begun = begin(), [threading.Event() for _ in range(3)]
        jobs = [Answer(seed=seed) for seed in range(3)]
        for job, event in zip(jobs, begun):
            job.on_step = lambda session, step, event=event: event.set()
            engine.submit(job)
        for event in begun:
            assert event.wait(60)
        engine.close(grace=60)
        for job in jobs:
            job.wait()
        with pytest.raises(ClosedError):
            engine.submit(Answer())

    @pytest.fixture
    def running(self, begin):
        """(an engine, a long answer that it has begun)."""
        engine, began, job = begin(), threading.Event(), Answer(limit=24 * 40)
        job.on_step = lambda session, step: began.set()
        engine.submit(job)
        began.wait(60)
        return engine, job

    def test_it_tells_those_that_wait_at_once(self, begin):
        """And lets finish what runs."""
        engine = begin(max_batch=1)
        runs, waits = Answer(seed=1, limit=24 * 20), Answer(seed=2)
        steps = threading.Semaphore(0)
        runs.on_step = lambda session, step: steps.release()
        engine.submit(runs)
        steps.acquire()
        engine.submit(waits)
        closing = threading.Thread(target=engine.close, args=(60,))
        closing.start()
        with pytest.raises(ClosedError):
            waits.wait()
        assert not runs.ended.is_set()
        runs.wait()
        closing.join()

    def test_it_begins_no_turn_that_would_end_too_late(self, running):
        engine, job = running
        engine.scheduler.longest_step = 1e6  # seconds
        engine.close(grace=1000)
        with pytest.raises(ClosedError):
            job.wait()

    def test_but_not_for_ever(self, running):
        engine, job = running
        started = time.monotonic()
        engine.close(grace=0)
        with pytest.raises(ClosedError):
            job.wait()
        assert time.monotonic() - started < 30

    def test_told_twice_it_does_not_wait(self, running):
        engine, job = running
        threading.Timer(0.02, engine.close).start()
        started = time.monotonic()
        engine.close(grace=600)
        with pytest.raises(ClosedError):
            job.wait()
        assert time.monotonic() - started < 60

    def test_what_cannot_be_loaded(self):
        def load():
            raise FileNotFoundError("no model")

        with pytest.raises(FileNotFoundError, match="no model"):
            Engine(load).start()


def test_free_memory_is_returned_once_after_work_has_ended(begin, monkeypatch):
    returned = []
    monkeypatch.setattr(engine_module, "IDLE", 0.05)
    monkeypatch.setattr(engine_module, "return_memory", lambda: returned.append(engine.stats.rows))
    engine = begin()
    for _ in range(2):
        job = Answer()
        job.on_step = lambda session, step: returned.clear()
        engine.submit(job)
        job.wait()
        end = time.monotonic() + 60
        while not returned:
            assert time.monotonic() < end
            time.sleep(0.01)
        time.sleep(0.3)
        assert returned == [0], "once, and with no row taken"


def test_the_tower_is_not_read_before_an_image_comes(begin, tmp_path):
    """A server of text does not hold it."""
    folder = make_checkpoint(tmp_path, vision="plain")
    model = load_model(folder, "float32")
    before = mx.get_active_memory()
    begin(load=lambda: (model, None))
    tower = sum(
        array.nbytes for name, array in tree_flatten(model.parameters()) if name.startswith(VISION)
    )
    assert mx.get_active_memory() - before < tower / 2
    mx.eval(model.parameters())
    assert mx.get_active_memory() - before > tower / 2, "it would not show"


SLOW_ENDS = """
import time
from concurrent.futures import Future

# The thread that sets a result gets no processor afterwards, until the interpreter is ending.
set_result = Future.set_result
def slow(future, result):
    set_result(future, result)
    time.sleep(0.5)
Future.set_result = slow

class SlowEnd:
    sleep = staticmethod(time.sleep)
    def __del__(self):
        self.sleep(1.0)
at_the_end_of_the_interpreter = SlowEnd()
"""


def test_engines_do_not_abort_the_end_of_the_interpreter():
    """MLX aborts a process one of whose threads ends, or runs, after the interpreter."""
    program = SLOW_ENDS + (
        "from mlx_diffgemma import load\n"
        "from mlx_diffgemma.serving.engine import Engine\n"
        "closed, left = Engine(lambda: load('nano')), Engine(lambda: load('nano'))\n"
        "closed.start()\n"
        "left.start()\n"
        "closed.close()\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_an_engine_takes_the_thread_of_a_closed_one(small_folder):
    """A thread that has used MLX must not end, and there must not be more and more of them."""
    threads = []

    def load():
        threads.append(threading.get_ident())
        return load_model(small_folder), None

    for _ in range(3):
        engine = Engine(load)
        engine.start()
        engine.close()
    assert len(set(threads)) == 1
    assert threads[0] in {thread.ident for thread in threading.enumerate()}
