"""Measurements of a trained SAE on held-out text."""
