"""``python -m loadtest COMMAND``: the load tests, one command each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import click

from loadtest.workloads import WORKLOADS

_DRAINED = click.Choice(sorted(WORKLOADS))


class Place(NamedTuple):
    """Where to measure: existing brokers, if any, and the folder to keep."""

    bootstrap: str | None
    amqp: str | None
    folder: Path | None

    @property
    def kafka(self) -> tuple[str | None, Path | None]:
        """What a stage with Kafka takes."""
        return self.bootstrap, self.folder

    @property
    def rabbitmq(self) -> tuple[str | None, Path | None]:
        """What a stage with RabbitMQ takes."""
        return self.amqp, self.folder


@click.group(context_settings={"show_default": True})
@click.option("--bootstrap", help="An existing Kafka; left out, one is started for the test.")
@click.option("--amqp", help="The address of an existing RabbitMQ; left out, one is started for the test.")
@click.option("--folder", type=click.Path(path_type=Path), help="Keep models, settings and logs here.")
@click.pass_context
def main(context: click.Context, bootstrap: str | None, amqp: str | None, folder: Path | None) -> None:
    """Measure inferfleet on this machine, beside a bare loop in the same run."""
    context.obj = Place(bootstrap, amqp, folder)


def _show(result: Any, output: Path | None) -> None:
    text = json.dumps(result, indent=2)
    if output is None:
        click.echo(text)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n")
        click.echo(f"written to {output}")


_output = click.option("--output", type=click.Path(path_type=Path), help="Write the JSON here.")
_broker = click.option("--broker", type=click.Choice(["kafka", "rabbitmq"]), default="kafka")


@main.command()
@_broker
@click.option("--workload", type=_DRAINED, default="tiny")
@click.option("--runs", type=click.IntRange(1), default=5, help="Runs of each subject, in turn.")
@click.option("--records", type=click.IntRange(1_000), help="Backlog size [default: the workload's own].")
@click.option(
    "--only",
    type=click.Choice(["bare", "pika", "worker"]),
    help="Measure one subject alone; on RabbitMQ the bare loop is aio-pika's, and pika's is there too.",
)
@_output
@click.pass_obj
def drain(
    obj: Place,
    broker: str,
    workload: str,
    runs: int,
    records: int | None,
    only: str | None,
    output: Path | None,
) -> None:
    """Empty a backlog with the bare loop and the worker in turn; print rates and their ratio."""
    from loadtest import drain as drains
    from loadtest import rabbitdrain, subjects
    from loadtest.stage import rabbit_stage, stage

    if broker == "rabbitmq":
        bare = {"bare": rabbitdrain.AIO_PIKA, "pika": rabbitdrain.PIKA, "worker": subjects.WORKER}
        chosen = rabbitdrain.NAMES if only is None else (bare[only],)
        with rabbit_stage(*obj.rabbitmq) as place:
            found = rabbitdrain.compare(
                place, WORKLOADS[workload], runs=runs, records=records, names=chosen, tell=click.echo
            )
        click.echo(rabbitdrain.shown(found))
        _show(found, output)
        return
    if only == "pika":
        raise click.UsageError("--only pika needs --broker rabbitmq")
    names = {"bare": (subjects.BARE,), "worker": (subjects.WORKER,), None: subjects.NAMES}[only]
    with stage(*obj.kafka) as on:
        result = drains.compare(
            on, WORKLOADS[workload], runs=runs, records=records, names=names, tell=click.echo
        )
    _show(result, output)


@main.command()
@click.option("--runs", type=click.IntRange(1), default=3, help="Runs of each subject, in turn.")
@click.option("--requests", type=click.IntRange(50), default=300, help="Requests a run.")
@_output
@click.pass_obj
def latency(obj: Place, runs: int, requests: int, output: Path | None) -> None:
    """Send one request at a time to the bare loop and the worker; print p50 and p99 and their ratio."""
    from loadtest import latency as latencies
    from loadtest.stage import stage

    with stage(*obj.kafka) as on:
        result = latencies.compare(on, runs=runs, requests=requests, tell=click.echo)
    _show(result, output)


@main.command()
@click.option("--runs", type=click.IntRange(1), default=5, help="Rounds, each with all three in turn.")
@click.option("--records", type=click.IntRange(1_000), default=300_000, help="Backlog size.")
@_output
@click.pass_obj
def telemetry(obj: Place, runs: int, records: int, output: Path | None) -> None:
    """Drain tiny requests of one trace with all metrics, without exemplars, without any; print the cost."""
    from loadtest import telemetry as measured
    from loadtest.stage import stage

    with stage(*obj.kafka) as on:
        result = measured.compare(on, runs=runs, records=records, tell=click.echo)
    _show(result, output)


@main.command()
@click.option("--first", type=click.IntRange(1), default=500_000, help="Look at this answer,")
@click.option("--last", type=click.IntRange(2), default=2_000_000, help="and at this one.")
@_output
@click.pass_obj
def memory(obj: Place, first: int, last: int, output: Path | None) -> None:
    """Drain raw requests and print how much the worker's resident memory grew on the way."""
    from loadtest import memory as memories
    from loadtest.stage import stage

    with stage(*obj.kafka) as on:
        result = memories.growth(on, first=first, last=last, tell=click.echo)
    _show(result, output)


@main.command()
@click.option("--runs", type=click.IntRange(1), default=3, help="Runs of each size, in turn.")
@click.option(
    "--records",
    type=click.IntRange(100),
    default=3_000,
    help="Texts a run: many, or the second worker joins near the end.",
)
@_output
@click.pass_obj
def scale(obj: Place, runs: int, records: int, output: Path | None) -> None:
    """Drain a model-bound backlog with one worker and with two; print the ratio."""
    from loadtest import scale as scales
    from loadtest.stage import stage

    with stage(*obj.kafka) as on:
        result = scales.compare(on, runs=runs, records=records, tell=click.echo)
    _show(result, output)


@main.command()
@click.option("--quick", is_flag=True, help="One short run of each: to see that it works.")
@click.option("--results", type=click.Path(path_type=Path), default=Path("loadtest/results"))
@click.pass_obj
def report(obj: Place, quick: bool, results: Path) -> None:
    """Run every workload and the idle latency; print a table, write JSON and a picture."""
    from loadtest import report as reports
    from loadtest.stage import stage

    with stage(*obj.kafka) as on:
        result = reports.measure(on, quick=quick, tell=click.echo)
    reports.show(result)
    for path in reports.write(result, results):
        click.echo(f"written to {path}")


@main.command()
@click.option("--count", type=click.IntRange(1_000), default=50_000, help="The backlog.")
@click.option("--rate", type=click.FloatRange(50), default=800.0, help="Requests a second of both workers.")
@_output
@click.pass_obj
def rollback(obj: Place, count: int, rate: float, output: Path | None) -> None:
    """Give a broken version 5 % of a backlog; print how much it answered before it was taken back."""
    from loadtest import rollback as rollbacks

    _show(rollbacks.measure(count, per_s=rate, folder=obj.folder, tell=click.echo), output)


@main.command("control-plane")
@click.option("--workers", type=click.IntRange(1), default=500)
@click.option("--routes", type=click.IntRange(2), default=200)
@click.option("--pools", type=click.IntRange(1), default=10, help="Pools that workers and routes are in.")
@click.option("--rollouts", type=click.IntRange(0), default=10, help="Rollouts that go on meanwhile.")
@click.option("--changes", type=click.IntRange(1), default=8, help="Changes that are timed, one by one.")
@_output
@click.pass_obj
def control_plane(obj: Place, /, output: Path | None, **plan: Any) -> None:
    """Change routes under many simulated workers; print when all know, and what Redis and coordinator do."""
    from loadtest import controlplane

    if plan["rollouts"] + plan["changes"] > plan["routes"]:
        raise click.UsageError("there must be a route for each rollout and each change")
    result = controlplane.run(controlplane.Plan(**plan), obj.folder, tell=click.echo)
    click.echo(controlplane.table(result))
    _show(result, output)


@main.command()
@click.option("--runs", type=click.IntRange(1), default=3, help="Runs without and with the shadow, in turn.")
@click.option("--seconds", type=click.FloatRange(5), default=30.0, help="How long requests flow in each.")
@click.option(
    "--load", type=click.FloatRange(0.05, 0.9), default=0.5, help="How busy the primary's model is."
)
@click.option("--goal-ms", type=click.FloatRange(10), default=200.0, help="The route's latency goal.")
@_output
@click.pass_obj
def shadow(obj: Place, runs: int, seconds: float, load: float, goal_ms: float, output: Path | None) -> None:
    """Send at half load without and with a shadow as heavy as the primary; print p99 and coverage."""
    from loadtest import shadow as shadows
    from loadtest.stage import stage

    plan = shadows.Plan(runs=runs, seconds=seconds, load=load, goal_ms=goal_ms)
    with stage(*obj.kafka) as on:
        result = shadows.compare(on, plan, tell=click.echo)
    click.echo(shadows.table(result))
    if output is not None:
        _show(result, output)
    if result["shortfalls"]:
        raise SystemExit(1)


def _sizes(_context: click.Context, _option: click.Parameter, text: str | None) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in (text or "").split(",") if part)
    except ValueError:
        sizes = (0,)
    if any(size < 1 for size in sizes):
        raise click.BadParameter("must be numbers of workers, as in 3,6,3")
    return sizes


@main.command("open-loop")
@_broker
@click.option("--count", type=click.IntRange(100), help="How many requests, in place of --seconds.")
@click.option("--seconds", type=click.FloatRange(5), default=95.0, help="How long requests flow.")
@click.option("--rate", type=click.FloatRange(10), default=1_500.0, help="Requests a second.")
@click.option("--poisson", is_flag=True, help="Random gaps between requests instead of even ones.")
@click.option("--workers", type=click.IntRange(1), default=3)
@click.option("--kill-every", type=click.FloatRange(1), help="SIGKILL and replace a worker every S seconds.")
@click.option(
    "--restart-node",
    type=click.IntRange(0),
    default=0,
    help="Restart RabbitMQ N times, every other by SIGKILL.",
)
@click.option("--sigterm", is_flag=True, help="Let the worker drain (SIGTERM) instead of killing it.")
@click.option("--scale", callback=_sizes, help="Numbers of workers, as in 3,6,3, for parts of equal length.")
@click.option("--protocol", type=click.Choice(["classic", "consumer"]), default="classic")
@click.option("--delay-ms", type=click.FloatRange(0), default=20.0, help="Model time of each batch.")
@click.option("--warmup", type=click.FloatRange(0), default=5.0, help="Seconds left out of the latency.")
@_output
@click.pass_obj
def open_loop(obj: Place, /, broker: str, output: Path | None, **plan: Any) -> None:
    """Send at planned times while workers come and go; print what was lost, repeated, wrong or silent."""
    if plan["scale"] and plan["kill_every"]:
        raise click.UsageError("--scale and --kill-every exclude each other")
    result, text = (_open_kafka if broker == "kafka" else _open_rabbitmq)(obj, plan)
    click.echo(text)
    if output is not None:
        _show(result, output)
    if result["shortfalls"]:
        raise SystemExit(1)


def _open_kafka(obj: Place, plan: dict[str, Any]) -> tuple[dict[str, Any], str]:
    from loadtest import openloop
    from loadtest.stage import stage

    count, restarts = plan.pop("count"), plan.pop("restart_node")
    if restarts:
        raise click.UsageError("--restart-node needs --broker rabbitmq")
    if count is not None:
        plan["seconds"] = count / plan["rate"] - plan["warmup"]
    with stage(*obj.kafka) as on:
        result = openloop.run(on, openloop.Plan(**plan), tell=click.echo)
    return result, openloop.table(result)


def _open_rabbitmq(obj: Place, plan: dict[str, Any]) -> tuple[dict[str, Any], str]:
    from loadtest import rabbitloop
    from loadtest.stage import rabbit_stage

    count = plan["count"] or int(plan["rate"] * plan["seconds"])
    if plan["scale"]:
        raise click.UsageError("--scale needs --broker kafka")
    if plan["restart_node"] and obj.amqp is not None:
        raise click.UsageError(
            "--restart-node works on a node that is started for the test, so not with --amqp"
        )
    taken = {key: plan[key] for key in rabbitloop.RabbitPlan.__dataclass_fields__ if key in plan}
    with rabbit_stage(*obj.rabbitmq) as on:
        result = rabbitloop.run(on, rabbitloop.RabbitPlan(**{**taken, "count": count}), tell=click.echo)
    return result, rabbitloop.table(result)


if __name__ == "__main__":
    main()
