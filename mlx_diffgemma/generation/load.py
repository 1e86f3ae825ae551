"""``load``: a model and its tokenizer from a name, a folder or the Hub."""

from __future__ import annotations

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_diffgemma.checkpoint import hub
from mlx_diffgemma.checkpoint.loading import check_supported, load_model
from mlx_diffgemma.files import expand_path
from mlx_diffgemma.model.diffusion_gemma import DiffusionGemma
from mlx_diffgemma.text.tokenizer import load_tokenizer
from mlx_diffgemma.tuning.adapters import load_adapter


def load(
    model: str,
    *,
    revision: str | None = None,
    dtype: str | None = None,
    adapter_path: str | None = None,
) -> tuple[DiffusionGemma, TokenizerWrapper]:
    """Load a model and its tokenizer.

    Args:
        model: "nano", "nano-vision", a checkpoint folder or a Hub id.
        revision: Branch, tag or commit of the Hub repository.
        dtype: Compute dtype: float32, bfloat16 or float16.  None: the checkpoint's on a GPU,
            float32 on a CPU.
        adapter_path: Folder of an adapter that ``lora`` trained.

    Returns:
        (model, tokenizer).

    Raises:
        UserError: There is no such checkpoint, it is damaged, it does not fit the memory, or the
            adapter belongs to another model.
    """
    folder = hub.resolve(model, revision, before_weights=check_supported)
    loaded = load_model(folder, dtype)
    if adapter_path is not None:
        load_adapter(loaded, expand_path(adapter_path))
    return loaded, load_tokenizer(folder, loaded.config.generation.eos_token_ids)
