"""Load tests of inferfleet: drains, open loop with faults, idle latency, memory, and a report."""
