"""``python -m loadtest COMMAND``: the load tests, one command each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from loadtest.workloads import WORKLOADS

_DRAINED = click.Choice(sorted(WORKLOADS))


@click.group(context_settings={"show_default": True})
@click.option("--bootstrap", help="An existing Kafka; left out, one is started for the test.")
@click.option("--folder", type=click.Path(path_type=Path), help="Keep models, settings and logs here.")
@click.pass_context
def main(context: click.Context, bootstrap: str | None, folder: Path | None) -> None:
    """Measure inferfleet on this machine, beside a bare loop in the same run."""
    context.obj = (bootstrap, folder)


def _show(result: Any, output: Path | None) -> None:
    text = json.dumps(result, indent=2)
    if output is None:
        click.echo(text)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n")
        click.echo(f"written to {output}")


_output = click.option("--output", type=click.Path(path_type=Path), help="Write the JSON here.")


@main.command()
@click.option("--workload", type=_DRAINED, default="tiny")
@click.option("--runs", type=click.IntRange(1), default=5, help="Runs of each subject, in turn.")
@click.option("--records", type=click.IntRange(1_000), help="Backlog size [default: the workload's own].")
@click.option("--only", type=click.Choice(["bare", "worker"]), help="Measure one subject alone.")
@_output
@click.pass_obj
def drain(
    obj: tuple[str | None, Path | None],
    workload: str,
    runs: int,
    records: int | None,
    only: str | None,
    output: Path | None,
) -> None:
    """Empty a backlog with the bare loop and the worker in turn; print rates and their ratio."""
    from loadtest import drain as drains
    from loadtest import subjects
    from loadtest.stage import stage

    names = {"bare": (subjects.BARE,), "worker": (subjects.WORKER,), None: subjects.NAMES}[only]
    with stage(*obj) as on:
        result = drains.compare(
            on, WORKLOADS[workload], runs=runs, records=records, names=names, tell=click.echo
        )
    _show(result, output)


if __name__ == "__main__":
    main()
