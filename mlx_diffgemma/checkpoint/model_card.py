"""The README.md of a converted checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData, metadata_load

from mlx_diffgemma.checkpoint.plan import Conversion

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
    """The card of a conversion's result.

    It depends on its arguments alone, so that converting twice gives the same file.
    """
    source = _metadata(conversion.folder)
    is_hub_id = not Path(conversion.name).exists() and conversion.name.count("/") == 1
    base = conversion.name if is_hub_id else source.get("base_model")
    name = conversion.name if is_hub_id else Path(conversion.name).name
    merger = conversion.merger
    relation = None
    if merger:
        relation = "finetune"
        words = "fine-tuned"
        command = f"mlx-diffgemma fuse --model {name} {merger.command}"
    else:
        if any(output.after for output in conversion.outputs):
            relation = "quantized"
        words = conversion.recipe or conversion.options.command() or "as stored"
        command = f"mlx-diffgemma convert --hf-path {name} {conversion.options.command()}"
    data = ModelCardData(
        license=source.get("license", "apache-2.0"),
        library_name="mlx",
        base_model=base,
        base_model_relation=relation if base else None,
        language=source.get("language"),
        pipeline_tag="image-text-to-text" if conversion.source.config.vision else "text-generation",
        tags=["mlx", "diffusion_gemma", "mlx-diffgemma"],
    )
    rows = []
    for row in conversion.rows():
        cells = (row.kind, row.tensors, f"{row.parameters:,}", row.precision)
        rows.append(f"| {' | '.join(map(str, cells))} | {row.bits_per_weight:.2f} |")
    return TEMPLATE.format(
        metadata=data.to_yaml(),
        title=upload_repo or f"{name}, {words}",
        origin=f"[{name}](https://huggingface.co/{name})" if is_hub_id else f"`{name}`",
        version=conversion.raw_config["mlx_diffgemma"]["version"],
        bits=conversion.bits_per_weight,
        size=conversion.bytes_out / 1e9,
        command=command,
        merged=f" with the adapter `{merger.name}` worked in" if merger else "",
        rows="\n".join(rows),
        place="from anywhere" if upload_repo else "from inside this folder",
        model=upload_repo or ".",
    )


def _metadata(folder: Path) -> dict[str, Any]:
    """The front matter of the source's own card; empty where it has none or it cannot be read."""
    card = folder / "README.md"
    if not card.exists():
        return {}
    try:
        return metadata_load(card) or {}
    except (ValueError, yaml.YAMLError):
        return {}
