"""Lowering of the mixture of experts."""
