"""nano's golden outputs: what the reference computes for fixed inputs.

``doctor`` and the tests use them.  ``python -m mlx_diffgemma.diagnostics.golden`` makes them again
with transformers (extra ``parity``), in float32 on the CPU.
"""

from __future__ import annotations

import hashlib
import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np

from mlx_diffgemma import nano
from mlx_diffgemma.sampling.draws import Draws

FILE = nano.FOLDER / "golden.npz"
PROMPT = "Turn this into JSON: Clara is 41 years old and lives in Lisbon."
SEED = 7
ROWS = 16  # canvas rows whose logits are kept


@dataclass(frozen=True)
class Outputs:
    """The outputs of the reference.

    Attributes:
        next_token: The logits [vocabulary] after the prompt.
        first: The logits [ROWS, vocabulary] of the canvas without self-conditioning.
        conditioned: The logits [ROWS, vocabulary] of the canvas with self-conditioning.
        argmax: The most probable tokens [steps, length] of the trajectory under Draws(SEED).
        accepted: The accepted positions [steps, length] of that trajectory.
    """

    next_token: np.ndarray
    first: np.ndarray
    conditioned: np.ndarray
    argmax: np.ndarray
    accepted: np.ndarray


@dataclass(frozen=True)
class Golden:
    """The inputs and their outputs.

    ``original`` holds the outputs of nano itself.  ``quantised`` holds those of nano as ``convert
    -q`` packs it: the reference runs on the dequantised weights.
    """

    model_sha256: str
    prompt: np.ndarray
    canvas: np.ndarray
    belief: np.ndarray  # [length] the tokens at which the self-conditioning logits have their peak
    original: Outputs
    quantised: Outputs

    def scaled(self, vocabulary: int) -> np.ndarray:
        """The self-conditioning logits [length, vocabulary]: 4 at the tokens of ``belief``, 0
        elsewhere.
        """
        logits = np.zeros((self.belief.size, vocabulary), dtype=np.float32)
        logits[np.arange(self.belief.size), self.belief] = 4.0
        return logits


def load() -> Golden:
    with np.load(FILE, allow_pickle=False) as data:
        arrays = {key: data[key] for key in data.files}
    original, quantised = (
        Outputs(**{f.name: arrays[f"{group}.{f.name}"] for f in fields(Outputs)})
        for group in ("original", "quantised")
    )
    return Golden(
        str(arrays["model_sha256"]),
        arrays["prompt"],
        arrays["canvas"],
        arrays["belief"],
        original,
        quantised,
    )


def save(golden: Golden) -> None:
    flat = {key: value for key, value in vars(golden).items() if not isinstance(value, Outputs)}
    for group in ("original", "quantised"):
        flat |= {f"{group}.{key}": value for key, value in vars(getattr(golden, group)).items()}
    np.savez_compressed(FILE, **flat)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make() -> Golden:
    """Compute the golden outputs with transformers."""
    from mlx_diffgemma.checkpoint.convert import convert
    from mlx_diffgemma.model.config import ModelConfig
    from mlx_diffgemma.text.tokenizer import chat_ids, load_tokenizer

    config = ModelConfig.from_folder(nano.FOLDER)
    tokenizer = load_tokenizer(nano.FOLDER, config.generation.eos_token_ids)
    prompt = np.array(chat_ids(tokenizer, [{"role": "user", "content": PROMPT}]), dtype=np.int32)
    step = Draws(SEED, config.text.vocab_size).step(0, 0, 0, 0, config.canvas_length)
    empty = Outputs(*[np.zeros(0)] * len(fields(Outputs)))
    golden = Golden(
        sha256(nano.FOLDER / "model.safetensors"), prompt, step.initial, step.renoise, empty, empty
    )
    with tempfile.TemporaryDirectory() as name:
        packed = convert("nano", Path(name) / "packed", quantize=True)
        plain = convert(str(packed), Path(name) / "plain", dequantize=True, dtype="float32")
        return replace(
            golden,
            original=_reference(nano.FOLDER, golden, config.text.vocab_size),
            quantised=_reference(plain, golden, config.text.vocab_size),
        )


def _reference(folder: Path, golden: Golden, vocabulary: int) -> Outputs:
    from mlx_diffgemma.diagnostics.reference import Reference

    reference = Reference(folder)
    encoded = reference.encode(golden.prompt.tolist())
    first, _ = reference.denoise(encoded.cache, golden.canvas)
    conditioned, _ = reference.denoise(encoded.cache, golden.canvas, golden.scaled(vocabulary))
    steps = reference.trajectories([golden.prompt.tolist()], [Draws(SEED, vocabulary)], 1)[0][
        0
    ].steps
    return Outputs(
        reference.next_token_logits(encoded),
        first[:ROWS],
        conditioned[:ROWS],
        np.stack([s.argmax for s in steps]).astype(np.int32),
        np.stack([s.accepted for s in steps]),
    )


if __name__ == "__main__":
    save(make())
    print(f"wrote {FILE}")
