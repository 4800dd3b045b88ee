"""The demo from start to end: servers, models, workers, requests, one kill, one table, and away again."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from inferfleet.core.routing import Steering
from inferfleet.demo import digits, files, live, sentences, servers
from inferfleet.demo.broker import Broker
from inferfleet.demo.kafka import KafkaBroker
from inferfleet.demo.processes import DemoError, Processes, recorded
from inferfleet.demo.rabbitmq import start_rabbitmq
from inferfleet.demo.report import Findings, hints, tables
from inferfleet.demo.rollouts import Rollouts, SecondAct, start_coordinator
from inferfleet.demo.screen import Screen
from inferfleet.demo.show import Show
from inferfleet.demo.stage import FLEET, GROUP, Stage, start_worker, wait_until_ready
from inferfleet.demo.tally import Tally
from inferfleet.demo.traffic import DigitsLoad, FilesLoad, Load
from inferfleet.routes import load_routes

FILES = 240
SENTENCES = 120
WORKERS = 2


@dataclass(frozen=True, slots=True)
class Options:
    """What to show and where: ``folder`` is emptied and filled, ``cache`` keeps Kafka's jars.

    ``broker`` is ``embedded`` (Kafka), ``kafka`` (a real one) or ``rabbitmq``.
    """

    folder: Path = Path(".demo")
    cache: Path = Path(".cache")
    keep: bool = False
    torch: bool = False
    broker: Literal["embedded", "kafka", "rabbitmq"] = "embedded"


def run(options: Options) -> bool:
    """Show the main job; returns whether every request was answered, and rightly.

    Raises :class:`~inferfleet.demo.processes.DemoError` when something is missing or does not come up.
    Whatever happens, what was started is ended, unless ``keep`` is asked for and the show went through.
    """
    screen = Screen()
    routes = ("digits", "files", *([sentences.ROUTE] if options.torch else []))
    api = f"127.0.0.1:{servers.free_port()}"
    stage = Stage(options.folder, routes, rollouts=options.broker != "rabbitmq", api=api)
    if recorded(stage.record):
        raise DemoError(f"a demo runs in {options.folder} already; end it with `inferfleet demo --stop`")
    stage.clear()
    processes = Processes(stage.record)
    kept = False
    try:
        with _sigterm_like_ctrl_c():
            broker, redis_port = _start_servers(options, stage, processes, screen)
            findings = _perform(stage, processes, broker, redis_port, screen)
        kept = options.keep
    except KeyboardInterrupt:
        screen.say("stopped: ending what was started")
        raise
    finally:
        if not kept:
            processes.stop()
            shutil.rmtree(stage.data, ignore_errors=True)
    for table in tables(findings, broker):
        screen.show(table)
    screen.show(hints(stage, broker, redis_port, findings.admins, kept))
    return findings.passed


def _start_servers(
    options: Options, stage: Stage, processes: Processes, screen: Screen
) -> tuple[Broker, int]:
    """Return the broker, with all that the routes need in place, and the port of Redis."""
    broker = _start_broker(options, stage, processes, screen)
    redis_port = servers.start_redis(processes, stage.data, stage.logs)
    screen.say(f"{broker.title}, Redis on 127.0.0.1:{redis_port}")
    stage.write_settings(broker, redis_port)
    return broker, redis_port


def _start_broker(options: Options, stage: Stage, processes: Processes, screen: Screen) -> Broker:
    if options.broker == "rabbitmq":
        return start_rabbitmq(processes, stage.data, stage.logs, screen.say)
    if options.broker == "kafka":
        address = servers.start_kafka(processes, stage.data, stage.logs, options.cache)
        return KafkaBroker(address, GROUP, embedded=False)
    address = servers.start_broker(processes, stage.logs, detached=options.keep)
    return KafkaBroker(address, GROUP, embedded=True)


def _perform(stage: Stage, processes: Processes, broker: Broker, redis_port: int, screen: Screen) -> Findings:
    data = digits.load_digits()
    classifiers = digits.train(data)
    layers = {version: digits.layers_of(each) for version, each in classifiers.items()}
    stage.add_digits(layers | {digits.BROKEN: digits.broken(layers["2"])})
    types = files.load_file_types()
    stage.add_file_types(types)
    if sentences.ROUTE in stage.routes:
        stage.add_sentence_encoder()
    screen.say("two versions of a digits classifier trained, magika taken from its wheel: all as ONNX")
    stage.apply_routes()
    broker.declare(stage.fleet_toml, [live.FEEDBACK] if stage.rollouts else [])
    screen.say("the routes are in the control plane: inferfleet route apply routes.toml")
    workers = [start_worker(processes, stage, f"worker-{number + 1}") for number in range(WORKERS)]

    # The workers start while the requests are prepared.
    route = load_routes(stage.folder / "routes.toml", FLEET).named("digits")
    steering = Steering.over(route.salt, [variant.ranges for variant in route.variants])
    loads: dict[str, Load] = {
        "digits": DigitsLoad("digits", data, digits.expected_probabilities(classifiers, data), steering),
        "files": FilesLoad("files", types, files.sample_files(types, FILES)),
    }
    if sentences.ROUTE in stage.routes:
        loads[sentences.ROUTE] = sentences.SentencesLoad(sentences.sentences(SENTENCES))
    wait_until_ready(workers)
    screen.say(
        f"{WORKERS} workers are ready: {', '.join(f'{each.name} pid {each.started.pid}' for each in workers)}"
    )

    tally = Tally(loads)
    wires = broker.wires(stage.routes, tally)
    try:
        findings = Show(stage, processes, broker, wires, tally, workers, screen).perform(redis_port)
    finally:
        wires.close()
    if isinstance(broker, KafkaBroker):
        findings = replace(findings, rollouts=_roll_out(stage, processes, broker.address, data, screen))
    return findings


def _roll_out(
    stage: Stage, processes: Processes, kafka: str, data: digits.Digits, screen: Screen
) -> Rollouts:
    start_coordinator(processes, stage, stage.api)
    screen.say(f"second act: a coordinator on http://{stage.api} rolls out two more versions on live traffic")
    traffic = live.LiveTraffic(kafka, data)
    try:
        return SecondAct(stage, traffic, screen, stage.api).perform()
    finally:
        traffic.close()


@contextmanager
def _sigterm_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM end the demo the way Ctrl-C does, so that nothing it started is left behind."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
