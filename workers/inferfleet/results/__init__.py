"""Adapters that keep results where callers read them."""
