"""Mutated inputs: no file, option or request body may end in a traceback, a 500 or a hang.

python -m tests.fuzz --cases 10000 --seed 0     # the whole
python -m tests.fuzz --only yaml --seed 7 -v    # one kind of input; a failure prints the command that repeats it
"""
