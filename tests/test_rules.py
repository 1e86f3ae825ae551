"""Named rules: what each does to a canvas, and that none changes anything while it is off."""

import itertools
import json
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest

from mlx_diffgemma import GenerationWarning, batch_generate, stream_generate
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.generation.options import GenerationOptions
from mlx_diffgemma.model.generation_config import GenerationConfig
from mlx_diffgemma.sampling.draws import Draws
from mlx_diffgemma.sampling.policy import ReferencePolicy
from mlx_diffgemma.sampling.rules import PRESETS, ConfidencePolicy, RulesPolicy
from mlx_diffgemma.sampling.sampler import reveal
from mlx_diffgemma.sampling.stopping import StopContext
from tests.helpers.in_process import run as command
from tests.helpers.ruled import NUMBERS, plain, run, session
from tests.helpers.sessions import PROMPTS, UNSURE, Scripted, certain

LOOSE = NUMBERS | {
    "entropy_bound": 1e3,
    "max_steps": 3,
}  # accepts what it draws, so that a draw shows
MANY_ENDS = tuple(range(1, 301, 9))  # so that random weights come upon one


def rules(kind=RulesPolicy, **changes):
    return kind(**NUMBERS | changes)


def context(entropies, stop=False, ends=(), retry=0, length=64, canvas_index=0):
    return StopContext(
        canvas_index, retry, length, stop, entropies, ends or [length] * len(entropies)
    )


def test_without_a_rule_it_is_the_reference(tiny):
    reference = run(tiny, session(tiny, 1, ReferencePolicy(**NUMBERS)))[0]
    assert plain(run(tiny, session(tiny, 1, rules()))[0]) == plain(reference)


VARIANTS = [
    rules(drop_tail=1),
    rules(length="growing"),
    rules(length=10, stability=2),
    rules(ConfidencePolicy, threshold=0.05),
    ReferencePolicy(**NUMBERS),
    rules(retry_unconverged=1),
    rules(drop_tail=1, coverage=0.9),
    *(
        ReferencePolicy(**LOOSE, **options)
        for options in (
            {},
            {"temperature": 0.0},
            {"top_k": 3},
            {"top_k": 90, "top_p": 0.9},
            {"min_p": 0.2},
        )
    ),
]


def test_rows_of_a_batch_equal_the_same_rows_alone_whatever_their_rules(tiny):
    """Canvases of different lengths, classes and attempts in one forward."""

    def sessions():
        return [
            session(tiny, index % 4, policy, eos=MANY_ENDS if policy.name == "rules" else (1,))
            for index, policy in enumerate(VARIANTS)
        ]

    together = run(tiny, *sessions())
    assert len({step.argmax.size for steps in together for step in steps}) >= 4
    for one, expected in zip(sessions(), together):
        assert plain(run(tiny, one)[0]) == plain(expected)


def test_a_dense_row_covers_nothing_beside_a_sparse_one():
    numbers = ReferencePolicy.numbers(
        [ReferencePolicy(**NUMBERS), ReferencePolicy(**NUMBERS, coverage=0.9)], [0, 0]
    )
    assert numbers.tail.tolist() == pytest.approx([-1.0, 0.1], abs=1e-6)


class TestStop:
    def test_not_before_the_first_steps_asked_for(self):
        assert rules(min_steps=3).stop_reason(context([0.0] * 2, stop=True)) is None
        assert rules(min_steps=3).stop_reason(context([0.0] * 3, stop=True)) == "converged"

    def test_plateau_counts_from_the_lowest_entropy(self):
        policy = rules(plateau=2)
        assert policy.stop_reason(context([3.0, 1.0, 2.0])) is None
        assert policy.stop_reason(context([3.0, 1.0, 2.0, 1.5])) == "plateau"
        assert policy.stop_reason(context([3.0, 2.0, 1.0, 0.9])) is None
        assert policy.stop_reason(context([3.0, 1.0, 2.0, 1.5], stop=True)) == "converged"

    def test_a_plateau_did_not_converge(self, tiny):
        s = session(tiny, 0, rules(plateau=2), max_tokens=24)
        (steps,) = run(Scripted(tiny, [UNSURE] * 3), s)
        assert (s.canvases[0].steps, s.canvases[0].converged, steps[-1].certificate) == (
            3,
            False,
            None,
        )

    def test_without_stability_entropy_alone_stops(self, tiny):
        s = session(tiny, 0, rules(stability=0), max_tokens=24)
        (steps,) = run(Scripted(tiny, [certain(9)]), s)
        assert (len(steps), steps[-1].certificate) == (1, "confident")

    def test_a_cap_moves_the_temperatures_unless_they_have_their_own_steps(self):
        assert rules(max_steps=2).schedule(1) == pytest.approx(0.6)
        assert rules(max_steps=2, temperature_steps=8).schedule(1) == pytest.approx(0.75)
        assert rules(max_steps=8, temperature_steps=2).schedule(5) == pytest.approx(0.4), (
            "the lowest, once it is reached"
        )


class TestDroppedTail:
    @staticmethod
    def ending(at, token=9):
        logits = certain(token)
        logits[0, at:] = np.eye(301)[1] * 60.0
        return logits

    def test_positions_after_a_stable_end_leave(self, tiny, monkeypatch):
        sizes, real = [], Scripted.denoise
        monkeypatch.setattr(
            Scripted,
            "denoise",
            lambda self, canvas, *rest, **options: (
                sizes.append(canvas.size) or real(self, canvas, *rest, **options)
            ),
        )
        unsure = self.ending(4) * 0.05  # the argmax stands but nothing is certain
        s = session(tiny, 0, rules(drop_tail=2), max_tokens=24)
        run(Scripted(tiny, [unsure, unsure, unsure, self.ending(4)]), s)
        assert sizes == [24, 24, 6, 6], "the end at 4 in parts of 3 positions"
        assert s.canvases[0].tokens.tolist() == [9] * 4 + [1]
        assert (s.canvases[0].rows, s.canvases[0].steps) == (60, 4)

    def test_they_count_as_certain(self, tiny):
        flat = self.ending(4) * 0.05
        s = session(tiny, 0, rules(drop_tail=1), max_tokens=24)
        (steps,) = run(Scripted(tiny, [flat] * 6), s)
        assert steps[1].mean_entropy == pytest.approx(steps[1].entropy.sum().item() / 24, rel=1e-5)

    def test_an_end_that_moves_drops_nothing(self):
        policy = rules(drop_tail=2)
        assert policy.trim_to(context([1, 1], ends=[9, 8]), 64) == 64
        assert policy.trim_to(context([1, 1], ends=[9, 9]), 64) == 16
        assert policy.trim_to(context([1, 1], ends=[8, 8]), 64) == 16, "the end itself stays"
        assert policy.trim_to(context([1, 1], ends=[64, 64]), 64) == 64
        assert policy.trim_to(context([1], ends=[9]), 64) == 64
        assert policy.trim_to(context([1, 1], ends=[63, 63]), 64) == 64

    def test_an_end_that_vanishes_leaves_a_short_canvas_and_the_answer_goes_on(self, tiny):
        s = session(tiny, 0, rules(drop_tail=1), max_tokens=30)
        run(Scripted(tiny, [self.ending(4)] + [certain(9)] * 6), s)
        assert [c.tokens.size for c in s.canvases] == [6, 24]
        assert s.start == 30


class TestLength:
    def test_growing(self):
        assert [rules(length="growing").canvas_length(i, 999, 64) for i in range(4)] == [
            16,
            32,
            64,
            64,
        ]

    def test_fitting(self):
        assert [rules(length="fitting").canvas_length(0, n, 64) for n in (3, 8, 9, 70)] == [
            8,
            8,
            16,
            64,
        ]

    def test_a_number(self, tiny):
        s = session(tiny, 0, rules(length=10), max_tokens=25, eos=())
        run(tiny, s)
        assert [c.tokens.size for c in s.canvases] == [10, 10, 10]
        assert s.cache.length == len(PROMPTS[0]) + 20

    def test_fitting_counts_what_is_left(self, tiny):
        s = session(tiny, 0, rules(length="fitting"), max_tokens=28, eos=())
        run(tiny, s)
        assert [c.tokens.size for c in s.canvases] == [24, 6]

    @pytest.mark.parametrize("length", ["growing", 10, 7])
    def test_never_past_the_context(self, tiny, length):
        s = session(tiny, 0, rules(length=length, max_steps=1), max_tokens=24, eos=())
        room = len(PROMPTS[0]) + 24
        s.text_config = replace(s.text_config, max_position_embeddings=room)
        run(tiny, s)
        assert len(s.ids) == room

    def test_positions_draw_the_same_numbers_in_any_canvas(self, tiny):
        """The seed of position 12 does not depend on where canvases begin, but for the canvas
        index.
        """
        whole, short = (
            policy.initial_canvas(Draws(0, 301), 0, 0, 0, n)
            for policy, n in ((rules(), 24), (rules(length=10), 10))
        )
        assert whole[:10].tolist() == short.tolist()


class Counting(Draws):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        object.__setattr__(self, "keys", [])

    def step(self, canvas_index, retry, step, start, length):
        self.keys.append((canvas_index, retry, step))
        return super().step(canvas_index, retry, step, start, length)


class TestRetries:
    def test_an_unconverged_canvas_is_tried_again_with_other_draws(self, tiny):
        draws = Counting(0, 301)
        s = session(tiny, 0, rules(max_steps=2, retry_unconverged=3), max_tokens=24, draws=draws)
        (steps,) = run(Scripted(tiny, [UNSURE, UNSURE, certain(9), certain(9)]), s)
        assert [(x.retry, x.step, x.reason, x.rejected) for x in steps] == [
            (0, 0, None, False),
            (0, 1, "max_steps", True),
            (1, 0, None, False),
            (1, 1, "converged", False),
        ]
        seeded = [(0, 0, 0), (0, 1, 0)]  # once to begin an attempt, then by each step
        assert draws.keys == [seeded[0], (0, 0, 0), (0, 0, 1), seeded[1], (0, 1, 0), (0, 1, 1)]
        canvas = s.canvases[0]
        assert (canvas.steps, canvas.retries, canvas.converged, canvas.rows) == (4, 1, True, 96)

    def test_another_attempt_knows_nothing_of_the_one_before(self, tiny, monkeypatch):
        signals, real = [], type(tiny).denoise

        def denoise(self, canvas, caches, signal=None, **options):
            signals.append(signal is not None)
            return real(self, canvas, caches, signal, **options)

        monkeypatch.setattr(type(tiny), "denoise", denoise)
        s = session(tiny, 0, rules(max_steps=2, retry_unconverged=1, stability=9), max_tokens=24)
        run(tiny, s)
        assert signals == [False, True, False, True]

    def test_if_none_converges_the_most_certain_attempt_is_committed(self, tiny):
        def unsure(token, scale):
            return certain(token) / 60.0 * scale

        s = session(tiny, 0, rules(max_steps=1, retry_unconverged=2), max_tokens=24)
        (steps,) = run(Scripted(tiny, [unsure(5, 1.0), unsure(6, 3.0), unsure(7, 2.0)]), s)
        assert s.canvases[0].tokens.tolist() == [6] * 24
        assert steps[-1].argmax.tolist() == [6] * 24, "what leaves the loop is what is committed"
        assert (steps[-1].retry, steps[-1].committed, [step.committed for step in steps[:-1]]) == (
            2,
            True,
            [False, False],
        )
        assert (s.canvases[0].converged, s.canvases[0].retries) == (False, 2)

    def test_an_empty_first_canvas_is_tried_again(self, tiny):
        s = session(tiny, 0, rules(reroll_empty=1), max_tokens=24)
        run(Scripted(tiny, [certain(1), certain(1), certain(9), certain(9)]), s)
        assert (s.canvases[0].tokens[0], s.canvases[0].retries, s.canvases[0].converged) == (
            9,
            1,
            True,
        )

    def test_an_empty_attempt_does_not_come_back(self, tiny):
        """Though it was the more certain one."""
        s = session(tiny, 0, rules(max_steps=1, reroll_empty=1), max_tokens=24)
        run(Scripted(tiny, [certain(1) / 60.0 * 3.0, certain(9) / 60.0]), s)
        assert s.canvases[0].tokens.tolist() == [9] * 24

    def test_and_accepted_when_it_stays_empty(self, tiny):
        s = session(tiny, 0, rules(reroll_empty=1), max_tokens=24)
        run(Scripted(tiny, [certain(1)] * 4), s)
        assert s.canvases[0].tokens.tolist() == [1]

    def test_a_later_canvas_may_be_empty(self, tiny):
        s = session(tiny, 0, rules(reroll_empty=1), max_tokens=48)
        run(Scripted(tiny, [certain(9), certain(9), certain(1), certain(1)]), s)
        assert [c.retries for c in s.canvases] == [0, 0]

    def test_each_canvas_counts_its_own(self, tiny):
        s = session(tiny, 0, rules(max_steps=1, retry_unconverged=1, stability=0), max_tokens=48)
        run(Scripted(tiny, [UNSURE, certain(9), certain(9)]), s)
        assert [(c.steps, c.rows, c.retries) for c in s.canvases] == [(2, 48, 1), (1, 24, 0)]

    @pytest.mark.slow
    def test_answers_are_put_together_from_what_was_committed(self, nano_pair):
        prompt, options = (
            "Tell me a story about Leo the owl and a map.",
            {"max_denoising_steps": 5, "retry_unconverged": 2},
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GenerationWarning)
            parts = list(stream_generate(*nano_pair, prompt, 128, seed=0, **options))
            (whole,) = batch_generate(*nano_pair, [prompt], max_tokens=128, seed=0, **options)
        assert len(parts) == len(whole.parts) == 2
        assert [(p.steps, p.rows, p.retries, p.converged) for p in parts] == [
            (15, 15 * 64, 2, False)
        ] * 2
        assert (whole.steps, whole.rows, whole.retries) == (30, 30 * 64, 4)
        assert "".join(p.text for p in parts) == whole.text

    def test_the_prompt_is_not_encoded_again(self, tiny):
        s = session(tiny, 0, rules(max_steps=1, retry_unconverged=2), max_tokens=24)
        run(tiny, s)
        assert s.cache.length == len(PROMPTS[0])


class TestConfidence:
    def test_reveal(self):
        p, none = mx.array([[0.2, 0.95, 0.9, 0.5]]), mx.zeros((1, 4), dtype=mx.bool_)
        assert reveal(p, none, mx.array([0.9])).tolist() == [[False, True, True, False]]
        assert reveal(p, none, mx.array([0.99])).tolist() == [[False, True, False, False]], (
            "the most probable at least"
        )
        assert reveal(p, mx.array([[False, True, False, False]]), mx.array([0.9])).tolist() == [
            [False, False, True, False]
        ]
        assert reveal(p, mx.ones((1, 4), dtype=mx.bool_), mx.array([0.1])).tolist() == [[False] * 4]
        assert reveal(mx.ones((1, 3)) / 2, none[:, :3], mx.array([0.9])).tolist() == [
            [True, False, False]
        ], "one of equals"

    def test_what_is_accepted_stays(self, tiny):
        (steps,) = run(
            tiny,
            session(tiny, 1, rules(ConfidencePolicy, max_steps=12, threshold=0.999), max_tokens=24),
        )
        assert len(steps) > 3
        for before, after in itertools.pairwise(steps):
            accepted = np.array(before.accepted)
            assert np.array(after.accepted)[accepted].all()
            assert (np.array(after.canvas)[accepted] == np.array(before.canvas)[accepted]).all()
            assert np.array(after.accepted).sum() > accepted.sum()

    def test_all_accepted_ends_the_canvas(self, tiny):
        s = session(
            tiny, 0, rules(ConfidencePolicy, confidence_threshold=1e-9, stability=3), max_tokens=24
        )
        run(Scripted(tiny, [certain(9)] * 3), s)
        assert (s.canvases[0].steps, s.canvases[0].converged) == (1, True)


@pytest.mark.parametrize(
    "changes",
    [
        {"min_steps": 0},
        {"min_steps": 7},
        {"temperature_steps": 0},
        {"plateau": -1},
        {"drop_tail": -1},
        {"drop_tail": 1.5},
        {"plateau": "2"},
        {"length": 8.0},
        {"length": 0},
        {"t_min": 0.0, "temperature_steps": 2},
        {"length": "short"},
        {"reroll_empty": -1},
        {"retry_unconverged": -1},
    ],
)
def test_numbers_out_of_range_are_refused(changes):
    with pytest.raises(UserError):
        rules(**changes)


@pytest.mark.parametrize("threshold", [0.0, 1.1])
def test_thresholds_out_of_range_are_refused(threshold):
    with pytest.raises(UserError):
        rules(ConfidencePolicy, threshold=threshold)


class TestOptions:
    def test_the_default_is_the_reference(self, tiny):
        assert type(GenerationOptions().policy(tiny)) is ReferencePolicy
        assert type(GenerationOptions(preset="reference").policy(tiny)) is ReferencePolicy

    @pytest.mark.parametrize("name", PRESETS)
    def test_an_option_overrides_the_preset(self, tiny, name):
        policy = GenerationOptions(preset=name, confidence_threshold=0.123, temperature=0.5).policy(
            tiny
        )
        assert (policy.confidence_threshold, policy.temperature) == (0.123, 0.5)

    def test_dense_overrides_the_coverage_of_a_preset(self, tiny, monkeypatch):
        monkeypatch.setitem(PRESETS, "fast", {"coverage": 0.9})
        assert GenerationOptions(preset="fast").policy(tiny).coverage == 0.9
        assert (
            GenerationOptions(preset="fast", self_conditioning="dense").policy(tiny).coverage
            is None
        )

    def test_every_rule_has_an_option(self, tiny):
        policy = GenerationOptions(
            diffusion_sampler="confidence-threshold",
            threshold=0.7,
            min_denoising_steps=2,
            temperature_steps=9,
            plateau=3,
            drop_tail=2,
            canvas_length=8,
            reroll_empty=1,
            retry_unconverged=4,
        ).policy(tiny)
        assert type(policy) is ConfidencePolicy
        assert (
            policy.threshold,
            policy.min_steps,
            policy.temperature_steps,
            policy.plateau,
            policy.drop_tail,
            policy.length,
            policy.reroll_empty,
            policy.retry_unconverged,
        ) == (0.7, 2, 9, 3, 2, 8, 1, 4)

    @pytest.mark.parametrize(
        ("options", "word"),
        [
            ({"threshold": 0.5}, "confidence-threshold"),
            ({"preset": "quick"}, "reference"),
            ({"diffusion_sampler": "best"}, "entropy-bound"),
            ({"mode": "ar", "preset": "fast"}, "preset"),
            ({"diffusion_sampler": "confidence-threshold", "entropy_bound": 0.1}, "entropy_bound"),
            ({"mode": "ar", "drop_tail": 1}, "drop_tail"),
            ({"canvas_length": "abc"}, "growing"),
            ({"plateau": -1}, "plateau"),
            ({"threshold": 2.0, "diffusion_sampler": "confidence-threshold"}, "threshold"),
            ({"max_denoising_steps": 0}, "max_den"),
            ({"t_max": -0.2}, "t_max"),
        ],
    )
    def test_contradictions_are_refused(self, options, word):
        with pytest.raises(UserError, match=word):
            GenerationOptions(**options)

    def test_a_zero_goes_before_a_preset(self, tiny):
        for preset, options in PRESETS.items():
            for name in (
                name for name, value in options.items() if isinstance(value, int) and value
            ):
                assert (
                    getattr(GenerationOptions(preset=preset, **{name: 0}).policy(tiny), name) == 0
                )
            assert GenerationOptions(preset=preset, temperature=0.0).policy(tiny).temperature == 0
        assert GenerationOptions(preset="fast", drop_tail=0).policy(tiny).drop_tail == 0

    def test_numbers_that_fit_other_checkpoints_are_not_refused(self, tiny):
        """Only where they meet a checkpoint's own, which are 48 steps from 0.8 to 0.4."""
        steps, cold, hot = (
            GenerationOptions(**own)
            for own in ({"min_denoising_steps": 60}, {"t_max": 0.2}, {"t_min": 0.9})
        )
        for options, word in (
            (steps, "min_denoising_steps 60 exceeds"),
            (cold, "t_m"),
            (hot, "t_m"),
        ):
            with pytest.raises(UserError, match=word):
                options.policy(tiny)
        other = SimpleNamespace(
            config=SimpleNamespace(
                canvas_length=24,
                generation=GenerationConfig(max_denoising_steps=60, t_min=0.1, t_max=1.0),
            )
        )
        assert steps.policy(other).min_steps == 60
        assert (cold.policy(other).t_max, hot.policy(other).t_min) == (0.2, 0.9)

    def test_a_policy_decides_alone(self, nano_pair):
        policy = GenerationOptions().policy(nano_pair[0])
        for call in (
            lambda **o: list(stream_generate(*nano_pair, "fox", policy=policy, **o)),
            lambda **o: batch_generate(*nano_pair, ["fox"], policy=policy, **o),
        ):
            with pytest.raises(UserError, match="drop_tail is for the policy"):
                call(drop_tail=1)
            with pytest.raises(UserError, match="mode 'ar'"):
                call(mode="ar")

    def test_presets_are_as_documented(self):
        text = (Path(__file__).parent.parent / "docs" / "speed.md").read_text(encoding="utf-8")
        for name, options in PRESETS.items():
            if options:
                flags = " ".join(
                    f"--{option.replace('_', '-')} {value}" for option, value in options.items()
                )
                assert f"| `{name}` | `{flags}` |" in text

    def test_a_canvas_longer_than_the_checkpoint_s_is_refused(self, tiny):
        with pytest.raises(UserError, match="24 positions"):
            GenerationOptions(canvas_length=25).policy(tiny)


class TestCommand:
    def test_a_canvas_length(self, monkeypatch, capsys):
        code, out, _ = command(
            monkeypatch,
            capsys,
            "generate",
            "-p",
            "Add 12 and 30.",
            "--canvas-length",
            "8",
            "--json",
        )
        record = json.loads(out.splitlines()[-1])
        assert (code, record["rows"]) == (0, 8 * record["steps"])

    def test_all_canvases_are_summed(self, monkeypatch, capsys):
        _, out, _ = command(
            monkeypatch,
            capsys,
            "generate",
            "-p",
            "Tell me a story about Leo the owl and a map.",
            "--seed",
            "0",
            "-m",
            "128",
            "--retry-unconverged",
            "1",
            "--max-denoising-steps",
            "3",
            "--json",
        )
        record = json.loads(out.splitlines()[-1])
        assert (
            record["canvases"]
            == [{"steps": 6, "rows": 384, "retries": 1, "converged": False, "certificate": None}]
            * 2
        )
        assert (record["steps"], record["rows"], record["retries"]) == (12, 768, 2)

    @pytest.mark.parametrize("length", ["abc", "--5", "²", "0", "65"])
    @pytest.mark.parametrize("verb", ["generate", "chat"])
    def test_wrong_lengths_are_one_sentence(self, monkeypatch, capsys, verb, length):
        words = [verb, f"--canvas-length={length}", *(["-p", "fox"] if verb == "generate" else [])]
        code, _, err = command(monkeypatch, capsys, *words)
        assert (code, err.count("\n"), "canvas_length" in err) == (2, 1, True)

    def test_rules_are_for_the_canvas_mode_of_both(self, monkeypatch, capsys):
        code, out, _ = command(
            monkeypatch,
            capsys,
            "evaluate",
            "--tasks",
            "add",
            "--limit",
            "2",
            "--mode",
            "both",
            "--preset",
            "fast",
            "--json",
        )
        diffusion, causal = (json.loads(line) for line in out.splitlines()[-2:])
        assert (code, diffusion["options"]["preset"], "preset" in causal["options"]) == (
            0,
            "fast",
            False,
        )
