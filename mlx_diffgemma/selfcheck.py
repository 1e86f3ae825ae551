"""What MLX computes on this machine for the operations of this package, at the released shapes, against numpy in float64.

No weights are needed, and no golden outputs: every check makes random inputs and its own reference on the host.  At most
5 GB are held.  ``SECTIONS`` names the kinds of operations; each is a generator of ``Result``.

    >>> [result.name for result in run() if not result.ok]
    []
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_diffgemma import sampler
from mlx_diffgemma.config import LayerConfig, released_config
from mlx_diffgemma.layers import apply_rope, attend_in_turn, gated_gelu, rms_norm
from mlx_diffgemma.model import rope_table, soft_cap

# (mode, bits, group size) of everything that recipes and published conversions use.
MODES = (("affine", 4, 64), ("affine", 8, 64), ("affine", 4, 32), ("affine", 3, 64), ("affine", 2, 64), ("affine", 5, 64),
         ("affine", 6, 64), ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16))
EXPERT_MODES = (("affine", 4, 64), ("affine", 4, 32), ("affine", 8, 32), ("mxfp4", 4, 32), ("nvfp4", 4, 16))
PRODUCT = 1.5e-2  # of the largest value: what a product in 16 bits may be off
EXACT_PRODUCT = 1e-3  # the same in float32


@dataclass(frozen=True)
class Result:
    """One check: ``error`` relative to the largest value of the reference and the ``bound`` it is held against, where the
    check measures one; ``note`` what went wrong where it does not."""

    section: str
    name: str
    ok: bool
    error: float | None = None
    bound: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Sizes:
    """How large the inputs are.  ``compared`` rows of a large result are checked on the host."""

    vocabulary: int = 262_144
    length: int = 256
    hidden: int = 2816
    inner: int = 2112
    expert_inner: int = 704
    experts: int = 128
    compared: int = 12
    expert_rows: tuple[int, ...] = (64, 2048, 16_384, 32_800, 40_002)  # the last two: above 32,768, and no multiple of 64
    product_rows: tuple[int, ...] = (1, 5, 8, 12, 33, 256)  # on both sides of where MLX changes kernels
    attention: tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...] = (
        (256, 8, ((1, 1024), (2, 9), (8, 600), (256, 1279))),
        (512, 2, ((1, 700), (1, 4200), (8, 1200), (256, 1456))))


RELEASED = Sizes()
# The CPU has one kernel for every number of rows, and is slow: fewer rows tell as much there.
ON_CPU = Sizes(expert_rows=(64, 330), product_rows=(1, 8, 33), compared=8)
SMALL = Sizes(vocabulary=5000, length=16, hidden=128, inner=96, expert_inner=64, experts=4, compared=16, expert_rows=(64, 130),
              product_rows=(1, 9), attention=((64, 4, ((1, 40), (9, 33))), (128, 2, ((1, 50),))))


class Checks:
    """What every section is given: sizes, dtype, random numbers, and the two ways to judge."""

    def __init__(self, sizes: Sizes, dtype: mx.Dtype, seed: int = 0):
        self.sizes, self.dtype, self.section = sizes, dtype, ""
        self.rng = np.random.default_rng(seed)

    def normal(self, *shape: int, scale: float = 1.0) -> np.ndarray:
        return self.rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)

    def array(self, *shape: int, scale: float = 1.0) -> mx.array:
        """Normal numbers in the compute dtype."""
        return mx.array(self.normal(*shape, scale=scale)).astype(self.dtype)

    def equal(self, name: str, found: object, expected: object) -> Result:
        """That both arrays hold the same."""
        left, right = np.asarray(found), np.asarray(expected)
        same = left.shape == right.shape and bool(np.array_equal(left, right, equal_nan=left.dtype.kind == "f"))
        wrong = "" if same or left.shape != right.shape else f"{np.mean(left != right):.1%} of the entries differ"
        return Result(self.section, name, same, note=wrong or ("" if same else f"shape {left.shape} for {right.shape}"))

    def near(self, name: str, found: mx.array | np.ndarray, expected: np.ndarray, bound: float) -> Result:
        """That the largest difference is within ``bound`` of the largest value."""
        values = float64(found) if isinstance(found, mx.array) else np.asarray(found, dtype=np.float64)
        if values.shape != expected.shape:
            return Result(self.section, name, False, note=f"shape {values.shape} for {expected.shape}")
        error = float(np.abs(values - expected).max() / max(1e-9, np.abs(expected).max()))
        return Result(self.section, name, bool(error <= bound), error, bound)

    @property
    def product_bound(self) -> float:
        return EXACT_PRODUCT if self.dtype == mx.float32 else PRODUCT

    @property
    def sum_bound(self) -> float:
        """Of a float32 sum over the vocabulary, which the CPU backend adds up entry after entry."""
        return 1e-3 if self.dtype == mx.float32 else 1e-5

    def some(self, count: int) -> np.ndarray:
        """``compared`` of ``count`` rows, the first and the last among them."""
        chosen = np.linspace(0, count - 1, min(count, self.sizes.compared)).round().astype(int)
        found: np.ndarray = np.unique(chosen)
        return found


def float64(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32)).astype(np.float64)


def default_sizes() -> Sizes:
    return ON_CPU if mx.default_device() == mx.cpu else RELEASED


def run(sizes: Sizes | None = None, progress: Callable[[str], None] | None = None) -> list[Result]:
    """All sections; ``progress`` is told the name of each before it runs.  An operation that raises is a failed check."""
    # MLX's products on the CPU add up in the dtype of their inputs, which says nothing about a GPU.
    dtype = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    results = list[Result]()
    for name, section in SECTIONS.items():
        if progress:
            progress(name)
        results += run_section(name, section, Checks(sizes or default_sizes(), dtype))
        mx.clear_cache()
    return results


def run_section(name: str, section: Callable[[Checks], Iterator[Result]], checks: Checks) -> list[Result]:
    """The results of a section, and one more where an operation raised, which ends it."""
    checks.section = name
    results = list[Result]()
    try:
        for result in section(checks):
            results.append(result)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:  # of MLX without a kernel, or of wrong numbers
        after = f"after {results[-1].name!r}" if results else "at once"
        results.append(Result(name, "an operation failed", False, note=f"{after}: {type(error).__name__}: {error}"[:300]))
    return results


def ordering(checks: Checks) -> Iterator[Result]:
    """Maxima, sorts and what becomes of NaN and infinity."""
    size, length = checks.sizes.vocabulary, checks.sizes.length
    ties = np.zeros((2, size), dtype=np.float32)
    ties[0, [7, 9, size - 1]] = 5
    ties[1] = 1
    yield checks.equal("argmax takes the first of equals", mx.argmax(mx.array(ties), axis=-1), [7, 0])
    yield checks.equal("argmax of a mask takes the first True", mx.argmax(mx.array(ties > 0), axis=-1), [7, 0])
    entropies = np.repeat(checks.rng.permutation(length // 4).astype(np.float32), 4)[None]
    yield checks.equal("argsort is stable", mx.argsort(mx.array(entropies), axis=-1), np.argsort(entropies, kind="stable"))
    uncovered = checks.rng.random(length) > 0.5
    order = mx.argsort((~mx.array(uncovered)).astype(mx.uint8))
    yield checks.equal("argsort of a mask as uint8", order, np.argsort(~uncovered, kind="stable"))
    long = checks.normal(2, size)
    yield checks.equal("sort of the vocabulary", mx.sort(mx.array(long), axis=-1), np.sort(long))
    experts = checks.rng.integers(0, checks.sizes.experts, max(checks.sizes.expert_rows)).astype(np.uint32)
    yield checks.equal("argsort of expert numbers", mx.argsort(mx.array(experts)), np.argsort(experts, kind="stable"))
    capped = soft_cap(mx.array([1.0, mx.inf, -mx.inf, mx.nan]), mx.array(30.0))
    yield checks.equal("soft cap turns infinity into NaN", mx.isnan(capped), [False, True, True, True])
    yield checks.equal("maximum passes NaN on", mx.isnan(mx.maximum(mx.array([mx.nan]), 0.0)), [True])
    finite = mx.isfinite(mx.array([1.0, mx.nan, mx.inf]))
    yield checks.equal("isfinite sees NaN and infinity", finite, [True, False, False])


def sampling(checks: Checks) -> Iterator[Result]:
    """The sampler over the vocabulary."""
    size, length = checks.sizes.vocabulary, checks.sizes.length
    logits = checks.normal(1, length, size, scale=3.0)
    device, rows = mx.array(logits), checks.some(length)
    best = -np.sort(-logits[0, rows], axis=-1)[:, : sampler.KEPT]
    kept = mx.take_along_axis(device, sampler.largest(device, sampler.KEPT), axis=-1)
    yield checks.equal("the 64 largest of the vocabulary", -np.sort(-np.array(kept)[0, rows], axis=-1), best)
    host = logits[0, rows].astype(np.float64)
    host -= host.max(axis=-1, keepdims=True)
    exact = np.exp(host)
    total = exact.sum(axis=-1, keepdims=True)
    probabilities = mx.softmax(device, axis=-1)
    yield checks.near("softmax over the vocabulary", np.array(probabilities)[0, rows], exact / total, checks.sum_bound)
    sums = mx.logsumexp(device - mx.max(device, axis=-1, keepdims=True), axis=-1)
    yield checks.near("logsumexp over the vocabulary", np.array(sums)[0, rows], np.log(total[:, 0]), checks.sum_bound)
    u = checks.rng.random((1, length)).astype(np.float32)
    u[0, rows[:2]] = (0.0, 1 - 2.0**-24)
    tokens = np.array(sampler.inverse_cdf(probabilities, mx.array(u)))[0, rows]
    running = np.cumsum(exact, axis=-1) / total
    place = np.arange(len(rows))
    valid = (tokens >= 0) & (tokens < size)
    tokens = np.clip(tokens, 0, size - 1)
    below = np.where(tokens > 0, running[place, tokens - 1], 0)
    drawn = u[0, rows]
    inside = (drawn >= below - 2e-6) & (drawn <= running[place, tokens] + 2e-6)
    yield checks.equal("the drawn token's interval holds u", valid & inside, np.ones(len(rows), dtype=bool))
    entropy = np.abs(checks.normal(1, length))
    order = np.argsort(entropy[0], kind="stable")
    before = np.cumsum(entropy[0, order].astype(np.float64)) - entropy[0, order]
    bound = float(before[length // 2] + before[length // 2 + 1]) / 2
    accepted = np.zeros(length, dtype=bool)
    accepted[order] = before <= bound
    yield checks.equal("positions within the entropy bound", sampler.accept(mx.array(entropy), mx.array([bound]))[0], accepted)
    scores = checks.normal(length, checks.sizes.experts)
    few = min(8, checks.sizes.experts - 1)
    chosen = np.sort(np.array(mx.argpartition(-mx.array(scores), few - 1, axis=-1)[:, :few]), axis=-1)
    yield checks.equal("the router's experts", chosen, np.sort(np.argsort(-scores, axis=-1)[:, :few], axis=-1))
    moved = mx.put_along_axis(mx.arange(10, 10 + length), mx.array([3, 1]), mx.array([0, 1]), axis=0)
    yield checks.equal("put_along_axis of int32", moved[:4], [10, 1, 12, 0])


def elementwise(checks: Checks) -> Iterator[Result]:
    """Activation, norm and rotation, in each dtype."""
    sizes = checks.sizes
    for dtype in (mx.float32, mx.bfloat16, mx.float16):
        name, exact = str(dtype).removeprefix("mlx.core."), dtype == mx.float32
        gate, up = (mx.array(checks.normal(64, sizes.inner, scale=3.0)).astype(dtype) for _ in range(2))
        x = float64(gate)
        gelu = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) * float64(up)
        yield checks.near(f"gated GELU in {name}", gated_gelu(gate, up), gelu, 2e-6 if exact else 5e-3)
        rows, weight = mx.array(checks.normal(64, sizes.hidden)).astype(dtype), mx.array(checks.normal(sizes.hidden)).astype(dtype)
        host = float64(rows)
        normed = host / np.sqrt((host**2).mean(axis=-1, keepdims=True) + 1e-6)
        yield checks.near(f"norm in {name}", rms_norm(rows, weight, 1e-6), normed * float64(weight), 2e-6 if exact else 5e-3)
        yield checks.near(f"norm without weight in {name}", rms_norm(rows, None, 1e-6), normed, 2e-6 if exact else 5e-3)
    for layer in sorted(set(released_config().text.layers), key=lambda own: own.head_dim):
        yield from _rotation(checks, layer)


def _rotation(checks: Checks, layer: LayerConfig) -> Iterator[Result]:
    """The table of angles, and turning by one."""
    name, half = f"heads of {layer.head_dim}", layer.head_dim // 2
    positions = np.array([0, 1, 4095, 65_537, 262_143])
    pairs = np.arange(half)
    power = np.power(layer.rope_theta, ((2 * pairs).astype(np.float32) / np.float32(layer.head_dim)).astype(np.float64))
    frequencies = np.where(pairs < layer.rotated, np.float32(1) / power.astype(np.float32), np.float32(0))
    # The angle is a product of float32 numbers in the reference too.
    angles = (positions.astype(np.float32)[:, None] * frequencies.astype(np.float32)).astype(np.float64)
    cos, sin = (np.array(part).reshape(len(positions), -1)[:, -half:] for part in rope_table(mx.array(positions), layer))
    found, expected = np.stack((cos, sin), axis=1), np.stack((np.cos(angles), np.sin(angles)), axis=1)
    # A frequency that is off in its last bit turns position 4,095 by 5e-4 and position 262,143 by 3e-2.
    yield checks.near(f"angles of {name}, to position 4,095", found[:3], expected[:3], 5e-4)
    yield checks.near(f"angles of {name}, to position 262,143", found, expected, 4e-2)
    x = checks.normal(len(positions), 2, layer.head_dim)
    first, second = np.split(x.astype(np.float64), 2, axis=-1)
    cos64, sin64 = (part[:, None].astype(np.float64) for part in (cos, sin))
    turned = np.concatenate((first * cos64 - second * sin64, second * cos64 + first * sin64), axis=-1)
    found = apply_rope(mx.array(x), (mx.array(cos)[:, None], mx.array(sin)[:, None]))
    yield checks.near(f"rotation of {name}", found, turned, 2e-6)


def attention(checks: Checks) -> Iterator[Result]:
    """Attention in float32: one row and a few take MLX's vector kernels, many its matrix kernels."""
    for size, kv_heads, cases in checks.sizes.attention:
        for rows, keys in cases:
            q, k, v = (mx.array(checks.normal(1, heads, count, size, scale=0.3))
                       for heads, count in ((16, rows), (kv_heads, keys), (kv_heads, keys)))
            some = checks.some(rows)
            for kind in ("none", "causal", "a mask"):
                seen = checks.rng.random((rows, keys)) > 0.3
                mask = {"none": None, "causal": "causal" if rows > 1 else None, "a mask": mx.array(seen)}[kind]
                if kind == "causal":
                    seen = np.arange(keys)[None] <= np.arange(rows)[:, None] + keys - rows
                expected = _attention(q, k, v, None if kind == "none" else seen, some)
                found = np.array(attend_in_turn([(q, k, v, mask)]))[0][:, some]
                yield checks.near(f"attention, heads of {size}, {rows} rows, {keys} keys, mask: {kind}", found, expected, 2e-3)


def _attention(q: mx.array, k: mx.array, v: mx.array, seen: np.ndarray | None, some: np.ndarray) -> np.ndarray:
    """[heads, rows, size] of the rows ``some``, in float64 at scale 1."""
    keys, values = float64(k)[0], float64(v)[0]
    heads, size = q.shape[1], q.shape[3]
    # Query heads that share a key head are taken as further rows of it.
    shared = heads // k.shape[1] * len(some)
    queries = np.array(q)[0][:, some].astype(np.float64).reshape(-1, shared, size)
    scores = queries @ keys.transpose(0, 2, 1)
    if seen is not None:
        visible = np.broadcast_to(seen[some], (heads, len(some), seen.shape[1])).reshape(scores.shape)
        scores = np.where(visible, scores, -1e30)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    out: np.ndarray = weights / weights.sum(axis=-1, keepdims=True) @ values
    return out.reshape(heads, len(some), size)


def packed_products(checks: Checks) -> Iterator[Result]:
    """Packing, and both products with packed weights, for numbers of rows that take different kernels."""
    sizes = checks.sizes
    for mode, bits, group in MODES:
        name, options = f"{mode} {bits} bits, groups of {group}", {"group_size": group, "bits": bits, "mode": mode}
        weight = checks.array(sizes.expert_inner, sizes.hidden, scale=sizes.hidden**-0.5)
        packed = mx.quantize(weight, **options)
        dense = float64(mx.dequantize(*packed, **options))
        off = np.abs(dense - float64(weight)).max() / np.abs(float64(weight)).max()
        bound = 2.5 / 2**bits if mode == "affine" else 0.06 if bits == 8 else 0.25
        yield Result(checks.section, f"packing, {name}", bool(off < bound), float(off), bound)
        biases = packed[2] if len(packed) > 2 else None
        for rows in sizes.product_rows:
            x, y = checks.array(rows, sizes.hidden), checks.array(rows, sizes.expert_inner)
            found = mx.quantized_matmul(x, packed[0], packed[1], biases, transpose=True, **options)
            yield checks.near(f"product, {name}, {rows} rows", found, float64(x) @ dense.T, checks.product_bound)
            found = mx.quantized_matmul(y, packed[0], packed[1], biases, transpose=False, **options)
            yield checks.near(f"mean embedding, {name}, {rows} rows", found, float64(y) @ dense, checks.product_bound)


def experts(checks: Checks) -> Iterator[Result]:
    """The grouped products, sorted and not, for numbers of rows on both sides of 32,768 and no multiples of 64."""
    sizes = checks.sizes
    for rows in sizes.expert_rows:
        numbers = np.sort(checks.rng.integers(0, sizes.experts, rows)).astype(np.uint32)
        ends = np.arange(max(0, rows - 70), rows)  # the last tile is where a ragged number of rows shows
        some = np.unique(np.concatenate((np.arange(0, rows, max(1, rows // 100)), ends)))
        for inputs, outputs in ((sizes.hidden, 64), (sizes.expert_inner, 96), (96, 128)):
            x = checks.array(rows, 1, inputs)
            weight = checks.array(sizes.experts, outputs, inputs, scale=inputs**-0.5)
            chosen = float64(x[mx.array(some)])[:, 0]
            shape = f"{rows:,} rows of {inputs}"
            for ordered in (True, False) if rows <= 2048 else (True,):
                indices = mx.array(numbers)
                grouped = mx.gather_mm(x, weight.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=ordered)
                yield checks.near(f"experts, sorted {ordered}, {shape}", float64(grouped[mx.array(some)])[:, 0],
                                  _per_expert(chosen, weight, numbers[some]), checks.product_bound)
                for mode, bits, group in EXPERT_MODES:
                    if inputs % group:
                        continue
                    options = {"group_size": group, "bits": bits, "mode": mode}
                    packed = mx.quantize(weight, **options)
                    found = mx.gather_qmm(x, packed[0], packed[1], packed[2] if len(packed) > 2 else None, rhs_indices=indices,
                                          transpose=True, sorted_indices=ordered, **options)
                    expected = _per_expert(chosen, mx.dequantize(*packed, **options), numbers[some])
                    yield checks.near(f"packed experts, {mode} {bits} bits, groups of {group}, sorted {ordered}, {shape}",
                                      float64(found[mx.array(some)])[:, 0], expected, checks.product_bound)
            mx.clear_cache()


def _per_expert(x: np.ndarray, weight: mx.array, numbers: np.ndarray) -> np.ndarray:
    """[rows, outputs]: each row of ``x`` times its expert's matrix, in float64."""
    out = np.empty((len(x), weight.shape[1]))
    for expert in np.unique(numbers):
        rows = numbers == expert
        out[rows] = x[rows] @ float64(weight[int(expert)]).T
    return out


def cache_writes(checks: Checks) -> Iterator[Result]:
    """Writing at a position, into arrays with room left."""
    size = checks.sizes.attention[-1][0]
    for dtype in (mx.float32, mx.bfloat16):
        room = mx.zeros((1, 2, 2048, size), dtype=dtype)
        new = mx.array(checks.normal(1, 2, 256, size)).astype(dtype)
        mx.eval(room, new)
        expected = np.zeros(room.shape)
        for start in (0, 300, 1792):
            room = mx.slice_update(room, new, mx.array([start]), axes=[2])
            expected[:, :, start : start + 256] = float64(new)
        yield checks.equal(f"cache writes in {str(dtype).removeprefix('mlx.core.')}", float64(room), expected)


SECTIONS: dict[str, Callable[[Checks], Iterator[Result]]] = {
    "ordering": ordering, "sampling": sampling, "elementwise": elementwise, "attention": attention,
    "packed products": packed_products, "experts": experts, "cache writes": cache_writes}
