"""Against the tables the project keeps of the released model, and against itself."""

import json

import pytest

from mlx_diffgemma.config import released_config
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.estimate import CHIPS, chip_named, estimate, measure
from mlx_diffgemma.recipes import RECIPES
from tests.test_cli import run

CONFIG = released_config()


@pytest.mark.parametrize(("chip", "rate"), [("M1 Max", 59), ("M3 Pro", 37), ("M3 Max", 81), ("M4 Max", 105), ("M3 Ultra", 188),
                                            ("M5 Pro", 146), ("M5 Max", 292)])
def test_rates_at_twelve_steps(chip, rate):
    assert estimate(CONFIG, RECIPES["4bit"], CHIPS[chip], context=512).rates[12] == pytest.approx(rate, rel=0.02)


@pytest.mark.parametrize(("chip", "milliseconds", "bound"), [("M1 Max", 333, "compute"), ("M3 Pro", 538, "compute"),
                                                             ("M3 Ultra", 105, "compute"), ("M5 Max", 68, "compute")])
def test_step(chip, milliseconds, bound):
    found = estimate(CONFIG, RECIPES["4bit"], CHIPS[chip], context=512)
    assert 1000 * found.step_seconds == pytest.approx(milliseconds, rel=0.015)
    assert found.bound_by == bound


def test_parameters_and_bytes():
    found = estimate(CONFIG, RECIPES["4bit"], CHIPS["M3 Max"], context=512)
    assert (found.parameters, found.active) == (pytest.approx(25.2e9, rel=0.003), pytest.approx(3.8e9, rel=0.015))
    assert sum(found.bytes.values()) == pytest.approx(15.6e9, rel=0.02), "practically every expert is read"
    assert sum(found.flops.values()) == pytest.approx(2.08e12, rel=0.01)
    dense = estimate(CONFIG, RECIPES["4bit"], CHIPS["M3 Max"], context=512, sparse=False)
    assert sum(dense.flops.values()) == pytest.approx(2.46e12, rel=0.01)


def test_break_even_is_where_both_are_equally_fast():
    found = estimate(CONFIG, RECIPES["4bit"], CHIPS["M3 Max"], context=512)
    assert CONFIG.canvas_length / ((found.break_even + 1) * found.step_seconds) == pytest.approx(found.causal_rate)
    assert found.reported_break_even == pytest.approx(17, abs=1)


def test_more_context_costs_more():
    short, long = (estimate(CONFIG, RECIPES["4bit"], CHIPS["M3 Max"], context) for context in (512, 131_072))
    assert long.flops["scores"] > 20 * short.flops["scores"]
    assert long.memory - short.memory == pytest.approx(20_480 * (131_072 - 512))


def test_refusals():
    with pytest.raises(UserError, match="did you mean 'M3 Max'"):
        chip_named("M3 Maxx")
    assert chip_named("apple m3 max") is CHIPS["M3 Max"]
    with pytest.raises(UserError, match="between 0 and 262,144"):
        estimate(CONFIG, RECIPES["4bit"], CHIPS["M3 Max"], 300_000)


def test_every_chip_says_where_its_figures_come_from():
    for chip in CHIPS.values():
        assert chip.source
        assert chip.bandwidth > 1e10
        assert chip.flops > 1e12
        assert 0 < chip.flops_share <= 1


def test_measured_ceilings():
    found = measure()
    assert found.bandwidth > 1e8
    assert found.flops > 1e8


def test_the_command(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "estimate", "--chip", "M3 Max", "--context", "8192", "--recipe", "8bit")
    assert code == 0
    assert "bound by compute" in out
    code, out, _ = run(monkeypatch, capsys, "estimate", "--chip", "M3 Max", "--model", "nano", "--json")
    assert json.loads(out)["parameters"] == 2_331_388
    for words, message in ((["--chip", "M9"], "Unknown chip 'M9'"), (["--chip", "M1", "--measure"], "Either --chip or --measure"),
                           (["--chip", "M1", "--recipe", "best"], "Unknown recipe"), ([], "not in the table")):
        code, _, err = run(monkeypatch, capsys, "estimate", *words)
        assert code == 2
        assert message in err
