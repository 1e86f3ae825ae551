"""Conversion: what is written, that it can be trusted, and what a user gets wrong."""

import filecmp
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_map

from mlx_diffgemma import chat_ids, convert, generate, load, nano
from mlx_diffgemma.checkpoint import convert as convert_module
from mlx_diffgemma.checkpoint import layouts, writer
from mlx_diffgemma.checkpoint import outputs as outputs_module
from mlx_diffgemma.checkpoint import plan as plan_module
from mlx_diffgemma.checkpoint.loading import load_model
from mlx_diffgemma.checkpoint.options import ConvertOptions
from mlx_diffgemma.errors import CheckpointWarning, UserError
from mlx_diffgemma.model.cache import Cache
from mlx_diffgemma.model.config import ModelConfig
from mlx_diffgemma.model.generation_config import GenerationConfig
from mlx_diffgemma.model.recipes import RECIPES, kind_of
from mlx_diffgemma.safetensors import INDEX, Stored, read_header, read_headers
from tests.checkpoints import make_checkpoint
from tests.helpers.in_process import run
from tests.helpers.tensors import tensors_of
from tests.variants import few

ROOT = Path(__file__).parents[1]


def same_files(a, b):
    names = sorted(path.name for path in a.iterdir())
    assert names == sorted(path.name for path in b.iterdir())
    assert filecmp.cmpfiles(a, b, names, shallow=False)[0] == names


def logits(model, seed=0):
    """Of a prompt's last row and of a canvas, without and with self-conditioning."""
    mx.random.seed(seed)
    vocabulary, length = model.config.text.vocab_size, model.config.canvas_length
    cache = Cache(model.config.text)
    (last,) = model.encode([mx.random.randint(1, vocabulary, (90,))], [cache], logits="last").logits
    canvas = mx.random.randint(1, vocabulary, (1, length))
    first = model.denoise(canvas, [cache]).logits
    return (
        last,
        first,
        model.denoise(canvas, [cache], model.soft_embed(mx.softmax(first, axis=-1))).logits,
    )


class TestRecipes:
    """For every recipe, on nano."""

    @pytest.mark.parametrize("recipe", few(RECIPES.values(), "4bit", "nvfp4"), ids=lambda r: r.name)
    def test_convert_load_generate(self, recipe, tmp_path):
        model, tokenizer = load(str(convert("nano", tmp_path / "out", recipe=recipe.name)))
        prompt = chat_ids(tokenizer, [{"role": "user", "content": "Sort these numbers: 42 17 91"}])
        assert generate(model, tokenizer, prompt, seed=0) == "17 42 91"

    @pytest.mark.parametrize("recipe", few(RECIPES.values(), "4bit"), ids=lambda r: r.name)
    def test_saved_and_loaded_is_quantised_in_memory(self, recipe, tmp_path):
        saved = load_model(convert("nano", tmp_path / "out", recipe=recipe.name), "float32")
        # MLX's own quantiser on the stored bfloat16 weights, then the cast that loading does
        memory = load_model(nano.FOLDER, "bfloat16")

        def predicate(path, layer):
            precision = (
                recipe.precision_of(kind_of(path), layer.weight.shape[-1])
                if hasattr(layer, "to_quantized")
                else None
            )
            return vars(precision) if precision else False

        nn.quantize(memory, class_predicate=predicate)
        memory.update(
            tree_map(
                lambda x: x.astype(mx.float32) if mx.issubdtype(x.dtype, mx.floating) else x,
                memory.parameters(),
            )
        )
        for a, b in zip(logits(saved), logits(memory)):
            assert mx.array_equal(a, b)

    @pytest.mark.parametrize("recipe", few(RECIPES, "4bit"))
    def test_twice_gives_the_same_files(self, recipe, tmp_path):
        same_files(*(convert("nano", tmp_path / name, recipe=recipe) for name in ("one", "two")))

    @pytest.mark.parametrize(
        "recipe",
        few([r for r in RECIPES.values() if r.quantises], "4bit-bf16-core", "nvfp4"),
        ids=lambda r: r.name,
    )
    def test_every_class_gets_its_precision(self, recipe, tmp_path):
        source = make_checkpoint(tmp_path / "src", "divisible", vision="divisible")
        folder = convert(str(source), tmp_path / "out", recipe=recipe.name)
        tensors = tensors_of(folder)
        for name, original in tensors_of(source).items():
            path = name.removesuffix(".weight")
            is_matrix = original.ndim > 1 and "position" not in name
            precision = (
                recipe.precision_of(kind_of(path), original.shape[-1]) if is_matrix else None
            )
            if precision is None or "down_proj.linear" in name or "input_proj" in name:
                assert mx.array_equal(tensors[name], original), name
            else:
                expected = precision.quantize(original)
                for suffix, array in expected.items():
                    assert mx.array_equal(tensors[f"{path}.{suffix}"], array), (name, suffix)

    @pytest.mark.parametrize(
        "recipe", few([r.name for r in RECIPES.values() if r.quantises], "4bit", "nvfp4")
    )
    def test_dequantised_is_what_the_packed_weights_mean(self, recipe, tmp_path):
        packed = convert("nano", tmp_path / "q", recipe=recipe)
        plain = convert(str(packed), tmp_path / "d", dequantize=True, dtype="float32")
        assert "quantization" not in json.loads((plain / "config.json").read_text())
        assert tensors_of(plain).keys() == tensors_of(nano.FOLDER).keys()
        for a, b in zip(logits(load_model(packed, "float32")), logits(load_model(plain))):
            assert mx.abs(a - b).max() < 1e-4

    def test_uniform_4bit_is_further_from_the_original(self, tmp_path):
        """By the divergence of the denoiser's logits, several times over; bench/recipes.py has the
        whole table.
        """
        original = load_model(nano.FOLDER)

        def divergence(recipe):
            model, total = load_model(convert("nano", tmp_path / recipe, recipe=recipe)), 0.0
            for seed in range(2):
                p, q = (
                    x - mx.logsumexp(x, axis=-1, keepdims=True)
                    for x in (logits(m, seed)[1] for m in (original, model))
                )
                total += (mx.exp(p) * (p - q)).sum(axis=-1).mean().item()
            return total

        assert divergence("uniform-4bit") > 3 * divergence("4bit")


class TestWhatIsKept:
    def test_unquantised_conversion_changes_no_weight(self, tmp_path):
        folder = convert("nano", tmp_path / "out")
        ours, theirs = tensors_of(nano.FOLDER), tensors_of(folder)
        assert ours.keys() == theirs.keys()
        assert all(
            mx.array_equal(array, theirs[name]) and array.dtype == theirs[name].dtype
            for name, array in ours.items()
        )

    def test_files(self, tmp_path):
        source = shutil.copytree(nano.FOLDER, tmp_path / "src")
        for name in (
            "processor_config.json",
            "preprocessor_config.json",
            "LICENSE.txt",
            "pytorch_model.bin.index.json",
            "run.py",
        ):
            (source / name).write_text("{}")
        folder = convert(str(source), tmp_path / "out", recipe="4bit")
        assert {p.name for p in folder.iterdir()} == {
            "README.md",
            "config.json",
            "generation_config.json",
            "model.safetensors",
            INDEX,
            "chat_template.jinja",
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer_config.json",
            "processor_config.json",
            "preprocessor_config.json",
            "LICENSE.txt",
        }
        for name in ("tokenizer.json", "chat_template.jinja", "tokenizer.model"):
            assert (folder / name).read_bytes() == (source / name).read_bytes()

    def test_both_thresholds_and_the_older_dialect(self, tmp_path):
        source = make_checkpoint(tmp_path / "src", "full-only")  # in the newer dialect
        generation = {"eos_token_id": [1, 6], "confidence_threshold": None, "max_new_tokens": 9}
        (source / "generation_config.json").write_text(json.dumps(generation))
        folder = convert(str(source), tmp_path / "out")
        raw, written = (
            json.loads((folder / name).read_text())
            for name in ("config.json", "generation_config.json")
        )
        assert raw["generation_config"] == written
        assert written["confidence_threshold"] == GenerationConfig().confidence_threshold
        assert written["stability_threshold"] == GenerationConfig().stability_threshold
        assert (written["eos_token_id"], written["max_new_tokens"]) == ([1, 6], 9)
        assert "per_layer_config" not in raw["text_config"]
        assert ModelConfig.from_folder(folder) == ModelConfig.from_folder(source)

    def test_no_tokenizer_is_needed(self, divisible_folder, tmp_path):
        assert not list(divisible_folder.glob("tokenizer*"))
        convert(str(divisible_folder), tmp_path / "out", quantize=True)

    def test_a_vision_config_without_weights_goes(self, divisible_folder, tmp_path):
        source = shutil.copytree(divisible_folder, tmp_path / "src")
        raw = json.loads((source / "config.json").read_text()) | {
            "vision_config": {"model_type": "gemma4_vision"}
        }
        (source / "config.json").write_text(json.dumps(raw))
        assert (
            json.loads((convert(str(source), tmp_path / "out") / "config.json").read_text())[
                "vision_config"
            ]
            is None
        )

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
    def test_dtype(self, dtype, tmp_path):
        folder = convert("nano", tmp_path / "out", recipe="4bit", dtype=dtype)
        assert {str(a.dtype).removeprefix("mlx.core.") for a in tensors_of(folder).values()} == {
            dtype,
            "uint32",
        }
        raw = json.loads((folder / "config.json").read_text())
        assert raw["dtype"] == raw["text_config"]["dtype"] == dtype

    def test_a_quantised_source_stays_as_it_is(self, tmp_path):
        first = convert("nano", tmp_path / "q", recipe="mxfp4")
        again = convert(str(first), tmp_path / "again")
        assert (again / "model.safetensors").read_bytes() == (
            first / "model.safetensors"
        ).read_bytes()

    def test_whose_conversion_it_is(self, divisible_folder, tmp_path):
        """Ours keeps its recipe's name; a stranger's does not become ours by being copied."""
        ours = convert(str(divisible_folder), tmp_path / "ours", recipe="uniform-4bit")
        copied = convert(str(ours), tmp_path / "copied", dtype="bfloat16")
        assert (
            json.loads((copied / "config.json").read_text())["mlx_diffgemma"]["recipe"]
            == "uniform-4bit"
        )
        raw = json.loads((ours / "config.json").read_text())
        del raw["mlx_diffgemma"]
        (ours / "config.json").write_text(json.dumps(raw))
        strange = convert(str(ours), tmp_path / "strange", dtype="bfloat16")
        with pytest.warns(CheckpointWarning, match="attention at 4 bits"):
            load_model(strange)

    def test_shards(self, divisible_folder, tmp_path, monkeypatch):
        limit = 300_000
        monkeypatch.setattr(plan_module, "SHARD_SIZE", limit)
        whole = tensors_of(convert(str(divisible_folder), tmp_path / "out", recipe="4bit"))
        self.check_sizes(tmp_path / "out", limit)
        index = json.loads((tmp_path / "out" / INDEX).read_text())
        assert len(set(index["weight_map"].values())) > 3
        assert index["weight_map"].keys() == whole.keys()
        assert index["metadata"]["total_size"] == sum(array.nbytes for array in whole.values())
        monkeypatch.undo()
        other = tensors_of(convert(str(divisible_folder), tmp_path / "one", recipe="4bit"))
        assert all(mx.array_equal(array, other[name]) for name, array in whole.items())
        load_model(tmp_path / "out")

    def check_sizes(self, folder, limit):
        """Every file is closed when the next matrix, with its scales, would not fit, and no
        earlier.
        """
        modules = []
        for path in sorted(folder.glob("*.safetensors")):
            sizes = {}
            for name, tensor in sorted(read_header(path).items(), key=lambda item: item[1].offset):
                module = (
                    name.removesuffix(".scales").removesuffix(".biases").removesuffix(".weight")
                )
                sizes[module] = sizes.get(module, 0) + tensor.nbytes
            modules.append(list(sizes.values()))
        assert all(sum(own) <= limit or len(own) == 1 for own in modules)
        assert all(
            sum(own) + following[0] > limit for own, following in itertools.pairwise(modules)
        )

    def test_card(self, tmp_path):
        source = shutil.copytree(nano.FOLDER, tmp_path / "small")
        (source / "README.md").write_text("---\nlicense: gemma\nbase_model: someone/base\n---\n")
        text = (
            convert(str(source), tmp_path / "out", quantize=True, q_bits=3) / "README.md"
        ).read_text()
        for part in (
            "license: gemma",
            "base_model: someone/base",
            "base_model_relation: quantized",
            "library_name: mlx",
            "- mlx",
            "mlx-diffgemma convert --hf-path small -q --q-bits 3",
            "5.99 bits per weight",
            "generate --model .",
        ):
            assert part in text, part

    @pytest.mark.slow
    def test_the_cards_command_works(self, tmp_path):
        folder = convert("nano", tmp_path / "out", quantize=True)
        line = next(
            line
            for line in (folder / "README.md").read_text().splitlines()
            if line.startswith("mlx-diffgemma generate")
        )
        words = line.split(' -p "')[0].split()[1:]
        out = subprocess.run(
            [sys.executable, "-m", "mlx_diffgemma", *words, "-p", "Add 12 and 30."],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
        assert out.stdout == "42\n"

    def test_a_slice_is_all_that_is_read_at_once(self, divisible_folder, tmp_path, monkeypatch):
        largest, rows = 0, Stored.rows

        def spy(self, start, stop):
            nonlocal largest
            largest = max(largest, 4 * (stop - start) * self.columns)
            return rows(self, start, stop)

        monkeypatch.setattr(Stored, "rows", spy)
        monkeypatch.setattr(layouts, "SLICE", 30_000)
        convert(str(divisible_folder), tmp_path / "out", recipe="4bit")
        assert 15_000 < largest <= 30_000

    def test_slices_do_not_show(self, divisible_folder, tmp_path, monkeypatch):
        whole = convert(str(divisible_folder), tmp_path / "whole", recipe="nvfp4")
        monkeypatch.setattr(layouts, "SLICE", 3 * 4 * 128)
        same_files(whole, convert(str(divisible_folder), tmp_path / "slices", recipe="nvfp4"))


class Killed(BaseException):
    """Stands for a signal that leaves no time for anything."""


def state_is_sound(target, unbroken):
    """After an interruption the target is absent or right, and what lies beside it is no
    checkpoint, or right.
    """
    if target.exists():
        same_files(unbroken, target)
    partial = target.with_name(f"{target.name}.partial")
    if partial.exists():
        with pytest.raises(UserError, match="config.json"):
            load_model(partial)
    if (partial / "result" / "config.json").exists():
        load_model(partial / "result")


class TestInterruption:
    def test_resumed_is_unbroken_at_every_kind_of_point(
        self, divisible_folder, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(plan_module, "SHARD_SIZE", 300_000)
        unbroken = convert(str(divisible_folder), tmp_path / "unbroken", recipe="4bit")
        pwrite, calls, stop = os.pwrite, 0, 0

        def counted(*arguments):
            nonlocal calls
            calls += 1
            if calls == stop:
                raise Killed
            return pwrite(*arguments)

        monkeypatch.setattr(os, "pwrite", counted)
        convert(str(divisible_folder), tmp_path / "count", recipe="4bit")
        points = calls
        for number, point in enumerate(
            [1, 2, points, *random.Random(0).sample(range(3, points), 7)]
        ):
            target, calls, stop = tmp_path / f"t{number}", 0, point
            with pytest.raises(Killed):
                convert(str(divisible_folder), target, recipe="4bit")
            state_is_sound(target, unbroken)
            stop, before = 0, calls
            convert(str(divisible_folder), target, recipe="4bit", resume=True)
            same_files(unbroken, target)
            assert not target.with_name(f"{target.name}.partial").exists()
            if point > points // 2:
                assert calls - before < points, "what was finished is not made again"

    def test_a_journal_cut_off_in_a_line(self, divisible_folder, tmp_path, monkeypatch):
        unbroken = convert(str(divisible_folder), tmp_path / "unbroken", recipe="4bit")
        monkeypatch.setattr(writer, "write_files", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            convert(str(divisible_folder), tmp_path / "out", recipe="4bit")
        monkeypatch.undo()
        journal = tmp_path / "out.partial" / "conversion.jsonl"
        journal.write_text(journal.read_text()[:-7])
        same_files(
            unbroken, convert(str(divisible_folder), tmp_path / "out", recipe="4bit", resume=True)
        )

    def test_other_options_do_not_resume(self, divisible_folder, tmp_path, monkeypatch):
        monkeypatch.setattr(writer, "write_files", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            convert(str(divisible_folder), tmp_path / "out", recipe="4bit")
        with pytest.raises(
            UserError,
            match="with other options or another version; add --overwrite without --resume",
        ):
            convert(str(divisible_folder), tmp_path / "out", recipe="8bit", resume=True)
        with pytest.raises(UserError, match="An interrupted conversion lies in .*add --resume"):
            convert(str(divisible_folder), tmp_path / "out", recipe="8bit")
        monkeypatch.undo()
        convert(str(divisible_folder), tmp_path / "out", recipe="8bit", overwrite=True)
        same_files(
            tmp_path / "out", convert(str(divisible_folder), tmp_path / "fresh", recipe="8bit")
        )

    def interrupted(self, source, target, monkeypatch):
        with monkeypatch.context() as patch:
            patch.setattr(writer, "write_files", lambda *_: (_ for _ in ()).throw(Killed()))
            with pytest.raises(Killed):
                convert(str(source), target, recipe="4bit")
        return target.with_name(f"{target.name}.partial")

    @pytest.mark.parametrize(
        "damage",
        [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-1000])],
        ids=["gone", "cut"],
    )
    def test_a_shard_that_was_removed_to_make_room(
        self, divisible_folder, tmp_path, monkeypatch, damage
    ):
        monkeypatch.setattr(plan_module, "SHARD_SIZE", 300_000)
        unbroken = convert(str(divisible_folder), tmp_path / "unbroken", recipe="4bit")
        partial = self.interrupted(divisible_folder, tmp_path / "out", monkeypatch)
        damage(sorted((partial / "result").glob("*.safetensors"))[2])
        same_files(
            unbroken, convert(str(divisible_folder), tmp_path / "out", recipe="4bit", resume=True)
        )

    @pytest.mark.parametrize("content", ["{}\n", "\0\0\0\n", '{"fingerprint": 3}\n{"x": 1}\n'])
    def test_a_damaged_journal(self, divisible_folder, tmp_path, monkeypatch, content):
        partial = self.interrupted(divisible_folder, tmp_path / "out", monkeypatch)
        (partial / "conversion.jsonl").write_text(content)
        with pytest.raises(UserError, match="is damaged; add --overwrite without --resume"):
            convert(str(divisible_folder), tmp_path / "out", recipe="4bit", resume=True)
        convert(str(divisible_folder), tmp_path / "out", recipe="4bit", overwrite=True)

    def test_killed_between_the_last_file_and_the_rename(
        self, divisible_folder, tmp_path, monkeypatch
    ):
        unbroken = convert(str(divisible_folder), tmp_path / "unbroken", recipe="4bit")
        with monkeypatch.context() as patch:
            patch.setattr(writer, "_put_in_place", lambda *_: (_ for _ in ()).throw(Killed()))
            with pytest.raises(Killed):
                convert(str(divisible_folder), tmp_path / "out", recipe="4bit")
        monkeypatch.setattr(outputs_module.Output, "slices", lambda self: pytest.fail("made again"))
        same_files(
            unbroken, convert(str(divisible_folder), tmp_path / "out", recipe="4bit", resume=True)
        )

    def test_a_source_that_changed_is_another_conversion(self, divisible_folder, tmp_path):
        source = Path(shutil.copytree(divisible_folder, tmp_path / "source"))

        def fingerprint():
            stored = read_headers(source)
            options = ConvertOptions(recipe="4bit")
            return plan_module.plan("source", source, stored, options).fingerprint()

        before = fingerprint()
        assert fingerprint() == before
        weights = next(source.glob("*.safetensors"))
        os.utime(weights, ns=(0, weights.stat().st_mtime_ns + 1))
        assert fingerprint() != before

    def test_two_at_once(self, divisible_folder, tmp_path, monkeypatch):
        refusals, slices = [], outputs_module.Output.slices

        def meanwhile(output):
            if not refusals:
                refusals.append("")
                with pytest.raises(UserError, match="Another conversion is writing") as caught:
                    convert(str(divisible_folder), tmp_path / "out", recipe="4bit", overwrite=True)
                refusals[0] = str(caught.value)
            return slices(output)

        monkeypatch.setattr(outputs_module.Output, "slices", meanwhile)
        folder = convert(str(divisible_folder), tmp_path / "out", recipe="4bit")
        assert refusals[0]
        monkeypatch.undo()
        same_files(folder, convert(str(divisible_folder), tmp_path / "alone", recipe="4bit"))

    @pytest.mark.slow
    @pytest.mark.parametrize("existing", [False, True], ids=["new", "overwriting"])
    def test_killed(self, existing, divisible_folder, tmp_path):
        """SIGKILL at ten random file operations of a process of its own."""
        unbroken, old = (
            tmp_path / "unbroken",
            convert(str(divisible_folder), tmp_path / "old", recipe="8bit"),
        )
        command = [sys.executable, "-m", "tests.conversions", str(divisible_folder)]
        with subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as jobs:

            def run(target, kill_at=0, resume=False):
                jobs.stdin.write(
                    json.dumps({"target": str(target), "kill_at": kill_at, "resume": resume}) + "\n"
                )
                jobs.stdin.flush()
                return json.loads(jobs.stdout.readline())

            status, points = run(tmp_path / "out0" / "x")
            assert status == 0
            shutil.copytree(tmp_path / "out0" / "x", unbroken)
            for number, point in enumerate(random.Random(existing).sample(range(1, points), 10)):
                target = tmp_path / f"out-{number}" / "x"
                target.parent.mkdir()
                if existing:
                    shutil.copytree(old, target)
                assert run(target, point)[0] == signal.SIGKILL
                if (
                    target.exists()
                    and existing
                    and (target / "README.md").read_bytes() == (old / "README.md").read_bytes()
                ):
                    same_files(old, target)
                else:
                    state_is_sound(target, unbroken)
                assert run(target, resume=True)[0] == 0
                same_files(unbroken, target)
                assert [path.name for path in target.parent.iterdir()] == ["x"]


class TestBadInput:
    """One sentence with the remedy, and nothing left behind."""

    @pytest.fixture
    def source(self, divisible_folder, tmp_path):
        return shutil.copytree(divisible_folder, tmp_path / "source")

    def refused(self, source, tmp_path, message, **options):
        with pytest.raises(UserError, match=message) as caught:
            convert(str(source), tmp_path / "out", **({"recipe": "4bit"} | options))
        assert "\n" not in str(caught.value)
        assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]

    def test_another_model(self, source, tmp_path):
        (source / "config.json").write_text('{"model_type": "llama"}')
        self.refused(
            source, tmp_path, "Not a DiffusionGemma checkpoint: config.json has model_type 'llama'"
        )

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            ("canvas_length", "long"),
            ("rms_norm_eps", "small"),
            ("per_layer_config", [3]),
            ("rope_parameters", {"full_attention": {}}),
            ("head_dim", "x"),
        ],
    )
    def test_a_config_with_fields_of_the_wrong_kind(self, source, tmp_path, field, value):
        raw = json.loads((source / "config.json").read_text())
        (raw if field == "canvas_length" else raw["text_config"])[field] = value
        (source / "config.json").write_text(json.dumps(raw))
        self.refused(source, tmp_path, "config.json")

    def test_a_missing_shard(self, source, tmp_path):
        next(source.glob("*.safetensors")).unlink()
        self.refused(source, tmp_path, "lacks model-.*download")

    def test_a_truncated_shard(self, source, tmp_path):
        path = next(source.glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-9])
        self.refused(source, tmp_path, "damaged or cut off.*download it again")

    def test_a_shard_that_shrinks_while_it_is_read(self, source, tmp_path, monkeypatch):
        path = max(source.glob("*.safetensors"))
        write = convert_module.write
        monkeypatch.setattr(
            convert_module,
            "write",
            lambda *a: path.write_bytes(path.read_bytes()[:-9]) and write(*a),
        )
        self.refused(source, tmp_path, "ends inside tensor")

    def test_a_wrong_header(self, source, tmp_path):
        path = next(source.glob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:8] + b"!" + path.read_bytes()[9:])
        self.refused(source, tmp_path, "damaged or cut off")

    def test_a_group_size_that_does_not_divide(self, tiny_folder, tmp_path):
        self.refused(
            tiny_folder,
            tmp_path,
            r"experts.down_proj has rows of 32 weights, which groups of 64 do not divide",
        )

    def test_mode_and_bits_that_do_not_go_together(self, source, tmp_path):
        self.refused(
            source,
            tmp_path,
            "mxfp4 has 4 bits, not 8",
            recipe=None,
            quantize=True,
            q_mode="mxfp4",
            q_bits=8,
        )

    def test_too_little_disk(self, source, tmp_path, monkeypatch):
        monkeypatch.setattr(
            shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000)
        )
        self.refused(source, tmp_path, r"needs 0\.05 GB on disk, 0\.00 GB are free; make room")

    def test_a_disk_that_fills_up(self, source, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "pwrite", full)
        with pytest.raises(UserError, match="filled up; free .* and run again with --resume"):
            convert(str(source), tmp_path / "out", recipe="4bit")
        monkeypatch.undo()
        resumed = convert(str(source), tmp_path / "out", recipe="4bit", resume=True)
        same_files(resumed, convert(str(source), tmp_path / "2", recipe="4bit"))

    def test_no_permission(self, source, tmp_path, monkeypatch):
        monkeypatch.setattr(
            shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, 10**9)
        )
        with pytest.raises(
            UserError, match=r"/proc/out cannot be written \(.+\); choose another folder"
        ):
            convert(str(source), "/proc/out", recipe="4bit")

    def test_an_existing_target(self, source, tmp_path):
        target = convert(str(source), tmp_path / "out", recipe="4bit")
        before = {path.name: path.read_bytes() for path in target.iterdir()}
        with pytest.raises(
            UserError, match="exists already; choose another folder, or add --overwrite"
        ):
            convert(str(source), target, recipe="8bit")
        assert before == {path.name: path.read_bytes() for path in target.iterdir()}
        convert(str(source), target, recipe="8bit", overwrite=True)
        assert json.loads((target / "config.json").read_text())["mlx_diffgemma"]["recipe"] == "8bit"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]

    @pytest.mark.parametrize("beside", [(), ("config.json",)])
    def test_overwrite_spares_what_is_no_checkpoint(self, source, tmp_path, beside):
        (tmp_path / "home" / "src").mkdir(parents=True)
        (tmp_path / "home" / "src" / "thesis.txt").write_text("x")
        for name in beside:
            shutil.copy(source / name, tmp_path / "home")
        with pytest.raises(UserError, match="is not overwritten"):
            convert(str(source), tmp_path / "home", overwrite=True)
        assert (tmp_path / "home" / "src" / "thesis.txt").exists()

    @pytest.mark.parametrize("place", ["file/out", "link/out"])
    def test_a_target_that_cannot_be_made_is_told_before_the_download(
        self, tmp_path, monkeypatch, place
    ):
        monkeypatch.setattr(convert_module.hub, "headers", lambda *_: pytest.fail("fetched"))
        (tmp_path / "file").write_text("mine")
        (tmp_path / "link").symlink_to("nowhere/x")
        (tmp_path / "nowhere").write_text("mine")
        with pytest.raises(UserError, match="cannot be made|cannot be written"):
            convert("someone/model", tmp_path / place)

    @pytest.mark.parametrize(
        "name", ["diary.txt", "notes.json", "more.safetensors", "LICENSE-of-mine", "model.bak"]
    )
    def test_overwrite_spares_a_file_beside_a_conversion(self, source, tmp_path, name):
        target = convert(str(source), tmp_path / "out", recipe="4bit")
        (target / name).write_text("mine")
        before = {path.name: path.read_bytes() for path in target.iterdir()}
        with pytest.raises(UserError, match=f"holds {name}, which this command did not write"):
            convert(str(source), target, recipe="8bit", overwrite=True)
        assert before == {path.name: path.read_bytes() for path in target.iterdir()}

    def test_overwrite_spares_a_checkpoint_of_others(self, source, tmp_path):
        shutil.copytree(source, tmp_path / "other")
        with pytest.raises(UserError, match="which this command did not write"):
            convert(str(source), tmp_path / "other", overwrite=True)
        assert load_model(tmp_path / "other")

    def test_overwrite_knows_conversions_without_a_list(self, source, tmp_path):
        (source / "tokenizer.json").write_text("{}")
        target = convert(str(source), tmp_path / "out", recipe="4bit")
        index = json.loads((target / INDEX).read_text())
        assert index["metadata"].pop("files") == ["tokenizer.json"]
        (target / INDEX).write_text(json.dumps(index))
        convert(str(source), target, recipe="8bit", overwrite=True)
        assert (target / "tokenizer.json").exists()

    def test_a_result_without_a_journal_is_not_ours(self, source, tmp_path):
        (tmp_path / "out.partial" / "result").mkdir(parents=True)
        (tmp_path / "out.partial" / "result" / "thesis.txt").write_text("x")
        for options in ({"resume": True}, {"overwrite": True}, {}):
            with pytest.raises(UserError, match="out.partial is in the way and is not ours"):
                convert(str(source), tmp_path / "out", **options)
        assert (tmp_path / "out.partial" / "result" / "thesis.txt").exists()

    def test_apple_doubles_are_not_copied(self, source, tmp_path):
        (source / "._config.json").write_bytes(b"attributes")
        target = convert(str(source), tmp_path / "out")
        assert not list(target.glob("._*"))

    def test_neighbours_are_spared(self, source, tmp_path):
        for name in ("out.old", "out.partial"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "thesis.txt").write_text("x")
        for options in ({"resume": True}, {"overwrite": True}, {}):
            with pytest.raises(UserError, match="out.partial is in the way and is not ours"):
                convert(str(source), tmp_path / "out", **options)
        shutil.rmtree(tmp_path / "out.partial")
        convert(str(source), tmp_path / "out")
        convert(str(source), tmp_path / "out", overwrite=True)
        assert (tmp_path / "out.old" / "thesis.txt").exists()

    def test_onto_itself_in_another_case(self, source, tmp_path, monkeypatch):
        """As a file system does that takes upper and lower case for the same name (APFS by
        default).
        """
        folder = tmp_path / "Model"
        shutil.copytree(source, folder)
        monkeypatch.setattr(
            Path, "samefile", lambda one, other: str(one).casefold() == str(other).casefold()
        )
        for mlx_path in (tmp_path / "model", tmp_path / "model" / "inside"):
            with pytest.raises(UserError, match="lie in each other"):
                convert(str(folder), mlx_path)

    def test_onto_itself(self, source, tmp_path):
        shutil.copytree(source, tmp_path / "outer" / "inner")
        outer = tmp_path / "outer"
        for hf_path, mlx_path in (
            (source, source),
            (source, source / "inside"),
            (outer / "inner", outer),
        ):
            with pytest.raises(UserError, match="lie in each other|is not overwritten"):
                convert(str(hf_path), mlx_path, overwrite=True)
        assert load_model(source)
        assert load_model(tmp_path / "outer" / "inner")

    def test_a_link_is_followed(self, source, tmp_path):
        convert(str(source), tmp_path / "real", recipe="4bit")
        (tmp_path / "link").symlink_to(tmp_path / "real")
        for _ in range(2):
            convert(str(source), tmp_path / "link", recipe="8bit", overwrite=True)
        assert (
            json.loads((tmp_path / "real" / "config.json").read_text())["mlx_diffgemma"]["recipe"]
            == "8bit"
        )

    def test_names_the_system_does_not_take(self, source, tmp_path):
        for name in ("x" * 300, "x" * 250):
            with pytest.raises(UserError, match=r"cannot be written \(File name too long\)"):
                convert(str(source), tmp_path / name)
        with pytest.raises(UserError, match="There is no folder"):
            convert("x" * 300, tmp_path / "out")

    def test_a_revision_of_a_folder(self, source, tmp_path):
        self.refused(source, tmp_path, "--revision is for Hub ids", revision="main")

    def test_quantising_twice(self, source, tmp_path):
        packed = convert(str(source), tmp_path / "q", recipe="4bit")
        self.refused(
            packed,
            tmp_path,
            r"is quantised already \(4 bits, 8 bits\); convert the original checkpoint",
        )

    def test_dequantising_what_is_not_quantised(self, source, tmp_path):
        self.refused(
            source, tmp_path, "is not quantised; leave -d out", recipe=None, dequantize=True
        )

    def test_numbers_that_float16_cannot_hold(self, source, tmp_path):
        tensors = tensors_of(source)
        tensors["model.decoder.norm.weight"] = mx.full((128,), 1e6)
        for path in [*source.glob("*.safetensors"), source / INDEX]:
            path.unlink()
        mx.save_safetensors(str(source / "model.safetensors"), tensors)
        self.refused(
            source,
            tmp_path,
            "model.decoder.norm holds numbers that are not finite in float16; leave --dtype out",
            dtype="float16",
        )

    @pytest.mark.parametrize("recipe", RECIPES)
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_numbers_that_are_none(self, source, tmp_path, recipe, bad):
        """In an expert, where a quantiser would hide them."""
        tensors = tensors_of(source)
        name = "model.decoder.layers.3.experts.gate_up_proj"
        tensors[name] = mx.where(
            mx.arange(tensors[name].size).reshape(tensors[name].shape) == 777, bad, tensors[name]
        )
        for path in [*source.glob("*.safetensors"), source / INDEX]:
            path.unlink()
        mx.save_safetensors(str(source / "model.safetensors"), tensors)
        self.refused(
            source,
            tmp_path,
            f"Tensor {name} holds numbers that are not finite; download",
            recipe=recipe,
        )

    def test_vision_packed_in_another_way_than_the_config_says(self, tmp_path):
        made = make_checkpoint(tmp_path / "src", "divisible", vision="divisible")
        packed = convert(str(made), tmp_path / "q", recipe="3bit")
        raw = json.loads((packed / "config.json").read_text())
        raw["quantization"] = {
            key: value for key, value in raw["quantization"].items() if "vision" not in key
        }
        (packed / "config.json").write_text(json.dumps(raw))
        self.refused(
            packed, tmp_path, r"vision_tower.*' has shape .*, config.json asks for", recipe=None
        )

    def test_the_command_says_it_in_one_line(self, tmp_path, monkeypatch, capsys):
        for arguments, message in (
            (["--hf-path", "nothing"], "There is no folder 'nothing'"),
            (["--hf-path", "nano", "--q-bits", "4"], "has no effect without -q"),
            (["--hf-path", "nano", "--recipe", "best"], "Unknown recipe 'best'"),
        ):
            code, _, err = run(
                monkeypatch, capsys, "convert", *arguments, "--mlx-path", str(tmp_path / "out")
            )
            assert code == 2
            (line,) = err.splitlines()
            assert line.startswith("error: ")
            assert message in line
        assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_script_is_the_command(tmp_path):
    words = ["--hf-path", "nano", "-q", "--q-mode", "nvfp4", "--mlx-path"]
    outs = [
        subprocess.run(
            [sys.executable, *start, *words, str(tmp_path / name)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        for start, name in ((["convert.py"], "a"), (["-m", "mlx_diffgemma", "convert"], "b"))
    ]
    assert outs[0].stdout.replace("/a:", "/b:") == outs[1].stdout
    same_files(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow
def test_dry_run_writes_nothing_and_says_what_would_be(tmp_path):
    words = [
        sys.executable,
        "convert.py",
        "--hf-path",
        "nano",
        "-q",
        "--mlx-path",
        str(tmp_path / "out"),
    ]
    dry = subprocess.run(
        [*words, "--dry-run", "--json"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not list(tmp_path.iterdir())
    plan = json.loads(dry.stdout)
    written = json.loads(
        subprocess.run(
            [*words, "--json"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    )
    assert plan["bytes"] == written["stored_bytes"]
    assert plan["bits_per_weight"] == written["bits_per_weight"]
    assert list(plan["memory_needed"]) == ["4096", "8192"], "4k and what nano's context holds"
