"""Checks: doctor, self-checks and parity with the reference."""
