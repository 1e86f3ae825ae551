"""Scoring a model: what is asked (tasks), how answers are read (run, choices), and the Sudoku task."""
