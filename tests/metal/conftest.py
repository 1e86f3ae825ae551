from tests.metal.recorder import recorder

# Elsewhere than on Linux nothing is recorded: a Mac has Metal itself.
collect_ignore = [] if recorder.running else ["test_recorder.py"]
