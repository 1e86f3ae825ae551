"""The scheduler alone, on the thread of the test."""

import pytest

from mlx_diffgemma.decoding.job import ClosedError, Job, Run, RunQueue, SlotState
from mlx_diffgemma.decoding.scheduler import Scheduler, SchedulerLimits
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.sampling.draws import Draws
from mlx_diffgemma.sampling.policy import ReferencePolicy


class Answer(Job):
    """One session with a prompt of ``size`` tokens; ``ended`` holds the errors it was told."""

    def __init__(self, size=8, client=""):
        self.client = client
        self.ids = list(range(2, 2 + size))
        self.ended = []
        self.session = None

    def rounds(self, model):
        policy = ReferencePolicy.from_config(model.config.generation, max_steps=6)
        draws = Draws(7, model.config.text.vocab_size)
        self.session = Session(model, self.ids, policy, draws, (1,), 8)
        yield [self.session]

    def done(self, error):
        self.ended.append(error)


@pytest.fixture
def make(random_pair):
    """A function that makes a scheduler of some jobs."""

    def scheduler_of(*jobs, **limits):
        queue = RunQueue()
        for job in jobs:
            queue.append(Run(job))
        return Scheduler(random_pair[0], queue, SchedulerLimits(**limits))

    return scheduler_of


def run(scheduler):
    for _ in range(1000):
        if not scheduler.has_work:
            return
        scheduler.step()
    raise AssertionError("the jobs never ended")


def states(scheduler):
    return [slot.state for slot in scheduler.slots.values()]


def test_a_slot_reads_its_prompt_before_it_is_ready(make):
    job = Answer(size=40)
    scheduler = make(job, prefill_step_size=16)
    seen = []
    while not job.ended:
        scheduler.step()
        seen += states(scheduler)
    assert seen[:2] == [SlotState.READING, SlotState.READING]
    assert SlotState.READING not in seen[2:]
    assert job.ended == [None]
    assert not scheduler.has_work
    assert scheduler.stats.encoded == 40


def test_a_cancelled_job_leaves_at_the_next_step(make):
    job, other = Answer(size=40), Answer()
    scheduler = make(job, other, prefill_step_size=16)
    scheduler.step()
    job.cancel()
    scheduler.step()
    assert [type(error) for error in job.ended] == [ClosedError]
    assert all(slot.run.job is other for slot in scheduler.slots.values())
    run(scheduler)
    assert other.ended == [None]
    assert (scheduler.stats.finished, scheduler.stats.cancelled) == (1, 1)


def test_a_client_with_all_slots_parks_one_for_another(make):
    many = [Answer(client="a") for _ in range(2)]
    scheduler = make(*many, max_batch=2)
    scheduler.step()
    one = Answer(client="b")
    scheduler.queue.append(Run(one))
    scheduler.step()
    parked = [slot for waiting in scheduler.queue.snapshot() for slot in waiting.todo]
    assert [slot.state for slot in parked] == [SlotState.PARKED]
    assert {slot.run.job.client for slot in parked} == {"a"}
    run(scheduler)
    assert [job.ended for job in (*many, one)] == [[None]] * 3


def test_runs_of_equal_rank_leave_the_queue_in_their_order():
    queue, runs = RunQueue(), [Run(Answer()) for _ in range(4)]
    for waiting in runs[:3]:
        queue.append(waiting)
    queue.append_left(runs[3])
    queue.discard(runs[1])
    taken = [queue.take(lambda _: (0, 0)) for _ in range(4)]
    assert taken == [runs[3], runs[0], runs[2], None]
