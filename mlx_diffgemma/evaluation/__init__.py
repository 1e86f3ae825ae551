"""Scoring a model: the tasks, the run that asks their questions, and the built-in suites."""
