"""Checks what MLX computes on this machine, at the released shapes, against numpy in float64.

Neither weights nor golden outputs are needed: every check makes random inputs and its own reference
on the host.  At most 5 GB are held.  ``SECTIONS`` names the kinds of operations; each is a
generator of ``Result``.

    >>> [result.name for result in run() if not result.ok]
    []
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx

from mlx_diffgemma.diagnostics.operations.checks import ON_CPU, RELEASED, Checks, Result, Sizes
from mlx_diffgemma.diagnostics.operations.layers import attention, cache_writes, elementwise
from mlx_diffgemma.diagnostics.operations.products import experts, packed_products
from mlx_diffgemma.diagnostics.operations.sampling import ordering, sampling

# The exceptions that MLX raises without a kernel, and those that wrong values lead to.
FAILURES = (RuntimeError, ValueError, TypeError, IndexError)

SECTIONS: dict[str, Callable[[Checks], Iterator[Result]]] = {
    "ordering": ordering,
    "sampling": sampling,
    "elementwise": elementwise,
    "attention": attention,
    "packed products": packed_products,
    "experts": experts,
    "cache writes": cache_writes,
}


def default_sizes() -> Sizes:
    return ON_CPU if mx.default_device() == mx.cpu else RELEASED


def run(sizes: Sizes | None = None, progress: Callable[[str], None] | None = None) -> list[Result]:
    """Run all sections.  An operation that raises is a failed check.

    Args:
        sizes: The sizes of the inputs.  None: those for the default device.
        progress: Called with the name of each section before it runs.

    Returns:
        The results of all checks.
    """
    # On the CPU, MLX's products add up in the dtype of their inputs, so a check in 16 bits would
    # say nothing about a GPU.
    dtype = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    results: list[Result] = []
    for name, section in SECTIONS.items():
        if progress:
            progress(name)
        results += run_section(name, section, Checks(sizes or default_sizes(), dtype))
        mx.clear_cache()
    return results


def run_section(
    name: str, section: Callable[[Checks], Iterator[Result]], checks: Checks
) -> list[Result]:
    """Run a section.  An operation that raises ends it and adds a failed result.

    Args:
        name: The name of the section.
        section: Makes the results.
        checks: How results are compared.
    """
    checks.section = name
    results: list[Result] = []
    try:
        for result in section(checks):
            results.append(result)
    except FAILURES as error:
        after = f"after {results[-1].name!r}" if results else "at once"
        note = f"{after}: {type(error).__name__}: {error}"[:300]
        results.append(Result(name, "an operation failed", False, note=note))
    return results
