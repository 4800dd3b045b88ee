"""``scripts/compose-check``: the compose file for real, with faults and changes, judged by the answers.

10,000 requests go in through the port on the host. On the way one worker container is killed, the workers are
scaled to four and back to two, and a route is changed. Then every result is read from Redis and compared with
what its version answers outside of a fleet, Prometheus is asked whom it scrapes, and all is taken down again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import redis
from confluent_kafka import Producer

from tests.support import containers
from tests.support.compose import REPOSITORY, Compose, ComposeError, Ports, ask
from tests.support.process import free_ports
from tests.support.programs import MissingServerError, install_package
from tests.support.waiting import wait_until

REQUESTS = 10_000
TEXT_SHARE = 10
"""One request in so many is a text; the others are digits."""
FLEET = "inferfleet"
KAFKA, VALKEY = "docker.io/apache/kafka:4.3.1", "docker.io/valkey/valkey:9.1"
PROMETHEUS, GRAFANA = "docker.io/prom/prometheus:v3.14.0", "docker.io/grafana/grafana:13.2.0"
# In no good order: each process has to wait by itself where the engine does not see to it.
SERVICES = ("worker", "traffic", "coordinator", "prometheus", "setup", "models", "secrets", "valkey", "kafka")
PAGE = REPOSITORY / "docs" / "how-to" / "compose.md"
HOST_SETTINGS = REPOSITORY / "deploy" / "compose" / "host.toml"
SAMPLES = "/opt/inferfleet/samples"
ADMIN_TOKEN = "/run/inferfleet/admin.token"
UP_S = 300.0
ANSWERS_S = 180.0
READY = "from urllib.request import urlopen; urlopen('http://127.0.0.1:8471/readyz', timeout=5)"
SECOND_ROUTE = """\
[[route]]
name = "digits"
source = "kafka:digits.requests"
results = ["kafka:digits.results", "redis"]
model = "digits"
goal_p99_ms = 250
variants = [
  { name = "stable", version = "1", weight = 5 },
  { name = "canary", version = "2", weight = 95 },
]
"""


class Asked(NamedTuple):
    """A request: its route, and the label that each version gives it outside of a fleet."""

    route: str
    body: dict[str, Any]
    labels: dict[str, Any]


@dataclass
class Report:
    """What was seen; the figures are printed, and judged by whoever asked."""

    first_answer_s: float = 0.0
    answered: int = 0
    wrong: list[str] = field(default_factory=list)
    versions: dict[str, int] = field(default_factory=dict)
    late_versions: dict[str, int] = field(default_factory=dict)
    targets: dict[str, dict[str, str]] = field(default_factory=dict)
    api: dict[str, int] = field(default_factory=dict)
    traffic: dict[str, int] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """What is not as it must be; empty where all is well."""
        found = [f"{len(self.wrong)} wrong answers, the first: {self.wrong[0]}"] if self.wrong else []
        if self.answered != REQUESTS:
            found.append(f"{self.answered} of {REQUESTS} requests have a result in Redis")
        down = [
            f"{job} {name}" for job, each in self.targets.items() for name, up in each.items() if up != "up"
        ]
        if down or len(self.targets.get("worker", {})) != 2 or len(self.targets.get("coordinator", {})) != 1:
            found.append(
                f"Prometheus scrapes {self.targets}, which is not two workers and a coordinator, all up"
            )
        if self.api != {"without a token": 401, "with the token": 200}:
            found.append(f"the API answers {self.api}")
        if self.late_versions.get("2", 0) < 5 * self.late_versions.get("1", 0):
            found.append(f"after the change of the route the versions answered {self.late_versions}")
        if self.traffic.get("wrong", 0) or not self.traffic.get("right", 0):
            found.append(f"the traffic generator counted {self.traffic}")
        return found + [f"left behind: {each}" for each in self.left]


def check(compose: Compose, say: Callable[[str], None]) -> Report:
    """Run all of it and return what was seen; the project is taken down however it ends."""
    report = Report()
    try:
        _run(compose, report, say)
    except BaseException:
        _show_logs(compose)
        raise
    finally:
        compose.down()
    report.left = compose.left()
    say(f"taken down; left behind: {', '.join(report.left) or 'nothing'}")
    return report


def _run(compose: Compose, report: Report, say: Callable[[str], None]) -> None:
    began = time.monotonic()
    compose.up()
    with redis.Redis(port=compose.ports.redis, socket_timeout=5) as store:
        sender = Producer(
            {"bootstrap.servers": f"127.0.0.1:{compose.ports.kafka}", "linger.ms": 5, "log_level": 0}
        )
        samples = _samples(compose)
        first = next(samples)
        wait_until(
            lambda: _first_answer(sender, store, first), UP_S, "the first request is answered", every_s=0.5
        )
        report.first_answer_s = time.monotonic() - began
        say(f"from `up` to the first answer: {report.first_answer_s:.1f} s")
        wait_until(lambda: _ready_workers(compose) >= 2, UP_S, "two workers are ready", every_s=1)
        say(f"the page's tour from the host: {_take_the_tour(compose)} commands, each with exit code 0")
        sent = dict(zip((f"check-{number}" for number in range(REQUESTS)), samples, strict=False))
        _send_with_faults(compose, sender, sent, say)
        _read_results(store, sent, report, say)
    _look_around(compose, report, say)


def _samples(compose: Compose) -> Iterator[Asked]:
    """Yield requests for ever, from the files that the traffic generator's image carries."""
    (container, *_) = wait_until(lambda: compose.containers("traffic"), UP_S, "the traffic generator runs")
    files = {
        route: [
            Asked(route, line["body"], line["label"])
            for line in map(
                json.loads, compose.inside(container, "cat", f"{SAMPLES}/{route}.jsonl").splitlines()
            )
        ]
        for route in ("digits", "text")
    }
    digits, texts = cycle(files["digits"]), cycle(files["text"])
    while True:
        yield from islice(digits, TEXT_SHARE - 1)
        yield next(texts)


def _take_the_tour(compose: Compose) -> int:
    """Run what the page says under its heading Ask, word for word, in a shell of the host; count its lines.

    Only the ports are others. Raises ComposeError for a command that fails or an answer that is missing.
    """
    for program, package in (("kcat", "kcat"), ("redis-cli", "redis-tools")):
        if shutil.which(program) is None:
            install_package(package)
    section = PAGE.read_text(encoding="utf-8").partition("## Ask\n")[2].partition("\n## ")[0]
    script = "\n".join(re.findall(r"^```sh\n(.*?)^```$", section, re.DOTALL | re.MULTILINE))
    ports = compose.ports
    kafka, store = f"127.0.0.1:{ports.kafka}", f"redis://127.0.0.1:{ports.redis}/0"
    named = {
        "KAFKA": kafka,
        "REDIS": store,
        "INFERFLEET_CONFIG": str(HOST_SETTINGS),
        "INFERFLEET__KAFKA__BOOTSTRAP_SERVERS": kafka,
        "INFERFLEET__REDIS__URL": store,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    words = ["env", *(f"{name}={value}" for name, value in named.items()), "sh", "-euc", script]
    said = compose.run(words, 180)
    for expected in ("tour-1  ok", '"data":["python"]', "tour-3  error", "E_SHAPE", "inferfleet-id=tour-1"):
        if expected not in said:
            raise ComposeError(f"the tour did not print {expected}:\n{said}")
    return len(re.findall(r"^(?:inferfleet|redis-cli|kcat|echo|printf) ", script, re.MULTILINE))


def _send(sender: Producer, request_id: str, asked: Asked) -> None:
    body = json.dumps({"id": request_id, **asked.body}).encode()
    sender.produce(f"{asked.route}.requests", body, f"key-{request_id}".encode())
    sender.poll(0)


def _key(route: str, request_id: str) -> str:
    return f"{FLEET}:result:{route}:{request_id}"


def _first_answer(sender: Producer, store: redis.Redis, asked: Asked) -> bool:
    """Ask, again and again until the topic stands, and look for the answer."""
    try:
        if store.get(_key(asked.route, "check-first")):
            return True
        if f"{asked.route}.requests" in sender.list_topics(timeout=2).topics and not store.get("check:asked"):
            _send(sender, "check-first", asked)
            if sender.flush(10) == 0:
                store.set("check:asked", 1)
    except Exception:  # the servers are still coming up, each with errors of its own
        return False
    return False


def _send_with_faults(
    compose: Compose, sender: Producer, sent: Mapping[str, Asked], say: Callable[[str], None]
) -> None:
    """Send all requests in five parts, and between them do what may not cost any of them."""
    steps: list[Callable[[], str]] = [
        lambda: _kill_a_worker(compose),
        lambda: _scale(compose, 4),
        lambda: _change_route(compose),
        lambda: _scale(compose, 2),
        lambda: "",
    ]
    ids, size = list(sent), len(sent) // len(steps)
    for number, step in enumerate(steps):
        for request_id in ids[number * size : (number + 1) * size]:
            _send(sender, request_id, sent[request_id])
        said = step()
        if said:
            say(f"{(number + 1) * size:,} sent; {said}")
    assert sender.flush(60) == 0, "Kafka did not take all requests"


def _kill_a_worker(compose: Compose) -> str:
    victim = compose.containers("worker")[0]
    compose.engine_says("kill", "--signal", "KILL", victim)
    return f"killed the worker container {victim[:12]}"


def _scale(compose: Compose, count: int) -> str:
    compose.scale("worker", count)
    wait_until(lambda: _ready_workers(compose) == count, UP_S, f"{count} workers are ready", every_s=1)
    return f"scaled to {count} workers, all ready"


def _change_route(compose: Compose) -> str:
    """Move nearly all keys to version 2, as an operator would in the coordinator's container."""
    (container,) = compose.containers("coordinator")
    script = "cat > /tmp/routes.toml && inferfleet route apply /tmp/routes.toml --yes --reason check"
    said: list[str] = []

    def applied() -> bool:
        """While containers come and go, the engine's resolver may not know a name for a moment."""
        try:
            said.append(compose.inside(container, "sh", "-c", script, given=SECOND_ROUTE))
        except ComposeError as error:
            if "Name or service not known" not in str(error):
                raise
        return bool(said)

    wait_until(applied, 60, "the route is changed", every_s=1)
    return " ".join(said[0].strip().splitlines()[-1:])


def _ready_workers(compose: Compose) -> int:
    """Return how many worker containers run and say that they are ready."""
    return sum(_is_ready(compose, container) for container in compose.containers("worker"))


def _is_ready(compose: Compose, container: str) -> bool:
    try:
        compose.inside(container, "python", "-c", READY)
    except ComposeError:
        return False
    return True


def _read_results(
    store: redis.Redis, sent: Mapping[str, Asked], report: Report, say: Callable[[str], None]
) -> None:
    """Read every result, and compare it with what its version says to that request."""
    bodies: dict[str, bytes] = {}

    def all_there() -> bool:
        missing = [each for each in sent if each not in bodies]
        for at in range(0, len(missing), 1000):
            part = missing[at : at + 1000]
            found: Any = store.mget([_key(sent[each].route, each) for each in part])
            bodies.update({each: body for each, body in zip(part, found, strict=True) if body})
        return len(bodies) == len(sent)

    try:
        wait_until(all_there, ANSWERS_S, "every request has a result in Redis", every_s=0.5)
    except AssertionError:
        say("not every request has a result in Redis")
    versions: Counter[str] = Counter()
    late: Counter[str] = Counter()
    for number, (request_id, asked) in enumerate(sent.items()):
        if request_id not in bodies:
            continue
        body = json.loads(bodies[request_id])
        if _label(body) != asked.labels.get(body.get("model_version")):
            report.wrong.append(f"{request_id}: {bodies[request_id][:200]!r}")
        if asked.route == "digits":
            versions[body.get("model_version", "")] += 1
            if number >= len(sent) * 4 // 5:
                late[body.get("model_version", "")] += 1
    report.answered, report.versions, report.late_versions = len(bodies), dict(versions), dict(late)
    say(f"{report.answered:,} of {len(sent):,} results in Redis, {len(report.wrong)} wrong")
    say(f"digits by version: {dict(versions)}, of the last fifth {dict(late)}")


def _label(body: Mapping[str, Any]) -> Any:
    return next((each["data"][0] for each in body.get("outputs", []) if each["name"] == "label"), None)


def _look_around(compose: Compose, report: Report, say: Callable[[str], None]) -> None:
    """Ask Prometheus whom it scrapes, the API with and without its token, and the traffic generator."""

    def scraped() -> dict[str, dict[str, str]]:
        _, page = ask(f"http://127.0.0.1:{compose.ports.prometheus}/api/v1/targets?state=active")
        found: dict[str, dict[str, str]] = {}
        for each in page["data"]["activeTargets"] if page else []:
            found.setdefault(each["labels"]["job"], {})[each["labels"]["instance"]] = each["health"]
        report.targets = found
        return found

    def as_it_should() -> bool:
        found = scraped()
        healths = [health for each in found.values() for health in each.values()]
        return len(found.get("worker", {})) == 2 and bool(healths) and set(healths) == {"up"}

    try:
        wait_until(as_it_should, 90, "every target is scraped", every_s=1)
    except AssertionError:
        say("not every target is scraped")
    said = ", ".join(f"{job} {len(each)}" for job, each in sorted(report.targets.items()))
    say(f"Prometheus scrapes: {said}")
    (container,) = compose.containers("coordinator")
    token = compose.inside(container, "cat", ADMIN_TOKEN).strip()
    url = f"http://127.0.0.1:{compose.ports.api}/v1/routes"
    report.api = {"without a token": ask(url)[0], "with the token": ask(url, token)[0]}
    say(f"the coordinator's API: {report.api}")
    (traffic,) = compose.containers("traffic")
    lines = [json.loads(each) for each in compose.logs(traffic).splitlines() if each.startswith("{")]
    counts = [each for each in lines if each.get("event") == "traffic"]
    known = ("sent", "right", "wrong", "errors", "undelivered", "in_flight")
    report.traffic = {name: counts[-1][name] for name in known if counts and name in counts[-1]}
    say(f"the traffic generator: {report.traffic}")


def _show_logs(compose: Compose) -> None:
    """Print the end of every container's log, for whoever has to find out."""
    for container in compose.containers(running=False):
        name = compose.engine_says("inspect", "--format", "{{.Name}} {{.State.Status}}", container).strip()
        print(f"--- {name}", file=sys.stderr)
        print("\n".join(compose.logs(container).splitlines()[-15:]), file=sys.stderr)


def open_compose(say: Callable[[str], None]) -> Compose:
    """Return a project of its own under the engine that there is; images are built, pulled or stood in for.

    Raises :class:`~tests.support.programs.MissingServerError` where no engine or image can be had.
    """
    engine = containers.engine()
    others = (KAFKA, VALKEY, PROMETHEUS, GRAFANA)
    missing = containers.prepare(engine, others, say)
    for image in missing:
        if image != GRAFANA:
            raise MissingServerError(f"the image {image} cannot be had")
        say(f"{image} cannot be had: Grafana is left out")
    say(f"{engine.name}; our own layers: {containers.sizes(engine)}")
    return Compose(
        engine.command,
        engine.compose,
        engine.environment,
        f"inferfleet-check-{os.getpid()}",
        Ports(*free_ports(5)),
        [*SERVICES, *([] if GRAFANA in missing else ["grafana"])],
        in_any_order=engine.name == "podman",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check and print what it sees; the exit code says whether all of it is right."""
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("compose-check", description=__doc__, formatter_class=as_written)
    parser.parse_args(arguments)
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"compose-check: {time.monotonic() - began:6.1f} s  {text}", flush=True)

    try:
        problems = check(open_compose(say), say).problems
    except (MissingServerError, ComposeError) as error:
        problems = [str(error)]
    for problem in problems:
        print(f"compose-check: {problem}", file=sys.stderr)
    say("all of it is right" if not problems else "NOT right")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
