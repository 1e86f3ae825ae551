"""Measures the peak memory and the time of converting a checkpoint with the released tensor shapes.

    python bench/convert_memory.py WORK_FOLDER          # needs 7 GB of disk for two layers; --layers 30 is the whole model

It writes random weights in the released layout (full embedding, 128 experts, shards of about 1 GB,
no tokenizer).  It converts them with ``python convert.py -q`` in a separate process, and records
the largest resident memory of that process.  The bound is the largest tensor plus 0.6 GB.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_diffgemma.device import describe
from mlx_diffgemma.estimate import cost
from mlx_diffgemma.model.config import FULL, SLIDING, ModelConfig, released_config
from mlx_diffgemma.safetensors import INDEX, SafetensorsWriter

ROOT = Path(__file__).parent.parent
ALLOWANCE = 600_000_000
SLICE = 16_000_000  # numbers drawn at once


def config(layers: int) -> dict[str, Any]:
    """The released config.json with another number of layers, the last one full."""
    raw = copy.deepcopy(dict(released_config().raw))
    raw["text_config"] |= {
        "num_hidden_layers": layers,
        "layer_types": [
            FULL if (i + 1) % 6 == 0 or i + 1 == layers else SLIDING for i in range(layers)
        ],
    }
    return raw | {"vision_config": None}


def make(folder: Path, layers: int) -> int:
    """Write the checkpoint; the bytes of its largest tensor."""
    folder.mkdir(parents=True)
    raw = config(layers)
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    shapes = {
        name.replace("experts.gate_up_proj.weight", "experts.gate_up_proj").replace(
            "experts.down_proj.weight", "experts.down_proj"
        ): shape
        for name, shape in cost.shapes(ModelConfig.from_dict(raw)).items()
    }
    shards: list[dict[str, tuple[mx.Dtype, tuple[int, ...]]]] = [{}]
    for name, shape in shapes.items():
        if sum(2 * math.prod(s) for _, s in shards[-1].values()) > 1e9:
            shards.append({})
        shards[-1][name] = (mx.bfloat16, shape)
    index, largest = {}, 0
    for number, tensors in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        writer = SafetensorsWriter(folder / file, tensors, {"format": "pt"})
        for name, (dtype, shape) in tensors.items():
            index[name], place, size = file, 0, math.prod(shape)
            largest = max(largest, size * dtype.size)
            for start in range(0, size, SLICE):
                drawn = mx.random.normal((min(SLICE, size - start),), scale=shape[-1] ** -0.5)
                place = writer.write(name, place, drawn.astype(dtype))
        writer.close()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}), encoding="utf-8")
    return largest


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "bench" / "results" / "convert-memory.json"
    )
    arguments = parser.parse_args()
    source, target = arguments.work / "released-shapes", arguments.work / "released-shapes-4bit"
    largest = make(source, arguments.layers)
    command = ["convert.py", "--hf-path", str(source), "--mlx-path", str(target), "-q", "--json"]
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, check=True, capture_output=True, text=True
    )
    seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )
    before = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    found = json.loads(done.stdout)
    record = {
        "command": f"python bench/convert_memory.py WORK --layers {arguments.layers}",
        "layers": arguments.layers,
        "checkpoint_bytes": before,
        "shards": len(list(source.glob("*.safetensors"))),
        "largest_tensor_bytes": largest,
        "output_bytes": found["stored_bytes"],
        "bits_per_weight": found["bits_per_weight"],
        "peak_resident_bytes": peak,
        "bound_bytes": largest + ALLOWANCE,
        "within_bound": peak <= largest + ALLOWANCE,
        "seconds": seconds,
        "bytes_per_second": before / seconds,
        "machine": describe(mx.bfloat16),
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))
    shutil.rmtree(source)
    shutil.rmtree(target)
    if not record["within_bound"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
