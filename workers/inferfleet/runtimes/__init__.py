"""Adapters that load model versions and run batches."""
