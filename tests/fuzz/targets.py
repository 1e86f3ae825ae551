"""What is fuzzed: each target changes one input of a world that is right otherwise, and uses it as
a user would.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from mlx_diffgemma import nano
from mlx_diffgemma.cli import main
from tests.checkpoints import FULL, SLIDING, write_checkpoint
from tests.fuzz.mutate import changed, json_text, some_bytes

ANSWER = ["-m", "4", "--max-denoising-steps", "2", "--seed", "1"]
QUESTIONS = [
    {"prompt": "Add 1 and 2.", "answer": "3"},
    {"prompt": "a", "choices": ["b", "c"], "answer": "b"},
    {"messages": [{"role": "user", "content": "x"}], "schema": {"type": "integer"}},
]
EXAMPLES = [
    {"prompt": "a", "completion": "b"},
    {"text": "c d"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
]
OPTIONS = {
    "iters": 1,
    "batch_size": 1,
    "num_layers": 1,
    "learning_rate": 1e-4,
    "mask_prompt": True,
    "val_batches": 1,
    "lora_parameters": {"rank": 2, "scale": 2.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]},
    "seed": 0,
    "lr_schedule": {"name": "cosine_decay", "warmup": 1, "arguments": [1e-3, 4]},
    "optimizer": "adamw",
    "optimizer_config": {"adamw": {"betas": [0.9, 0.99], "weight_decay": 0.0}},
    "steps_per_eval": 1,
    "canvas_length": 8,
}


class World:
    """A tiny checkpoint with nano's tokenizer, its adapter and prompt cache; targets work on
    copies.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.model = folder / "model"
        vocabulary = json.loads((nano.FOLDER / "config.json").read_text())["text_config"][
            "vocab_size"
        ]
        shape = dict(
            hidden=32,
            heads=4,
            kv=2,
            head_dim=8,
            global_kv=1,
            global_head_dim=16,
            layers=2,
            window=9,
            canvas=16,
            experts=2,
            top_k=1,
            vocab=vocabulary,
            kinds=[SLIDING, FULL],
        )
        write_checkpoint(self.model, shape, calm=False)
        for path in nano.FOLDER.glob("*token*"):
            shutil.copy(path, self.model)
        shutil.copy(nano.FOLDER / "chat_template.jinja", self.model)
        self.data = folder / "data"
        self.data.mkdir()
        (self.data / "train.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in EXAMPLES)
        )
        self.adapter = folder / "adapter"
        self.cache = folder / "cache.safetensors"
        self._run(
            "lora",
            "--train",
            "--model",
            str(self.model),
            "--data",
            str(self.data),
            "--adapter-path",
            str(self.adapter),
            "--iters",
            "1",
            "--batch-size",
            "1",
            "--num-layers",
            "1",
            "--canvas-length",
            "8",
        )
        self._run(
            "generate",
            "--model",
            str(self.model),
            "-p",
            "a",
            "--prompt-cache-file",
            str(self.cache),
            *ANSWER,
        )

    def _run(self, *arguments: str) -> None:
        code, _, err = command(*arguments)
        if code:
            raise RuntimeError(f"the unchanged {arguments[0]} failed: {err}")

    def copy(self, what: Path) -> Path:
        """A fresh copy under a name of its own, in place of the last one."""
        place = self.folder / "changed" / what.name
        if place.parent.exists():
            shutil.rmtree(place.parent)
        place.parent.mkdir()
        if what.is_dir():
            shutil.copytree(what, place)
        else:
            shutil.copy(what, place)
        return place


class FailedError(Exception):
    """An input that ended as none may."""


def command(*arguments: str, stdin: bytes | None = None) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of the command, in this process."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.StringIO()
    before = sys.stdin
    if stdin is not None:
        sys.stdin = io.TextIOWrapper(io.BytesIO(stdin), "utf-8")
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main(list(arguments))
        code: Any = 0
    except SystemExit as left:
        code = left.code or 0
    finally:
        sys.stdin = before
    out.flush()
    return int(code), out.buffer.getvalue().decode("utf-8", "replace"), err.getvalue()


def check(*arguments: str, stdin: bytes | None = None) -> None:
    """The command must end well, or with a sentence."""
    code, _, err = command(*arguments, stdin=stdin)
    if code not in (0, 1, 2) or "Traceback" in err or "defect" in err:
        raise FailedError(f"exit code {code}: {err.strip()[-600:]}")
    if code == 2 and not err.strip():
        raise FailedError("exit code 2 without a word")


def _generate(folder: Path) -> None:
    check("generate", "--model", str(folder), "-p", "Add 1 and 2.", *ANSWER)


def _json_file(name: str) -> Callable[[World, Random], None]:
    def target(world: World, rng: Random) -> None:
        folder = world.copy(world.model)
        (folder / name).write_bytes(json_text(rng, json.loads((folder / name).read_bytes())))
        rng.choice((_generate, _generate, lambda where: check("info", str(where))))(folder)

    return target


def header(world: World, rng: Random) -> None:
    """The header of a safetensors file: lengths, dtypes, shapes and offsets."""
    folder = world.copy(world.model)
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    if rng.random() < 0.8:
        text = json_text(rng, json.loads(content[8 : 8 + size]))
        length = len(text) if rng.random() < 0.9 else rng.choice((0, 1, 2**63, len(content) * 2))
        path.write_bytes(struct.pack("<Q", length) + text + content[8 + size :])
    else:
        path.write_bytes(some_bytes(rng, content[: 8 + size]) + content[8 + size :])
    use = rng.choice(("generate", "info", "convert"))
    if use == "generate":
        _generate(folder)
    elif use == "info":
        check("info", str(folder))
    else:
        check(
            "convert",
            "--hf-path",
            str(folder),
            "--mlx-path",
            str(world.folder / "out"),
            "--dry-run",
        )


def tokenizer(world: World, rng: Random) -> None:
    folder = world.copy(world.model)
    path = folder / "tokenizer.json"
    path.write_bytes(
        some_bytes(rng, path.read_bytes()) if rng.random() < 0.4 else _shallow(rng, path)
    )
    _generate(folder)


def _shallow(rng: Random, path: Path) -> bytes:
    """Changes near the top: the vocabulary's thousands of entries would take nearly all of them."""
    content = json.loads(path.read_bytes())
    vocabulary = content["model"].pop("vocab")
    merges = content["model"].pop("merges", None)
    text = changed(rng, content)
    if isinstance(text, dict) and isinstance(text.get("model"), dict) and rng.random() < 0.9:
        text["model"] |= {"vocab": vocabulary} | ({} if merges is None else {"merges": merges})
    return json.dumps(text).encode("utf-8", "surrogatepass")


TEMPLATES = (
    "{{ messages[0].content.x.y }}",
    "{% for i in range(10**9) %}a{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ 1 / 0 }}",
    "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "{{ messages | tojson(indent=10**9) }}",
    "{{ raise_exception('no') }}",
    "{% if %}",
    "{{ undefined_function() }}",
    "{{ messages[99] }}",
    "{{ ''.__class__.__mro__ }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 'a'.format(*range(10)) }}",
    "{{ 2 ** 10**9 }}",
    "",
    "{% include 'x' %}",
    "{{ messages | sum }}",
    "{{ '%999999999d' % 1 }}",
    "{{ messages | map(attribute='a.b.c') | list }}",
    "{{ [].pop() }}",
)


def template(world: World, rng: Random) -> None:
    folder = world.copy(world.model)
    path = folder / "chat_template.jinja"
    if rng.random() < 0.4:
        path.write_text(rng.choice(TEMPLATES))
    else:
        path.write_bytes(some_bytes(rng, path.read_bytes()))
    _generate(folder)


def adapter(world: World, rng: Random) -> None:
    folder = world.copy(world.adapter)
    if rng.random() < 0.7:
        path = folder / "adapter_config.json"
        path.write_bytes(json_text(rng, json.loads(path.read_bytes())))
    else:
        path = folder / "adapters.safetensors"
        path.write_bytes(some_bytes(rng, path.read_bytes()))
    check(
        "generate", "--model", str(world.model), "--adapter-path", str(folder), "-p", "a", *ANSWER
    )


def cache(world: World, rng: Random) -> None:
    path = world.copy(world.cache)
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    if rng.random() < 0.6:
        text = json_text(rng, json.loads(content[8 : 8 + size]))
        path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])
    else:
        path.write_bytes(some_bytes(rng, content))
    check(
        "generate",
        "--model",
        str(world.model),
        "--prompt-cache-file",
        str(path),
        "-p",
        "a",
        *ANSWER,
    )


def jsonl(world: World, rng: Random) -> None:
    kind = rng.random()
    lines = EXAMPLES if kind < 0.6 else QUESTIONS
    text = b"\n".join(
        json_text(rng, line) if rng.random() < 0.6 else json.dumps(line).encode() for line in lines
    )
    folder = world.copy(world.data)
    (folder / "train.jsonl").write_bytes(some_bytes(rng, text) if rng.random() < 0.1 else text)
    if kind < 0.6:
        check(
            "lora",
            "--train",
            "--model",
            str(world.model),
            "--data",
            str(folder),
            "--adapter-path",
            str(folder / "out"),
            "--iters",
            "1",
            "--batch-size",
            "1",
            "--num-layers",
            "1",
            "--canvas-length",
            "8",
        )
    else:
        check(
            "evaluate",
            "--model",
            str(world.model),
            "--data",
            str(folder / "train.jsonl"),
            "--max-denoising-steps",
            "1",
            "--max-tokens",
            "4",
        )


def yaml_options(world: World, rng: Random) -> None:
    import yaml

    content = OPTIONS | {
        "model": str(world.model),
        "data": str(world.data),
        "adapter_path": str(world.folder / "changed" / "out"),
    }
    path = world.copy(world.data) / "options.yaml"
    made = changed(rng, content)
    # What takes long by right stays small.
    if isinstance(made, dict):
        made |= {
            key: OPTIONS[key]
            for key in ("iters", "canvas_length", "batch_size")
            if rng.random() < 0.9 or (isinstance(made.get(key), int | float) and made[key] > 100)
        }
    try:
        text = yaml.safe_dump(made).encode("utf-8", "surrogatepass")
    except (ValueError, yaml.YAMLError):
        text = b"iters: " + b"9" * 5000
    text = some_bytes(rng, text) if rng.random() < 0.3 else text
    path.write_bytes(text)
    # Where the file has lost the option, its default is a long run.
    check("lora", "--train", "-c", str(path), *(() if b"\niters:" in text else ("--iters", "1")))


VALUES = (
    "0",
    "1",
    "-1",
    "2.5",
    "1e308",
    "nan",
    "inf",
    "99999999999999999999",
    "",
    " ",
    "x",
    "é",
    "\x1f",
    "null",
    "true",
    "{}",
    "[]",
    "{",
    '{"type": "integer"}',
    "a{",
    "(a+)+$",
    "(",
    "a,b",
    ",",
    "auto",
    "0.5",
    "/dev/null",
    "/nowhere/x",
    "~",
    ".",
    "--",
    "<eos>",
    "dense",
    "ar",
    "fast",
    "float32",
    "9" * 5000,
)
# Options that download, serve, wait for a person or write where the values would send them stay
# out.
SHUNNED = {
    "--help",
    "--model",
    "--revision",
    "--trace",
    "--prompt-cache-file",
    "--hf-path",
    "--mlx-path",
    "--upload-repo",
    "--adapter-path",
    "--save-path",
    "--draft-path",
    "--output-dir",
    "--output",
    "--data",
    "--draft-model",
    "--in-place",
    "--prefix-cache-dir",
    "--show",
    "--canvas-length",
    "--image",
    "--video",
    "--resume-adapter-file",
    "--max-batch",
    "--limit",
    "--prompts",
    "--max-tokens",
}
COMMANDS = {
    "generate": ("-p", "Add 1 and 2.", *ANSWER),
    "infill": ("--prefix", "a ", "--suffix", " b", *ANSWER[2:]),
    "decide": ("-p", "a?"),
    "estimate": (),
    "info": (),
    "evaluate": ("--tasks", "nano", "--limit", "1"),
}


def options(world: World, rng: Random) -> None:
    from typer.core import TyperOption

    from mlx_diffgemma.cli.app import load_command

    name = rng.choice(sorted(COMMANDS))
    known = load_command(name)
    arguments = [name, *COMMANDS[name]]
    arguments += (
        [str(world.model)]
        if name == "info"
        else []
        if name == "estimate"
        else ["--model", str(world.model)]
    )
    if name == "evaluate":
        arguments += ["--max-denoising-steps", "1", "--max-tokens", "4"]
    for option in rng.sample(known.params, min(len(known.params), rng.choice((1, 1, 2, 3)))):
        if not isinstance(option, TyperOption) or set(option.opts) & SHUNNED:
            continue
        arguments += [option.opts[0]] if option.is_flag else [option.opts[0], rng.choice(VALUES)]
    check(
        *arguments, stdin=some_bytes(rng, b"text on standard input") if rng.random() < 0.1 else b""
    )


class Bodies:
    """HTTP bodies, against the application in this process over the tiny model."""

    def __init__(self) -> None:
        self.client: Any = None

    def __call__(self, world: World, rng: Random) -> None:
        if self.client is None:
            self._start(world)
        path, body = rng.choice(REQUESTS)
        raw = json_text(rng, body)
        answer = self.client.post(path, content=raw, headers={"content-type": "application/json"})
        if answer.status_code >= 500:
            raise FailedError(
                f"{path} answered {answer.status_code}: {answer.text[:300]} to {raw[:600]!r}"
            )
        if answer.status_code == 200 and "stream" not in str(raw):
            answer.json()

    def _start(self, world: World) -> None:
        from fastapi.testclient import TestClient

        from mlx_diffgemma import load
        from mlx_diffgemma.serving.app import create_app
        from mlx_diffgemma.serving.engine import Engine
        from mlx_diffgemma.serving.settings import Settings

        engine = Engine(lambda: load(str(world.model)))
        engine.start()
        self.client = TestClient(
            create_app(engine, Settings(model="tiny")), raise_server_exceptions=False
        )


TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "integer"}},
            "required": ["a"],
        },
    },
}
SMALL = {"model": "tiny", "max_tokens": 4, "max_denoising_steps": 1, "seed": 1}
REQUESTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], **SMALL}),
    (
        "/v1/chat/completions",
        {
            "messages": [
                {"role": "system", "content": "s"},
                {"role": "user", "content": [{"type": "text", "text": "a"}]},
            ],
            "temperature": 0.5,
            "top_p": 0.9,
            "stop": ["x"],
            "n": 1,
            "logprobs": True,
            "top_logprobs": 2,
            **SMALL,
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "a"}],
            "tools": [TOOL],
            "tool_choice": "auto",
            **SMALL,
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [
                {"role": "user", "content": "a"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "1",
                            "type": "function",
                            "function": {"name": "add", "arguments": '{"a": 1}'},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "1", "content": "2"},
            ],
            "tools": [TOOL],
            **SMALL,
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "a"}],
            "response_format": {
                "type": "json_schema",
                "json_schema": {
                    "name": "x",
                    "schema": {
                        "type": "object",
                        "properties": {"a": {"enum": [1, 2]}},
                        "required": ["a"],
                    },
                },
            },
            **SMALL,
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "a"}],
            "stream": True,
            "stream_options": {"include_usage": True},
            **SMALL,
        },
    ),
    ("/v1/completions", {"prompt": "a", "suffix": "b", **SMALL}),
    ("/v1/completions", {"prompt": ["a", "b"], "echo": True, **SMALL}),
)

TARGETS: dict[str, Callable[[World, Random], None]] = {
    "config": _json_file("config.json"),
    "generation_config": _json_file("generation_config.json"),
    "index": _json_file("model.safetensors.index.json"),
    "tokenizer_config": _json_file("tokenizer_config.json"),
    "header": header,
    "tokenizer": tokenizer,
    "template": template,
    "adapter": adapter,
    "cache": cache,
    "jsonl": jsonl,
    "yaml": yaml_options,
    "options": options,
    "bodies": Bodies(),
}
# How often a target's turn comes; those without a model's load are cheap.
WEIGHTS = {"bodies": 4, "config": 2, "options": 2}
