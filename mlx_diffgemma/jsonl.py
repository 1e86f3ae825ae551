"""Files with one JSON object a line, whose mistakes are told with the line they are on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from mlx_diffgemma.errors import UserError

T = TypeVar("T")


def read_lines(path: Path, make: Callable[[Any], T]) -> Iterator[T]:
    """What ``make`` makes of each line that is not empty.

    Errors: UserError naming file and line, for what is no JSON and for what ``make`` refuses with one.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}).") from None
    # Not splitlines, which splits at characters that JSON allows inside of a text.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield make(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not valid JSON ({error}).") from None
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from None
