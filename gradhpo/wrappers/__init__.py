"""Optimizers that wrap another optimizer."""
