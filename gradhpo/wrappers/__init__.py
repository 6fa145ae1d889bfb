"""Optimizers around another optimizer."""
