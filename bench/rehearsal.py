"""Writes, loads and runs a whole checkpoint of random weights at the released shape.

It is loaded by the ordinary path.

    python bench/rehearsal.py WORK_FOLDER                          # both recipes, every stage; hours on a CPU
    python bench/rehearsal.py WORK_FOLDER --recipes 4bit --stages make,load,ar,step
    python bench/rehearsal.py WORK_FOLDER --layers 2 --output /tmp/r.json      # the same code, small

Each stage runs in a separate process, so that its peak memory can be measured:

    make     write the checkpoint tensor by tensor (15.4 GB for 4bit)
    info     `mlx-diffgemma info`
    load     load it; resident memory beside what `estimate` counts for this machine
    ar       one token left to right after 16 tokens
    step     one denoising step of a short canvas after 16 tokens
    image    an image of 70 soft tokens through the tower, then one denoising step
    serve    `mlx-diffgemma serve`, and one request
    prompt   a prompt of --prompt-tokens, then one token
    remove   delete the checkpoint

A stage is recorded under its recipe as soon as it has run, so stages may run on different days.  A
watchdog ends a stage when the machine has less than --keep-free bytes left.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import PIL.Image
from documents import put_table

from mlx_diffgemma import load, nano, stream_generate
from mlx_diffgemma.checkpoint.layouts import row_slices
from mlx_diffgemma.checkpoint.options import ConvertOptions
from mlx_diffgemma.checkpoint.outputs import Output
from mlx_diffgemma.checkpoint.plan import Conversion, plan
from mlx_diffgemma.checkpoint.writer import write_files
from mlx_diffgemma.device import compute_dtype, describe
from mlx_diffgemma.estimate import cost
from mlx_diffgemma.files import read_json
from mlx_diffgemma.model.config import FULL, SLIDING, ModelConfig, released_config
from mlx_diffgemma.model.recipes import Precision, recipe_named
from mlx_diffgemma.safetensors import SafetensorsWriter, Stored

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "rehearsal.json"
STAGES = ("make", "info", "load", "ar", "step", "image", "serve", "prompt", "remove")
RECIPES = ("4bit", "3bit-small")
SHORT = 16  # tokens of a short prompt
CANVAS = 8  # positions of a short canvas
POOL = 2**25  # random numbers that weights are taken from; a slice of rows has at most half of them


# --- writing
# -------------------------------------------------------------------------------------------------------------


def raw_config(layers: int) -> dict[str, Any]:
    """The released config.json with its tower, nano-vision's image tokens, and maybe fewer layers."""
    raw = dict(released_config().raw)
    eyes = read_json(nano.FOLDERS["nano-vision"] / "config.json")
    raw["vision_config"] = raw.pop("released_vision_config")
    raw |= {
        key: eyes[key] for key in ("boi_token_id", "eoi_token_id", "image_token_id", "eos_token_id")
    }
    raw["vision_soft_tokens_per_image"] = 70
    raw["text_config"] = raw["text_config"] | {
        "num_hidden_layers": layers,
        "layer_types": [
            FULL if (i + 1) % 6 == 0 or i + 1 == layers else SLIDING for i in range(layers)
        ],
    }
    return raw


def planned(folder: Path, layers: int, recipe: str) -> Conversion:
    """What `convert --recipe` would write for a bfloat16 checkpoint of that shape; no such
    checkpoint is needed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "small-files"
    shutil.copytree(
        nano.FOLDERS["nano-vision"],
        source,
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("*.safetensors", "*.index.json", "README.md"),
    )
    raw = raw_config(layers)
    (source / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    stored = {
        name: Stored(name, source / "none.safetensors", "BF16", shape, 0, 0)
        for name, shape in cost.shapes(ModelConfig.from_dict(raw), with_tower=True).items()
    }
    return plan("random", source, stored, ConvertOptions(recipe=recipe))


def write_random(conversion: Conversion, target: Path, after_tensor: Callable[[], None]) -> None:
    """Write every output of ``conversion`` with random weights of the scale of trained ones."""
    target.mkdir(parents=True, exist_ok=True)
    for name, outputs in conversion.shards().items():
        arrays = {key: array for output in outputs for key, array in output.arrays.items()}
        writer = SafetensorsWriter(target / name, arrays, {"format": "mlx"})
        try:
            for output in outputs:
                for key, (dtype, shape) in output.arrays.items():
                    write_array(writer, key, dtype, shape, output)
                after_tensor()
        finally:
            writer.close()
    write_files(conversion, target, None)


def write_array(
    writer: SafetensorsWriter, key: str, dtype: mx.Dtype, shape: tuple[int, ...], output: Output
) -> None:
    offset = 0
    for start, stop in row_slices(shape):
        size = (stop - start, shape[-1] if shape else 1)
        offset = writer.write(
            key, offset, random_rows(key, dtype, size, output.after, output.shape)
        )


def random_rows(
    key: str,
    dtype: mx.Dtype,
    size: tuple[int, int],
    precision: Precision | None,
    shape: tuple[int, ...],
) -> mx.array:
    """Packed bits are uniform, and scales and biases such that the weights have mean 0 and variance
    1 / columns.
    """
    columns = shape[-1] if shape else 1
    wanted = 1.0 if "embed_tokens" in key else columns**-0.5
    if dtype == mx.uint32:
        return drawn("bits", size)
    if precision is not None:
        top = 2**precision.bits - 1
        scale = wanted * 12**0.5 / top
        return mx.full(size, -scale * top / 2 if key.endswith("biases") else scale).astype(dtype)
    if len(shape) > 1:
        return (drawn("normal", size) * wanted).astype(dtype)
    return mx.ones(size, dtype=dtype)


@cache
def pool(kind: str) -> mx.array:
    """Random numbers drawn once; drawing each weight would take ten times as long as writing it."""
    bits = mx.random.randint(0, 2**32 - 1, (POOL,), dtype=mx.uint32)
    made = mx.random.normal((POOL,)) if kind == "normal" else bits
    mx.eval(made)
    return made


def drawn(kind: str, size: tuple[int, int]) -> mx.array:
    """[rows, columns] of the pool from a random place on."""
    count = math.prod(size)
    start = random.randrange(POOL - count)
    return pool(kind)[start : start + count].reshape(size)


# --- measuring
# -----------------------------------------------------------------------------------------------------------


def status(field: str, process: int | str = "self") -> int:
    """Bytes of a process by /proc: VmRSS is resident now, VmHWM at most so far."""
    line = next(
        line
        for line in Path(f"/proc/{process}/status").read_text().splitlines()
        if line.startswith(f"{field}:")
    )
    return int(line.split()[1]) * 1024


PYTHON_BYTES = status("VmRSS")  # Python and the imported packages, before any model


def available() -> int:
    """Bytes that the machine could still give out."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def watch(keep_free: int) -> None:
    """End this process, and nobody else's, when the machine runs out of memory."""

    def run() -> None:
        while True:
            if available() < keep_free:
                print(
                    f"stopped: less than {keep_free / 1e9:.1f} GB of memory left",
                    file=sys.stderr,
                    flush=True,
                )
                os._exit(9)
            time.sleep(0.2)

    threading.Thread(target=run, daemon=True).start()


def measured(began: float, **more: Any) -> dict[str, Any]:
    """What a stage is recorded as: its time, and this process's memory now and at its peak."""
    mx.synchronize()
    return {
        "seconds": round(time.perf_counter() - began, 2),
        "resident_bytes": status("VmRSS"),
        "peak_resident_bytes": status("VmHWM"),
        "python_bytes": PYTHON_BYTES,
        "mlx_active_bytes": mx.get_active_memory(),
        "mlx_peak_bytes": mx.get_peak_memory(),
        **more,
    }


# --- stages
# --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One recipe of one run."""

    recipe: str
    folder: Path
    layers: int
    prompt_tokens: int
    canvas: int

    def memory(self, context: int, tower: bool = False, patches: int = 0) -> dict[str, int]:
        """What `estimate` counts for this machine, in bytes by part; a step has a shorter canvas
        than the checkpoint's.
        """
        config = replace(ModelConfig.from_folder(self.folder), canvas_length=self.canvas)
        found = cost.run_memory(
            config, recipe_named(self.recipe), context, compute_dtype(mx.bfloat16), tower, patches
        )
        return asdict(found) | {"total": found.total}

    def load(self) -> tuple[Any, Any]:
        return load(str(self.folder))

    def ids(self, count: int) -> list[int]:
        return np.random.default_rng(0).integers(100, 1000, count).tolist()


def make(case: Case) -> dict[str, Any]:
    began = time.perf_counter()
    mx.random.seed(0)
    random.seed(0)
    conversion = planned(
        case.folder.with_name(f"{case.folder.name}-source"), case.layers, case.recipe
    )
    write_random(conversion, case.folder, mx.clear_cache)
    shutil.rmtree(conversion.folder.parent)
    stored = sum(path.stat().st_size for path in case.folder.glob("*.safetensors"))
    return measured(
        began,
        stored_bytes=stored,
        files=len(list(case.folder.glob("*.safetensors"))),
        bits_per_weight=conversion.bits_per_weight,
    )


def info(case: Case) -> dict[str, Any]:
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "mlx_diffgemma", "info", str(case.folder), "--json"],
        check=True,
        capture_output=True,
        text=True,
    )
    found = json.loads(done.stdout)
    kept = (
        "parameters",
        "active_parameters",
        "stored_bytes",
        "bits_per_weight",
        "vision",
        "layers",
    )
    return measured(began, **{name: found[name] for name in kept})


def load_only(case: Case) -> dict[str, Any]:
    """The tower's weights are read when the first image comes, so they are not among what is
    resident here.
    """
    began = time.perf_counter()
    kept = case.load()
    counted = case.memory(0)
    found = measured(began, counted=counted)
    del kept
    return found | {"resident_to_counted": found["mlx_active_bytes"] / counted["weights"]}


def left_to_right(case: Case) -> dict[str, Any]:
    model, tokenizer = case.load()
    began = time.perf_counter()
    (last,) = list(stream_generate(model, tokenizer, case.ids(SHORT), 1, mode="ar"))
    return measured(began, tokens=len(last.tokens), prompt_tokens=SHORT, counted=case.memory(SHORT))


def step(case: Case) -> dict[str, Any]:
    model, tokenizer = case.load()
    began = time.perf_counter()
    last = answer(model, tokenizer, case.ids(SHORT), case.canvas)
    return measured(
        began,
        steps=last.steps,
        canvas=case.canvas,
        prompt_tokens=SHORT,
        counted=case.memory(SHORT + case.canvas),
    )


def image(case: Case) -> dict[str, Any]:
    """Noise of 500 x 500 pixels, 70 soft tokens of it."""
    model, tokenizer = case.load()
    began = time.perf_counter()
    pixels = np.random.default_rng(0).integers(0, 256, (500, 500, 3), dtype=np.uint8)
    ids = [*case.ids(SHORT), model.config.image_tokens.image]
    request = {"images": [PIL.Image.fromarray(pixels)], "image_tokens": 70}
    last = answer(model, tokenizer, ids, case.canvas, **request)
    return measured(
        began,
        steps=last.steps,
        prompt_tokens=last.prompt_tokens,
        counted=case.memory(last.prompt_tokens + case.canvas, tower=True, patches=70 * 9),
    )


def prompt(case: Case) -> dict[str, Any]:
    model, tokenizer = case.load()
    began = time.perf_counter()
    (last,) = list(stream_generate(model, tokenizer, case.ids(case.prompt_tokens), 1, mode="ar"))
    return measured(
        began,
        tokens=len(last.tokens),
        prompt_tokens=case.prompt_tokens,
        counted=case.memory(case.prompt_tokens),
    )


def serve(case: Case) -> dict[str, Any]:
    """One completion of one canvas and one step."""
    began = time.perf_counter()
    command = [
        sys.executable,
        "-m",
        "mlx_diffgemma",
        "serve",
        "--model",
        str(case.folder),
        "--port",
        "0",
        "--max-denoising-steps",
        "1",
        "--log-level",
        "warning",
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        address = line.split(" is at ")[1].split(": ")[0]
        ready = time.perf_counter() - began
        body = {
            "model": "default",
            "prompt": "Why is the sky blue?",
            "max_tokens": case.canvas,
            "canvas_length": case.canvas,
        }
        asked = urllib.request.Request(
            f"{address}/v1/completions",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        answered = ask(asked)
        return measured(
            began,
            ready_seconds=round(ready, 2),
            usage=answered["usage"],
            counted=case.memory(SHORT + case.canvas),
            resident_bytes_of_server=status("VmRSS", server.pid),
            peak_resident_bytes_of_server=status("VmHWM", server.pid),
        )
    finally:
        server.terminate()
        server.wait(60)


def ask(request: urllib.request.Request) -> dict[str, Any]:
    """The server's answer; it says where it is a moment before it listens there."""
    for attempt in range(60):
        try:
            with urllib.request.urlopen(request, timeout=3600) as reply:
                found: dict[str, Any] = json.loads(reply.read())
                return found
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError) or attempt == 59:
                raise
            time.sleep(1)
    raise AssertionError("unreachable")


def remove(case: Case) -> dict[str, Any]:
    began = time.perf_counter()
    shutil.rmtree(case.folder)
    return measured(began)


def answer(model: Any, tokenizer: Any, ids: list[int], canvas: int, **options: Any) -> Any:
    """The last response of one canvas in one step."""
    return list(
        stream_generate(
            model,
            tokenizer,
            ids,
            canvas,
            canvas_length=canvas,
            max_denoising_steps=1,
            seed=0,
            **options,
        )
    )[-1]


RUN: dict[str, Callable[[Case], dict[str, Any]]] = {
    "make": make,
    "info": info,
    "load": load_only,
    "ar": left_to_right,
    "step": step,
    "image": image,
    "serve": serve,
    "prompt": prompt,
    "remove": remove,
}


# --- record
# --------------------------------------------------------------------------------------------------------------


def table(record: dict[str, Any]) -> str:
    lines = [
        "| recipe | stage | seconds | resident, GB | counted, GB | resident to counted | peak, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for recipe, stages in record["recipes"].items():
        for stage in (name for name in STAGES if name in stages and name != "remove"):
            row = stages[stage]
            peak = row.get("peak_resident_bytes_of_server", row["peak_resident_bytes"])
            resident = row.get("resident_bytes_of_server", row["resident_bytes"])
            counted, share = "", ""
            if "counted" in row:
                held = sum(row["counted"][part] for part in ("weights", "tower", "cache"))
                counted, share = f"{held / 1e9:.2f}", f"{resident / held:.3f}"
            lines.append(
                f"| {recipe} | {described(stage, row)} | {row['seconds']:,.1f} | {resident / 1e9:.2f} | "
                f"{counted} | {share} | {peak / 1e9:.2f} |"
            )
    return "\n".join(lines)


def described(stage: str, row: dict[str, Any]) -> str:
    words = {
        "make": "written to disk",
        "info": "`info`",
        "load": "loaded",
        "ar": "one token left to right",
        "step": f"one step of {row.get('canvas')} positions",
        "image": "an image, and a step",
        "serve": "`serve`, one request",
        "prompt": f"a prompt of {row.get('prompt_tokens', 0):,} tokens",
    }
    return words[stage]


def run_stage(arguments: argparse.Namespace, recipe: str, stage: str) -> dict[str, Any]:
    """In a process of its own; what it prints is its record.  Errors: SystemExit when the stage
    failed.
    """
    command = [
        sys.executable,
        __file__,
        str(arguments.work),
        "--only",
        stage,
        "--recipes",
        recipe,
        "--layers",
        str(arguments.layers),
        "--prompt-tokens",
        str(arguments.prompt_tokens),
        "--canvas",
        str(arguments.canvas),
        "--keep-free",
        str(arguments.keep_free),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"{recipe}, {stage}: failed with exit status {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "work",
        type=Path,
        nargs="?",
        help="folder for the checkpoints: 15.4 GB at the released size",
    )
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument(
        "--canvas", type=int, default=CANVAS, help="positions of the canvas that is denoised"
    )
    parser.add_argument(
        "--keep-free",
        type=int,
        default=1_500_000_000,
        help="bytes of memory that other programs keep",
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument(
        "--table", action="store_true", help="only make the table in docs/metal.md from the record"
    )
    parser.add_argument("--only", choices=STAGES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        watch(arguments.keep_free)
        case = Case(
            arguments.recipes,
            arguments.work / arguments.recipes,
            arguments.layers,
            arguments.prompt_tokens,
            arguments.canvas,
        )
        print(json.dumps(RUN[arguments.only](case)))
        return
    if not arguments.table:
        if arguments.work is None:
            raise SystemExit("Give a folder to work in; the checkpoints take 15.4 GB there.")
        for recipe in arguments.recipes.split(","):
            for stage in arguments.stages.split(","):
                found = run_stage(arguments, recipe, stage)
                put(arguments, recipe, stage, found)
                print(recipe, stage, json.dumps(found), flush=True)
    if arguments.output == RESULTS:
        put_table(
            "metal.md", "rehearsal.py", table(json.loads(RESULTS.read_text(encoding="utf-8")))
        )


def put(arguments: argparse.Namespace, recipe: str, stage: str, found: dict[str, Any]) -> None:
    """Add to the record; another kind of machine or number of layers starts a new one.

    The build of the operating system may differ: it decides neither memory nor kernels.
    """
    record: dict[str, Any] = {}
    if arguments.output.exists():
        record = json.loads(arguments.output.read_text(encoding="utf-8"))
    machine = describe(mx.float32)
    recorded = {**record.get("machine", {}), "os": machine["os"]}
    if (record.get("layers"), recorded) != (arguments.layers, machine):
        record = {
            "command": "python bench/rehearsal.py WORK",
            "layers": arguments.layers,
            "machine": machine,
            "recipes": {},
        }
    record["recipes"].setdefault(recipe, {})[stage] = found
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
