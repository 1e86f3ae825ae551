"""The torch side: transformers' DiffusionGemma with its dynamic cache, fed with our random numbers.

The reference has a spread of its own: its eager and its grouped_mm experts differ, and so do its float32 and a float64
copy.  Everything here can be asked of each of these *variants*, so that a difference can be held against that spread.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from transformers import DiffusionGemmaConfig, DiffusionGemmaForBlockDiffusion, DynamicCache, Gemma4VisionConfig

from mlx_diffgemma.draws import DrawSource
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.images import Image

VARIANTS = ("eager", "grouped_mm", "float64")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# A float64 copy of a model beyond this many parameters would not fit beside it.
FLOAT64_LIMIT = 2_000_000_000
REFUSALS = (ValueError, TypeError, KeyError, AttributeError, OSError)  # what transformers raises for settings it does not take
PADDED_TO = 1260  # patches: a multiple of the smallest budget, of squares of nine and of four


@dataclass(frozen=True)
class Encoded:
    """What the causal mode made of a prompt: ``hidden`` [rows, hidden] after the norm, its cache, router margins."""

    hidden: np.ndarray
    cache: DynamicCache
    margins: np.ndarray


@dataclass(frozen=True)
class ReferenceStep:
    """One denoising step of one row; all arrays are [length]."""

    canvas_in: np.ndarray
    canvas: np.ndarray
    argmax: np.ndarray
    accepted: np.ndarray
    stopped: bool


@dataclass
class ReferenceCanvas:
    """One canvas of one row: the ids it follows and its steps."""

    prefix: np.ndarray
    steps: list[ReferenceStep] = field(default_factory=list)


class Reference:
    """transformers' model of a checkpoint folder on ``device``; ``dtype`` is that of weights and activations."""

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
            raise UserError(f"The reference refuses config.json of {folder}: {_sentence(error)}; correct it, or compare another "
                            "checkpoint.") from None
        if not _raw_vision(folder):
            # Without vision weights the reference builds a random tower of 150 M parameters; the smallest one will do.
            config.vision_config = Gemma4VisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                                      num_attention_heads=1, num_key_value_heads=1, head_dim=16,
                                                      position_embedding_size=16)
        try:
            model = DiffusionGemmaForBlockDiffusion.from_pretrained(folder, config=config, dtype=DTYPES[dtype],
                                                                    experts_implementation="eager")
        except REFUSALS as error:
            raise UserError(f"The reference cannot load {folder}: {_sentence(error)}; correct the file it names, or compare "
                            "another checkpoint.") from None
        self.model = model.to(device).eval()
        self.device, self.config = device, config
        self.variants = [name for name in VARIANTS if name != "float64" or self._fits_float64(dtype)]
        self._float64: DiffusionGemmaForBlockDiffusion | None = None

    def _fits_float64(self, dtype: str) -> bool:
        return dtype == "float32" and sum(p.numel() for p in self.model.model.decoder.parameters()) < FLOAT64_LIMIT

    @contextlib.contextmanager
    def variant(self, name: str) -> Iterator[DiffusionGemmaForBlockDiffusion]:
        """The model as "eager", "grouped_mm" or "float64"; one model switches between the first two."""
        if name != "float64":
            self.model.set_experts_implementation(name)
            yield self.model
            return
        if self._float64 is None:
            self.model.set_experts_implementation("eager")
            self._float64 = copy.deepcopy(self.model).double()
        with _stay_double():
            yield self._float64

    @torch.no_grad()
    def encode(self, ids: Sequence[int], variant: str = "eager", images: Sequence[Image] = ()) -> Encoded:
        """``images`` stand at the image tokens among ``ids``; their masks are given, as a plain forward drops them."""
        cache, given = DynamicCache(config=self.config.get_text_config(decoder=True)), dict[str, Any]()
        row = self._tensor(ids)[None]
        with self.variant(variant) as model, _router_margins(model) as margins:
            encoder = model.model.encoder
            if images:
                pixels, positions = self._padded(images, model.dtype)
                masks = encoder.create_masks_for_generate(
                    config=model.config.get_text_config(), attention_mask=None, past_key_values=cache,
                    inputs_embeds=torch.empty(*row.shape, 1, dtype=model.dtype, device=self.device),
                    position_ids=torch.arange(row.shape[1], device=self.device)[None],
                    mm_token_type_ids=(row == self.config.image_token_id).long())
                given = {"pixel_values": pixels, "image_position_ids": positions, "attention_mask": masks}
            out = encoder(input_ids=row, past_key_values=cache, **given)
        return Encoded(_numpy(out.last_hidden_state[0]), out.past_key_values, margins())

    @torch.no_grad()
    def see(self, image: Image, variant: str = "eager") -> list[tuple[str, np.ndarray]]:
        """What the tower makes of an image, stage by stage, without the rows of its padding; the last are the embeddings."""
        found, count = list[tuple[str, np.ndarray]](), len(image.patches)

        def keep(name: str) -> Callable[..., None]:
            def hook(_module: object, _inputs: object, output: torch.Tensor) -> None:
                found.append((name, _numpy(output[0, :count])))
            return hook

        with self.variant(variant) as model:
            tower = model.model.encoder.vision_tower
            handles = [tower.patch_embedder.register_forward_hook(keep("patch embedding"))]
            handles += [layer.register_forward_hook(keep(f"tower layer {index}"))
                        for index, layer in enumerate(tower.encoder.layers)]
            pixels, positions = self._padded([image], model.dtype)
            out = model.model.encoder.get_image_features(pixels, positions)
            for handle in handles:
                handle.remove()
        return [*found, ("soft tokens", _numpy(out.last_hidden_state)), ("image embeddings", _numpy(out.pooler_output))]

    def _padded(self, images: Sequence[Image], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Patches and positions [images, longest, ...] with the padding that the reference's processor adds."""
        longest = -(-max(len(image.patches) for image in images) // PADDED_TO) * PADDED_TO
        pixels = np.zeros((len(images), longest, images[0].patches.shape[1]), dtype=np.float32)
        positions = np.full((len(images), longest, 2), -1)
        for row, image in enumerate(images):
            pixels[row, : len(image.patches)], positions[row, : len(image.patches)] = image.patches, image.positions
        return torch.from_numpy(pixels).to(self.device, dtype), self._tensor(positions)

    @torch.no_grad()
    def next_token_logits(self, encoded: Encoded) -> np.ndarray:
        """Soft-capped logits [vocabulary] of the causal mode after the last encoded row."""
        cap = self.model.final_logit_softcapping
        hidden = torch.from_numpy(encoded.hidden[-1]).to(self.device, self.model.dtype)
        return _numpy(torch.tanh(self.model.lm_head(hidden).float() / cap) * cap)

    @torch.no_grad()
    def denoise(self, cache: DynamicCache, canvas: np.ndarray, scaled: np.ndarray | None = None, variant: str = "eager",
                ) -> tuple[np.ndarray, np.ndarray]:
        """(soft-capped logits [length, vocabulary], router margins [length]) of one unpadded row."""
        with self.variant(variant) as model, _router_margins(model) as margins:
            conditioning = None if scaled is None else torch.from_numpy(scaled)[None].to(self.device, model.dtype)
            out = model(decoder_input_ids=self._tensor(canvas)[None], past_key_values=cache,
                        self_conditioning_logits=conditioning)
        return _numpy(out.logits[0]), margins()

    @torch.no_grad()
    def denoise_padded(self, prompts: Sequence[Sequence[int]], canvas: np.ndarray, variant: str = "eager") -> np.ndarray:
        """Logits [batch, length, vocabulary] of left-padded prompts, without self-conditioning."""
        ids, mask = self._pad(prompts)
        cache = DynamicCache(config=self.config.get_text_config(decoder=True))
        full = torch.nn.functional.pad(mask, (0, canvas.shape[1]), value=True)
        with self.variant(variant) as model:
            out = model(input_ids=ids, attention_mask=mask, past_key_values=cache, decoder_input_ids=self._tensor(canvas),
                        decoder_attention_mask=full)
        return _numpy(out.logits)

    def trajectories(self, prompts: Sequence[Sequence[int]], draws: Sequence[DrawSource], canvases: int,
                     variant: str = "eager", **generation: object) -> list[list[ReferenceCanvas]]:
        """Run ``generate`` on left-padded prompts with our draws; per row its canvases until its end token.

        ``generation`` are fields of the reference's generation config, as max_denoising_steps.
        """
        ids, mask = self._pad(prompts)
        length = self.config.canvas_length
        recorder = _Recorder(prompts, draws, length, self.device)
        with self.variant(variant) as model, recorder.installed(model):
            try:
                model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=canvases * length, **generation)
            except REFUSALS as error:
                raise UserError(f"The reference refuses generation_config.json: {_sentence(error)}; correct it, or compare "
                                "another checkpoint.") from None
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


class _Recorder:
    """Gives the reference our random numbers and writes down every step."""

    def __init__(self, prompts: Sequence[Sequence[int]], draws: Sequence[DrawSource], length: int, device: str):
        self.prompts, self.draws, self.length, self.device = prompts, draws, length, device
        self.canvas_index, self.step, self.in_step = -1, 0, False
        self.steps: list[list[dict[str, object]]] = []  # per canvas, per step

    @contextlib.contextmanager
    def installed(self, model: DiffusionGemmaForBlockDiffusion) -> Iterator[None]:
        make_sampler, step = model._prepare_sampler, model._denoising_step

        def prepare(config: object) -> object:
            self.sampler = make_sampler(config)
            self.sampler.initialize_canvas = self._initialize
            return self.sampler

        def denoise(**inputs: object) -> object:
            self.in_step = True
            before = inputs["finished_denoising"].clone()
            with mock.patch.object(torch, "multinomial", self._multinomial):
                out = step(**inputs)
            self.steps[-1].append({"canvas_in": inputs["current_canvas"], "canvas": out[0], "argmax": out[1], "before": before,
                                   "finished": out[3].clone(), "accepted": self.sampler.accepted_token_mask})
            self.in_step, self.step = False, self.step + 1
            return out

        with mock.patch.object(model, "_prepare_sampler", prepare), mock.patch.object(model, "_denoising_step", denoise):
            yield

    def _numbers(self, name: str) -> torch.Tensor:
        rows = [getattr(d.step(self.canvas_index, 0, self.step, self.canvas_index * self.length, self.length), name)
                for d in self.draws]
        return torch.from_numpy(np.stack(rows)).to(self.device)

    def _initialize(self, batch_size: int, device: torch.device) -> torch.Tensor:  # noqa: ARG002 (the reference's call)
        if self.in_step:
            return self._numbers("renoise").long()
        self.canvas_index, self.step = self.canvas_index + 1, 0
        self.steps.append([])
        return self._numbers("initial").long()

    def _multinomial(self, probabilities: torch.Tensor, num_samples: int) -> torch.Tensor:  # noqa: ARG002
        """The inverse CDF at our ``u``, in place of torch's own draw from the same distribution."""
        u = self._numbers("u").flatten()[:, None].double()
        running = probabilities.double().cumsum(-1)
        chosen = (running <= u * running[:, -1:]).sum(-1, keepdim=True)
        return torch.minimum(chosen, (running < running[:, -1:]).sum(-1, keepdim=True))

    def row(self, row: int, ends: set[int]) -> list[ReferenceCanvas]:
        canvases = []
        for steps in self.steps:
            committed = _numpy(steps[-1]["argmax"][row])
            prefix = np.concatenate([np.asarray(self.prompts[row]), *(c.steps[-1].argmax for c in canvases)])
            canvas = ReferenceCanvas(prefix.astype(np.int64))
            for step in steps:
                if step["before"][row]:
                    break
                pick = {name: _numpy(step[name][row]) for name in ("canvas_in", "canvas", "argmax", "accepted")}
                canvas.steps.append(ReferenceStep(stopped=bool(step["finished"][row]), **pick))
            canvases.append(canvas)
            if ends & set(committed.tolist()):
                break
        return canvases


@contextlib.contextmanager
def _stay_double() -> Iterator[None]:
    """The reference casts to float32 inside norms and softmax; a float64 copy must not."""
    to_float, softmax, one_hot = torch.Tensor.float, torch.nn.functional.softmax, torch.nn.functional.one_hot

    def keep(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self if self.dtype == torch.float64 else to_float(self, *args, **kwargs)

    def double_one_hot(*args: Any, **kwargs: Any) -> torch.Tensor:
        return one_hot(*args, **kwargs).double()

    def double_softmax(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return softmax(x, *args, **(kwargs | {"dtype": x.dtype} if x.dtype == torch.float64 else kwargs))

    functions = torch.nn.functional
    with mock.patch.object(torch.Tensor, "float", keep), mock.patch.object(functions, "softmax", double_softmax), \
            mock.patch.object(functions, "one_hot", double_one_hot):
        yield


@contextlib.contextmanager
def _router_margins(model: torch.nn.Module) -> Iterator[Callable[[], np.ndarray]]:
    """Per row the smallest gap, over the layers, between the last chosen and the first unchosen expert's probability."""
    gaps: list[torch.Tensor] = []

    def hook(module: torch.nn.Module, _: object, outputs: tuple[torch.Tensor, ...]) -> None:
        top_k = module.config.top_k_experts
        if top_k < outputs[0].shape[-1]:
            best = outputs[0].topk(top_k + 1, dim=-1).values
            gaps.append(best[:, -2] - best[:, -1])

    handles = [m.register_forward_hook(hook) for m in model.modules() if type(m).__name__ == "DiffusionGemmaTextRouter"]
    try:
        yield lambda: _numpy(torch.stack(gaps).min(dim=0).values) if gaps else np.array([np.inf])
    finally:
        for handle in handles:
            handle.remove()


def _raw_vision(folder: Path) -> bool:
    from mlx_diffgemma.files import read_json

    return bool(read_json(folder / "config.json").get("vision_config"))


def _sentence(error: Exception) -> str:
    """The first line of what transformers says, without its full stop."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".:")


def _numpy(tensor: torch.Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
