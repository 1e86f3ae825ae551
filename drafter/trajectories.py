"""Rollouts of a target, logged as a drafter's training data.

A log is a folder of shards, each a safetensors file for some prompts.  A shard is put in place when
it is whole, so an interrupted rollout continues with the first missing shard.  A log keeps of each
canvas the ids that every step but the first started from, the draft that the first step started
from, if there was one, and the ids that were committed.  Hidden states and distributions are not
kept: training computes them again from the ids, at a fraction of the cost of the rollout.  The
distribution of a step that converges is what it commits, within the stop rule's 0.005 nats.

    prompts    int32 [ids of all prompts]        prompt_ends      int32 [prompts], running
    committed  int32 [canvases, length]          canvas_prompt    int32 [canvases], in the order of each answer
    states     int32 [steps, length]             state_canvas     int32 [steps]; -1 where a draft is silent
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_diffgemma.checkpoint.fingerprint import fingerprint
from mlx_diffgemma.decoding.batch import run
from mlx_diffgemma.decoding.records import CanvasStep
from mlx_diffgemma.decoding.session import Session
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.files import list_files, make_folder
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.safetensors import read_tensors, write_tensors
from mlx_diffgemma.sampling.draws import Draws
from mlx_diffgemma.sampling.protocols import Policy
from mlx_diffgemma.tuning.adapters import model_fingerprint

SHARD = 64  # prompts in a file


@dataclass(frozen=True)
class Trajectory:
    """One logged canvas.

    Attributes:
        prefix: The ids before it: the prompt, then earlier canvases.
        prompt: How many ids the prompt has.
        committed: The committed ids [length].
        states: The ids [states, length] that its steps started from, -1 where a draft left the
            noise.  The noise of a first step is not among them.
    """

    prefix: np.ndarray
    prompt: int
    committed: np.ndarray
    states: np.ndarray


def record_rollouts(
    model: DiffusionGemma,
    prompts: Sequence[Sequence[int]],
    folder: Path,
    policy: Policy,
    max_tokens: int,
    seed: int = 0,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Answer prompts and log the steps.

    A call with the arguments of an earlier one continues its log.

    Args:
        model: The target.
        prompts: Token ids of each prompt; prompt i has the seed ``seed`` + i.
        folder: Where the log is written.
        policy: The policy that samples and stops.
        max_tokens: The most tokens of an answer.
        seed: The seed of the first prompt.
        batch_size: How many prompts run together.
        progress: Called with (prompts done, all prompts) after each shard.

    Raises:
        UserError: The folder holds the log of another model, other prompts or another policy.
    """
    make_folder(folder)
    # The fingerprint of a base model is the same for all its adapters and quantisations, but their
    # answers differ.
    wanted = [list(map(list, prompts)), repr(policy), max_tokens, seed, fingerprint(model)]
    asked = hashlib.sha256(json.dumps(wanted).encode()).hexdigest()
    metadata = {
        "target": model_fingerprint(model),
        "asked": asked,
        "canvas_length": str(model.config.canvas_length),
    }
    for number, first in enumerate(range(0, len(prompts), SHARD)):
        part = prompts[first : first + SHARD]
        path = folder / f"trajectories-{number:05}.safetensors"
        if path.exists():
            if _metadata(path) != metadata:
                raise UserError(
                    f"{path} is the log of another model, or of other prompts or options; give another folder."
                )
        else:
            sessions = [
                Session(
                    model,
                    ids,
                    policy,
                    Draws(seed + first + i, model.config.text.vocab_size),
                    model.config.generation.eos_token_ids,
                    max_tokens,
                )
                for i, ids in enumerate(part)
            ]
            write_tensors(path, _record(model, sessions, batch_size), metadata)
        if progress:
            progress(first + len(part), len(prompts))


def _record(
    model: DiffusionGemma, sessions: Sequence[Session], batch_size: int
) -> dict[str, mx.array]:
    """Run sessions.

    Args:
        model: The target.
        sessions: The sessions.
        batch_size: How many run together.

    Returns:
        The tensors of a shard.
    """
    prompts = [list(session.ids) for session in sessions]
    rows = {id(session): row for row, session in enumerate(sessions)}
    steps: list[list[CanvasStep]] = [[] for _ in sessions]
    for session, step in run(model, sessions, batch_size):
        steps[rows[id(session)]].append(step)
    committed = list[np.ndarray]()
    owner = list[int]()
    states = list[np.ndarray]()
    canvas = list[int]()
    for row, own in enumerate(steps):
        for step in own:
            if step.step == 0 and step.draft is not None:
                states.append(np.array(step.draft))
                canvas.append(len(committed))
            if step.committed:
                committed.append(np.array(step.argmax))
                owner.append(row)
            elif not step.stopped:
                states.append(np.array(step.canvas))
                canvas.append(len(committed))
    length = model.config.canvas_length
    return {
        "prompts": mx.array(np.concatenate(prompts).astype(np.int32)),
        "prompt_ends": mx.array(np.cumsum([len(ids) for ids in prompts]).astype(np.int32)),
        "committed": mx.array(np.array(committed, dtype=np.int32)),
        "canvas_prompt": mx.array(np.array(owner, dtype=np.int32)),
        "states": mx.array(np.array(states, dtype=np.int32).reshape(-1, length)),
        "state_canvas": mx.array(np.array(canvas, dtype=np.int32)),
    }


def read_trajectories(folder: Path, model: DiffusionGemma) -> Iterator[Trajectory]:
    """Read all logged canvases.

    Raises:
        UserError: The folder has no log, a shard is damaged, or the log belongs to another model.
    """
    paths = list_files(folder, "trajectories-*.safetensors")
    if not paths:
        raise UserError(f"{folder} holds no trajectories; roll the target out first.")
    for path in paths:
        if _metadata(path).get("target") != model_fingerprint(model):
            raise UserError(f"{path} was logged from another model than this one.")
        t = {name: np.array(value) for name, value in read_tensors(path)[0].items()}
        prompts = np.split(t["prompts"], t["prompt_ends"][:-1])
        prefix: np.ndarray = np.zeros(0, dtype=np.int32)
        for index, row in enumerate(t["canvas_prompt"].tolist()):
            first = index == 0 or t["canvas_prompt"][index - 1] != row
            prefix = prompts[row] if first else np.concatenate((prefix, t["committed"][index - 1]))
            yield Trajectory(
                prefix,
                prompts[row].size,
                t["committed"][index],
                t["states"][t["state_canvas"] == index],
            )


def _metadata(path: Path) -> dict[str, str]:
    return read_tensors(path)[1]
