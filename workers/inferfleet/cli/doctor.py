"""``inferfleet doctor``: everything that a worker needs, looked at before one is started."""

from __future__ import annotations

import click

from inferfleet.cli.frame import Session, echo_json, pass_session

_COLOURS = {"ok": "green", "warn": "yellow", "FAIL": "red"}


@click.command(epilog="Example: inferfleet doctor --config fleet.toml --partitions 6")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.option("--no-load", is_flag=True, help="Compare models with their manifests, but do not load them.")
@click.option("--partitions", type=click.IntRange(1), help="The partition count that each source must have.")
@click.pass_context
@pass_session
def doctor(
    session: Session, context: click.Context, as_json: bool, no_load: bool, partitions: int | None
) -> None:
    """Check settings, routes, Kafka, RabbitMQ, topics, queues, rights, Redis, models and the admin port.

    One line each: ok, warn (works, may surprise) or FAIL with the mend. Exits 1 if anything fails.
    """
    from inferfleet.cli.examination import examine

    findings = []
    for finding in examine(session, not no_load, partitions):
        findings.append(finding)
        if not as_json:
            verdict = click.style(f"{finding.verdict:<4}", fg=_COLOURS[finding.verdict])
            click.echo(f"{verdict}  {finding.name}: {' '.join(finding.text.split())}")
    if as_json:
        echo_json(findings)
    context.exit(1 if any(each.verdict == "FAIL" for each in findings) else 0)
