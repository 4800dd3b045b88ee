"""Metrics, logs and health: every name defined once."""
