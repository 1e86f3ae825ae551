"""Processes that work beside the server: the same results, ended at their limits, nothing left."""

import io
import os
import resource
import signal
import sys
import threading
import time

import numpy as np
import pytest

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.grammar import budget, elsewhere
from mlx_diffgemma.grammar.budget import AbandonedError, TooLongError
from mlx_diffgemma.grammar.checker import Checker
from mlx_diffgemma.grammar.compilation import compiled, language_of, language_of_named
from mlx_diffgemma.grammar.constraint import compile_constraint
from mlx_diffgemma.grammar.tokens import Vocabulary
from mlx_diffgemma.serving import content, worker
from mlx_diffgemma.serving.frames import read, write
from mlx_diffgemma.serving.workers import WorkerError, Workers

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "yz"]}}}


@pytest.fixture(scope="module")
def workers():
    made = Workers()
    yield made
    made.close()
    assert not made.processes


@pytest.fixture(scope="module")
def vocabulary(nano_pair):
    return Vocabulary(nano_pair[1], nano_pair[0].config.text.vocab_size)


def test_arrays_and_their_frames():
    value = {"a": np.arange(12).reshape(3, 4).T, "b": [1, "x", b"y"], "c": np.ones(0)}
    stream = io.BytesIO()
    write(stream, value)
    write(stream, 7)
    stream.seek(0)
    found = read(stream)
    assert found["b"] == value["b"]
    for name in "ac":
        np.testing.assert_array_equal(found[name], value[name])
    assert read(stream) == 7
    with pytest.raises(EOFError):
        read(stream)


@pytest.mark.parametrize(
    ("language", "asked"),
    [
        (language_of, (SCHEMA, None, None, "")),
        (language_of, (None, "[a-c]{2,5} owls?", None, " ")),
        (language_of, (None, None, ["yes", "no"], "")),
        (language_of_named, ((("call:f", SCHEMA),), False)),
    ],
)
def test_constraints_are_those_compiled_here(workers, vocabulary, language, asked):
    here, states = compiled(language, asked, vocabulary, 60.0)
    for _ in range(2):  # for the second the worker has the vocabulary
        there, as_many = workers.run(compiled, language, asked, vocabulary, 60.0)
        assert as_many == states
        for name in ("behind", "accepting", "class_of", "distance"):
            np.testing.assert_array_equal(getattr(there, name), getattr(here, name))
            assert getattr(there, name).dtype == getattr(here, name).dtype


@pytest.mark.parametrize("pattern", ["(", "a{20000}b{20000}", "[^\\s\\S]"])
def test_refusals_are_those_made_here(workers, vocabulary, pattern):
    asked = (None, pattern, None, "")
    with pytest.raises(UserError) as here:
        compiled(language_of, asked, vocabulary, 60.0)
    with pytest.raises(UserError) as there:
        workers.run(compiled, language_of, asked, vocabulary, 60.0)
    assert str(there.value) == str(here.value)


def test_checkers_of_tools(workers):
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^x+$"}}}
    seen = []

    def counted(function, *given):
        seen.append(function.__name__)
        return workers.run(function, *given)

    with elsewhere.sent_to(counted):
        checker = Checker(schema)
    assert seen == ["check_schema", "Matcher"]
    assert checker.fits({"a": "xx"})
    assert not checker.fits({"a": "y"})


def test_bodies(workers):
    given = b'{"a": [1, "x"], "user": "u"}', "identity", 100, ("user", "b")
    assert workers.run(content.value_of, *given) == {"a": [1, "x"]} == content.value_of(*given)
    with pytest.raises(content.NotJSONError) as error:
        workers.run(content.value_of, b"{", "identity", 100, ())
    assert error.value.position == 1
    with pytest.raises(content.UnreadableError) as refused:
        workers.run(content.value_of, b"[" * 200 + b"]" * 200, "identity", 1000, ())
    assert refused.value.status == 400


def test_a_worker_knows_neither_mlx_nor_transformers(workers):
    modules = workers.run(eval, "sorted(__import__('sys').modules)")
    assert "mlx_diffgemma.grammar.compilation" in modules
    assert not {"mlx.core", "mlx_lm", "transformers", "torch", "fastapi"} & set(modules)


def test_constraints_of_the_library_are_sent(workers, nano_pair):
    model, tokenizer = nano_pair
    seen = []

    def counted(function, *given):
        seen.append(function.__name__)
        return workers.run(function, *given)

    for _ in range(2):  # the second is remembered
        with elsewhere.sent_to(counted):
            constraint = compile_constraint(tokenizer, model.config, regex="[0-9]{3} sent owls?")
    assert seen == ["compiled"]
    assert constraint.automaton.accepts(
        np.array(tokenizer.encode("123 sent owl", add_special_tokens=False))
    )


def test_the_model_comes_first(workers):
    assert workers.run(os.nice, 0) == min(19, os.nice(0) + worker.NICE)


class TestEnds:
    @pytest.fixture
    def workers(self):
        made = Workers()
        yield made
        made.close()
        assert not made.processes

    def test_at_its_limit_though_it_looks_at_no_clock(self, workers):
        with budget.limited(0.2), pytest.raises(TooLongError, match="the 0.2 seconds allowed"):
            workers.run(time.sleep, 600)
        assert workers.run(os.getpid) != os.getpid()

    def test_when_nobody_waits(self, workers):
        assert workers.run(os.getpid)  # one that is still starting would end at once
        gone = threading.Event()
        threading.Timer(0.2, gone.set).start()
        with budget.limited(600, gone.is_set), pytest.raises(AbandonedError):
            workers.run(time.sleep, 600)

    def test_one_that_looks_is_kept(self, workers, vocabulary):
        process = workers.run(os.getpid)
        gone = threading.Event()
        slow = (None, "(a|b)*a(a|b){14}" * 2, None, "")
        threading.Timer(0.1, gone.set).start()
        with budget.limited(600, gone.is_set), pytest.raises(AbandonedError):
            workers.run(compiled, language_of, slow, vocabulary, 600.0)
        assert workers.run(os.getpid) == process

    def test_by_itself(self, workers):
        with pytest.raises(WorkerError, match="ended with 3"):
            workers.run(os._exit, 3)
        assert workers.run(os.getpid)

    def test_by_somebody_else(self, workers):
        process = workers.run(os.getpid)
        os.kill(process, signal.SIGKILL)
        os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)
        assert workers.run(os.getpid) != process

    def test_one_that_has_taken_much_memory(self, workers):
        process = workers.run(os.getpid)
        assert len(workers.run(bytes, 1000)) == 1000
        assert workers.run(os.getpid) == process
        assert workers.run(eval, "len(globals().setdefault('left', b'x' * 2**26))") == 2**26
        assert workers.run(os.getpid) != process

    @pytest.mark.skipif(sys.platform == "darwin", reason="macOS limits no address space")
    def test_more_memory_than_it_may_take(self, workers):
        assert workers.run(resource.getrlimit, resource.RLIMIT_AS)[0] == worker.MEMORY
        with pytest.raises(MemoryError):
            workers.run(bytes, 2**40)
        assert workers.run(os.getpid)

    def test_not_by_ctrl_c_which_is_for_the_server(self, workers):
        process = workers.run(os.getpid)
        os.kill(process, signal.SIGINT)
        assert workers.run(os.getpid) == process

    def test_all_but_one_when_they_have_no_work(self, workers):
        threads = [threading.Thread(target=workers.run, args=(time.sleep, 0.3)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(workers.processes) == 1

    def test_all_with_the_server_whatever_they_work_on(self, workers):
        errors = []

        def work():
            try:
                workers.run(time.sleep, 600)
            except WorkerError as error:
                errors.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        while not workers._working:
            time.sleep(0.001)
        workers.close()
        thread.join(60)
        assert len(errors) == 1
