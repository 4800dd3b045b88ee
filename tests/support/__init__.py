"""What tests (and the demo's real-broker mode) stand on: real servers, bounded waiting, certificates."""
