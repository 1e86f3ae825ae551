"""Checks of single operations of MLX against numpy in float64; ``selfcheck`` runs them."""
