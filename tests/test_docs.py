"""What the README and the docs promise is run."""

import ast
import functools
import importlib
import importlib.metadata
import json
import os
import re
import runpy
import subprocess
import sys
import venv
from pathlib import Path

import pytest

import mlx_diffgemma
from mlx_diffgemma import nano
from mlx_diffgemma.generation import load as loading
from mlx_diffgemma.model.recipes import RECIPES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def test_the_cli_page_is_current():
    assert runpy.run_path(str(ROOT / "docs" / "make_cli.py"))["page"]() == (
        ROOT / "docs" / "cli.md"
    ).read_text(encoding="utf-8")


def test_the_api_page_is_current():
    made = runpy.run_path(str(ROOT / "docs" / "make_api.py"))
    assert made["page"]() == (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    shown: dict[str, list[str]] = {}
    for module, names in made["SECTIONS"].values():
        shown.setdefault(module.__name__, []).extend(names)
    for name, names in shown.items():
        assert sorted(names) == sorted(importlib.import_module(name).__all__)


def test_the_table_of_recipes_is_what_was_measured():
    record = json.loads(
        (ROOT / "bench" / "results" / "recipes-nano.json").read_text(encoding="utf-8")
    )
    assert record["settings"]["model"] == nano.VERSION
    assert {"original", *RECIPES} <= record["recipes"].keys()
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert runpy.run_path(str(ROOT / "bench" / "recipes.py"))["table"](record) in page
    named = set(re.findall(r"`([^`]+)`", page.split("| recipe |")[1].split("Bits are")[0]))
    assert named == set(RECIPES), "the page's first table has every recipe"


def test_the_table_of_macs_is_what_estimate_counts():
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert runpy.run_path(str(ROOT / "bench" / "macs.py"))["table"]() in page


def test_the_table_of_self_conditioning_is_what_was_measured():
    record = json.loads(
        (ROOT / "bench" / "results" / "self-conditioning-nano.json").read_text(encoding="utf-8")
    )
    assert record["model"] == nano.VERSION
    assert record["settings"]["sparse, 0.999999"]["changed"] == 0, "why it is the default"
    page = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    assert runpy.run_path(str(ROOT / "bench" / "self_conditioning.py"))["table"](record) in page


def test_the_table_of_loop_memory_is_what_was_measured():
    record = json.loads(
        (ROOT / "bench" / "results" / "loop-memory.json").read_text(encoding="utf-8")
    )
    made = runpy.run_path(str(ROOT / "bench" / "loop_memory.py"))
    assert made["table"](record) in (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    peaks = [
        [max(step["peak"] for step in row["steps"][1:]) for row in record[made[label]]]
        for label in ("DROPPED", "HELD")
    ]
    assert all(new <= 0.8 * old for new, old in zip(*peaks, strict=True)), (
        "why only the signal is kept"
    )


def test_the_python_snippets_run(capsys):
    snippets = blocks(README, "python")
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


# What nano prints for the snippets of a page, line by line.  It must be right.
PRINTED = {
    "decisions": [r"no \{'yes': 0\.00\d+, 'no': 0\.99\d+\} 0\.00\d+"],
    "images": ["a blue circle"],
    "infill": [r"Mia was a red fox\. Mia lived near the river\.", "31"],
    "structure": [r'\{"name": "Anna", "age": 23\}'],
}
OTHERS = {"drafting": "another model", "trace": "a file of the reader's"}


@pytest.mark.parametrize("page", PRINTED)
def test_nano_answers_the_snippets_of_a_page_rightly(page, capsys, monkeypatch, nano_pair):
    models = {"nano": nano_pair}
    monkeypatch.setattr(mlx_diffgemma, "load", lambda name: models.get(name) or loading.load(name))
    for snippet in blocks((ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"), "python"):
        exec(compile(snippet, f"{page}.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(PRINTED[page])
    for line, wanted in zip(lines, PRINTED[page]):
        assert re.fullmatch(wanted, line)


def test_every_page_with_snippets_is_run():
    pages = {
        path.stem
        for path in (ROOT / "docs").glob("*.md")
        if blocks(path.read_text(encoding="utf-8"), "python")
    }
    assert pages - {"api", "server"} == PRINTED.keys() | OTHERS.keys()


def test_options_named_in_the_docs_exist():
    known = set(
        re.findall(r"--[a-z][a-z-]+", (ROOT / "docs" / "cli.md").read_text(encoding="utf-8"))
    )
    for path in [*(ROOT / "docs").glob("*.md"), ROOT / "examples" / "README.md"]:
        for block in blocks(path.read_text(encoding="utf-8"), "bash"):
            for line in block.splitlines():
                if line.startswith("mlx-diffgemma "):
                    assert set(re.findall(r"--[a-z][a-z-]+", line)) <= known, line


def test_links_lead_somewhere():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "examples" / "README.md"]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" in target:
                continue
            name, _, anchor = target.partition("#")
            path = page.parent / name if name else page
            assert path.exists(), f"{page.name}: {target}"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
                anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
                assert anchor in anchors, f"{page.name}: {target}"


def test_the_first_screen_holds_both_commands():
    first_screen = "\n".join(README.splitlines()[:40])
    assert "mlx-diffgemma generate" in first_screen
    assert "python -m pytest" in first_screen


def test_ci_runs_the_readmes_test_command():
    command = next(
        line for block in blocks(README, "bash") for line in block.splitlines() if "pytest" in line
    )
    assert "README.md" in (ROOT / ".ci" / "run").read_text()
    assert command.startswith(".venv/bin/pip install")


def test_options_named_in_the_readme_exist():
    known = set(
        re.findall(r"--[a-z][a-z-]+", (ROOT / "docs" / "cli.md").read_text(encoding="utf-8"))
    )
    for block in blocks(README, "bash"):
        for line in block.splitlines():
            if "mlx-diffgemma " in line and "pip" not in line:
                assert set(re.findall(r"--[a-z][a-z-]+", line)) <= known, line


@pytest.mark.slow
def test_the_cuda_sequence_leaves_the_cuda_library(tmp_path):
    """The documented lines, run in an environment of their own; CUDA's own libraries (gigabytes)
    are left out.
    """
    block = next(
        b
        for b in blocks((ROOT / "docs" / "cuda.md").read_text(encoding="utf-8"), "bash")
        if "uninstall" in b
    )
    install, *rest = block.strip().splitlines()
    assert install == "pip install '.[cuda]'"
    venv.create(tmp_path, with_pip=True)
    version = importlib.metadata.version("mlx")
    both = [f"{name}=={version}" for name in ("mlx", "mlx-cuda-13", "mlx-cpu")]

    def shell(line):
        subprocess.run(
            line,
            shell=True,
            check=True,
            env={**os.environ, "PATH": f"{tmp_path}/bin:/usr/bin:/bin"},
            capture_output=True,
        )

    shell(f"pip install --no-deps {' '.join(both)}")
    for line in rest:
        shell(line)
    code = (
        "import importlib.metadata as m, json; d = m.distribution('mlx-cuda-13'); "
        "print(json.dumps([[str(f), f.size, f.locate().stat().st_size if f.locate().exists() else None] for f in d.files "
        "if f.size]), sum(x.name == 'mlx-cpu' for x in m.distributions()))"
    )
    out = subprocess.run(
        [f"{tmp_path}/bin/python", "-c", code], check=True, capture_output=True, text=True
    ).stdout
    files, leftover = json.loads(out[: out.rindex("]") + 1]), out[out.rindex("]") + 1 :].strip()
    assert leftover == "0"
    assert any(name.endswith("mlx/lib/libmlx.so") for name, _, _ in files)
    assert all(size == found for _, size, found in files), (
        "every file of the CUDA wheel is there, as the wheel has it"
    )


@pytest.mark.slow
def test_the_wheel_is_pure_python_and_complete(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)],
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheel)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for needed in (
        "nano/checkpoint/model.safetensors",
        "nano/checkpoint/tokenizer.json",
        "nano/checkpoint/golden.npz",
        "nano/checkpoint/chat_template.jinja",
        "licenses/LICENSE",
        "diagnostics/parity.py",
        "mlx_diffgemma/page/index.html",
        "page/chat.js",
        "page/canvas.js",
        "page/style.css",
        "page/icon.svg",
        "page/replay.html",
        "page/replay.js",
    ):
        assert needed in names
    assert "tests/" not in names


CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PLACES = re.findall(
    r"^\| [^|]+ \| `([\w/]+\.py)` \| `([\w.]+)` \|$",
    CONTRIBUTING.split("## Where is")[1].split("\n## ")[0],
    re.MULTILINE,
)


MODULES = [p for name in ("mlx_diffgemma", "drafter") for p in (ROOT / name).rglob("*.py")]


@functools.cache
def defined(path: Path) -> set[str]:
    """The names that a module defines, those of methods as Class.method."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{inner.name}" for inner in node.body if hasattr(inner, "name")}
        if isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def test_the_list_of_places_is_complete():
    rows = CONTRIBUTING.split("## Where is")[1].split("\n## ")[0].count("\n| ")
    assert len(PLACES) == rows - 1, "each row but the heading names a file and a name"


GLOSSARY = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
TERMS = re.findall(r"`([\w/]+\.py)`: `([\w.]+)`", GLOSSARY)


def test_each_entry_of_the_glossary_names_a_place():
    assert len(TERMS) == len(re.findall(r"^\*\*", GLOSSARY, re.MULTILINE))


@pytest.mark.parametrize(("file", "name"), sorted({*PLACES, *TERMS}))
def test_a_place_exists(file, name):
    roots = (ROOT / "mlx_diffgemma", ROOT)
    if any((root / file).exists() and name in defined(root / file) for root in roots):
        return
    now = [str(p.relative_to(ROOT)) for p in MODULES if name in defined(p)]
    pytest.fail(f"{file} does not define {name}; it is in {now or 'no module'}")


def test_files_named_in_contributing_exist():
    for name in re.findall(r"`((?:[\w.-]+/)+[\w.-]+\.\w+)`", CONTRIBUTING):
        assert any((ROOT / base / name).exists() for base in ("", "mlx_diffgemma")), name
