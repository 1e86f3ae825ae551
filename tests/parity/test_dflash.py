"""The drafter's forward against the published package's, on the same random weights in its file
layout.

The bound is made as for the backbone: the reference's own spread on the same input, here between
its torch model in float32 and in float64.
"""

import json

import mlx.core as mx
import numpy as np
import pytest
import torch

from drafter import DrafterConfig, load_drafter
from drafter.head import TargetHead
from mlx_diffgemma.diagnostics.stages import StageErrors
from mlx_diffgemma.model.attention import Segment
from mlx_diffgemma.model.cache import Cache
from tests.helpers.deferred import Deferred

in_torch, in_mlx = Deferred("dflash.model"), Deferred("dflash.model_mlx")
qwen3 = Deferred("transformers.models.qwen3")

HIDDEN, VOCABULARY, TAPS, BLOCK = 64, 301, (0, 2, 4), 7
LAYERS = {
    "full": ["full_attention"] * 2,
    "sliding": ["sliding_attention"] * 2,
    "both": ["sliding_attention", "full_attention", "sliding_attention"],
}


def published(folder, kinds, causal=None, **dflash):
    """A drafter for the tiny target in DFlash's layout."""
    config = {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "hidden_size": HIDDEN,
        "num_hidden_layers": len(kinds),
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 96,
        "vocab_size": VOCABULARY,
        "rms_norm_eps": 1e-6,
        "rope_theta": 50_000.0,
        "max_position_embeddings": 4096,
        "block_size": BLOCK,
        "num_target_layers": 6,
        "layer_types": kinds,
        "sliding_window": 12,
        "use_sliding_window": True,
        "dflash_config": {"target_layer_ids": list(TAPS), "mask_token_id": 4} | dflash,
    }
    if causal is not None:
        config["is_causal"] = causal
    rng = np.random.default_rng(3)
    norm = lambda n: 1 + 0.2 * rng.normal(size=n)  # noqa: E731
    matrix = lambda n, m: rng.normal(size=(n, m)) * m**-0.5  # noqa: E731
    weights = {
        "fc.weight": matrix(HIDDEN, HIDDEN * len(TAPS)),
        "hidden_norm.weight": norm(HIDDEN),
        "norm.weight": norm(HIDDEN),
    }
    for i in range(len(kinds)):
        path = f"layers.{i}"
        weights |= {
            f"{path}.{n}.weight": norm(HIDDEN)
            for n in ("input_layernorm", "post_attention_layernorm")
        }
        weights |= {f"{path}.self_attn.{n}.weight": norm(16) for n in ("q_norm", "k_norm")}
        weights |= {
            f"{path}.self_attn.q_proj.weight": matrix(96, HIDDEN),
            f"{path}.self_attn.k_proj.weight": matrix(32, HIDDEN),
            f"{path}.self_attn.v_proj.weight": matrix(32, HIDDEN),
            f"{path}.self_attn.o_proj.weight": matrix(HIDDEN, 96),
            f"{path}.mlp.gate_proj.weight": matrix(96, HIDDEN),
            f"{path}.mlp.up_proj.weight": matrix(96, HIDDEN),
            f"{path}.mlp.down_proj.weight": matrix(HIDDEN, 96),
        }
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(
        str(folder / "model.safetensors"),
        {k: mx.array(v.astype(np.float32)) for k, v in weights.items()},
    )
    return folder


class TorchTarget:
    """What the published MLX model borrows of a target."""

    def __init__(self, tiny):
        self.embed_tokens = tiny.model.decoder.embed_tokens
        self.embed_scale = tiny.config.text.hidden_size**0.5


def torch_hidden(folder, dtype, rounds, embeddings):
    """Hidden states of each round [rows, hidden] by the torch model, which is given all features
    anew each time.
    """
    raw = json.loads((folder / "config.json").read_text())
    model = in_torch.DFlashDraftModel(qwen3.Qwen3Config(**raw)).to(dtype).eval()
    stored = {
        k: torch.tensor(np.array(v)).to(dtype)
        for k, v in mx.load(str(folder / "model.safetensors")).items()
    }
    model.load_state_dict(stored)
    out, seen = [], []
    with torch.inference_mode():
        for taps, embedding in zip(rounds, embeddings):
            seen.append(taps)
            context = torch.tensor(np.concatenate(seen)[None]).to(dtype)
            rows = context.shape[1] + embedding.shape[0]
            out.append(
                model(
                    target_hidden=context,
                    noise_embedding=torch.tensor(embedding[None]).to(dtype),
                    position_ids=torch.arange(rows)[None],
                    use_cache=False,
                )[0]
                .double()
                .numpy()
            )
    return out


@pytest.mark.parametrize("kinds", LAYERS)
@pytest.mark.parametrize("causal", [None, False, True], ids=["by-kind", "both-ways", "causal"])
@pytest.mark.parametrize(
    "extras",
    [{}, {"input_embedding_scale": 0.5, "output_multiplier": 1.5, "final_logit_softcapping": 20.0}],
    ids=["plain", "scaled"],
)
def test_forward_equals_the_published_package(kinds, causal, extras, tiny, tmp_path, monkeypatch):
    folder = published(tmp_path / "draft", LAYERS[kinds], causal, **extras)
    monkeypatch.setattr("dflash.model_mlx.snapshot_download", lambda *args, **kwargs: str(folder))
    theirs = in_mlx.load_draft(str(folder)).bind(TorchTarget(tiny))
    ours = load_drafter(str(folder), tiny)
    head, cache, their_cache = TargetHead(tiny, ours), Cache(ours.config), theirs.make_cache()
    rng, rounds, embeddings, found = np.random.default_rng(0), [], [], []
    for rows in (
        9,
        3,
        2,
        20,
        1,
    ):  # what a prompt and four rounds add; one passes the window at once
        taps = rng.normal(size=(rows, HIDDEN * len(TAPS))).astype(np.float32)
        block = mx.array([int(rng.integers(5, VOCABULARY)), *[4] * (BLOCK - 1)])
        ours.append_features(
            [
                ours.features(
                    dict(zip(TAPS, (mx.array(part) for part in np.split(taps, len(TAPS), axis=1))))
                )
            ],
            [cache],
        )
        x = head.embed(block)
        mine = ours(x, [Segment(0, BLOCK, cache, canvas=True)])
        rounds.append(taps)
        embeddings.append(np.array(x))
        found.append(
            (mine, theirs.hidden_states(block[None], mx.array(taps)[None], their_cache)[0])
        )
    single, double = (
        torch_hidden(folder, dtype, rounds, embeddings) for dtype in (torch.float32, torch.float64)
    )
    hidden, logits, torchs = (
        StageErrors("hidden states"),
        StageErrors("logits"),
        StageErrors("hidden states, torch"),
    )
    for index, ((mine, wanted), s, d) in enumerate(zip(found, single, double)):
        torchs.add(np.array(mine), [s, d])
        # A round of one row turns the MLX model's cache of a full window into a ring, whose order
        # its masks do not know.
        if index < 4 or kinds == "full":
            variant = wanted + mx.array((s - d).astype(np.float32))
            hidden.add(np.array(mine), [np.array(wanted), np.array(variant)])
            logits.add(
                np.array(head.logits(mine)),
                [np.array(theirs.compute_logits(h)) for h in (wanted, variant)],
            )
    for errors in (hidden, logits, torchs):
        assert errors.result().ok, errors.result()


def test_a_published_config_is_read(tmp_path):
    config = DrafterConfig.from_folder(published(tmp_path, LAYERS["both"]))
    assert (config.taps, config.block_size, config.mask_token_id, config.head_size) == (
        TAPS,
        BLOCK,
        4,
        None,
    )
    assert [(layer.window, layer.causal) for layer in config.layers] == [
        (12, True),
        (None, False),
        (12, True),
    ]
    assert DrafterConfig.from_dict(config.to_dict() | {"is_causal": None}).taps == TAPS
