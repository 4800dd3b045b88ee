"""The record path on the memory broker, under a seed: one schedule after another, none of them lucky."""
