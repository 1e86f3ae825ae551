"""Measures the time and the peak memory of reading a long prompt, from 1k to 128k tokens.

    python bench/prefill.py                        # nano's weights, at any length
    python bench/prefill.py --model path --longest 32768

The peak must grow linearly with the prompt, as its K/V cache does: a n + b.  The record holds the
largest relative distance from that line.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_diffgemma import nano
from mlx_diffgemma.checkpoint import hub
from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.decoding.prefill import PREFILL_STEP_SIZE, prefill
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.device import describe
from mlx_diffgemma.estimate.cost import cache_bytes
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.sampling.draws import Draws
from mlx_diffgemma.sampling.policy import ReferencePolicy

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=nano.NAME)
    parser.add_argument("--longest", type=int, default=131_072)
    parser.add_argument("--chunk", type=int, default=PREFILL_STEP_SIZE)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "bench" / "results" / "prefill-nano.json"
    )
    arguments = parser.parse_args()
    model = load_model(hub.resolve(arguments.model))
    rows: list[dict[str, Any]] = []
    length = 1024
    while length <= arguments.longest:
        rows.append(measure(model, length, arguments.chunk))
        print(rows[-1], flush=True)
        length *= 2
    # The shortest prompts do not fill a chunk or the window; the line is that of those that do.
    long = [row for row in rows if row["tokens"] >= 2 * arguments.chunk]
    n, peak = (
        np.array([row[key] for row in long], dtype=np.float64) for key in ("tokens", "peak_bytes")
    )
    slope, intercept = np.polyfit(n, peak, 1, w=1 / peak)  # relative residuals
    residual = float(np.abs((slope * n + intercept) / peak - 1).max())
    per_token, sliding = cache_bytes(model.config.text, 4 if model.dtype == mx.float32 else 2)
    record = {
        "command": f"python bench/prefill.py --longest {arguments.longest}",
        "rows": rows,
        "bytes_per_token": slope,
        "bytes_fixed": intercept,
        "largest_residual": residual,
        "cache_bytes_per_token": per_token,
        "sliding_cache_bytes": sliding,
        "model": nano.VERSION if arguments.model == nano.NAME else arguments.model,
        "chunk": arguments.chunk,
        "machine": describe(model.dtype),
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    plot(record, arguments.output.with_suffix(".png"))
    print(json.dumps(record))


def measure(model: DiffusionGemma, length: int, chunk: int) -> dict[str, Any]:
    # Positions beyond what the checkpoint promises are as much work as any.
    config = model.config.generation
    ids = np.random.default_rng(0).integers(20, model.config.text.vocab_size, length)
    session = Session(
        model,
        ids.tolist(),
        ReferencePolicy.from_config(config),
        Draws(0, model.config.text.vocab_size),
        (),
        1,
    )
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    began = time.perf_counter()
    prefill(model, [session], chunk)
    seconds = time.perf_counter() - began
    return {
        "tokens": length,
        "seconds": seconds,
        "tokens_per_second": length / seconds,
        "peak_bytes": mx.get_peak_memory() - before,
        "cache_bytes": session.cache.nbytes,
    }


def plot(record: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    n = [row["tokens"] for row in record["rows"]]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    axes[0].plot(
        n, [row["peak_bytes"] / 1e6 for row in record["rows"]], "o", label="peak above the weights"
    )
    axes[0].plot(
        n,
        [(record["bytes_per_token"] * x + record["bytes_fixed"]) / 1e6 for x in n],
        label="a n + b",
    )
    axes[0].plot(n, [row["cache_bytes"] / 1e6 for row in record["rows"]], "--", label="K/V cache")
    axes[0].set(
        xscale="log",
        yscale="log",
        xlabel="tokens",
        ylabel="MB",
        title=f"{record['model']}, prefill",
    )
    axes[0].legend()
    axes[1].plot(n, [row["tokens_per_second"] for row in record["rows"]], "o-")
    axes[1].set(
        xscale="log",
        xlabel="tokens",
        ylabel="tokens a second",
        title=f"BLAS: {record['machine']['blas']}",
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
