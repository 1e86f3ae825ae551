"""Trajectories and training: what is logged is what happened, and interrupted work ends as unbroken
work does.
"""

import json
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from drafter import load_drafter
from drafter.baselines import disturbed
from drafter.rules import DraftRules
from drafter.run import DraftRun, DraftShape, read_prompts, share
from drafter.training import DraftTrainer, DraftTrainingOptions, frequent_tokens
from drafter.trajectories import read_trajectories, record_rollouts
from mlx_diffgemma.decoding.loop import Loop
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.model.cache import Cache
from mlx_diffgemma.model.config import released_config
from mlx_diffgemma.sampling.draws import Draws
from mlx_diffgemma.sampling.policy import ReferencePolicy
from tests.drafter.drafters import random_drafter
from tests.helpers.in_process import run as run_command
from tests.helpers.knowing import prompts_of
from tests.helpers.prompts import nano_prompts


def policy_of(model):
    return ReferencePolicy.from_config(model.config.generation, coverage=1 - 1e-6, max_steps=4)


def logged(model, prompts, folder):
    """(folder, prompts): in shards of three."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("drafter.trajectories.SHARD", 3)
        record_rollouts(model, prompts, folder, policy_of(model), 128, seed=4, batch_size=2)
    return folder, prompts


@pytest.fixture(scope="module")
def log(knowing_pair, tmp_path_factory):
    """The log of eight prompts."""
    return logged(knowing_pair[0], own_prompts(8), tmp_path_factory.mktemp("log"))


@pytest.fixture(scope="module")
def nano_log(nano_pair, tmp_path_factory):
    """Nano's log of eight prompts, for tests in which a drafter learns."""
    return logged(nano_pair[0], nano_prompts(8), tmp_path_factory.mktemp("nano-log"))


def own_prompts(count):
    """The prompts of the target that has a text in mind, from other places of it too."""
    return [ids[place:] for place in (0, 3) for ids in prompts_of(6)][:count]


def same(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


class TestTrajectories:
    def test_what_is_logged_is_what_happened(self, log, knowing_pair):
        model, (folder, prompts) = knowing_pair[0], log
        found = read_trajectories(folder, model)
        for i, ids in enumerate(prompts):
            session = Session(
                model,
                ids,
                policy_of(model),
                Draws(4 + i, 1024),
                model.config.generation.eos_token_ids,
                128,
            )
            loop, steps = Loop(model, [session]), []
            while loop.active:
                steps += [step for _, step in loop.advance()]
            prefix = list(ids)
            for canvas in range(len(session.canvases)):
                own, t = [step for step in steps if step.canvas_index == canvas], next(found)
                assert (t.prefix.tolist(), t.prompt) == (prefix, len(ids))
                assert t.committed.tolist() == own[-1].argmax.tolist()
                assert t.states.tolist() == [step.canvas.tolist() for step in own[:-1]]
                prefix += t.committed.tolist()
        assert next(found, None) is None

    def test_drafts_are_logged(self, knowing_pair, tmp_path):
        model, prompts = knowing_pair[0], own_prompts(3)
        drafter = random_drafter(model)
        drafter.confidence.bias = mx.array([1.0])  # sure of some
        for again in range(
            2
        ):  # the second time the log is there, of the same drafter under another name
            policy = (
                drafter.canvas(model, policy_of(model), DraftRules(gate=0.5))
                if not again
                else disturbed(drafter, 0.0).canvas(model, policy_of(model), DraftRules(gate=0.5))
            )
            record_rollouts(model, prompts, tmp_path, policy, 64, seed=4, batch_size=2)
        with pytest.raises(UserError, match="other prompts or options"):
            record_rollouts(
                model,
                prompts,
                tmp_path,
                disturbed(drafter, 0.01).canvas(model, policy_of(model)),
                64,
                4,
                2,
            )
        for t, ids, i in zip(read_trajectories(tmp_path, model), prompts, range(3), strict=True):
            session = Session(
                model, ids, policy, Draws(4 + i, 1024), model.config.generation.eos_token_ids, 64
            )
            loop, steps = Loop(model, [session]), []
            while loop.active:
                steps += [step for _, step in loop.advance()]
            assert t.states[0].tolist() == steps[0].draft.tolist()
            assert 0 < (t.states[0] < 0).sum() < 64
            assert len(t.states) == len(steps) - sum(step.stopped for step in steps) + 1

    def test_interrupted_it_goes_on(self, log, knowing_pair, tmp_path, monkeypatch):
        model, (folder, prompts) = knowing_pair[0], log
        monkeypatch.setattr("drafter.trajectories.SHARD", 3)
        seen = []

        def stop(done, total):
            seen.append((done, total))
            if len(seen) == 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            record_rollouts(model, prompts, tmp_path, policy_of(model), 128, 4, 2, stop)
        assert len(list(tmp_path.glob("*.safetensors"))) == 2
        before = (tmp_path / "trajectories-00000.safetensors").stat().st_mtime_ns
        record_rollouts(model, prompts, tmp_path, policy_of(model), 128, 4, 2)
        assert (tmp_path / "trajectories-00000.safetensors").stat().st_mtime_ns == before
        pairs = list(
            zip(read_trajectories(tmp_path, model), read_trajectories(folder, model), strict=True)
        )
        assert pairs
        assert all(same(a, b) for a, b in pairs)

    def test_a_log_of_something_else_is_refused(
        self, log, knowing_pair, tiny, tmp_path, monkeypatch
    ):
        model, (folder, prompts) = knowing_pair[0], log
        with pytest.raises(UserError, match="holds no trajectories"):
            list(read_trajectories(tmp_path, model))
        with pytest.raises(UserError, match="another model"):
            list(read_trajectories(folder, tiny))
        monkeypatch.setattr("drafter.trajectories.SHARD", 3)
        for asked, seed in ((prompts[1:], 4), (prompts, 5)):
            with pytest.raises(UserError, match="other prompts or options"):
                record_rollouts(model, asked, folder, policy_of(model), 128, seed, 2)
        with monkeypatch.context() as patch:
            patch.setattr(
                "drafter.trajectories.fingerprint", lambda _: "the same base with an adapter"
            )
            with pytest.raises(UserError, match="log of another model"):
                record_rollouts(model, prompts, folder, policy_of(model), 128, 4, 2)
        whole = (folder / "trajectories-00001.safetensors").read_bytes()
        (tmp_path / "trajectories-00001.safetensors").write_bytes(whole[:-100])
        with pytest.raises(UserError, match="damaged or cut off"):
            list(read_trajectories(tmp_path, model))


def trainer_of(model, log, iters, **options):
    found = list(read_trajectories(log[0], model))
    drafter = random_drafter(model, seed=2, head_size=300, block_size=12, refinement=True)
    drafter.head_ids = mx.array(frequent_tokens(found, 300, 1024))
    return DraftTrainer(
        drafter,
        model,
        found,
        found[:3],
        DraftTrainingOptions(
            iters=iters, batch_size=4, steps_per_report=5, steps_per_eval=5, **options
        ),
    )


class TestTraining:
    def test_only_the_same_run_goes_on(self, log, knowing_pair, tmp_path):
        first = trainer_of(knowing_pair[0], log, 10)
        first.save(tmp_path / "state.safetensors")
        trainer_of(knowing_pair[0], log, 10).restore(tmp_path / "state.safetensors")
        other = trainer_of(knowing_pair[0], log, 10)
        other.train = [*other.train[1:], other.train[0]]  # as many, in another order
        with pytest.raises(UserError, match=r"other options .data"):
            other.restore(tmp_path / "state.safetensors")
        with pytest.raises(UserError, match=r"learning_rate was 0.\d+, is 1.0"):
            trainer_of(knowing_pair[0], log, 10, learning_rate=1.0).restore(
                tmp_path / "state.safetensors"
            )

    @pytest.mark.slow
    def test_it_learns(self, nano_log, nano_pair):
        trainer = trainer_of(nano_pair[0], nano_log, 40, learning_rate=5e-3)
        head = trainer.drafter.head_ids.tolist()
        before = trainer.validate()
        trainer.run()
        after = trainer.reports[-1]
        assert after.valid
        assert (after.loss < 0.5 * before.loss, after.confidence_loss < before.confidence_loss) == (
            True,
            True,
        )
        assert trainer.drafter.head_ids.tolist() == head, "tokens are no parameters"

    @pytest.mark.slow
    def test_killed_and_resumed_is_unbroken(self, nano_log, nano_pair, tmp_path):
        whole = trainer_of(nano_pair[0], nano_log, 10)
        whole.run()

        class Killed(Exception):
            pass

        def kill(report):
            if report.iteration > 5:
                raise Killed

        first = trainer_of(nano_pair[0], nano_log, 10)
        with pytest.raises(Killed):
            first.run(kill, tmp_path / "state.safetensors")
        again = trainer_of(nano_pair[0], nano_log, 10)
        again.restore(tmp_path / "state.safetensors")
        assert again.iteration == 5
        again.run()
        wanted = dict(tree_flatten(whole.drafter.parameters()))
        assert all(
            mx.array_equal(value, wanted[name])
            for name, value in tree_flatten(again.drafter.parameters())
        )
        assert again.reports == whole.reports
        other = trainer_of(nano_pair[0], nano_log, 10, learning_rate=1.0)
        with pytest.raises(UserError, match="other options"):
            other.restore(tmp_path / "state.safetensors")

    def test_blocks(self, log, knowing_pair):
        trainer = trainer_of(knowing_pair[0], log, 10)
        blocks = [block for i in range(30) for block in trainer.blocks(i)]
        logged = {t.prefix.tobytes() + t.committed.tobytes(): t for t in trainer.train}
        for block in blocks:
            if block.known:
                assert (
                    block.ids.size <= 12,
                    block.ids[0] == block.wanted[0],
                    block.weights[0],
                ) == (True, True, 1.0)
                assert any(
                    key.startswith(np.concatenate((block.prefix, block.wanted)).tobytes())
                    for key in logged
                )
            else:
                t = logged[block.prefix.tobytes() + block.wanted.tobytes()]
                (ends,) = np.nonzero(np.isin(t.committed, trainer.ends))
                end = int(ends[0]) if ends.size else 63
                assert block.weights.tolist() == pytest.approx(
                    [1.0] * (end + 1) + [0.05] * (63 - end)
                )
                if block.seen is not None:
                    states = [state.tolist() for state in t.states]
                    place = states.index(block.ids.tolist())
                    assert place == 0 or block.seen.tolist() == states[place - 1]
                    assert not block.conditioned
        assert 0.1 < np.mean([block.known > 0 for block in blocks]) < 0.4
        canvases = [block for block in blocks if not block.known]
        assert 0.2 < np.mean([block.conditioned for block in canvases]) < 0.6
        assert 0.1 < np.mean([block.seen is not None for block in canvases]) < 0.4

    def test_what_refinement_reads(self, log, knowing_pair):
        """Of a batch in which some canvases were denoised just before: the hidden states of that
        forward alone.
        """
        model = knowing_pair[0]
        trainer = trainer_of(model, log, 10)
        batches = [trainer.blocks(i) for i in range(30)]
        blocks = next(
            batch for batch in batches if 0 < sum(block.seen is not None for block in batch) < 4
        )
        features, row = trainer.features(blocks), 0
        for block, before in zip(blocks, features.before):
            cache = Cache(model.config.text)
            taps = model.encode(
                [mx.array(block.prefix)], [cache], taps=trainer.drafter.config.taps
            ).taps
            assert all(
                mx.allclose(taps[layer][0], rows, atol=1e-4) for layer, rows in before.items()
            )
            if block.seen is not None:
                taps = model.denoise(
                    mx.array(block.seen)[None], [cache], taps=trainer.drafter.config.taps
                ).taps
                own = {layer: rows[row : row + 64] for layer, rows in features.seen.items()}
                assert all(
                    mx.allclose(taps[layer][0], rows, atol=1e-4) for layer, rows in own.items()
                )
                row += 64
        _, whole = trainer._loss(trainer.drafter, blocks, features)
        _, blind = trainer._loss(trainer.drafter, blocks, features._replace(seen={}))
        assert whole["loss"].item() != blind["loss"].item()

    def test_what_a_token_outside_the_head_counts(self, log, knowing_pair):
        trainer = trainer_of(knowing_pair[0], log, 10)
        blocks = trainer.blocks(0)
        outside = int(np.flatnonzero(np.array(trainer.places) < 0)[0])
        _, plain = trainer._loss(trainer.drafter, blocks, features := trainer.features(blocks))
        lost = [replace(b, wanted=np.full_like(b.wanted, outside)) for b in blocks]
        _, none = trainer._loss(trainer.drafter, lost, features)
        assert (none["loss"].item(), none["canvas_right"].item()) == (0.0, 0.0)
        assert none["canvas_tokens"].item() == plain["canvas_tokens"].item()

    def test_bad_options(self):
        for name, value in (
            ("iters", 0),
            ("batch_size", 0),
            ("learning_rate", 0.0),
            ("pure", 0.9),
            ("canvases", 2.0),
        ):
            with pytest.raises(UserError, match=name):
                DraftTrainingOptions(**{name: value})


class TestCommand:
    @pytest.fixture
    def data(self, tmp_path):
        lines = [{"prompt": f"Add {i} and {2 * i}."} for i in range(1, 5)]
        lines.append(
            {
                "messages": [
                    {"role": "user", "content": "Sort these words: owl, fox."},
                    {"role": "assistant", "content": "fox"},
                ]
            }
        )
        (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
        return tmp_path / "prompts.jsonl"

    def test_from_prompts_to_an_answer(self, monkeypatch, capsys, data, tmp_path, nano_pair):
        options = [
            "--data",
            str(data),
            "--draft-path",
            str(tmp_path / "out"),
            "--iters",
            "4",
            "--batch-size",
            "2",
            "-m",
            "64",
        ]
        code, out, err = run_command(monkeypatch, capsys, "draft", "train", *options, "--json")
        assert (
            code,
            "13.6% of a denoising step" in err,
            "4 canvases to train on, 1 to validate on" in err,
        ) == (0, True, True), err
        assert json.loads(out.splitlines()[-1])["reports"][-1]["valid"]
        assert load_drafter(str(tmp_path / "out"), nano_pair[0]).config.target["name"] == "nano-1"
        assert "5 prompts" in (tmp_path / "out" / "README.md").read_text()
        code, _, err = run_command(monkeypatch, capsys, "draft", "train", *options)
        assert (code, "holds a run already" in err) == (2, True)
        assert run_command(monkeypatch, capsys, "draft", "train", *options, "--resume")[0] == 0
        code, out, _ = run_command(
            monkeypatch,
            capsys,
            "generate",
            "-p",
            "Add 1 and 2.",
            "--draft-model",
            str(tmp_path / "out"),
        )
        assert (code, bool(out.strip())) == (0, True)

    @pytest.mark.slow
    def test_going_on_from_a_drafter(self, monkeypatch, capsys, data, tmp_path, nano_pair):
        """The answers begin from its guesses, and what it was trained on stays in."""
        options = ["--data", str(data), "--iters", "2", "--batch-size", "2", "-m", "64"]
        assert (
            run_command(
                monkeypatch, capsys, "draft", "train", *options, "--draft-path", str(tmp_path / "a")
            )[0]
            == 0
        )
        again = [
            "draft",
            "train",
            *options,
            "--draft-model",
            str(tmp_path / "a"),
            "--draft-path",
            str(tmp_path / "b"),
        ]
        code, _, err = run_command(monkeypatch, capsys, *again)
        assert (code, "8 canvases to train on, 2 to validate on" in err, "estimated: " in err) == (
            0,
            True,
            True,
        ), err
        shards = [
            tmp_path / name / "trajectories" / "trajectories-00000.safetensors" for name in "ab"
        ]
        logs = [mx.load(str(shard), return_metadata=True)[1] for shard in shards]
        assert logs[0]["target"] == logs[1]["target"]
        assert logs[0]["asked"] != logs[1]["asked"], "the second one's canvases began from drafts"
        first, second = (load_drafter(str(tmp_path / name), nano_pair[0]) for name in "ab")
        assert first.head_ids.tolist() == second.head_ids.tolist()
        assert not mx.array_equal(first.fc.weight, second.fc.weight)
        assert mx.allclose(first.fc.weight, second.fc.weight, atol=0.02), "two steps away"
        code, _, err = run_command(
            monkeypatch, capsys, *again, "--draft-path", str(tmp_path / "c"), "--num-layers", "2"
        )
        assert (code, "has its shape already" in err) == (2, True), err

    def test_bad_input(self, monkeypatch, capsys, data, tmp_path):
        (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"text": "b"}\n')
        (tmp_path / "empty.jsonl").write_text("\n")
        (tmp_path / "one.jsonl").write_text('{"prompt": "Add 1 and 2."}\n')
        (tmp_path / "seen.jsonl").write_text('{"prompt": "What is it?", "images": ["a.png"]}\n')
        for options, message in (
            (["--data", str(tmp_path / "bad.jsonl")], "line 2: 'prompt' or 'messages' is missing"),
            (["--data", str(tmp_path / "seen.jsonl")], "line 1: drafters are trained on text only"),
            (["--data", str(tmp_path / "empty.jsonl")], "holds no prompts"),
            (["--data", str(tmp_path / "one.jsonl"), "-m", "64"], "at least two"),
            (["--data", str(data), "--taps", "1,x"], "layer numbers"),
            (["--data", str(data), "--taps", "1,6"], "between 0 and 5"),
            (["--data", str(data), "--head-size", "0"], "head_size must be at least 1"),
        ):
            code, out, err = run_command(
                monkeypatch, capsys, "draft", "train", "--draft-path", str(tmp_path / "o"), *options
            )
            assert (code, out, message in err) == (2, "", True), err

    def test_prompts(self, data):
        asked = read_prompts(data)
        assert asked[0] == [{"role": "user", "content": "Add 1 and 2."}]
        assert asked[-1] == [{"role": "user", "content": "Sort these words: owl, fox."}]


def test_a_drafter_is_small_beside_its_target(nano_pair):
    for config in (nano_pair[0].config, released_config()):
        shape = DraftShape().config(config)
        assert 0.10 < share(shape, config) < 0.15
    assert DraftShape().config(released_config()).taps == (1, 6, 11, 17, 22, 27)


def test_a_target_that_cannot_be_held_is_refused(nano_pair, tmp_path, monkeypatch):
    monkeypatch.setattr("mlx_diffgemma.device.memory_limit", lambda: 10**6)
    with pytest.raises(UserError, match="rollout-batch-size"):
        DraftRun(
            nano_pair[0],
            {"name": "nano-1"},
            [[1, 2]],
            tmp_path,
            DraftShape(),
            DraftTrainingOptions(),
            64,
            8,
            False,
        )
