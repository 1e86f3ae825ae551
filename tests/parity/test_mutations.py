"""Each of the traps, sprung on purpose: the comparison with the reference must notice every one."""

from __future__ import annotations

import mlx.core as mx
import pytest

from mlx_diffgemma import cache, model, policy
from mlx_diffgemma.parity.compare import compare_forwards, compare_trajectories, default_prompts
from mlx_diffgemma.parity.reference import Reference
from mlx_diffgemma.weights import load_model
from tests.checkpoints import make_checkpoint


def shared_layer_scalar(monkeypatch):
    """The causal mode with the canvas mode's layer scalar."""
    monkeypatch.setattr(model, "_per_row", lambda segments, canvas, causal: canvas)


def normed_router_input(monkeypatch):
    """The router on the pre-normed rows, as the experts get them."""

    def call(self, x, table, segments, index, scalar):
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), table, segments, index))
        dense = self.post_feedforward_layernorm_1(self.mlp(self.pre_feedforward_layernorm(x)))
        h = self.pre_feedforward_layernorm_2(x)
        routed = self.post_feedforward_layernorm_2(self.experts(h, *self.router(h)))
        return (x + self.post_feedforward_layernorm(dense + routed)) * scalar

    monkeypatch.setattr(model.Layer, "__call__", call)


def no_value_norm(monkeypatch):
    """Values as projected, where they are projected: the norm of all heads leaves out the last ones."""
    norm, call, normed = model.rms_norm, model.Attention.__call__, []

    def remembering(self, *args):
        normed[:] = [self.heads + self.kv_heads]
        return call(self, *args)

    def leaving_values(x, weight, eps):
        if weight is not None or x.ndim != 3:
            return norm(x, weight, eps)
        return mx.concatenate((norm(x[:, : normed[0]], None, eps), x[:, normed[0] :]), axis=1)

    monkeypatch.setattr(model.Attention, "__call__", remembering)
    monkeypatch.setattr(model, "rms_norm", leaving_values)


def whole_window(monkeypatch):
    """Sliding layers show the canvas one cached position too many."""
    init = cache.Cache.__init__

    def wider(self, config, keep_all=False):
        init(self, config, keep_all)
        self.windows = tuple(window and window + 1 for window in self.windows)

    monkeypatch.setattr(cache.Cache, "__init__", wider)


def no_norm_at_the_first_step(monkeypatch):
    """Self-conditioning left out as a whole when there is no signal."""
    call = model.SelfConditioning.__call__
    monkeypatch.setattr(model.SelfConditioning, "__call__", lambda self, x, soft: x if soft is None else call(self, x, soft))


def no_soft_cap(monkeypatch):
    monkeypatch.setattr(model.DiffusionGemma, "logits",
                        lambda self, h: self.model.decoder.embed_tokens.as_linear(h).astype(mx.float32))


MUTATIONS = [shared_layer_scalar, normed_router_input, no_value_norm, whole_window, no_norm_at_the_first_step, no_soft_cap]


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    folder = make_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    loaded = load_model(folder, "float32")
    return loaded, Reference(folder), default_prompts(loaded, 2)


def test_unbroken_code_passes(sides):
    assert all(stage.ok for stage in compare_forwards(*sides))
    assert compare_trajectories(*sides, "plain").ok


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda f: f.__name__)
def test_forward_mutation_is_noticed(mutate, sides, monkeypatch):
    mutate(monkeypatch)
    assert not all(stage.ok for stage in compare_forwards(*sides))


def test_frozen_positions_are_noticed(tmp_path, monkeypatch):
    """Positions accepted once keep their token, in place of being drawn or renoised anew."""
    folder = make_checkpoint(tmp_path, calm=False)
    loaded = load_model(folder, "float32")
    sides = loaded, Reference(folder), default_prompts(loaded, 2)
    assert compare_trajectories(*sides, "plain").ok
    sample, frozen = policy.sample_step, {}

    def freezing(logits, u, renoise, before, numbers, eos, forced):
        step = sample(logits, u, renoise, before, numbers, eos, forced)
        first = bool((before.history[:, -1] == -1).all().item())
        mask, canvas = (mx.zeros(step.accepted.shape, dtype=mx.bool_), step.canvas) if first else frozen["last"]
        canvas = mx.where(mask, canvas, step.canvas)
        frozen["last"] = (mask | step.accepted, canvas)
        return step._replace(canvas=canvas)

    monkeypatch.setattr(policy, "sample_step", freezing)
    assert not compare_trajectories(*sides, "frozen").ok
