"""The draw contract, against an implementation of Philox4x64-10 written from the paper."""

import numpy as np
import pytest

from mlx_diffgemma.sampling.draws import Draws

MASK = 2**64 - 1


def philox4x64(counter: list[int], key: list[int]) -> list[int]:
    """Ten rounds, plain Python integers (Salmon et al. 2011, constants of Random123)."""
    c, k = list(counter), list(key)
    for round_ in range(10):
        if round_:
            k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
        low, high = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(high >> 64) ^ c[1] ^ k[0], high & MASK, (low >> 64) ^ c[3] ^ k[1], low & MASK]
    return c


@pytest.mark.parametrize(
    ("seed", "canvas", "retry", "step", "position"),
    [(0, 0, 0, 0, 0), (7, 3, 1, 47, 901), (2**64 - 5, 1, 0, 2, 64)],
)
def test_numbers_are_those_of_the_contract(seed, canvas, retry, step, position):
    words = philox4x64([position + 1, step, canvas, retry], [seed, 0])
    drawn = Draws(seed, 262_144).step(canvas, retry, step, position, 1)
    assert drawn.u[0] == np.float32(words[0] >> 40) * np.float32(2**-24)
    assert drawn.renoise[0] == (words[1] >> 32) * 262_144 >> 32
    assert drawn.initial[0] == (words[2] >> 32) * 262_144 >> 32


def test_first_numbers_of_seed_zero_never_change():
    drawn = Draws(0, 1024).step(0, 0, 0, 0, 3)
    assert drawn.u.tolist() == pytest.approx(
        [
            float(np.float32(x >> 40) * np.float32(2**-24))
            for x in (philox4x64([p, 0, 0, 0], [0, 0])[0] for p in (1, 2, 3))
        ],
        abs=0,
    )


def test_a_position_does_not_depend_on_where_the_canvas_begins():
    whole, tail = Draws(3, 500).step(1, 0, 5, 0, 64), Draws(3, 500).step(1, 0, 5, 40, 24)
    for name in ("u", "renoise", "initial"):
        np.testing.assert_array_equal(getattr(whole, name)[40:], getattr(tail, name))


def test_every_part_of_the_key_matters():
    base = Draws(1, 2**18).step(1, 1, 1, 0, 64).u
    for other in (
        Draws(2, 2**18).step(1, 1, 1, 0, 64),
        Draws(1, 2**18).step(2, 1, 1, 0, 64),
        Draws(1, 2**18).step(1, 2, 1, 0, 64),
        Draws(1, 2**18).step(1, 1, 2, 0, 64),
    ):
        assert not np.intersect1d(base, other.u).size


def test_ranges_and_uniformity():
    drawn = Draws(11, 10).step(0, 0, 0, 0, 200_000)
    assert drawn.u.dtype == np.float32
    assert drawn.u.min() >= 0
    assert drawn.u.max() < 1
    assert abs(drawn.u.mean() - 0.5) < 0.005
    counts = np.bincount(drawn.renoise, minlength=10)
    assert counts.size == 10, "ids stay inside the vocabulary"
    assert ((counts - 20_000) ** 2 / 20_000).sum() < 30  # chi-square, 9 degrees of freedom


def test_negative_and_huge_seeds_are_taken_modulo():
    assert (
        Draws(-1, 100).step(0, 0, 0, 0, 4).u.tolist()
        == Draws(2**64 - 1, 100).step(0, 0, 0, 0, 4).u.tolist()
    )
