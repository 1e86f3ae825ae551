"""Languages of numbers within bounds, as JSON writes them."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from typing import Any

from mlx_diffgemma.errors import UserError
from mlx_diffgemma.grammar.language import (
    EMPTY,
    Chars,
    Choice,
    Language,
    Repeat,
    chars,
    choice,
    concat,
    optional,
    text,
)

DIGITS = 15  # digits of a whole number without bounds, and digits after the point
PLACES = 6  # digits after the point of a number with bounds, or as many as the bounds have
DIGIT = Chars(((ord("0"), ord("9")),))
LARGEST = 308  # the largest power of ten of a bound, as of a number in float64
EXACT = Context(prec=1000)  # more digits than any bound has


def number(schema: Mapping[str, Any], whole: bool, where: str) -> Language:
    """The numbers within the bounds of a schema.

    With bounds they are written without an exponent; without bounds they may also have one.

    Args:
        schema: The schema.
        whole: Whether the numbers are whole.
        where: The path of the schema, for messages.
    """
    low, low_open = _bound(schema, where, "minimum", "exclusiveMinimum", max)
    high, high_open = _bound(schema, where, "maximum", "exclusiveMaximum", min)
    if low is None and high is None:
        magnitude: Language = concat(
            [_natural(), *([] if whole else [optional(_fraction()), optional(_exponent())])]
        )
        return concat([optional(text("-")), magnitude])
    places = (
        0 if whole else max(PLACES, *(_places(bound) for bound in (low, high) if bound is not None))
    )
    if places > 2 * DIGITS:
        raise UserError(
            f"The bounds of a number at #{where} have more than {2 * DIGITS} decimal places; round them."
        )
    unit = Decimal(1).scaleb(-places)
    first = None if low is None else _steps(low, unit, low_open)
    last = None if high is None else -_steps(high.copy_negate(), unit, high_open)
    parts: list[Language] = []
    if last is None or last >= 0:
        parts.append(_between(max(0, first or 0), last, places))
    if first is None or first < 0:
        parts.append(
            concat(
                [
                    text("-"),
                    _between(
                        max(1, -(last if last is not None and last < 0 else -1)),
                        None if first is None else -first,
                        places,
                    ),
                ]
            )
        )
    return choice(parts)


def _bound(
    schema: Mapping[str, Any], where: str, inclusive: str, exclusive: str, tighter: Any
) -> tuple[Decimal | None, bool]:
    bounds = [
        (_exact(schema[name]), name == exclusive)
        for name in (inclusive, exclusive)
        if name in schema
    ]
    if not bounds:
        return None, False
    for bound, _ in bounds:
        if not bound.is_finite() or abs(bound.adjusted()) > LARGEST:
            raise UserError(
                f"A number at #{where} has the bound {bound:.6g}, beyond those of float64; leave it out."
            )
    value = tighter(bound for bound, _ in bounds)
    return value, any(is_open for bound, is_open in bounds if bound == value)


def _exact(bound: float) -> Decimal:
    """The decimal that was most likely written; above 2**53, exactly the float."""
    return Decimal(bound if abs(bound) >= 2**53 else str(bound))


def _places(bound: Decimal) -> int:
    exponent = bound.normalize(EXACT).as_tuple().exponent
    return max(0, -int(exponent))


def _steps(bound: Decimal, unit: Decimal, is_open: bool) -> int:
    """The first multiple of a unit that is within a lower bound.

    Args:
        bound: The bound.
        unit: The unit.
        is_open: Whether the multiple must be above the bound, not equal to it.

    Returns:
        The number of units.
    """
    quotient = EXACT.divide(bound, unit)
    if is_open:
        return int(quotient.to_integral_value(ROUND_FLOOR, EXACT)) + 1
    return int(quotient.to_integral_value(ROUND_CEILING, EXACT))


def _between(first: int, last: int | None, places: int) -> Language:
    """The decimals from ``first`` to ``last``.

    Args:
        first: The smallest, in units of the last place.
        last: The largest, in the same units.  Without it, decimals have at most DIGITS before the
            point, or more where ``first`` needs them.
        places: The digits after the point.
    """
    scale = 10**places
    if last is None:
        last = max(10**DIGITS, 10 ** (len(str(first // scale)) + 1)) * scale - 1
    if last < first:
        return Choice(())
    if not places:
        return _naturals(first, last)
    low = first // scale
    high = last // scale
    parts: list[Language] = []
    if low == high:
        return concat([text(str(low)), _fractions(first % scale, last % scale, places)])
    parts.append(concat([text(str(low)), _fractions(first % scale, scale - 1, places)]))
    if high - low > 1:
        parts.append(concat([_naturals(low + 1, high - 1), _fractions(0, scale - 1, places)]))
    parts.append(concat([text(str(high)), _fractions(0, last % scale, places)]))
    return choice(parts)


def _naturals(first: int, last: int) -> Language:
    """The whole numbers from ``first`` to ``last``, both at least 0, without leading zeros."""
    parts: list[Language] = []
    while first <= last:
        end = min(last, 10 ** len(str(first)) - 1)
        parts.append(_digits(str(first), str(end)))
        first = end + 1
    return choice(parts)


def _digits(first: str, last: str) -> Language:
    """The strings of digits from ``first`` to ``last``, which have the same length."""
    if not first:
        return EMPTY
    if first == "0" * len(first) and last == "9" * len(last):
        return Repeat(DIGIT, len(first), len(first))
    if first[0] == last[0]:
        return concat([text(first[0]), _digits(first[1:], last[1:])])
    rest = len(first) - 1
    low = int(first[0])
    high = int(last[0])
    parts: list[Language] = []
    if first[1:] != "0" * rest:
        parts.append(concat([text(first[0]), _digits(first[1:], "9" * rest)]))
        low += 1
    top = high if last[1:] == "9" * rest else high - 1
    if low <= top:
        parts.append(
            concat([Chars(((ord("0") + low, ord("0") + top),)), Repeat(DIGIT, rest, rest)])
        )
    if top < high:
        parts.append(concat([text(last[0]), _digits("0" * rest, last[1:])]))
    return choice(parts)


def _fractions(first: int, last: int, places: int) -> Language:
    """The fractions from ``first`` to ``last``.

    Zeros at the end may be left out; so may the whole fraction where it may be zero.

    Args:
        first: The smallest, in units of the last place.
        last: The largest, in the same units.
        places: The digits after the point.
    """
    parts: list[Language] = [EMPTY] if first == 0 else []
    for length in range(1, places + 1):
        scale = 10 ** (places - length)
        low = -(-first // scale)
        high = last // scale
        if low <= high:
            parts.append(concat([text("."), _digits(f"{low:0{length}d}", f"{high:0{length}d}")]))
    return choice(parts)


def _natural() -> Language:
    return choice(
        [text("0"), concat([Chars(((ord("1"), ord("9")),)), Repeat(DIGIT, 0, DIGITS - 1)])]
    )


def _fraction() -> Language:
    return concat([text("."), Repeat(DIGIT, 1, DIGITS)])


def _exponent() -> Language:
    sign = optional(chars([(ord("+"), ord("+")), (ord("-"), ord("-"))]))
    return concat([chars([(ord("E"), ord("E")), (ord("e"), ord("e"))]), sign, Repeat(DIGIT, 1, 2)])
