"""Programs for whoever works on inferfleet; no part of what is installed."""
