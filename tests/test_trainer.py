"""The loop: a killed run goes on bit for bit, figures compare, batches are what they should be."""

import json

import mlx.core as mx
import mlx.optimizers as optimizers
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.tuning.adapters import AdapterOptions, prepare
from mlx_diffgemma.tuning.data import Example
from mlx_diffgemma.tuning.objective import Objective, make_batch
from mlx_diffgemma.tuning.trainer import Trainer, TrainingOptions

RNG = np.random.default_rng(0)
EXAMPLES = [
    Example(RNG.integers(7, 300, n).astype(np.int32), n // 2) for n in (30, 41, 25, 50, 33, 28, 60)
]
DROPOUT = {"rank": 4, "dropout": 0.1, "scale": 8.0}


def trainer(folder, valid=(), lora=None, objective=None, **options):
    model = load_model(folder)
    mx.random.seed(7)  # where the adapters begin
    prepare(model, AdapterOptions("lora" if lora else "full", -1, lora or DROPOUT))
    given = {"iters": 6, "batch_size": 2, "canvas_length": 16} | options
    schedule = optimizers.cosine_decay(1e-2, 10)
    return Trainer(
        model,
        EXAMPLES,
        valid,
        objective or Objective(),
        TrainingOptions(**given),
        optimizers.AdamW(learning_rate=schedule),
    )


def weights(run):
    return dict(tree_flatten(run.model.trainable_parameters()))


def same(a, b):
    return a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]) for name in a)


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("lora", "at", "every"),
    [
        (DROPOUT, 4, 3),
        pytest.param(DROPOUT, 4, 2, marks=pytest.mark.slow),
        pytest.param(None, 4, 3, marks=pytest.mark.slow),
        pytest.param(DROPOUT, 1, 2, marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_equals_unbroken(divisible_folder, tmp_path, lora, at, every):
    """Also where the last checkpoint lies between two steps of the optimiser."""
    path = tmp_path / "state.safetensors"
    unbroken = trainer(divisible_folder, lora=lora, grad_accumulation_steps=2)
    unbroken.run()
    first = trainer(
        divisible_folder, lora=lora, grad_accumulation_steps=2, save_every=every, steps_per_report=1
    )

    def kill(report):
        if report.iteration == at:
            raise Killed

    with pytest.raises(Killed):
        first.run(kill, lambda: first.save(path))
    second = trainer(divisible_folder, lora=lora, grad_accumulation_steps=2)
    if path.exists():
        second.restore(path)
        assert second.iteration == every
    else:
        assert at == 1
    second.run()
    assert same(weights(unbroken), weights(second))
    assert same(
        dict(tree_flatten(unbroken.optimizer.state)), dict(tree_flatten(second.optimizer.state))
    )


@pytest.mark.slow
def test_a_longer_run_goes_on_from_a_shorter_one(divisible_folder, tmp_path):
    whole, short = trainer(divisible_folder), trainer(divisible_folder, iters=3)
    whole.run()
    short.run()
    short.save(tmp_path / "s.safetensors")
    longer = trainer(divisible_folder)
    longer.restore(tmp_path / "s.safetensors")
    longer.run()
    assert same(weights(whole), weights(longer))


def test_a_run_that_ended_between_two_steps_does_not_go_on(divisible_folder, tmp_path):
    short = trainer(
        divisible_folder,
        lora=DROPOUT,
        iters=1,
        batch_size=1,
        canvas_length=4,
        grad_accumulation_steps=2,
    )
    short.run()
    short.save(tmp_path / "s.safetensors")
    longer = trainer(
        divisible_folder,
        lora=DROPOUT,
        iters=2,
        batch_size=1,
        canvas_length=4,
        grad_accumulation_steps=2,
    )
    longer.restore(tmp_path / "s.safetensors")
    with pytest.raises(UserError, match="ended at iteration 1, in the middle of 2 batches"):
        longer.run()


@pytest.mark.slow
def test_training_lowers_the_loss(divisible_folder):
    run = trainer(divisible_folder, valid=EXAMPLES, iters=40, steps_per_eval=1000, val_batches=-1)
    run.run()
    first, last = (report.total for report in run.reports if report.valid)
    assert last < 0.8 * first


def test_validation_sees_the_same_noise_each_time(divisible_folder):
    run = trainer(divisible_folder, valid=EXAMPLES)
    a = run.validate(0)
    first = list(run.validation_batches())
    run.iteration = 3  # also later in the run
    b = run.validate(0)
    second = list(run.validation_batches())
    assert (a.canvas, a.causal) == (b.canvas, b.causal)
    assert all((x.corrupted == y.corrupted).all() for x, y in zip(first, second, strict=True))
    assert run.iteration == 3


def test_losses_of_batches_are_weighted_by_their_tokens(divisible_folder):
    run = trainer(divisible_folder, valid=EXAMPLES)
    whole = run.validate(0)
    found = [run._loss(run.model, batch)[1] for batch in run.validation_batches()]
    for name in ("canvas", "causal"):
        losses = np.array([getattr(one, name).item() for one in found])
        tokens = np.array([getattr(one, f"{name}_tokens") for one in found])
        assert len(set(tokens.tolist())) > 1, "else no weight shows"
        assert getattr(whole, name) == pytest.approx((losses * tokens).sum() / tokens.sum())


def test_validation_drops_nothing_out(divisible_folder, monkeypatch):
    run, modes, real = trainer(divisible_folder, valid=EXAMPLES), [], Trainer._loss

    def loss(self, model, batch):
        modes.append(model.training)
        return real(self, model, batch)

    monkeypatch.setattr(Trainer, "_loss", loss)
    run.model.train()
    run.validate(0)
    assert modes == [False] * 4
    assert run.model.training


@pytest.mark.slow
def test_validation_does_not_touch_the_run(divisible_folder):
    with_it = trainer(divisible_folder, valid=EXAMPLES, lora=DROPOUT, steps_per_eval=2)
    without = trainer(divisible_folder, lora=DROPOUT)
    with_it.run()
    without.run()
    assert same(weights(with_it), weights(without))


def test_every_example_comes_once_an_epoch(divisible_folder):
    run = trainer(divisible_folder)
    lengths = [ids.size for number in range(7) for ids in run.batch(number).sequences]
    assert sorted(lengths[:7]) == sorted(lengths[7:]) == sorted(e.ids.size for e in EXAMPLES)
    assert lengths[:7] != lengths[7:], "in another order"


def test_accumulated_batches_are_averaged(divisible_folder):
    """Two halves with equally many tokens give the gradient of the whole."""
    objective = Objective(causal=0.0, self_conditioning=0.0)
    run = trainer(
        divisible_folder, objective=objective, grad_accumulation_steps=2, iters=2, max_grad_norm=0.0
    )
    found = []
    run.optimizer.update = lambda model, gradients: found.append(dict(tree_flatten(gradients)))
    run.run()
    import mlx.nn as nn

    grads = [
        dict(tree_flatten(nn.value_and_grad(run.model, run._loss)(run.model, run.batch(i))[1]))
        for i in range(2)
    ]
    assert len(found) == 1
    assert all(
        mx.allclose(found[0][name], (grads[0][name] + grads[1][name]) / 2, rtol=1e-4, atol=1e-6)
        for name in grads[0]
    )


class TestMakeBatch:
    def make(self, objective=None, seed=0):
        objective = objective or Objective()
        sequences = [e.ids for e in EXAMPLES]
        return make_batch(
            sequences,
            [e.answer for e in EXAMPLES],
            8,
            301,
            1,
            objective,
            np.random.default_rng(seed),
        )

    def test_a_canvas_holds_the_answer_from_where_it_begins_and_ends_after(self):
        for seed in range(20):
            batch = self.make(seed=seed)
            for row, example in enumerate(EXAMPLES):
                start = batch.starts[row]
                assert (start - example.answer) % 8 == 0
                assert example.answer <= start < example.ids.size
                piece = example.ids[start : start + 8]
                assert (batch.clean[row, : piece.size] == piece).all()
                assert (batch.clean[row, piece.size :] == 1).all()

    def test_every_canvas_of_an_answer_is_drawn(self):
        starts = {self.make(seed=seed).starts[3] for seed in range(40)}
        assert starts == {25, 33, 41, 49}

    def test_corruption(self):
        """Half of the positions on average, each by a token drawn evenly."""
        rows = [
            (b.corrupted != b.clean).mean(axis=1)
            for b in (self.make(seed=seed) for seed in range(200))
        ]
        assert np.mean(rows) == pytest.approx(0.5, abs=0.03)
        assert np.std(rows) > 0.25, "each example has its own share"
        within = np.mean([own.std() for own in rows])
        assert within > 0.2, "also within a batch"
        drawn = [
            token
            for batch in (self.make(seed=seed) for seed in range(200))
            for token in batch.corrupted[batch.corrupted != batch.clean].tolist()
        ]
        assert np.mean(drawn) == pytest.approx(150, abs=5), "of a vocabulary of 301"
        assert {0, 300} <= set(drawn)
        least = self.make(Objective(least=0.0, most=1e-9))
        assert (least.corrupted == least.clean).all()

    def test_self_conditioning(self):
        drawn = [draw for seed in range(200) for draw in self.make(seed=seed).conditioned]
        assert np.mean(drawn) == pytest.approx(0.5, abs=0.05)
        assert not any(self.make(Objective(self_conditioning=0.0)).conditioned)
        assert all(self.make(Objective(self_conditioning=1.0)).conditioned)


@pytest.mark.parametrize(
    "options",
    [
        {"self_conditioning": 1.5},
        {"least": 0.5, "most": 0.4},
        {"canvas": -1.0},
        {"canvas": 0.0, "causal": 0.0},
    ],
)
def test_objectives_that_make_no_sense(options):
    with pytest.raises(UserError):
        Objective(**options)


class TestRestore:
    def test_refuses_another_run_and_damage(self, divisible_folder, tmp_path):
        run = trainer(divisible_folder, iters=1)
        run.run()
        run.save(path := tmp_path / "s.safetensors")
        with pytest.raises(UserError, match="other options"):
            trainer(divisible_folder, batch_size=3).restore(path)
        with pytest.raises(UserError, match="other options"):
            trainer(divisible_folder, lora=DROPOUT).restore(path)
        path.write_bytes(path.read_bytes()[:-7])
        with pytest.raises(UserError, match="damaged"):
            trainer(divisible_folder).restore(path)

    def test_reports_go_on(self, divisible_folder, tmp_path):
        run = trainer(divisible_folder, steps_per_report=1, iters=2)
        run.run()
        run.save(path := tmp_path / "s.safetensors")
        again = trainer(divisible_folder, steps_per_report=1, iters=4)
        again.restore(path)
        again.run()
        assert [report.iteration for report in again.reports] == [1, 2, 3, 4]
        assert json.dumps([vars(report) for report in again.reports])


def test_nothing_to_train(divisible_folder):
    model = load_model(divisible_folder)
    prepare(model, AdapterOptions("full", 1))
    with pytest.raises(UserError, match="nothing to train on"):
        Trainer(model, [], (), Objective(), TrainingOptions(), optimizers.Adam(1e-3))
    model.freeze()
    with pytest.raises(UserError, match="Nothing of the model is trainable"):
        Trainer(model, EXAMPLES, (), Objective(), TrainingOptions(), optimizers.Adam(1e-3))
