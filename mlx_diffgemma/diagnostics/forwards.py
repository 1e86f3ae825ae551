"""Compares one forward pass of ours with the same pass of the reference, stage by stage."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_diffgemma.diagnostics.reference import Encoded, Reference
from mlx_diffgemma.diagnostics.stages import StageErrors, StageResult
from mlx_diffgemma.media.images import Image
from mlx_diffgemma.media.prompt import ImageSpan, check_vision, embed_inputs
from mlx_diffgemma.model.cache import Cache
from mlx_diffgemma.model.config import ImageTokens
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.model.vision import axial_table
from mlx_diffgemma.sampling import self_conditioning

Denoised = dict[str, tuple[np.ndarray, np.ndarray]]  # (logits, router margins) by variant


def compare_forwards(
    model: DiffusionGemma,
    reference: Reference,
    prompts: Sequence[Sequence[int]],
    seed: int = 0,
) -> list[StageResult]:
    """Compare encoder, cache and denoising.

    The denoising logits are compared without and with self-conditioning, and for all prompts as one
    batch.

    Args:
        model: Our model, in float32.
        reference: The reference for the same checkpoint.
        prompts: Token ids of each prompt.
        seed: Seed of the canvases.

    Returns:
        One result for each stage.
    """
    text = model.config.text
    exact = "float64" in reference.variants
    hidden = StageErrors("encoder hidden states")
    cached = StageErrors("cache")
    first = StageErrors("logits, first step")
    second = StageErrors("logits, self-conditioned")
    batch = StageErrors("logits, unequal batch")
    rng = np.random.default_rng(seed)
    canvases = rng.integers(0, text.vocab_size, (len(prompts), model.config.canvas_length))
    caches = [Cache(text) for _ in prompts]
    batch_margins = []
    for ids, canvas, cache in zip(prompts, canvases, caches, strict=True):
        encoded = {name: reference.encode(ids, name) for name in reference.variants}
        eager = encoded["eager"]
        ours = model.encode([mx.array(ids)], [cache]).hidden[0]
        hidden.add(_array(ours), [e.hidden for e in encoded.values()], eager.margins, exact)
        for layer in range(len(text.layers)):
            entries = [_cache_rows(e.cache, layer) for e in encoded.values()]
            margins = eager.margins[-len(entries[0]) :]
            cached.add(_our_cache_rows(cache, layer), entries, margins, exact)
        plain = _denoised(reference, encoded, canvas)
        _add_logits(first, _logits(model, canvas, cache), plain, exact)
        scaled = (plain["eager"][0] / np.float32(0.7)).astype(np.float32)
        conditioned = _denoised(reference, encoded, canvas, scaled)
        signal = self_conditioning.dense(model, mx.array(scaled[None]))
        _add_logits(second, _logits(model, canvas, cache, signal), conditioned, exact)
        batch_margins.append(plain["eager"][1])
    together = model.denoise(mx.array(canvases.astype(np.int32)), caches).logits
    padded = []
    for name in reference.variants:
        logits = reference.denoise_padded(prompts, canvases, name)
        padded.append(logits.reshape(-1, text.vocab_size))
    ours_together = _array(together).reshape(-1, text.vocab_size)
    batch.add(ours_together, padded, np.concatenate(batch_margins), exact)
    return [stage.result() for stage in (hidden, cached, first, second, batch)]


def compare_images(
    model: DiffusionGemma,
    reference: Reference,
    images: Sequence[Sequence[Image]],
    seed: int = 0,
) -> list[StageResult]:
    """Compare the vision tower, and prompts with images.

    Args:
        model: Our model, in float32.
        reference: The reference for the same checkpoint.
        images: Groups of images; each group becomes one prompt.
        seed: Seed of the text around the images and of the canvases.

    Returns:
        One result for each stage; an empty list without images.
    """
    if not images:
        return []
    text = model.config.text
    exact = "float64" in reference.variants
    _, tokens = check_vision(model.config)
    special = (tokens.begin, tokens.image, tokens.end)
    plain_ids = np.setdiff1d(np.arange(1, text.vocab_size), special)
    rng = np.random.default_rng(seed)
    tower: dict[str, StageErrors] = {}
    hidden = StageErrors("encoder hidden states, images")
    logits = StageErrors("logits behind images")
    for group in images:
        for image in group:
            _add_tower_stages(tower, model, reference, image, exact)
        ids, placed = _prompt_with_images(group, tokens, plain_ids, rng)
        cache = Cache(text)
        canvas = rng.choice(plain_ids, model.config.canvas_length)
        rows, blocks = embed_inputs(model, ids, 0, placed)
        ours = model.encode([rows], [cache], blocks=[blocks]).hidden[0]
        encoded = {name: reference.encode(ids, name, group) for name in reference.variants}
        theirs = [e.hidden for e in encoded.values()]
        hidden.add(_array(ours), theirs, encoded["eager"].margins, exact)
        plain = _denoised(reference, encoded, canvas)
        _add_logits(logits, _logits(model, canvas, cache), plain, exact)
    return [stage.result() for stage in (*tower.values(), hidden, logits)]


def _add_tower_stages(
    stages: dict[str, StageErrors],
    model: DiffusionGemma,
    reference: Reference,
    image: Image,
    exact: bool,
) -> None:
    """Add the tower's outputs for one image to ``stages``.

    Args:
        stages: The errors by stage.
        model: Our model.
        reference: The reference for the same checkpoint.
        image: The image.
        exact: Whether the last variant of the reference is float64.
    """
    variants = [name for name in reference.variants if name != "grouped_mm"]  # it has no experts
    theirs = [reference.encode_image(image, name) for name in variants]
    for (name, ours), *others in zip(_tower_stages(model, image), *theirs, strict=True):
        # Before the last norm the values have no fixed scale, so errors are divided by their root
        # mean square.
        unit = max(1.0, float(np.sqrt(np.mean(others[0][1] ** 2))))
        values = [array / unit for _, array in others]
        stages.setdefault(name, StageErrors(name)).add(ours / unit, values, exact=exact)


def _tower_stages(model: DiffusionGemma, image: Image) -> list[tuple[str, np.ndarray]]:
    """The output of each stage of our tower, under the names of ``Reference.encode_image``."""
    tower = model.model.encoder.vision_tower
    positions = mx.array(image.positions)
    patches = mx.array(image.patches)
    x = tower.patch_embedder(patches, positions)
    table = axial_table(positions, tower.config.head_dim, tower.config.rope_theta)
    stages = [("patch embedding", _array(x))]
    for index, layer in enumerate(tower.encoder.layers):
        x = layer(x, table)
        stages.append((f"tower layer {index}", _array(x)))
    stages.append(("soft tokens", _array(tower(patches, image.grid))))
    stages.append(("image embeddings", _array(model.encode_image(patches, image.grid))))
    return stages


def _prompt_with_images(
    group: Sequence[Image], tokens: ImageTokens, plain_ids: np.ndarray, rng: np.random.Generator
) -> tuple[list[int], list[ImageSpan]]:
    """A prompt with random text around the images.

    Args:
        group: The images.
        tokens: The image tokens of the model.
        plain_ids: The ids that text may have.
        rng: Where the text comes from.

    Returns:
        (the ids, where the images are in them)
    """
    ids: list[int] = []
    placed: list[ImageSpan] = []
    for image in group:
        ids += [*rng.choice(plain_ids, 7).tolist(), tokens.begin]
        placed.append(ImageSpan(len(ids), image))
        ids += [tokens.image] * image.soft_tokens + [tokens.end]
    ids += rng.choice(plain_ids, 9).tolist()
    return ids, placed


def _logits(
    model: DiffusionGemma, canvas: np.ndarray, cache: Cache, signal: mx.array | None = None
) -> np.ndarray:
    """Our logits [length, vocabulary] of one canvas.

    Args:
        model: Our model.
        canvas: The ids [length] of the canvas.
        cache: The cache of the prompt.
        signal: The self-conditioning signal, or None.
    """
    rows = mx.array(canvas[None].astype(np.int32))
    return _array(model.denoise(rows, [cache], signal).logits[0])


def _denoised(
    reference: Reference,
    encoded: dict[str, Encoded],
    canvas: np.ndarray,
    scaled: np.ndarray | None = None,
) -> Denoised:
    """Denoise one canvas with each variant of the reference.

    Args:
        reference: The reference.
        encoded: The prompt, as each variant encoded it.
        canvas: The ids [length] of the canvas.
        scaled: The scaled logits of the step before, or None.
    """
    return {
        name: reference.denoise(prompt.cache, canvas, scaled, name)
        for name, prompt in encoded.items()
    }


def _add_logits(stage: StageErrors, ours: np.ndarray, theirs: Denoised, exact: bool) -> None:
    stage.add(ours, [logits for logits, _ in theirs.values()], theirs["eager"][1], exact)


def _cache_rows(cache: object, layer: int) -> np.ndarray:
    """The reference's entries of a layer, as [entries, 2 x heads x size]."""
    entries = cache.layers[layer]  # type: ignore[attr-defined]
    pair = [np.asarray(t[0].detach().cpu().numpy()) for t in (entries.keys, entries.values)]
    return _entry_rows(pair)


def _our_cache_rows(cache: Cache, layer: int) -> np.ndarray:
    return _entry_rows([_array(t[0]) for t in cache.view(layer) or ()])


def _entry_rows(keys_and_values: Sequence[np.ndarray]) -> np.ndarray:
    """Arrange keys and values [heads, entries, size] as [entries, 2 x heads x size]."""
    flat = [a.transpose(1, 0, 2).reshape(a.shape[1], -1) for a in keys_and_values]
    return np.concatenate(flat, axis=1)


def _array(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32))
