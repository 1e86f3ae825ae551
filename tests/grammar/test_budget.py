"""Limits of time, one inside another."""

import pytest

from mlx_diffgemma.grammar import budget
from mlx_diffgemma.grammar.budget import AbandonedError, TooLongError, limited


def test_no_limit_outside_of_a_block():
    with limited(-1.0), pytest.raises(TooLongError):
        budget.check()
    budget.check()
    assert budget.current() is None


def test_an_inner_limit_ends_no_later_than_the_outer_one():
    with limited(-1.0), limited(600.0), pytest.raises(TooLongError, match="the 0 seconds allowed"):
        budget.check()


def test_the_message_names_the_limit_that_ended():
    with limited(600.0), limited(-0.0), pytest.raises(TooLongError, match="the 0 seconds allowed"):
        budget.check()


def test_an_inner_limit_keeps_who_waits_for_the_outer_one():
    with limited(600.0, lambda: True), limited(300.0), pytest.raises(AbandonedError):
        budget.check()


def test_an_inner_limit_may_have_its_own():
    with limited(600.0, lambda: True), limited(300.0, lambda: False):
        budget.check()
