"""Between two steps the loop holds the small self-conditioning signal, never the logits it was made
from.
"""

from dataclasses import replace

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from mlx_diffgemma.decoding.loop import Loop
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.decoding.verifier import verify
from mlx_diffgemma.model.config import released_config
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling.draws import Draws
from mlx_diffgemma.sampling.policy import ReferencePolicy

VOCABULARY, CANVAS = 32_768, 32
LOGITS = 4 * VOCABULARY * CANVAS  # bytes of one canvas


@pytest.fixture(scope="module")
def wide():
    """One tiny layer under a vocabulary that everything else is small beside."""
    config = released_config()
    layer = replace(config.text.layers[0], num_kv_heads=1, head_dim=16, rotated=8)
    text = replace(
        config.text,
        layers=(layer,),
        hidden_size=16,
        intermediate_size=16,
        moe_intermediate_size=16,
        num_experts=2,
        top_k_experts=1,
        num_attention_heads=1,
        vocab_size=VOCABULARY,
    )
    model = DiffusionGemma(replace(config, text=text, canvas_length=CANVAS, vision=None))
    drawn = [
        (name, mx.random.normal(value.shape, key=mx.random.key(index)) * 0.3)
        for index, (name, value) in enumerate(tree_flatten(model.parameters()))
    ]
    model.update(tree_unflatten(drawn))
    mx.eval(model.parameters())
    return model


def steps(model, coverage, rows):
    """(bytes held above the weights after each step, bytes above the weights at the peak of each
    step).
    """
    policy = ReferencePolicy.from_config(model.config.generation, coverage=coverage)
    loop = Loop(
        model,
        [
            Session(model, [5, 6, 7], policy, Draws(row, VOCABULARY), (1,), CANVAS)
            for row in range(rows)
        ],
    )
    weights, held, peaks = (
        sum(array.nbytes for _, array in tree_flatten(model.parameters())),
        [],
        [],
    )
    start = mx.get_active_memory() - weights
    for _ in range(3):
        mx.reset_peak_memory()
        loop.advance()
        mx.synchronize()
        held.append(mx.get_active_memory() - weights - start)
        peaks.append(mx.get_peak_memory() - weights - start)
    assert loop.active, "the canvas continues, so its signal is needed"
    return held, peaks


@pytest.mark.parametrize("coverage", [None, 0.999999], ids=["dense", "sparse"])
@pytest.mark.parametrize("rows", [1, 3])
def test_no_logits_live_through_the_next_step(wide, coverage, rows):
    held, peaks = steps(wide, coverage, rows)
    assert max(held) < 0.2 * rows * LOGITS
    assert max(peaks[1:]) < 1.1 * peaks[0], "the first step has no step before it"


def test_a_verdict_does_not_hold_the_logits_of_its_text(wide):
    cache = Session(
        wide,
        [5, 6, 7],
        ReferencePolicy.from_config(wide.config.generation),
        Draws(0, VOCABULARY),
        (1,),
        CANVAS,
    ).cache
    first = mx.zeros((VOCABULARY,))
    mx.eval(first)
    mx.synchronize()
    before = mx.get_active_memory()
    verdicts = verify(wide, [list(range(3, 3 + CANVAS))], [cache], [first])
    mx.synchronize()
    assert mx.get_active_memory() - before < 0.2 * LOGITS
    assert len(verdicts) == 1
