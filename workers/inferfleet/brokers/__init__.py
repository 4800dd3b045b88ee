"""Adapters that take chunks from brokers and publish envelopes to them."""
