"""A model runtime tells nobody about its use."""

from __future__ import annotations

import os
import subprocess
import sys

CODE = "import inferfleet.runtimes.onnx, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"


def test_onnx_runtime_is_told_to_send_no_telemetry_before_it_is_loaded() -> None:
    """Its builds send events to their makers by default; whoever wants that says so in the environment."""
    clean = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    for given, found in (({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0")):
        done = subprocess.run(
            [sys.executable, "-c", CODE],
            env={**clean, **given},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert (done.stdout.strip(), done.stderr) == (found, "")
