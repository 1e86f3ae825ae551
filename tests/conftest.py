import os
from importlib import import_module

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # of torch, before it is imported: tests run side by side
os.environ.setdefault(
    "MLX_ENABLE_TF32", "0"
)  # of MLX, before its first product: bounds of float32 are those of true float32


from tests.metal import plugin  # before mlx.core, whose graphs it sees from here on


def pytest_addoption(parser):
    plugin.add_options(parser)


def pytest_configure(config):
    config.pluginmanager.register(plugin, "metal")
    if runs_tests(config):
        plugin.watch(config)
        config.pluginmanager.register(import_module("tests.fixtures"))


def runs_tests(config):
    """Whether this process does.  That of pytest-xdist which hands them out does not, and to import
    the package takes as long as forty tests.
    """
    shares = config.getoption("dist", "no") != "no" and not config.option.collectonly
    return hasattr(config, "workerinput") or not shares
