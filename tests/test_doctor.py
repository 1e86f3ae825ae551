"""What ``doctor`` must notice, fault by fault: each planted fault is named by the check that is
there for it.
"""

import json

import mlx.core as mx
import pytest

from drafter.canvas import CanvasDraft
from mlx_diffgemma import nano
from mlx_diffgemma.decoding import autoregressive
from mlx_diffgemma.decoding.autoregressive import CausalSession
from mlx_diffgemma.diagnostics import diagnosis, doctor, golden, selfcheck
from mlx_diffgemma.diagnostics.diagnosis import WAYS, Subject, Way, _taken
from mlx_diffgemma.diagnostics.doctor import (
    ANSWER,
    KERNEL,
    NUMBERS,
    OPERATION,
    Check,
    Diagnosis,
    Section,
)
from mlx_diffgemma.diagnostics.operations.checks import Result
from mlx_diffgemma.grammar import constraint
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling import self_conditioning


@pytest.fixture(scope="module")
def subject(nano_pair):
    return Subject(*nano_pair, golden.load(), exact=True)


def take(name, subject):
    return _taken(name, WAYS[name], subject)


def no_kernel(*_, **__):
    raise RuntimeError(
        "[metal::Device] Unable to load kernel carg_block_sort_bool_uint32_bn256_tn4"
    )


def sparse_without_kernel(monkeypatch):
    monkeypatch.setattr(self_conditioning, "sparse", no_kernel)


def sparse_of_other_tokens(monkeypatch):
    """The signal of the sparse way alone is off, which shows after the first step."""
    right = self_conditioning.sparse
    monkeypatch.setattr(
        self_conditioning,
        "sparse",
        lambda model, scaled, kept: right(model, scaled, (kept + 1) % 1024),
    )


def rows_swapped(monkeypatch):
    """Rows of a batch read each other's prompts."""
    logits = DiffusionGemma.denoise

    def swapped(self, canvas, caches, *args, **kwargs):
        return logits(
            self, canvas, caches if len(caches) < 2 else [caches[1], caches[0]], *args, **kwargs
        )

    monkeypatch.setattr(DiffusionGemma, "denoise", swapped)


def next_token_off(monkeypatch):
    right = autoregressive.draw_next
    monkeypatch.setattr(autoregressive, "draw_next", lambda *a: right(*a) + 1)


def draft_taken_unseen(monkeypatch):
    """Every guess is taken, whatever the model says."""
    take = CausalSession.take
    monkeypatch.setattr(
        CausalSession, "take", lambda self, tokens, guess: take(self, [*guess, tokens[-1]], guess)
    )


def draft_without_features(monkeypatch):
    monkeypatch.setattr(CanvasDraft, "_pass", no_kernel)


def constraint_unheard(monkeypatch):
    """Other tokens come out than those whose class was chosen."""
    right = constraint.Constraint.best
    monkeypatch.setattr(
        constraint.Constraint, "best", lambda self, *args: (right(self, *args) + 1) % 1024
    )


FAULTS = {
    "canvases": [sparse_without_kernel],
    "a long canvas": [sparse_without_kernel, sparse_of_other_tokens],
    "prompts together": [rows_swapped],
    "left to right": [next_token_off],
    "canvases with a drafter": [draft_without_features],
    "left to right with a drafter": [draft_taken_unseen],
    "constraints": [constraint_unheard],
}


@pytest.mark.parametrize("name", WAYS)
def test_every_way_is_sound_here(name, subject):
    way = take(name, subject)
    assert way.ok, way.note


@pytest.mark.parametrize(
    ("name", "fault"),
    [(name, fault) for name, faults in FAULTS.items() for fault in faults],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_a_fault_is_named(name, fault, subject, monkeypatch):
    assert set(FAULTS) == set(WAYS)
    fault(monkeypatch)
    way = take(name, subject)
    assert not way.ok
    assert way.note


def test_the_first_fault_of_every_mac_is_noticed(subject, monkeypatch):
    """``mx.argsort`` of bool has no Metal kernel; in 16 bits too, where only the text is compared."""
    argsort = mx.argsort

    def as_metal(x, *args, **kwargs):
        return no_kernel() if x.dtype == mx.bool_ else argsort(x, *args, **kwargs)

    sorted_masks = []
    monkeypatch.setattr(
        mx, "argsort", lambda x, *a, **k: (sorted_masks.append(x.dtype), argsort(x, *a, **k))[1]
    )
    assert take("canvases", subject).ok
    monkeypatch.setattr(mx, "argsort", as_metal)
    found = take("canvases", subject)
    assert found.ok == (mx.bool_ not in sorted_masks), "a mask is sorted, and doctor says so"


def test_other_logits_are_noticed(nano_float32, monkeypatch):
    model = nano_float32[0]
    expected = golden.load()
    assert doctor.check(model, expected, expected.original, "float32", 1).ok
    head = type(model).logits
    monkeypatch.setattr(type(model), "logits", lambda self, h: head(self, h) * 1.01)
    wrong = doctor.check(model, expected, expected.original, "float32", 1)
    assert not wrong.ok
    assert wrong.logits > 0.01


def sound(**changes):
    check = Check("float32", 1e-5, 1e-9, 1.0, 2, 2, 30.0, True)
    way = Way("canvases, float32", True, 0.3)
    section = Section("experts", 30, 0.2, ())
    return Diagnosis(
        **{
            "machine": {"chip": "Apple M4"},
            "memory_limit": 10**10,
            "nano": nano.VERSION,
            "checks": (check,),
            "ways": (way,),
            "deep": (section,),
        }
        | changes
    )


WRONG = Result("experts", "packed experts, mxfp4", False, 0.3, 0.015)
REFUSED = Result(
    "ordering", "an operation failed", False, note="at once: RuntimeError: Unable to load kernel"
)


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        (
            {"checks": (Check("4bit", float("nan"), float("nan"), 0.0, 0, 2, 30.0, False),)},
            f"4bit: {NUMBERS}",
        ),
        (
            {"ways": (Way("constraints, bfloat16", False, 0.3, "the answer is 'x'"),)},
            f"constraints, bfloat16: {ANSWER}",
        ),
        (
            {"ways": (Way("canvases, bfloat16", False, 0.3, "RuntimeError: Unable to load"),)},
            f"canvases, bfloat16: {KERNEL}",
        ),
        (
            {"deep": (Section("experts", 30, 20.0, (WRONG,)),)},
            f"experts, packed experts, mxfp4: {OPERATION}",
        ),
        (
            {"deep": (Section("ordering", 1, 0.0, (REFUSED,)),)},
            f"ordering, an operation failed: {KERNEL}",
        ),
    ],
    ids=["numbers", "an answer", "a kernel", "an operation", "an operation's kernel"],
)
def test_each_failure_says_what_to_do(changes, advice):
    assert sound().ok
    assert sound().advice == []
    found = sound(**changes)
    assert not found.ok
    assert found.advice == [advice]
    record = json.loads(json.dumps(found.record(), allow_nan=False))
    assert record["ok"] is False
    assert record["advice"] == [advice]


def test_deep_is_summed_up_by_section(monkeypatch):
    results = [
        Result("ordering", "a", True),
        Result("experts", "b", True, 0.001, 0.01),
        WRONG,
    ]
    monkeypatch.setattr(selfcheck, "run", lambda progress: progress("experts") or results)
    told = []
    sections = {section.name: section for section in doctor._sections(told.append)}
    assert set(sections) == set(selfcheck.SECTIONS)
    assert sections["ordering"].ok
    assert (sections["experts"].checks, sections["experts"].failed) == (2, (WRONG,))
    assert sections["experts"].worst == pytest.approx(20)
    assert told == ["operations at the released shapes: experts"]
    assert diagnosis.WAYS.keys() == WAYS.keys()


def test_one_way_that_fails_is_enough():
    ways = Way("canvases", True, 0.1), Way("left to right", False, 0.1, "another answer")
    assert Diagnosis({}, 0, "nano", (), ways[:1]).ok
    assert not Diagnosis({}, 0, "nano", (), ways).ok
