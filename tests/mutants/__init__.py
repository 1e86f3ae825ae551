"""Small breaks of the code, each with the tests that must notice it.

    python -m tests.mutants                     # all of them, two at a time
    python -m tests.mutants --only ar-noise     # one
    python -m tests.mutants --seconds 180 --seed 7   # a sample

A break that no test notices is a hole in the tests.  ``breaks.py`` holds the list; add to it with every rule that matters.
"""
