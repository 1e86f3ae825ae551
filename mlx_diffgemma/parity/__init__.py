"""Ours against transformers on the same checkpoint (extra ``parity``: torch and transformers).

``reference`` runs transformers with our random numbers and records what it does; ``compare`` runs both sides, stage by
stage, and judges the differences by the reference's own spread.
"""
