"""The DiffusionGemma backbone: one stack of weights, two modes, one forward.

``encode`` runs the causal mode and writes the cache.  ``denoise`` runs the canvas mode and only
reads the cache.  Both call one forward over *segments* (see :mod:`mlx_diffgemma.model.attention`):
all rows of a call go through the projections, the experts and the head together, and attention runs
segment by segment.  The rows of a batch get the same numbers as alone (on Metal up to rounding:
docs/metal.md).

The module tree carries the checkpoint's key paths (``model.decoder.layers.N...``).  This file knows
no text and no sampling.

    >>> cache = Cache(model.config.text)
    >>> model.encode([prompt_ids], [cache])
    >>> model.denoise(canvas, [cache]).logits          # [1, canvas, vocabulary], float32
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_diffgemma.device import claim_process
from mlx_diffgemma.model.attention import Segment, rope_table
from mlx_diffgemma.model.blocks import Layer, SelfConditioning
from mlx_diffgemma.model.cache import Cache
from mlx_diffgemma.model.config import ModelConfig, TextConfig
from mlx_diffgemma.model.gradients import checkpoint
from mlx_diffgemma.model.layers import RMSNorm, soft_cap
from mlx_diffgemma.model.vision import Grid, VisionEmbedder, VisionTower

_reading = threading.Lock()  # guards the first read of the vision tower's weights


class Decoder(nn.Module):
    """The shared stack of weights, under the checkpoint's key path."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = [Layer(config, layer) for layer in config.layers]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_conditioning = SelfConditioning(config)


class EncoderLayer(nn.Module):
    """The only weight of a layer that the causal mode does not share with the canvas mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_scalar = mx.ones((1,))


class EncoderText(nn.Module):
    """The causal mode's own weights, under the checkpoint's key path."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.layers = [EncoderLayer() for _ in config.layers]


class Encoder(nn.Module):
    """The causal mode's own weights and, where the checkpoint has one, the vision tower."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.language_model = EncoderText(config.text)
        if config.vision:
            self.vision_tower = VisionTower(config.vision)
            self.embed_vision = VisionEmbedder(config.vision, config.text.hidden_size)


class Trunk(nn.Module):
    """Everything under the checkpoint's prefix ``model.``."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.decoder = Decoder(config.text)
        self.encoder = Encoder(config)


@dataclass(frozen=True)
class Encoded:
    """What ``encode`` returns; each list has one entry for each sequence.

    Args:
        logits: [1 or rows, vocabulary] float32, soft-capped; None unless asked for.
        hidden: The hidden states after the last norm, [rows, hidden].
        taps: The hidden states after the chosen layers, by layer index.
    """

    logits: list[mx.array] | None
    hidden: list[mx.array]
    taps: dict[int, list[mx.array]]


@dataclass(frozen=True)
class Denoised:
    """What ``denoise`` returns; where the canvases differ in length, no array has a batch axis.

    Args:
        logits: [batch, length, vocabulary] float32, soft-capped.
        hidden: The hidden states after the last norm, [batch, length, hidden].
        taps: The hidden states after the chosen layers, by layer index.
    """

    logits: mx.array
    hidden: mx.array
    taps: dict[int, mx.array]


class DiffusionGemma(nn.Module):
    """The whole model, made by :func:`mlx_diffgemma.checkpoint.loading.load_model`."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Trunk(config)

    @property
    def layers(self) -> list[Layer]:
        """The decoder's layers, under the name that mlx-lm's tuner looks for."""
        layers: list[Layer] = self.model.decoder.layers
        return layers

    @property
    def dtype(self) -> mx.Dtype:
        """The dtype of the hidden states."""
        return self.model.decoder.norm.weight.dtype

    def join(self) -> None:
        """Multiply the same rows by several matrices at once, if these have the same precision.

        The matrices become views of one array, under their own names, so nothing is in memory
        twice. A module whose weights are later replaced or adapted multiplies by each matrix again.
        """
        for layer in self.layers:
            layer.self_attn.join()
            layer.mlp.join()
        self.model.decoder.self_conditioning.join()

    @property
    def embed_scale(self) -> mx.array:
        """sqrt(hidden size), rounded to the compute dtype as the reference rounds it."""
        return mx.array(self.config.text.hidden_size**0.5, dtype=self.dtype)

    def embed(self, ids: mx.array) -> mx.array:
        """Scaled token embeddings; ``ids`` may have any shape."""
        # A table in a floating-point mode gives bfloat16 in every compute dtype.
        return self.model.decoder.embed_tokens(ids).astype(self.dtype) * self.embed_scale

    def encode_image(self, patches: mx.array, grid: Grid) -> mx.array:
        """The embeddings of an image.  The model's config must have a vision tower.

        Source: DiffusionGemmaEncoderModel.get_image_features.

        Args:
            patches: [rows * columns, 3 * patch size²] with values from 0 to 1, row by row.
            grid: The rows and columns of patches.

        Returns:
            [soft tokens, hidden]
        """
        claim_process()
        encoder = self.model.encoder
        with _reading:  # the tower's weights are read when the first image comes
            mx.eval(encoder.vision_tower.parameters(), encoder.embed_vision.parameters())
        return encoder.embed_vision(encoder.vision_tower(patches, grid)).astype(self.dtype)

    def soft_embed(self, probabilities: mx.array, ids: mx.array | None = None) -> mx.array:
        """The scaled mean of the token embeddings, weighted by ``probabilities``.

        Args:
            probabilities: [..., vocabulary], or [..., n] with ``ids``.
            ids: The tokens that the probabilities belong to, [..., n].

        Returns:
            [..., hidden]
        """
        table = self.model.decoder.embed_tokens
        probabilities = probabilities.astype(self.dtype)
        if ids is not None:
            mean = (probabilities[..., None, :] @ table(ids).astype(self.dtype))[..., 0, :]
        elif isinstance(table, nn.QuantizedEmbedding):
            mean = mx.quantized_matmul(
                probabilities,
                table.weight,
                table.scales,
                table.get("biases"),
                transpose=False,
                group_size=table.group_size,
                bits=table.bits,
                mode=table.mode,
            )
        else:
            mean = probabilities @ table.weight
        return mean * self.embed_scale

    def encode(
        self,
        inputs: Sequence[mx.array],
        caches: Sequence[Cache],
        logits: Literal["none", "last", "all"] = "none",
        taps: Sequence[int] = (),
        write: Literal["append", "hold"] = "append",
        blocks: Sequence[Sequence[tuple[int, int]]] = (),
    ) -> Encoded:
        """Causal mode: read the next positions of each sequence and write its cache.

        Args:
            inputs: Token ids [n] or embeddings [n, hidden] for each cache.
            caches: The cache of each sequence.
            logits: The rows whose next-token logits to compute: none, each sequence's last, or all.
            taps: The layers whose hidden states to return.
            write: ``"hold"`` keeps the K/V aside in the cache instead of appending them.
            blocks: For each input, ranges (start, end) of rows that see each other both ways
                (images).

        Returns:
            Hidden states and, where asked for, logits, for each sequence.
        """
        embeddings = [x if x.ndim == 2 else self.embed(x) for x in inputs]
        segments = []
        start = 0
        for row, (x, cache) in enumerate(zip(embeddings, caches, strict=True)):
            stop = start + x.shape[0]
            row_blocks = tuple(blocks[row]) if blocks else ()
            segments.append(Segment(start, stop, cache, write=write, blocks=row_blocks))
            start = stop
        hidden, tapped = self._forward(_concatenate(embeddings), segments, taps)
        for segment in segments:
            if write == "append":
                segment.cache.advance(segment.rows)
        parts = [hidden[s.stop - 1 if logits == "last" else s.start : s.stop] for s in segments]
        return Encoded(
            logits=None if logits == "none" else [self.logits(part) for part in parts],
            hidden=[hidden[s.start : s.stop] for s in segments],
            taps={layer: [x[s.start : s.stop] for s in segments] for layer, x in tapped.items()},
        )

    def denoise(
        self,
        canvas: mx.array,
        caches: Sequence[Cache],
        soft_embedding: mx.array | None = None,
        taps: Sequence[int] = (),
        commits: Sequence[mx.array | None] = (),
        lengths: Sequence[int] = (),
    ) -> Denoised:
        """Canvas mode: one denoising forward of a canvas after each sequence's cache.

        Args:
            canvas: Ids [batch, length]; with ``lengths``, the canvases one after the other in ids
                [sum of lengths].
            caches: The cache of each sequence.  It is only read, except for ``commits``.
            soft_embedding: The self-conditioning signal [batch, length, hidden].  At the first step
                of a canvas it is None, or zeros in a batch.
            taps: The layers whose hidden states to return.
            commits: For each sequence, ids [n] to encode into its cache in the same forward, before
                its canvas, as ``encode`` would; or None.
            lengths: The lengths of the canvases, where they differ.

        Returns:
            Logits and hidden states with the leading axes of ``canvas``.

        Raises:
            ValueError: The caches, the lengths and the canvas do not fit together.
        """
        lengths = lengths or [canvas.shape[1]] * canvas.shape[0]
        if len(caches) != len(lengths) or sum(lengths) != canvas.size:
            raise ValueError(
                f"{len(caches)} caches for canvases of lengths {list(lengths)} in an array of {canvas.shape}"
            )
        # 1) the rows to commit, which write to the caches
        rows, commit_segments = self._committed_rows(caches, commits)
        committed = start = commit_segments[-1].stop if commit_segments else 0
        segments = list(commit_segments)
        # 2) the rows of the canvases, each after the rows its sequence commits
        embedded = self.model.decoder.self_conditioning(self.embed(canvas), soft_embedding)
        for row, (cache, length) in enumerate(zip(caches, lengths, strict=True)):
            ids = commits[row] if commits else None
            after = 0 if ids is None else ids.size
            segments.append(Segment(start, start + length, cache, canvas=True, after=after))
            start += length
        # 3) one forward of both
        x = _concatenate([*rows, embedded.reshape(canvas.size, -1)])
        hidden, tapped = self._forward(x, segments, taps)
        for segment in commit_segments:
            segment.cache.advance(segment.rows)
        hidden = hidden[committed:]
        tapped = {layer: x[committed:] for layer, x in tapped.items()}
        return Denoised(
            logits=self.logits(hidden).reshape(*canvas.shape, -1),
            hidden=hidden.reshape(*canvas.shape, -1),
            taps={layer: x.reshape(*canvas.shape, -1) for layer, x in tapped.items()},
        )

    def _committed_rows(
        self, caches: Sequence[Cache], commits: Sequence[mx.array | None]
    ) -> tuple[list[mx.array], list[Segment]]:
        """The embedded rows that a forward commits, and their segments."""
        rows, segments = list[mx.array](), list[Segment]()
        start = 0
        for cache, ids in zip(caches, commits, strict=False):
            if ids is not None:
                rows.append(self.embed(ids))
                segments.append(Segment(start, start + ids.size, cache))
                start += ids.size
        return rows, segments

    def training_forward(
        self,
        sequences: Sequence[mx.array],
        canvases: mx.array,
        starts: Sequence[int],
        soft_embedding: mx.array | None = None,
        checkpoint: bool = False,
    ) -> tuple[mx.array, mx.array]:
        """Both modes in one forward, for training: each sequence causally, and a canvas inside it.

        A canvas sees of its sequence only what comes before it, so gradients flow from the canvas
        into the keys and values of the sequence.

        Args:
            sequences: Ids [n] of each sequence.
            canvases: Ids [batch, length], one canvas a sequence.
            starts: The position in its sequence at which each canvas begins.
            soft_embedding: The self-conditioning signal [batch, length, hidden], or None.
            checkpoint: Whether a layer's inner values are computed again for the backward pass
                instead of being kept.

        Returns:
            The hidden states after the last norm: [rows of all sequences, hidden] and
            [batch, length, hidden].
        """
        batch, length = canvases.shape
        total = sum(ids.size for ids in sequences)

        def make_segments() -> list[Segment]:
            caches = [Cache(self.config.text, keep_all=True) for _ in sequences]
            segments = []
            row = 0
            for ids, cache in zip(sequences, caches, strict=True):
                segments.append(Segment(row, row + ids.size, cache))
                row += ids.size
            for cache, start in zip(caches, starts, strict=True):
                segments.append(Segment(row, row + length, cache, canvas=True, at=start))
                row += length
            return segments

        canvas = self.model.decoder.self_conditioning(self.embed(canvases), soft_embedding)
        text = self.embed(_concatenate(list(sequences)))
        x = _concatenate([text, canvas.reshape(batch * length, -1)])
        hidden, _ = self._forward(x, make_segments(), (), make_segments if checkpoint else None)
        return hidden[:total], hidden[total:].reshape(batch, length, -1)

    def _forward(
        self,
        x: mx.array,
        segments: Sequence[Segment],
        taps: Sequence[int],
        make_segments: Callable[[], Sequence[Segment]] | None = None,
    ) -> tuple[mx.array, dict[int, mx.array]]:
        """Run all layers and the final norm.

        Args:
            x: Embeddings [rows, hidden].
            segments: The segments that the rows fall into, in order.
            taps: The layers whose hidden states to return.
            make_segments: Makes the same segments with empty caches.  With it, the layers run again
                in the backward pass instead of keeping their inner values.

        Returns:
            The hidden states after the last norm [rows, hidden], and those after each layer in
            ``taps``.
        """
        claim_process()
        decoder = self.model.decoder
        encoder = self.model.encoder.language_model
        positions = _concatenate([mx.arange(s.position, s.position + s.rows) for s in segments])
        shapes = self.config.text.layers
        tables = {shape: rope_table(positions, shape) for shape in set(shapes)}
        scalars = _per_row(
            segments,
            [layer.layer_scalar for layer in decoder.layers],
            [layer.layer_scalar for layer in encoder.layers],
        )
        tapped = {}
        for index, layer in enumerate(decoder.layers):
            table = tables[shapes[index]]
            if make_segments is None:
                x = layer(x, table, segments, index, scalars[index])
            else:
                x = _checkpointed(layer, x, table, make_segments, index, scalars[index])
            if index in taps:
                tapped[index] = x
        return decoder.norm(x), tapped

    def logits(self, hidden: mx.array) -> mx.array:
        """Soft-capped float32 logits of hidden states after the last norm."""
        cap = mx.array(self.config.text.final_logit_softcapping, dtype=mx.float32)
        return soft_cap(self.model.decoder.embed_tokens.as_linear(hidden), cap)


def _checkpointed(
    layer: Layer,
    x: mx.array,
    table: tuple[mx.array, mx.array],
    make_segments: Callable[[], Sequence[Segment]],
    index: int,
    scalar: mx.array,
) -> mx.array:
    """Apply ``layer`` to ``x``; only ``x`` is kept for the backward pass."""

    def run(parameters: dict[str, Any], x: mx.array) -> mx.array:
        layer.update(parameters)
        return layer(x, table, make_segments(), index, scalar)

    return checkpoint(run, layer.trainable_parameters(), x)


def _per_row(
    segments: Sequence[Segment], canvas: Sequence[mx.array], causal: Sequence[mx.array]
) -> Sequence[mx.array]:
    """The layer scalars that apply to the rows.

    Args:
        segments: The segments of the forward.
        canvas: The canvas mode's scalar of each layer.
        causal: The causal mode's scalar of each layer.

    Returns:
        For each layer, the scalar of the mode where all rows have the same mode, else that of each
        row [rows, 1].
    """
    if len({segment.canvas for segment in segments}) == 1:
        return canvas if segments[0].canvas else causal
    modes = np.repeat([s.canvas for s in segments], [s.rows for s in segments])
    is_canvas = mx.array(modes[:, None])
    scalars = mx.where(is_canvas, mx.concatenate(canvas), mx.concatenate(causal))
    return mx.split(scalars, len(canvas), axis=-1)


def _concatenate(arrays: Sequence[mx.array]) -> mx.array:
    return arrays[0] if len(arrays) == 1 else mx.concatenate(arrays)
