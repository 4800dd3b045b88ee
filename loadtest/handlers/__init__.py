"""Model code of the workloads; copied into model folders, and used by the bare loop."""
