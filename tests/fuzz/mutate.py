"""Random changes of JSON values and of bytes, towards what breaks readers."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from random import Random
from typing import Any

NASTY: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    7,
    2**31,
    2**53 + 1,
    2**63,
    2**64,
    -(2**70),
    10**12,
    10**400,
    0.5,
    -0.0,
    2.5,
    1e-5,
    1e308,
    float("inf"),
    float("-inf"),
    float("nan"),
    "",
    "x",
    "0",
    "1e-5",
    "true",
    "null",
    "../x",
    "/etc/passwd",
    "~",
    "\x00",
    "\x1f",
    "é",
    "\ud800",
    "\ufffd",
    "<eos>",
    "<|turn>",
    "<|image|>",
    "a" * 5000,
    [],
    [[]],
    [None],
    [1, "a"],
    {},
    {"": {}},
    {"a": None},
)
RAW = (  # written into JSON as it is
    "9" * 5000,
    "1e99999",
    "-",
    "NaN",
    "[" * 3000,
    '{"a":' * 2000,
    "tru",
    '"\\ud800"',
    '"\\u0000"',
    "\x00",
    "'x'",
    "{}}",
    "",
)
BYTES = (
    b"",
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\xe9",
    b"\r\n",
    b"\n" * 50,
    b"\x00" * 64,
    b"{",
    b"}",
    b"\xed\xa0\x80",
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of everything inside ``value``, its own included."""
    yield path
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, below in inner:
        yield from places(below, (*path, key))


def changed(rng: Random, value: Any) -> Any:
    """A copy of ``value`` with one or several changes at random places."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        *path, last = rng.choice(list(places(value))) or (None,)
        if last is None:
            return _nasty(rng) if rng.random() < 0.3 else value
        target = value
        for key in path:
            target = target[key]
        _change(rng, target, last)
    return value


def _nasty(rng: Random) -> Any:
    """A copy, since a later change may change what is inside."""
    return copy.deepcopy(rng.choice(NASTY))


def _change(rng: Random, target: Any, key: Any) -> None:
    kind = rng.random()
    if kind < 0.7:
        target[key] = _nasty(rng)
    elif kind < 0.8:
        del target[key]
    elif kind < 0.9 and isinstance(target, dict):
        target[rng.choice(("extra", "", "model", "type", str(key) + "_"))] = _nasty(rng)
    elif isinstance(target[key], int | float) and not isinstance(target[key], bool):
        target[key] = rng.choice(
            (target[key] * 10, -target[key], target[key] + 1, target[key] // 3, str(target[key]))
        )
    else:
        target[key] = [target[key]]


def json_text(rng: Random, value: Any) -> bytes:
    """JSON of a changed ``value``, now and then with a change that only its text can have."""
    text = json.dumps(changed(rng, value))
    if rng.random() < 0.15:
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(RAW) + text[at + rng.choice((0, 1, 5)) :]
    content = text.encode("utf-8", "surrogatepass")
    return some_bytes(rng, content) if rng.random() < 0.1 else content


def some_bytes(rng: Random, content: bytes) -> bytes:
    """``content`` cut, flipped, doubled or with something inserted."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(content) + 1)
        content = rng.choice(
            (
                content[:at],
                content[:at] + rng.choice(BYTES) + content[at:],
                content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :],
                content[:at] + content[at : at + 20] * 2 + content[at:],
            )
        )
    return content
