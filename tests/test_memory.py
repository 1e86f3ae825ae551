"""Memory stays flat over many generations."""

import gc
import os
import subprocess

import mlx.core as mx
import pytest

from mlx_diffgemma import chat_ids, generate


def resident() -> int:
    """Bytes of this process in memory; ps counts KiB on Linux and on macOS."""
    return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(os.getpid())])) * 1024


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::mlx_diffgemma.GenerationWarning")
def test_two_hundred_generations(nano_pair, capsys):
    model, tokenizer = nano_pair
    questions = [
        "Add 12 and 30.",
        "Sort these numbers: 42 17 91",
        "Tell me a story about Leo the owl and a map.",
        "Turn this into JSON: Anna is a red fox.",
    ]
    marks = {}
    for i in range(1, 201):
        prompt = chat_ids(tokenizer, [{"role": "user", "content": questions[i % 4]}])
        options = {"mode": "ar"} if i % 5 == 0 else {"max_denoising_steps": 6}
        generate(model, tokenizer, prompt, seed=i % 7, **options)
        if i in (50, 200):
            gc.collect()
            mx.clear_cache()
            marks[i] = (resident(), mx.get_active_memory())
    with capsys.disabled():
        print(
            f"\nresident after 50: {marks[50][0] / 1e6:.1f} MB, after 200: {marks[200][0] / 1e6:.1f} MB; "
            f"active {marks[50][1]} and {marks[200][1]} bytes"
        )
    assert marks[200][0] <= 1.03 * marks[50][0]
    assert marks[200][1] == marks[50][1]
