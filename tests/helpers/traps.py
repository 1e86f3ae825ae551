"""Faults in the model that a comparison with the reference must notice."""

from __future__ import annotations

import mlx.core as mx

from mlx_diffgemma.model import attention, blocks, cache, diffusion_gemma


def shared_layer_scalar(monkeypatch):
    """The causal mode with the canvas mode's layer scalar."""
    monkeypatch.setattr(diffusion_gemma, "_per_row", lambda segments, canvas, causal: canvas)


def normed_router_input(monkeypatch):
    """The router on the pre-normed rows, as the experts get them."""

    def call(self, x, table, segments, index, scalar):
        x = x + self.post_attention_layernorm(
            self.self_attn(self.input_layernorm(x), table, segments, index)
        )
        dense = self.post_feedforward_layernorm_1(self.mlp(self.pre_feedforward_layernorm(x)))
        h = self.pre_feedforward_layernorm_2(x)
        routed = self.post_feedforward_layernorm_2(self.experts(h, *self.router(h)))
        return (x + self.post_feedforward_layernorm(dense + routed)) * scalar

    monkeypatch.setattr(blocks.Layer, "__call__", call)


def no_value_norm(monkeypatch):
    """Values as projected, where they are projected: the norm of all heads leaves out the last
    ones.
    """
    norm, call, normed = attention.rms_norm, attention.Attention.__call__, []

    def remembering(self, *args):
        normed[:] = [self.heads + self.kv_heads]
        return call(self, *args)

    def leaving_values(x, weight, eps):
        if weight is not None or x.ndim != 3:
            return norm(x, weight, eps)
        return mx.concatenate((norm(x[:, : normed[0]], None, eps), x[:, normed[0] :]), axis=1)

    monkeypatch.setattr(attention.Attention, "__call__", remembering)
    monkeypatch.setattr(attention, "rms_norm", leaving_values)


def whole_window(monkeypatch):
    """Sliding layers show the canvas one cached position too many."""
    init = cache.Cache.__init__

    def wider(self, config, keep_all=False):
        init(self, config, keep_all)
        self.windows = tuple(window and window + 1 for window in self.windows)

    monkeypatch.setattr(cache.Cache, "__init__", wider)


def no_norm_at_the_first_step(monkeypatch):
    """Self-conditioning left out as a whole when there is no signal."""
    call = blocks.SelfConditioning.__call__
    monkeypatch.setattr(
        blocks.SelfConditioning,
        "__call__",
        lambda self, x, soft: x if soft is None else call(self, x, soft),
    )


def no_soft_cap(monkeypatch):
    monkeypatch.setattr(
        diffusion_gemma.DiffusionGemma,
        "logits",
        lambda self, h: self.model.decoder.embed_tokens.as_linear(h).astype(mx.float32),
    )


MUTATIONS = [
    shared_layer_scalar,
    normed_router_input,
    no_value_norm,
    whole_window,
    no_norm_at_the_first_step,
    no_soft_cap,
]
