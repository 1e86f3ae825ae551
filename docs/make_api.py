"""Writes docs/api.md from the docstrings of the public names: ``python docs/make_api.py``."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import drafter
import mlx_diffgemma

FILE = Path(__file__).with_name("api.md")
WIDTH = 100
HEAD = """# Python API

Made from the docstrings by `python docs/make_api.py`. Import the names from the package, never from its modules: modules may
move. Terms: [glossary.md](glossary.md).
"""
SECTIONS: dict[str, tuple[ModuleType, tuple[str, ...]]] = {
    "Load and generate": (
        mlx_diffgemma,
        ("load", "generate", "stream_generate", "batch_generate", "GenerationResponse"),
    ),
    "Options": (mlx_diffgemma, ("GenerationOptions",)),
    "Prompts": (mlx_diffgemma, ("chat_ids", "user_message", "Video", "PromptCache")),
    "Infilling and editing": (
        mlx_diffgemma,
        ("infill", "stream_infill", "batch_infill", "edit", "Hole", "Fill", "Infilled"),
    ),
    "Decisions": (mlx_diffgemma, ("decide", "Question", "Decision")),
    "Denoising steps": (mlx_diffgemma, ("CanvasStep",)),
    "Checkpoints": (mlx_diffgemma, ("convert",)),
    "Errors and warnings": (
        mlx_diffgemma,
        (
            "UserError",
            "NonFiniteLogitsError",
            "CheckpointWarning",
            "GenerationWarning",
            "VideoWarning",
        ),
    ),
    "The package drafter": (
        drafter,
        ("load_drafter", "save_drafter", "Drafter", "DraftRules", "DrafterConfig"),
    ),
}


def page() -> str:
    parts = [HEAD]
    for title, (module, names) in SECTIONS.items():
        parts.append(f"## {title}\n")
        parts += [entry(f"{module.__name__}.{name}", getattr(module, name)) for name in names]
    return "\n".join(parts)


def entry(path: str, value: Any) -> str:
    """A public name: its heading, signature, docstring, and the members of a class."""
    name = path.rsplit(".", 1)[1]
    lines = [f"### {name}\n", f"`{path}`\n"]
    if not (inspect.isclass(value) and issubclass(value, Exception)):
        lines.append(f"```python\n{signature(name, value)}\n```\n")
    lines.append(markdown(inspect.getdoc(value) or ""))
    if inspect.isclass(value):
        lines += described_fields(value)
        lines += members(value)
    return "\n".join(lines)


class Code(dict[str, str]):
    """Names of options in help texts become code."""

    def __missing__(self, name: str) -> str:
        return f"`{name}`"


def described_fields(kind: type) -> list[str]:
    """The help of the dataclass fields whose metadata has one."""
    if not dataclasses.is_dataclass(kind):
        return []
    return [
        f"- `{field.name}`: {description.help_for(Code())}"
        for field in dataclasses.fields(kind)
        for description in field.metadata.values()
        if hasattr(description, "help_for")
    ]


def members(kind: type) -> list[str]:
    """The public methods and properties that ``kind`` itself documents."""
    lines = []
    for name, value in vars(kind).items():
        if name.startswith("_") or not inspect.getdoc(value) or is_field(kind, name):
            continue
        if isinstance(value, property):
            lines.append(f"#### {kind.__name__}.{name}\n\n{markdown(inspect.getdoc(value) or '')}")
        elif callable(function := getattr(value, "__func__", value)):
            shown = signature(name, function, bound=not isinstance(value, staticmethod))
            lines.append(
                f"#### {kind.__name__}.{name}\n\n```python\n{shown}\n```\n\n"
                + markdown(inspect.getdoc(function) or "")
            )
    return lines


def is_field(kind: type, name: str) -> bool:
    return dataclasses.is_dataclass(kind) and name in {f.name for f in dataclasses.fields(kind)}


def signature(name: str, value: Any, bound: bool = False) -> str:
    """``name`` with its parameters, on one line or with one parameter a line."""
    found = inspect.signature(value)
    parameters = list(found.parameters.values())[1 if bound else 0 :]
    shown: list[str] = []
    for index, parameter in enumerate(parameters):
        keyword_only = parameter.kind is inspect.Parameter.KEYWORD_ONLY
        before = parameters[index - 1].kind if index else None
        if keyword_only and before is not inspect.Parameter.KEYWORD_ONLY:
            shown.append("*")
        shown.append(one_parameter(parameter))
    result = ""
    if not inspect.isclass(value) and found.return_annotation is not inspect.Signature.empty:
        result = f" -> {annotation(found.return_annotation)}"
    line = f"{name}({', '.join(shown)}){result}"
    if len(line) <= WIDTH:
        return line
    return f"{name}(\n" + "".join(f"    {part},\n" for part in shown) + f"){result}"


def one_parameter(parameter: inspect.Parameter) -> str:
    stars: dict[Any, str] = {
        inspect.Parameter.VAR_POSITIONAL: "*",
        inspect.Parameter.VAR_KEYWORD: "**",
    }
    text = stars.get(parameter.kind, "") + parameter.name
    if parameter.annotation is not inspect.Parameter.empty:
        text += f": {annotation(parameter.annotation)}"
    if parameter.default is not inspect.Parameter.empty:
        text += f" = {default(parameter.default)}"
    return text


def annotation(value: Any) -> str:
    return value if isinstance(value, str) else inspect.formatannotation(value)


def default(value: Any) -> str:
    if repr(value) == "<factory>":
        return "..."
    if dataclasses.is_dataclass(value) and value == type(value)():  # type: ignore[misc]
        return f"{type(value).__name__}()"
    return repr(value)


def markdown(docstring: str) -> str:
    """A docstring with its ``Args:`` and ``Raises:`` as lists, and ``Returns:`` as a paragraph."""
    text = re.sub(r":\w+:`[~.\w]*?(\w+)`", r"`\1`", docstring).replace("``", "`")
    text = text.replace(".  ", ". ")
    lines: list[str] = []
    section = ""
    for line in text.splitlines():
        if heading := re.fullmatch(r"(Args|Returns|Raises|Attributes):", line):
            section = heading[1]
            lines += [f"**{section}**", ""]
        elif section and line.startswith("    "):
            item = re.match(r" {4}(\*{0,2}\w[\w, *]*?): (.*)", line)
            if section == "Returns":
                lines.append(line.strip())
            elif item:
                lines.append(f"- `{item[1]}`: {item[2]}")
            else:
                lines.append(f"{'  ' if lines[-1] else '- '}{line.strip()}")
        else:
            section = section if not line else ""
            lines.append(line)
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    FILE.write_text(page(), encoding="utf-8")
