"""nano's golden outputs: what the reference computes for fixed inputs, shipped for ``doctor`` and the tests.

``python -m mlx_diffgemma.nano.golden`` makes them anew with transformers (extra ``parity``), float32 on the CPU.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mlx_diffgemma import nano
from mlx_diffgemma.draws import Draws

FILE = nano.FOLDER / "golden.npz"
PROMPT = "Turn this into JSON: Clara is 41 years old and lives in Lisbon."
SEED = 7
ROWS = 16  # canvas rows whose logits are kept


@dataclass(frozen=True)
class Golden:
    """``next_token`` [vocabulary] logits after the prompt; ``first`` and ``conditioned`` [ROWS, vocabulary] logits of the
    canvas without and with ``scaled`` logits as self-conditioning (only their token ids and values are kept);
    ``argmax`` and ``accepted`` [steps, length] of the trajectory under Draws(SEED)."""

    model_sha256: str
    prompt: np.ndarray
    canvas: np.ndarray
    belief: np.ndarray  # [length] tokens the self-conditioning logits are peaked at
    next_token: np.ndarray
    first: np.ndarray
    conditioned: np.ndarray
    argmax: np.ndarray
    accepted: np.ndarray

    def scaled(self, vocabulary: int) -> np.ndarray:
        """The self-conditioning logits [length, vocabulary]: 4 at the believed token, 0 elsewhere."""
        logits = np.zeros((self.belief.size, vocabulary), dtype=np.float32)
        logits[np.arange(self.belief.size), self.belief] = 4.0
        return logits


def load() -> Golden:
    with np.load(FILE, allow_pickle=False) as data:
        arrays = {key: data[key] for key in data.files}
    return Golden(model_sha256=str(arrays.pop("model_sha256")), **arrays)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make() -> Golden:
    """Computed with transformers."""
    from mlx_diffgemma.config import ModelConfig
    from mlx_diffgemma.parity.reference import Reference
    from mlx_diffgemma.tokenizer import chat_ids, load_tokenizer

    config = ModelConfig.from_folder(nano.FOLDER)
    tokenizer = load_tokenizer(nano.FOLDER, config.generation.eos_token_ids)
    prompt = np.array(chat_ids(tokenizer, [{"role": "user", "content": PROMPT}]), dtype=np.int32)
    reference, draws = Reference(nano.FOLDER), Draws(SEED, config.text.vocab_size)
    step = draws.step(0, 0, 0, 0, config.canvas_length)
    encoded = reference.encode(prompt.tolist())
    first, _ = reference.denoise(encoded.cache, step.initial)
    golden = Golden(sha256(nano.FOLDER / "model.safetensors"), prompt, step.initial, step.renoise,
                    reference.next_token_logits(encoded), first[:ROWS], first[:0], first[:0], first[:0])
    conditioned, _ = reference.denoise(encoded.cache, step.initial, golden.scaled(config.text.vocab_size))
    steps = reference.trajectories([prompt.tolist()], [draws], 1)[0][0].steps
    return Golden(**{**asdict(golden), "conditioned": conditioned[:ROWS],
                     "argmax": np.stack([s.argmax for s in steps]).astype(np.int32),
                     "accepted": np.stack([s.accepted for s in steps])})


if __name__ == "__main__":
    np.savez_compressed(FILE, **asdict(make()))
    print(f"wrote {FILE}")
