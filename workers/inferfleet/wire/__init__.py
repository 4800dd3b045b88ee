"""Bytes to columns and back: Open Inference Protocol V2, raw tensors, headers, error bodies."""
