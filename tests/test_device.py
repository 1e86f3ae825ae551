"""What the machine says, with the values that Macs give."""

import os
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_diffgemma import device
from mlx_diffgemma.device import generation_memory, memory_limit, set_wiring, wired_bytes
from mlx_diffgemma.errors import UserError
from mlx_diffgemma.estimate import cost

ROOT = Path(__file__).parents[1]
GB = 10**9
# mx.device_info() on Metal, as mlx 0.32.4 fills it (mlx/backend/metal/device_info.cpp).
M4 = {
    "device_name": "Apple M4",
    "architecture": "applegpu_g16g",
    "max_buffer_length": 9_534_832_640,
    "max_recommended_working_set_size": 12_713_115_648,
    "memory_size": 17_179_869_184,
    "resource_limit": 499_000,
}


@pytest.fixture
def mac(monkeypatch):
    """A Mac with 16 GB as ``device`` sees it; a list of the limits that are set."""
    calls = []

    def setting(name, before):
        values = [before]

        def limit(value):
            calls.append((name, value))
            values.append(value)
            return values[-2]

        monkeypatch.setattr(mx, f"set_{name}_limit", limit)

    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda *_: dict(M4))
    monkeypatch.setattr(
        device.os,
        "sysconf",
        lambda name: {"SC_PAGE_SIZE": 16_384, "SC_PHYS_PAGES": 1_048_576}[name],
    )
    setting("wired", 0)
    setting("cache", 111)
    yield calls
    device._limits.running = 0
    device._limits.wiring = "auto"


def test_only_a_model_of_more_than_half_of_the_memory_is_wired():
    assert wired_bytes(8 * GB, GB, 12 * GB, 16 * GB) == 0
    assert wired_bytes(8 * GB + 1, GB, 12 * GB, 16 * GB) == 9 * GB + 1
    assert wired_bytes(11 * GB, 3 * GB, 12 * GB, 16 * GB) == 12 * GB, (
        "never above what macOS recommends"
    )
    assert wired_bytes(4 * 10**6, GB, 12 * GB, 16 * GB) == 0, "nano"


def test_limits_are_set_and_restored_once(mac):
    assert memory_limit() == M4["max_recommended_working_set_size"]
    with generation_memory(lambda: (9 * GB, GB)), generation_memory(lambda: (9 * GB, GB)):
        assert mac == [("wired", 10 * GB), ("cache", memory_limit() // 8)]
    assert mac[2:] == [("wired", 0), ("cache", 111)]


def test_a_small_model_leaves_the_wired_limit_alone(mac):
    with generation_memory(lambda: (3 * GB, GB)):
        pass
    assert {name for name, _ in mac} == {"cache"}


def test_wired_off(mac):
    set_wiring("off")
    with generation_memory(lambda: (9 * GB, GB)):
        pass
    assert {name for name, _ in mac} == {"cache"}
    with pytest.raises(UserError, match="Unknown --wired 'on'; use one of auto, off"):
        set_wiring("on")


def test_nothing_is_counted_elsewhere_than_on_a_mac():
    def held():
        raise AssertionError("a walk over all parameters")

    with generation_memory(held):
        pass


def test_what_a_loaded_model_holds(tiny):
    weights, working = cost.held_bytes(tiny)
    assert weights == sum(array.nbytes for _, array in tree_flatten(tiny.parameters()))
    assert cost.held_bytes(tiny, 3) == (weights, 3 * working)
    assert working == cost.run_bytes(tiny.config, 0, 4096, 4)


def test_the_machine_as_a_mac_describes_it(mac, monkeypatch):
    monkeypatch.setattr(device.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(device.platform, "platform", lambda: "macOS-15.6.1-arm64-arm-64bit")
    described = device.describe(mx.bfloat16)
    assert (described["chip"], described["backend"], described["blas"]) == (
        "Apple M4",
        "metal",
        "Accelerate",
    )


def test_more_than_the_limit_names_the_sysctl(mac):
    says = r"needs 14\.00 GB, this machine allows 12\.71 GB; .* `sudo sysctl iogpu.wired_limit_mb=14375`"
    with pytest.raises(UserError, match=says):
        device.check_memory(14 * GB, "The model")
    with pytest.raises(UserError) as error:
        device.check_memory(17 * GB, "The model")
    assert "sysctl" not in str(error.value), "the memory itself is smaller"


def test_names_of_sysconf_that_macos_has():
    """SC_PAGE_SIZE and SC_PHYS_PAGES are in CPython's table on macOS as on Linux; SC_AVPHYS_PAGES
    is not.
    """
    assert {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= set(os.sysconf_names)
    assert device._physical_memory() > GB


def test_units_of_the_largest_resident_size():
    """ru_maxrss counts bytes on macOS and KiB on Linux: each line that reads it says which it
    takes.
    """
    lines = [
        line
        for folder in ("mlx_diffgemma", "drafter", "bench")
        for path in (ROOT / folder).rglob("*.py")
        for line in " ".join(path.read_text(encoding="utf-8").split()).split("ru_maxrss * ")[1:]
    ]
    assert lines
    assert all(line.startswith('( 1 if sys.platform == "darwin"') for line in lines)


def test_what_only_linux_has_is_not_in_the_package():
    for folder in ("mlx_diffgemma", "drafter"):
        for path in (ROOT / folder).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            # A file that a shell opened: /dev/fd on macOS, which must be named beside it.
            assert "/proc/" not in text.replace('"/proc/self/fd/"', "").replace(
                '"/proc/self/statm"', ""
            ), path
            assert "/proc/self/fd/" not in text or '"/dev/fd/"' in text, path
            assert "sched_getaffinity" not in text, path
            assert 'get_context("fork")' not in text, path
