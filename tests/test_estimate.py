"""Against the tables the project keeps of the released model, and against itself."""

import json
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest

from drafter.projection import project
from mlx_diffgemma.device import compute_dtype
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.estimate import cost
from mlx_diffgemma.estimate import estimate as estimating
from mlx_diffgemma.estimate.estimate import CHIPS, chip_named, estimate, measure
from mlx_diffgemma.files import read_json
from mlx_diffgemma.model.config import released_config
from mlx_diffgemma.model.recipes import RECIPES
from tests.helpers.in_process import run

CONFIG = released_config()


@pytest.mark.parametrize(
    ("chip", "rate"),
    [
        ("M1 Max", 59),
        ("M3 Pro", 37),
        ("M3 Max", 81),
        ("M4 Max", 105),
        ("M3 Ultra", 188),
        ("M5 Pro", 146),
        ("M5 Max", 292),
    ],
)
def test_rates_at_twelve_steps(chip, rate):
    assert estimate(CONFIG, RECIPES["4bit"], CHIPS[chip], context=512).rates[12] == pytest.approx(
        rate, rel=0.02
    )


@pytest.mark.parametrize(
    ("chip", "milliseconds", "bound"),
    [
        ("M1 Max", 333, "compute"),
        ("M3 Pro", 538, "compute"),
        ("M3 Ultra", 105, "compute"),
        ("M5 Max", 68, "compute"),
    ],
)
def test_step(chip, milliseconds, bound):
    found = estimate(CONFIG, RECIPES["4bit"], CHIPS[chip], context=512)
    assert 1000 * found.step_seconds == pytest.approx(milliseconds, rel=0.015)
    assert found.bound_by == bound


def test_parameters_and_bytes():
    found = estimate(CONFIG, RECIPES["4bit"], CHIPS["M3 Max"], context=512)
    assert (found.parameters, found.active) == (
        pytest.approx(25.2e9, rel=0.003),
        pytest.approx(3.8e9, rel=0.015),
    )
    assert sum(found.bytes.values()) == pytest.approx(15.6e9, rel=0.02), (
        "practically every expert is read"
    )
    assert sum(found.flops.values()) == pytest.approx(2.08e12, rel=0.01)
    dense = estimate(CONFIG, RECIPES["4bit"], CHIPS["M3 Max"], context=512, sparse=False)
    assert sum(dense.flops.values()) == pytest.approx(2.46e12, rel=0.01)


def test_break_even_is_where_both_are_equally_fast():
    found = estimate(CONFIG, RECIPES["4bit"], CHIPS["M3 Max"], context=512)
    assert CONFIG.canvas_length / ((found.break_even + 1) * found.step_seconds) == pytest.approx(
        found.causal_rate
    )
    assert found.reported is None, "the report is of all weights at 4 bits"
    assert estimate(
        CONFIG, RECIPES["uniform-4bit"], CHIPS["M3 Max"], 512
    ).reported_break_even == pytest.approx(17, abs=1)


def test_no_report_exceeds_what_is_possible_at_most():
    for chip in (chip for chip in CHIPS.values() if chip.causal):
        for recipe, context in [(name, 512) for name in RECIPES] + [("uniform-4bit", 262_144)]:
            found = estimate(CONFIG, RECIPES[recipe], chip, context)
            assert found.reported is None or found.reported < found.causal_rate, (chip.name, recipe)
    assert estimate(CONFIG, RECIPES["uniform-4bit"], CHIPS["M5 Pro"], 512).reported == 85


def test_more_context_costs_more():
    short, long = (
        estimate(CONFIG, RECIPES["4bit"], CHIPS["M3 Max"], context) for context in (512, 131_072)
    )
    assert long.flops["scores"] > 20 * short.flops["scores"]
    assert long.memory - short.memory == pytest.approx(20_480 * (131_072 - 512))


def test_refusals():
    with pytest.raises(UserError, match="did you mean 'M3 Max'"):
        chip_named("M3 Maxx")
    assert chip_named("apple  m3 max") is CHIPS["M3 Max"]
    with pytest.raises(UserError, match="Unknown chip ''"):
        chip_named("")
    with pytest.raises(UserError, match="between 0 and 262,144"):
        estimate(CONFIG, RECIPES["4bit"], CHIPS["M3 Max"], 300_000)


def test_every_apple_chip_is_there():
    families = {f"M{number}{size}" for number in range(1, 6) for size in ("", " Pro", " Max")}
    assert families | {"M1 Ultra", "M2 Ultra", "M3 Ultra"} <= CHIPS.keys()


def test_every_chip_says_where_its_figures_come_from():
    for row in read_json(Path(estimating.__file__).with_name("chips.json"))["chips"]:
        for source in (row["bandwidth_source"], row["tflops_source"]):
            assert source["name"]
            assert source["url"].startswith("https://")
    for chip in CHIPS.values():
        assert chip.source
        assert chip.bandwidth > 1e10
        assert chip.flops > 1e12
        assert 0 < chip.flops_share <= 1


def test_measured_ceilings():
    found = measure()
    assert found.bandwidth > 1e8
    assert found.flops > 1e8
    assert found.bandwidth_share == found.flops_share == 1.0, "what was measured is reached"
    assert found.here


def test_memory_of_this_machine_is_in_its_own_dtype():
    """On a CPU scales, norms and cache are held in float32, on a chip that is named in 16 bits."""
    named = estimate(CONFIG, RECIPES["4bit"], CHIPS["M3 Max"], 512)
    here = estimate(CONFIG, RECIPES["4bit"], replace(CHIPS["M3 Max"], here=True), 512)
    assert (
        here.memory
        == cost.run_memory(CONFIG, RECIPES["4bit"], 512, compute_dtype(mx.bfloat16)).total
    )
    assert named.memory == cost.run_memory(CONFIG, RECIPES["4bit"], 512, mx.bfloat16).total
    assert cost.weight_bytes(CONFIG, RECIPES["4bit"], mx.float32) == pytest.approx(
        16.98e9, rel=0.001
    )


def test_the_command(monkeypatch, capsys):
    code, out, _ = run(
        monkeypatch, capsys, "estimate", "--chip", "M3 Max", "--context", "8192", "--recipe", "8bit"
    )
    assert code == 0
    assert "bound by compute" in out
    assert "this machine allows" not in out, (
        "another chip's need is no matter of this machine's memory"
    )
    assert "fits Macs with 36 GB and more" in out
    code, out, _ = run(
        monkeypatch, capsys, "estimate", "--chip", "M3 Max", "--model", "nano", "--json"
    )
    assert json.loads(out)["parameters"] == 2_331_388
    for words, message in (
        (["--chip", "M9"], "Unknown chip 'M9'"),
        (["--chip", "M1", "--measure"], "Either --chip or --measure"),
        (["--chip", "M1", "--recipe", "best"], "Unknown recipe"),
        ([], "not in the table"),
        (["--chip", "M1", "--context", "-1"], "between 0 and 262,144"),
        (["--macs", "--chip", "M1"], "goes with --model and --json alone"),
        (["--macs", "--context", "9"], "goes with --model and --json alone"),
        (["--batch-size", "2"], "belongs to --training"),
        (["--training", "--recipe", "4bit"], "needs no chip"),
    ):
        code, _, err = run(monkeypatch, capsys, "estimate", *words)
        assert code == 2
        assert message in err


class TestDrafting:
    """Projections from a record of `draft evaluate`."""

    @staticmethod
    def record(**drafter):
        reference = {"name": "reference", "steps": 4.0, "commits": 0.5}
        own = {
            "name": "drafter",
            "steps": 4.0,
            "longest_steps": 1.0,
            "passes": 0.0,
            "judged_passes": 0.0,
            "judged_rows": 0.0,
            "commits": 0.5,
        } | drafter
        causal = {"temperature": 0.0, "tokens": 40.0, "forwards": 40.0, "rows": 40.0}
        return {
            "ways": [reference, own],
            "ar": [causal | {"name": "plain"}, causal | {"name": "drafted", "forwards": 20.0}],
        }

    @staticmethod
    def of(record, chip="M3 Max"):
        return project(CONFIG, RECIPES["4bit"], CHIPS[chip], 512, record)

    def test_a_drafter_that_does_nothing_changes_nothing(self):
        found = self.of(self.record())
        assert found.drafted_as_all == found.drafted_as_longest == found.plain

    @pytest.mark.parametrize("chip", ["M1 Max", "M3 Max", "M5 Max"])
    def test_what_is_plain_is_what_estimate_says_without_a_record(self, chip):
        found, alone = (
            self.of(self.record(), chip),
            estimate(CONFIG, RECIPES["4bit"], CHIPS[chip], 512),
        )
        assert found.plain == alone.rates
        assert found.causal == alone.causal_rate

    def test_what_it_saves_and_costs(self):
        step = estimate(CONFIG, RECIPES["4bit"], CHIPS["M3 Max"], 512).step_seconds
        half = self.of(self.record(steps=2.0, longest_steps=0.25, commits=0.0))
        assert half.drafted_as_all[26] == pytest.approx(256 / (13 * step))
        assert half.drafted_as_longest[26] == pytest.approx(256 / (6.5 * step))
        passes = self.of(self.record(steps=2.0, passes=2.0, commits=0.0))
        assert 1 / passes.drafted_as_all[26] - 1 / half.drafted_as_all[26] == pytest.approx(
            2 * 0.16 * step / 256, rel=0.1
        )
        judged = self.of(self.record(steps=2.0, judged_passes=1.0, judged_rows=1.0, commits=0.0))
        assert 1 / judged.drafted_as_all[26] - 1 / half.drafted_as_all[26] == pytest.approx(
            step / 256, rel=0.05
        )
        short = self.of(self.record(steps=2.0, judged_passes=1.0, judged_rows=1 / 256, commits=0.0))
        floor = 1 / short.drafted_as_all[26] - 1 / half.drafted_as_all[26]
        assert floor == pytest.approx(1 / half.causal / 256, rel=0.05), (
            "a pass over one row takes as long as a token left to right"
        )
        assert 1.2 < half.causal_drafted / half.causal < 2.0

    def test_the_command_projects_a_drafting_record(self, monkeypatch, capsys, tmp_path):
        path = tmp_path / "drafting.json"
        path.write_text(json.dumps(self.record(steps=2.0)))
        code, out, _ = run(
            monkeypatch, capsys, "estimate", "--chip", "M3 Max", "--drafting", str(path)
        )
        assert (code, "projection, not measured" in out, "as its longest" in out) == (0, True, True)
        code, out, _ = run(
            monkeypatch, capsys, "estimate", "--chip", "M3 Max", "--drafting", str(path), "--json"
        )
        assert (
            json.loads(out)["projection"]["drafted_as_all"]["26"]
            > json.loads(out)["projection"]["plain"]["26"]
        )
        path.write_text("{}")
        for options, message in (
            (["--drafting", str(path)], "no record of"),
            (["--drafting", str(tmp_path / "x.json")], "x.json"),
            (["--drafting", str(path), "--dense"], "leave --training and --dense out"),
        ):
            code, out, err = run(monkeypatch, capsys, "estimate", "--chip", "M3 Max", *options)
            assert (code, out, message in err) == (2, "", True), err


def test_a_short_canvas_does_not_reach_every_expert():
    """Eight positions that take 8 of 128 each, were routing even."""
    short, recipe = replace(CONFIG, canvas_length=8), RECIPES["4bit"]
    read = estimate(short, recipe, CHIPS["M4 Max"], context=512).bytes["experts"]
    every = cost.class_bytes(short, recipe)["experts"]
    assert read == pytest.approx(every * (1 - (1 - 8 / 128) ** 8))
