"""The torch side: transformers' DiffusionGemma with its dynamic cache and our random numbers.

The reference has a spread of its own: its eager and its grouped_mm experts differ, and so do its
float32 model and a float64 copy.  Every computation here runs in each of these *variants*, so that
a difference can be compared with that spread.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import (
    DiffusionGemmaConfig,
    DiffusionGemmaForBlockDiffusion,
    DynamicCache,
    Gemma4VisionConfig,
)

from mlx_diffgemma.diagnostics.recorder import Recorder, ReferenceCanvas
from mlx_diffgemma.diagnostics.reference_variants import router_margins, stay_double, to_numpy
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.files import read_json
from mlx_diffgemma.media.images import Image
from mlx_diffgemma.sampling.draws import DrawSource

VARIANTS = ("eager", "grouped_mm", "float64")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# A float64 copy of a model with more parameters than this would not fit beside the model.
FLOAT64_LIMIT = 2_000_000_000
# The exceptions that transformers raises for settings that it refuses.
REFUSALS = (ValueError, TypeError, KeyError, AttributeError, OSError)
PADDED_TO = 1260  # patches: a multiple of 70, the smallest budget, and of the squares 9 and 4


@dataclass(frozen=True)
class Encoded:
    """An encoded prompt: ``hidden`` [rows, hidden] after the norm, its cache, and its router
    margins.
    """

    hidden: np.ndarray
    cache: DynamicCache
    margins: np.ndarray


class Reference:
    """transformers' model of a checkpoint folder."""

    def __init__(self, folder: Path, device: str = "cpu", dtype: str = "float32"):
        if device not in ("cpu", "cuda"):
            raise UserError(f"Unknown device {device!r}; use cpu or cuda.")
        if device == "cuda" and not torch.cuda.is_available():
            raise UserError("torch sees no CUDA device here; run with --device cpu.")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        try:
            config = DiffusionGemmaConfig.from_pretrained(folder)
        except REFUSALS as error:
            raise UserError(
                f"The reference refuses config.json of {folder}: {_sentence(error)}; correct it, or compare another "
                "checkpoint."
            ) from None
        if not _raw_vision(folder):
            # Without vision weights the reference builds a random tower of 150 M parameters, so the
            # config asks for the smallest one.
            config.vision_config = Gemma4VisionConfig(
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=1,
                num_key_value_heads=1,
                head_dim=16,
                position_embedding_size=16,
            )
        try:
            model = DiffusionGemmaForBlockDiffusion.from_pretrained(
                folder, config=config, dtype=DTYPES[dtype], experts_implementation="eager"
            )
        except REFUSALS as error:
            raise UserError(
                f"The reference cannot load {folder}: {_sentence(error)}; correct the file it names, or compare "
                "another checkpoint."
            ) from None
        self.model = model.to(device).eval()
        self.device = device
        self.config = config
        self.variants = [
            name for name in VARIANTS if name != "float64" or self._fits_float64(dtype)
        ]
        self._float64: DiffusionGemmaForBlockDiffusion | None = None

    def _fits_float64(self, dtype: str) -> bool:
        return (
            dtype == "float32"
            and sum(p.numel() for p in self.model.model.decoder.parameters()) < FLOAT64_LIMIT
        )

    @contextlib.contextmanager
    def variant(self, name: str) -> Iterator[DiffusionGemmaForBlockDiffusion]:
        """Yield the model as "eager", "grouped_mm" or "float64".

        One model switches between the first two.
        """
        if name != "float64":
            self.model.set_experts_implementation(name)
            yield self.model
            return
        if self._float64 is None:
            self.model.set_experts_implementation("eager")
            self._float64 = copy.deepcopy(self.model).double()
        with stay_double():
            yield self._float64

    @torch.no_grad()
    def encode(
        self, ids: Sequence[int], variant: str = "eager", images: Sequence[Image] = ()
    ) -> Encoded:
        """Encode a prompt.

        Args:
            ids: The token ids, with image tokens for the images.
            variant: The variant of the reference.
            images: The images of the image tokens.

        Returns:
            Hidden states, cache and router margins.
        """
        cache = DynamicCache(config=self.config.get_text_config(decoder=True))
        image_inputs: dict[str, Any] = {}
        row = self._tensor(ids)[None]
        with self.variant(variant) as model, router_margins(model) as margins:
            encoder = model.model.encoder
            if images:
                pixels, positions = self._padded(images, model.dtype)
                # A plain forward drops the masks of images: they are passed in.
                masks = encoder.create_masks_for_generate(
                    config=model.config.get_text_config(),
                    attention_mask=None,
                    past_key_values=cache,
                    inputs_embeds=torch.empty(*row.shape, 1, dtype=model.dtype, device=self.device),
                    position_ids=torch.arange(row.shape[1], device=self.device)[None],
                    mm_token_type_ids=(row == self.config.image_token_id).long(),
                )
                image_inputs = {
                    "pixel_values": pixels,
                    "image_position_ids": positions,
                    "attention_mask": masks,
                }
            out = encoder(input_ids=row, past_key_values=cache, **image_inputs)
        return Encoded(to_numpy(out.last_hidden_state[0]), out.past_key_values, margins())

    @torch.no_grad()
    def encode_image(self, image: Image, variant: str = "eager") -> list[tuple[str, np.ndarray]]:
        """The output of each stage of the tower, without the rows of the padding.

        The embeddings come last.
        """
        stages: list[tuple[str, np.ndarray]] = []
        count = len(image.patches)

        def keep(name: str) -> Callable[..., None]:
            def hook(_module: object, _inputs: object, output: torch.Tensor) -> None:
                stages.append((name, to_numpy(output[0, :count])))

            return hook

        with self.variant(variant) as model:
            tower = model.model.encoder.vision_tower
            handles = [tower.patch_embedder.register_forward_hook(keep("patch embedding"))]
            handles += [
                layer.register_forward_hook(keep(f"tower layer {index}"))
                for index, layer in enumerate(tower.encoder.layers)
            ]
            pixels, positions = self._padded([image], model.dtype)
            out = model.model.encoder.get_image_features(pixels, positions)
            for handle in handles:
                handle.remove()
        return [
            *stages,
            ("soft tokens", to_numpy(out.last_hidden_state)),
            ("image embeddings", to_numpy(out.pooler_output)),
        ]

    def _padded(
        self, images: Sequence[Image], dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches and positions [images, longest, ...], padded as the reference's processor pads
        them.
        """
        longest = -(-max(len(image.patches) for image in images) // PADDED_TO) * PADDED_TO
        pixels = np.zeros((len(images), longest, images[0].patches.shape[1]), dtype=np.float32)
        positions = np.full((len(images), longest, 2), -1)
        for row, image in enumerate(images):
            pixels[row, : len(image.patches)] = image.patches
            positions[row, : len(image.patches)] = image.positions
        return torch.from_numpy(pixels).to(self.device, dtype), self._tensor(positions)

    @torch.no_grad()
    def next_token_logits(self, encoded: Encoded) -> np.ndarray:
        """Soft-capped logits [vocabulary] of the causal mode after the last encoded row."""
        cap = self.model.final_logit_softcapping
        hidden = torch.from_numpy(encoded.hidden[-1]).to(self.device, self.model.dtype)
        return to_numpy(torch.tanh(self.model.lm_head(hidden).float() / cap) * cap)

    @torch.no_grad()
    def denoise(
        self,
        cache: DynamicCache,
        canvas: np.ndarray,
        scaled: np.ndarray | None = None,
        variant: str = "eager",
    ) -> tuple[np.ndarray, np.ndarray]:
        """Denoise one unpadded row.

        Args:
            cache: The cache of the prompt.
            canvas: The ids [length] of the canvas.
            scaled: The scaled logits of the step before, or None.
            variant: The variant of the reference.

        Returns:
            (soft-capped logits [length, vocabulary], router margins [length])
        """
        with self.variant(variant) as model, router_margins(model) as margins:
            conditioning = (
                None
                if scaled is None
                else torch.from_numpy(scaled)[None].to(self.device, model.dtype)
            )
            out = model(
                decoder_input_ids=self._tensor(canvas)[None],
                past_key_values=cache,
                self_conditioning_logits=conditioning,
            )
        return to_numpy(out.logits[0]), margins()

    @torch.no_grad()
    def denoise_padded(
        self, prompts: Sequence[Sequence[int]], canvas: np.ndarray, variant: str = "eager"
    ) -> np.ndarray:
        """The logits [batch, length, vocabulary] of left-padded prompts, without self-conditioning.

        Args:
            prompts: The token ids of each prompt.
            canvas: The ids of the canvases.
            variant: The variant of the reference.
        """
        ids, mask = self._pad(prompts)
        cache = DynamicCache(config=self.config.get_text_config(decoder=True))
        full = torch.nn.functional.pad(mask, (0, canvas.shape[1]), value=True)
        with self.variant(variant) as model:
            out = model(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=cache,
                decoder_input_ids=self._tensor(canvas),
                decoder_attention_mask=full,
            )
        return to_numpy(out.logits)

    def trajectories(
        self,
        prompts: Sequence[Sequence[int]],
        draws: Sequence[DrawSource],
        canvases: int,
        variant: str = "eager",
        **generation: object,
    ) -> list[list[ReferenceCanvas]]:
        """Run ``generate`` on left-padded prompts with our random numbers.

        Args:
            prompts: Token ids of each prompt.
            draws: Random numbers of each prompt.
            canvases: The most canvases of an answer.
            variant: The variant of the reference.
            **generation: Fields of the reference's generation config, such as max_denoising_steps.

        Returns:
            For each prompt its canvases up to its end token.

        Raises:
            UserError: The reference refuses the checkpoint's generation config.
        """
        ids, mask = self._pad(prompts)
        length = self.config.canvas_length
        recorder = Recorder(prompts, draws, length, self.device)
        with self.variant(variant) as model, recorder.installed(model):
            try:
                model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=canvases * length,
                    **generation,
                )
            except REFUSALS as error:
                raise UserError(
                    f"The reference refuses generation_config.json: {_sentence(error)}; correct it, or compare "
                    "another checkpoint."
                ) from None
            ends = model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        return [recorder.row(row, ends) for row in range(len(prompts))]

    def _pad(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(map(len, prompts))
        rows = [[0] * (longest - len(p)) + list(p) for p in prompts]
        mask = [[False] * (longest - len(p)) + [True] * len(p) for p in prompts]
        return self._tensor(rows), torch.tensor(mask, device=self.device)

    def _tensor(self, ids: object) -> torch.Tensor:
        return torch.as_tensor(np.asarray(ids), dtype=torch.long, device=self.device)


def _raw_vision(folder: Path) -> bool:
    return bool(read_json(folder / "config.json").get("vision_config"))


def _sentence(error: Exception) -> str:
    """The first line of transformers' message, without its full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".:")
