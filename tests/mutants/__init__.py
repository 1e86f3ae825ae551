"""Small breaks of the code, each with the tests that must notice it.

    python -m tests.mutants                     # all of them, two at a time
    python -m tests.mutants --only ar-noise     # one
    python -m tests.mutants --part serving      # those of one table
    python -m tests.mutants --seconds 150 --seed 7   # a sample
    python -m tests.mutants --unbroken          # their tests on the code as it is

A break that no test notices is a hole in the tests.  ``breaks`` holds the tables, one for each part
of the package; add to them with every rule that matters.
"""
