"""Drafters in folders: what is written is read, and what does not fit is refused with the reason."""

import copy
import json
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from drafter import DrafterConfig, load_drafter, save_drafter
from drafter.config import DraftLayer
from drafter.head import TargetHead
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.model.attention import Segment
from mlx_diffgemma.model.cache import Cache
from mlx_diffgemma.tuning.adapters import model_fingerprint
from tests.drafter.drafters import random_drafter
from tests.helpers.in_process import run


@pytest.fixture
def folder(tiny, tmp_path):
    save_drafter(random_drafter(tiny, head_size=50), tmp_path / "drafter")
    return tmp_path / "drafter"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"head_size": 40},
        {"mask_token_id": 4, "self_conditioning": False, "confidence": False},
        {
            "layers": (DraftLayer(5, True),),
            "target": {"name": "tiny", "sha256": "0"},
            "final_logit_softcapping": 30.0,
        },
    ],
)
def test_what_is_written_is_read(changes, tiny, tmp_path):
    drafter = random_drafter(tiny, **changes)
    save_drafter(drafter, tmp_path)
    found = load_drafter(str(tmp_path), tiny)
    assert found.config == drafter.config
    wanted = dict(tree_flatten(drafter.parameters()))
    assert all(
        mx.array_equal(value, wanted.pop(name)) for name, value in tree_flatten(found.parameters())
    )
    assert not wanted


def test_a_reduced_head_gives_its_tokens(tiny):
    drafter, whole = random_drafter(tiny, head_size=40), random_drafter(tiny)
    hidden = mx.random.normal((5, tiny.config.text.hidden_size))
    head, every = TargetHead(tiny, drafter), TargetHead(tiny, whole)
    logits, all_logits = head.logits(hidden), every.logits(hidden)
    places = mx.array([0, 7, 39])
    assert mx.allclose(logits[:, places], all_logits[:, head.tokens(places)], atol=1e-4)
    assert every.tokens(places).tolist() == places.tolist()


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_a_quantised_target_lends_its_head_too(mode, nano_pair):
    target = copy.deepcopy(nano_pair[0])
    options = {"bits": 4, "mode": mode, "group_size": 32}
    nn.quantize(
        target, class_predicate=lambda path, _: options if path.endswith("embed_tokens") else False
    )
    assert isinstance(target.model.decoder.embed_tokens, nn.QuantizedEmbedding)
    head, every = (
        TargetHead(target, random_drafter(target, head_size=40)),
        TargetHead(target, random_drafter(target)),
    )
    hidden = mx.random.normal((5, 128))
    places = mx.arange(40)
    assert mx.allclose(head.logits(hidden), every.logits(hidden)[:, head.tokens(places)], atol=1e-3)


def test_blocks_of_a_batch_are_those_alone(tiny):
    drafter, rng = random_drafter(tiny), mx.random.key(0)
    taps = [
        {
            layer: mx.random.normal((n, 64), key=mx.random.key(layer))
            for layer in drafter.config.taps
        }
        for n in (3, 20)
    ]
    x = mx.random.normal((11, 64), key=rng)
    caches = [Cache(drafter.config), Cache(drafter.config)]
    drafter.append_features([drafter.features(own) for own in taps], caches)
    together = drafter(
        x, [Segment(0, 4, caches[0], canvas=True), Segment(4, 11, caches[1], canvas=True)]
    )
    for part, rows, own in ((together[:4], x[:4], taps[0]), (together[4:], x[4:], taps[1])):
        cache = Cache(drafter.config)
        drafter.append_features(
            [drafter.features({layer: t[:2] for layer, t in own.items()})], [cache]
        )
        drafter.append_features(
            [drafter.features({layer: t[2:] for layer, t in own.items()})], [cache]
        )
        assert mx.allclose(
            drafter(rows, [Segment(0, len(rows), cache, canvas=True)]), part, atol=1e-5
        )


class TestRefused:
    def test_a_folder_that_is_none(self, tiny, tiny_folder, tmp_path):
        with pytest.raises(UserError, match="holds no drafter"):
            load_drafter(str(tiny_folder), tiny)
        with pytest.raises(UserError, match="no config"):
            load_drafter(str(tmp_path), tiny)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"hidden_size": 32}, "hidden size of 32, this one has 64"),
            ({"vocab_size": 9}, "vocabulary of 9"),
            ({"num_target_layers": 30}, "number of target layers of 30"),
            ({"num_hidden_layers": 3}, "layer_types"),
            ({"hidden_size": "x"}, "wrong kind"),
            ({"architectures": ["DFlash2DraftModel"]}, "DFlash 2"),
            ({"attention_bias": True}, "biases"),
            ({"sliding_window": None}, "no sliding_window"),
            ({"num_key_value_heads": 3}, "multiple"),
        ],
    )
    def test_configs(self, change, message, folder, tiny):
        raw = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(raw | change))
        with pytest.raises(UserError, match=message):
            load_drafter(str(folder), tiny)

    def test_taps_the_target_does_not_have(self, folder, tiny):
        raw = json.loads((folder / "config.json").read_text())
        raw["dflash_config"]["target_layer_ids"] = [1, 6]
        (folder / "config.json").write_text(json.dumps(raw))
        with pytest.raises(UserError, match=r"taps the layers \[1, 6\] of a target with 6 layers"):
            load_drafter(str(folder), tiny)

    def test_weights(self, folder, tiny):
        weights = dict(mx.load(str(folder / "model.safetensors")))
        fc = weights.pop("fc.weight")
        mx.save_safetensors(str(folder / "model.safetensors"), weights)
        with pytest.raises(UserError, match="lacks the tensor 'fc.weight'"):
            load_drafter(str(folder), tiny)
        mx.save_safetensors(str(folder / "model.safetensors"), weights | {"fc.weight": fc[:3]})
        with pytest.raises(UserError, match="'fc.weight' has shape"):
            load_drafter(str(folder), tiny)

    def test_of_another_checkpoint_of_the_same_shape(self, tiny, tmp_path):
        for fingerprint, fits in ((model_fingerprint(tiny), True), ("0", False)):
            save_drafter(
                random_drafter(tiny), tmp_path, {"name": "tiny-2", "fingerprint": fingerprint}
            )
            if fits:
                assert load_drafter(str(tmp_path), tiny).config.target["name"] == "tiny-2"
            else:
                with pytest.raises(
                    UserError, match=r"trained for another model than this one \(tiny-2\)"
                ):
                    load_drafter(str(tmp_path), tiny)

    def test_a_drafter_in_memory(self, tiny, nano_pair):
        with pytest.raises(UserError, match="hidden size of 64, this one has 128"):
            random_drafter(tiny).causal(nano_pair[0])

    def test_the_command_refuses_drafters_that_do_not_fit(
        self, monkeypatch, capsys, folder, tmp_path
    ):
        for options, message in (
            (["--draft-model", str(folder)], "hidden size of 64, this one has 128"),
            (["--mode", "ar", "--draft-model", str(folder)], "hidden size of 64, this one has 128"),
            (["--mode", "ar", "--draft-model", str(tmp_path)], "no config.json"),
            (["--mode", "ar", "--num-draft-tokens", "3"], "without a draft_model"),
        ):
            code, out, err = run(monkeypatch, capsys, "generate", "-p", "Hi", *options)
            assert (code, out, message in err) == (2, "", True), err


def test_the_command_drafts(monkeypatch, capsys, nano_pair, tmp_path):
    save_drafter(random_drafter(nano_pair[0]), tmp_path)
    _, plain, _ = run(monkeypatch, capsys, "generate", "-p", "Add 12 and 30.", "--mode", "ar")
    code, out, err = run(
        monkeypatch,
        capsys,
        "generate",
        "-p",
        "Add 12 and 30.",
        "--mode",
        "ar",
        "--draft-model",
        str(tmp_path),
        "--verbose",
    )
    assert (code, out, "drafted tokens accepted" in err) == (0, plain, True)


def test_config_round_trip():
    config = DrafterConfig(
        64, 48, 4, 2, 8, 301, 6, (0, 4), (DraftLayer(9, False), DraftLayer(None, False))
    )
    assert DrafterConfig.from_dict(config.to_dict()) == config
    assert (
        DrafterConfig.from_dict(
            replace(config, head_size=7, rope_scaling={"rope_type": "default"}).to_dict()
        ).head_size
        == 7
    )
