"""The dashboards, one module each, and the parts that they are built from."""
