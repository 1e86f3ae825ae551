"""What the hosted workflows promise: they cannot run here, so they are read."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def jobs(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]


def steps(path):
    return [(name, step) for name, job in jobs(path).items() for step in job["steps"]]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_actions_are_pinned_to_a_commit(path):
    for _, step in steps(path):
        if "uses" in step:
            assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}", step["uses"]), step
    for line in path.read_text(encoding="utf-8").splitlines():
        assert "uses:" not in line or re.search(r"@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line), (
            f"say which version this is: {line}"
        )


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_rights_are_the_least(path):
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert content["permissions"] == {"contents": "read"}
    given = {
        name: job["permissions"] for name, job in content["jobs"].items() if "permissions" in job
    }
    assert given == ({"publish": {"id-token": "write"}} if path.stem == "release" else {})
    assert "secrets." not in path.read_text(encoding="utf-8")
    assert all(job["timeout-minutes"] for job in content["jobs"].values())
    for _, step in steps(path):
        if step.get("uses", "").startswith("actions/checkout"):
            assert step["with"]["persist-credentials"] is False


def test_the_mac_job_runs_on_metal_and_on_the_cpu():
    found = jobs(ROOT / ".github" / "workflows" / "ci.yml")
    assert found["linux"]["steps"][-1]["run"] == ".ci/run"
    mac = found["metal"]
    assert mac["runs-on"] == "macos-15", "arm64; macos-13 is Intel"
    commands = [step.get("run", "") for step in mac["steps"]]
    order = [
        "mx.default_device() == mx.gpu",
        "mlx-diffgemma generate -p",
        "doctor --deep",
        "pytest -n 1",
        "pytest -n 3",
    ]
    places = [
        next(place for place, command in enumerate(commands) if part in command) for part in order
    ]
    assert places == sorted(places)
    assert mac["env"]["MLX_ENABLE_TF32"] == "0"
    assert mac["steps"][-1]["env"] == {"MLX_DIFFGEMMA_DEVICE": "cpu"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_first_command_is_the_readmes(path):
    text = "\n".join(step.get("run", "") for _, step in steps(path))
    (command,) = set(re.findall(r'mlx-diffgemma (generate -p "[^"]+")', text))
    assert f"mlx-diffgemma {command}" in README


def test_a_release_is_tried_before_it_is_published():
    found = jobs(ROOT / ".github" / "workflows" / "release.yml")
    assert (found["try"]["needs"], found["publish"]["needs"]) == ("build", "try")
    assert {"whl", "tar.gz"} == set(found["try"]["strategy"]["matrix"]["kind"])
    assert not any(
        step.get("uses", "").startswith("actions/checkout") for step in found["try"]["steps"]
    )
    assert "twine check --strict" in found["build"]["steps"][2]["run"]


def test_the_readme_says_that_they_have_not_run():
    assert "have not run yet" in README
