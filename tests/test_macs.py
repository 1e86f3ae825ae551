"""Which recipe fits which Mac."""

import json

import mlx.core as mx
import pytest

from mlx_diffgemma import device
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.estimate import cost
from mlx_diffgemma.estimate.macs import (
    FIT_CONTEXT,
    LADDER,
    MACS,
    PATCHES,
    fit,
    gpu_memory,
    longest_context,
)
from mlx_diffgemma.model.config import ModelConfig
from mlx_diffgemma.model.recipes import RECIPES
from tests.helpers.in_process import run

CONFIG = cost.released_with_tower()


def test_what_macos_lets_the_gpu_take():
    """Mebibytes that users logged as recommendedMaxWorkingSetSize."""
    logged = {16: 10_922.67, 32: 21_845.34, 64: 49_152, 96: 73_728}
    assert {mac: gpu_memory(mac) / 2**20 for mac in logged} == pytest.approx(logged, abs=0.01)
    assert gpu_memory(18) / 1e9 == pytest.approx(12.885, abs=0.001)


def test_the_smallest_recipe_fits_a_mac_of_18_gb_with_8k_of_context():
    assert longest_context(CONFIG, RECIPES["3bit-small"], gpu_memory(18), tower=False) >= 8192
    assert longest_context(CONFIG, RECIPES["3bit"], gpu_memory(18), tower=False) == 0
    assert cost.weight_bytes(CONFIG, RECIPES["3bit-small"]) == min(
        cost.weight_bytes(CONFIG, r) for r in RECIPES.values()
    )


@pytest.mark.parametrize("tower", [False, True])
@pytest.mark.parametrize(
    ("recipe", "mac"), [("3bit-small", 18), ("4bit", 24), ("mxfp4", 24), ("5bit", 32), ("8bit", 36)]
)
def test_the_longest_context_fits_and_the_next_does_not(recipe, mac, tower):
    found = longest_context(CONFIG, RECIPES[recipe], gpu_memory(mac), tower)
    needs = [
        cost.run_memory(CONFIG, RECIPES[recipe], found + more, mx.bfloat16, tower, PATCHES).total
        for more in (0, 1024)
    ]
    assert not found or needs[0] <= gpu_memory(mac)
    assert needs[1] > gpu_memory(mac)


def test_never_more_than_the_model_can_read():
    assert (
        longest_context(CONFIG, RECIPES["4bit"], gpu_memory(128), tower=True)
        == CONFIG.text.max_position_embeddings
    )


class TestFit:
    @pytest.mark.parametrize(
        ("size", "recipe"),
        [
            ("18GB", "3bit-small"),
            ("24 gb", "4bit"),
            ("32", "6bit"),
            ("36GiB", "8bit"),
            ("128g", "8bit"),
        ],
    )
    def test_the_largest_that_fits(self, size, recipe):
        found = fit(CONFIG, size)
        assert found.recipe.name == recipe
        assert found.memory.total <= found.limit
        larger = LADDER[: LADDER.index(recipe)]
        assert all(
            cost.run_memory(CONFIG, RECIPES[name], FIT_CONTEXT).total > found.limit
            for name in larger
        )

    def test_says_why(self):
        assert str(fit(CONFIG, "24GB")) == (
            "4bit takes 16.7 GB at 8,192 tokens of context, and a Mac of 24 GB allows 17.2 GB; 5bit would take 19.5 GB; "
            "with an image it takes 17.8 GB, which does not fit."
        )

    def test_the_ladder_goes_down(self):
        sizes = [cost.weight_bytes(CONFIG, RECIPES[name]) for name in LADDER]
        assert sizes == sorted(sizes, reverse=True)

    def test_none_fits(self):
        with pytest.raises(
            UserError,
            match=r"No recipe fits: 3bit-small, the smallest, takes 12.8 GB .* a Mac of 16 GB allows "
            "11.5 GB; a Mac with 18 GB is the smallest that holds it",
        ):
            fit(CONFIG, "16GB")

    @pytest.mark.parametrize("size", ["", "big", "24TB", "-24", "0", "24.5GB", "24 32"])
    def test_no_size(self, size):
        with pytest.raises(
            UserError, match="--fit takes the memory of a Mac, such as 24GB, or auto"
        ):
            fit(CONFIG, size)

    def test_this_machine_in_its_own_dtype(self, monkeypatch):
        needed = cost.run_memory(
            CONFIG, RECIPES["4bit"], FIT_CONTEXT, device.compute_dtype(mx.bfloat16)
        ).total
        monkeypatch.setattr(device, "memory_limit", lambda: needed)
        assert fit(CONFIG, "auto").recipe.name == "4bit"
        monkeypatch.setattr(device, "memory_limit", lambda: needed - 1)
        assert fit(CONFIG, "Auto").recipe.name == "3bit"


class TestRefusal:
    """Before anything is downloaded it says which recipe would fit."""

    @staticmethod
    def folder(path, size):
        (path / "config.json").write_text(json.dumps(dict(CONFIG.raw)))
        (path / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {"total_size": size}, "weight_map": {}})
        )
        return path

    def test_names_the_recipe(self, tmp_path, monkeypatch):
        from mlx_diffgemma.checkpoint import loading

        monkeypatch.setattr(device, "memory_limit", lambda: gpu_memory(24))
        monkeypatch.setattr(device, "compute_dtype", lambda stored: mx.bfloat16)
        monkeypatch.setattr(loading, "on_gpu", lambda: True)
        with pytest.raises(
            UserError,
            match=r"needs 50.50 GB, this machine allows 17.18 GB; the recipe 4bit would fit \(16.7 GB",
        ):
            loading.check_supported(self.folder(tmp_path, 50_500_000_000))
        monkeypatch.setattr(device, "memory_limit", lambda: gpu_memory(16))
        with pytest.raises(UserError, match="no recipe of this model fits this machine"):
            loading.check_supported(self.folder(tmp_path, 50_500_000_000))
        assert loading.check_supported(self.folder(tmp_path, 11 * 10**9)).text == CONFIG.text


class TestCommands:
    def test_the_table(self, monkeypatch, capsys):
        code, out, _ = run(monkeypatch, capsys, "estimate", "--macs", "--json")
        assert code == 0
        found = json.loads(out)
        assert list(found["gpu_bytes"]) == [str(mac) for mac in MACS]
        assert found["context"].keys() == RECIPES.keys()
        assert found["context"]["3bit-small"]["18"]["without_tower"] >= 8192
        code, out, _ = run(monkeypatch, capsys, "estimate", "--macs")
        assert code == 0
        (small,) = (line.split() for line in out.splitlines() if "3bit-small" in line)
        assert small == ["3bit-small", "–", "14k/–", "219k/183k", *["256k"] * 6]

    def test_convert_takes_what_fits(self, monkeypatch, capsys, divisible_folder):
        words = ["convert", "--hf-path", str(divisible_folder), "-q", "--dry-run", "--json"]
        code, out, err = run(monkeypatch, capsys, *words, "--fit", "24GB")
        assert code == 0
        assert err.startswith("recipe 8bit takes")
        assert out == run(monkeypatch, capsys, *words, "--recipe", "8bit")[1]

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--fit", "24GB"], "add -q"),
            (["-q", "--fit", "24GB", "--recipe", "4bit"], "leave --recipe"),
            (["-q", "--fit", "24GB", "--q-bits", "4"], "leave --recipe"),
            (["-q", "--fit", "huge"], "such as 24GB"),
        ],
    )
    def test_bad_input(self, words, message, monkeypatch, capsys, divisible_folder):
        code, _, err = run(
            monkeypatch, capsys, "convert", "--hf-path", str(divisible_folder), "--dry-run", *words
        )
        assert code == 2
        assert message in err

    def test_what_is_quantised_has_nothing_to_choose(
        self, monkeypatch, capsys, divisible_folder, tmp_path
    ):
        raw = json.loads((divisible_folder / "config.json").read_text()) | {
            "quantization": {"bits": 4, "group_size": 64}
        }
        (tmp_path / "config.json").write_text(json.dumps(raw))
        code, _, err = run(
            monkeypatch,
            capsys,
            "convert",
            "--hf-path",
            str(tmp_path),
            "-q",
            "--fit",
            "24GB",
            "--dry-run",
        )
        assert (code, "quantised already" in err) == (2, True)


def test_a_model_without_a_tower_has_one_figure():
    config = ModelConfig.from_dict(
        {key: value for key, value in CONFIG.raw.items() if key != "vision_config"}
    )
    assert fit(config, "24GB").with_tower is None
