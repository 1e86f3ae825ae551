"""The README.md of a converted checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import ModelCardData, metadata_load

if TYPE_CHECKING:
    from mlx_diffgemma.convert import Conversion

TEMPLATE = """---
{metadata}
---

# {title}

{origin}{merged}, converted with mlx-diffgemma {version}: {bits:.2f} bits per weight, {size:.2f} GB.

| class | tensors | parameters | precision | bits per weight |
|---|---|---|---|---|
{rows}

Made by:

```bash
{command}
```

Use, {place}:

```bash
pip install mlx-diffgemma
mlx-diffgemma generate --model {model} -p "Why is the sky blue?"
```
"""


def model_card(conversion: Conversion, upload_repo: str | None) -> str:
    """The card of what ``conversion`` writes; it depends on nothing else, so that converting twice gives the same file."""
    own = _metadata(conversion.folder)
    is_hub_id = not Path(conversion.name).exists() and conversion.name.count("/") == 1
    base = conversion.name if is_hub_id else own.get("base_model")
    relation = "finetune" if conversion.merger else "quantized" if any(output.after for output in conversion.outputs) else None
    data = ModelCardData(
        license=own.get("license", "apache-2.0"), library_name="mlx", base_model=base,
        base_model_relation=relation if base else None, language=own.get("language"),
        pipeline_tag="image-text-to-text" if conversion.source.config.vision else "text-generation",
        tags=["mlx", "diffusion_gemma", "mlx-diffgemma"],
    )
    name, merger = conversion.name if is_hub_id else Path(conversion.name).name, conversion.merger
    words = "fine-tuned" if merger else conversion.recipe or conversion.options.command() or "as stored"
    command = (f"mlx-diffgemma fuse --model {name} {merger.command}" if merger
               else f"mlx-diffgemma convert --hf-path {name} {conversion.options.command()}")
    return TEMPLATE.format(
        metadata=data.to_yaml(), title=upload_repo or f"{name}, {words}",
        origin=f"[{name}](https://huggingface.co/{name})" if is_hub_id else f"`{name}`",
        version=conversion.raw_config["mlx_diffgemma"]["version"], bits=conversion.bits_per_weight,
        size=conversion.bytes_out / 1e9, command=command, merged=f" with the adapter `{merger.name}` worked in" if merger else "",
        rows="\n".join(f"| {row.kind} | {row.tensors} | {row.parameters:,} | {row.precision} | {row.bits_per_weight:.2f} |"
                       for row in conversion.rows()),
        place="from anywhere" if upload_repo else "from inside this folder", model=upload_repo or ".",
    )


def _metadata(folder: Path) -> dict[str, Any]:
    """The front matter of the source's own card, if it has one that can be read."""
    try:
        return (metadata_load(folder / "README.md") if (folder / "README.md").exists() else None) or {}
    except (ValueError, yaml.YAMLError):
        return {}
