"""What the workers of a pool, and one worker's lives, tell each other: pauses and crash marks."""
