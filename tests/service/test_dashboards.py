"""Every panel of every dashboard shows something, asked of a Prometheus that scraped a real run."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.dashboards import NAMES, filled, load, queries, variable_values, variables
from tests.support.fleet import Fleet
from tests.support.fleet_traffic import OpenLoop, Sender, row_of, v2_body
from tests.support.prometheus import PrometheusServer
from tests.support.rollout_scene import PATIENCE_S, QUICK, Scene
from tests.support.servers import KafkaServer, RedisServer
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.service, pytest.mark.slow, pytest.mark.timeout(420)]

RATE = 60.0
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACED = ("traceparent", f"00-{TRACE}-00f067aa0ba902b7-01".encode())
AWAY, UNFIT = -666.0, -888.0
HANDLER = """
import pathlib
import time
import numpy as np

class Model:
    '''Rows that start with -666 fail as if what the model asks were away, until the file `there` stands;
    -888 get an answer of another shape; `broken` fails at all but the self-check; a batch takes `slow_s`;
    a tenth of the answers is off by `other`.'''

    def load(self, folder, device, parameters):
        self.there = pathlib.Path(parameters["flags"]) / "there"
        self.broken = parameters.get("broken", False)
        self.slow_s = parameters.get("slow_s", 0)
        self.other = parameters.get("other", 0)

    def predict(self, tensors):
        x = tensors["x"]
        first = x[:, 0].astype(np.int64)
        if self.broken and x[:, 1].any():
            raise ValueError("this version is broken on purpose")
        if (first == -666).any() and not self.there.exists():
            raise TimeoutError("what the model asks is away")
        time.sleep(self.slow_s)
        wide = 1 if (first == -888).any() else 2
        check = np.stack([first % 7 + self.other * (first % 10 == 0), first], axis=1)
        return {"check": check[:, :wide]}
"""
BROKEN = """
kind = "canary"
step_limit_s = 120
[shadow]
enabled = false
[[step]]
percent = 50
dwell_s = 60
minimum = 100000
"""
STANDING = """
kind = "canary"
step_limit_s = 600
[shadow]
duration_s = 2
minimum_pairs = 1000
secondary = 0.2
stop_at = "never"
[guardrails]
p95_compute_ratio = 100
p95_latency_ratio = 100
p99_latency_ratio = 100
cost_ratio = 100
[[step]]
percent = 50
dwell_s = 1
minimum = 100000
"""
"""A rollout that is held at its step, for too few messages, until the test is over."""
TEXTS = """
import numpy as np

class Model:
    '''Counts the bytes of texts.'''

    def load(self, folder, device, parameters):
        pass

    def predict(self, tensors):
        return {"length": np.array([[len(text)] for text in tensors["text"][:, 0]], dtype=np.int64)}
"""
TEXTS_SETTINGS = """
runtime = "python"
file = "texts.py"
input = [{name = "text", datatype = "BYTES", shape = [1]}]
output = [{name = "length", datatype = "INT64", shape = [1]}]
"""


class Stand(NamedTuple):
    """A scene that has run and still runs, the Prometheus that scraped all of it, and when it began."""

    scene: Scene
    server: PrometheusServer
    began: float

    def ask(self, instant: bool, expr: str) -> list[float]:
        """Return the values that a query finds as Grafana would ask it: now, or over the whole scene."""
        if instant:
            values = [each.value for each in self.server.query(expr)]
        else:
            found = self.server.query_range(expr, start=self.began, step_s=1.0)
            values = [value for each in found for _, value in each.points]
        return [value for value in values if not math.isnan(value)]


@pytest.fixture(scope="module")
def stand(
    kafka: KafkaServer, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Stand]:
    """Two workers, a coordinator, a version taken back, and a canary at its step behind a shadow."""
    folder = tmp_path_factory.mktemp("dashboards")
    settings = {"retry": {"delays_ms": [300, 1000]}, "worker": {"state": "state"}}
    with Fleet(folder / "fleet", kafka, redis_server, settings=settings) as fleet:
        others: dict[str, dict[str, object]] = {"2": {"slow_s": 0.02, "other": 1}, "3": {"broken": True}}
        for version, more in {"1": {}, **others}.items():
            fleet.handler(HANDLER, version=version, flags=str(folder), **more)
        handler = folder / "texts.py"
        handler.write_text(TEXTS)
        fleet.trust("texts")
        fleet.repository.add("texts", "1", [handler], settings=TEXTS_SETTINGS)
        fleet.route(redis=True, goal_p99_ms=500)
        fleet.route("texts", model="texts")
        fleet.prepare()
        scene = Scene(fleet, QUICK)
        try:
            scene.run("route", "apply", str(fleet.routes_file))
            workers = scene.workers("w-1", "w-2")
            coordinator = scene.coordinator("c-1")
            targets = {
                "worker": [each.address for each in workers],
                "coordinator": [coordinator.events("coordinator_started")[0]["admin"]],
            }
            with PrometheusServer(folder / "prometheus", targets) as server:
                server.all_up()
                began = time.time()
                with OpenLoop(kafka.client_config(), fleet.source("sums"), 2, RATE):
                    _act(Stand(scene, server, began), kafka, folder / "there")
                    yield Stand(scene, server, began)
        finally:
            scene.close()


def _act(stand: Stand, kafka: KafkaServer, there: Path) -> None:
    """Let happen what the panels are about, and wait until Prometheus has seen each of it."""
    scene, server = stand.scene, stand.server
    source = scene.fleet.source("sums")
    sender = Sender(kafka.client_config())

    def seen(expr: str) -> None:
        wait_until(lambda: server.value(expr) > 0, PATIENCE_S, f"{expr} > 0", every_s=0.2)

    seen('sum(inferfleet_requests_total{outcome="ok"})')
    scene.coordinators[0].ask("GET", "/")
    for number in range(3):
        sender.send(source, b"{", id=f"unreadable-{number}")
        sender.send(source, v2_body([(AWAY, 1.0 + number, 0.0, 1.0)]), id=f"away-{number}")
        sender.send(source, v2_body([(UNFIT, 1.0 + number, 0.0, 1.0)]), id=f"unfit-{number}")
        sender.send(source, v2_body([row_of(number)]), id=f"again-{number}")
        sender.send(source, v2_body([row_of(number)]), id=f"traced-{number}", headers=[TRACED])
    sender.flush()
    seen("sum(inferfleet_retries_total)")
    seen("sum(inferfleet_dead_letters_total)")
    seen('sum(inferfleet_requests_total{outcome="E_MODEL_OUTPUT"})')
    there.touch()
    for number in range(3):
        sender.send(source, v2_body([row_of(number)]), id=f"again-{number}")
    sender.flush()
    seen("sum(inferfleet_redeliveries_total)")

    _send_texts(sender, scene.fleet, "first")
    seen("sum(inferfleet_padding_ratio_count)")
    before = server.value("sum(inferfleet_padding_ratio_count)")
    _send_texts(sender, scene.fleet, "second")
    seen(f"sum(inferfleet_padding_ratio_count) - {before}")

    broken = scene.json("rollout", "start", "sums", "--to", "3", "--policy", scene.policy(BROKEN))["id"]
    assert scene.reached(broken, "aborted", "done", "inconclusive").phase == "aborted"
    standing = scene.json("rollout", "start", "sums", "--to", "2", "--policy", scene.policy(STANDING))["id"]
    scene.reached(standing, "shadow")
    seen('sum(inferfleet_shadow_requests_total{outcome="ok"})')
    for number in range(400):
        rows = [row_of(number + more) for more in range(50)]
        sender.send(source, v2_body(rows), id=f"burst-{number}", key=b"%d" % number)
    sender.flush()
    seen("sum(inferfleet_shadow_shed_total)")
    scene.reached(standing, "step")
    seen('sum(inferfleet_requests_total{version="2"})')
    seen("sum(count_over_time(inferfleet_rollout_hold[5s])) > 5")


def _send_texts(sender: Sender, fleet: Fleet, round_: str) -> None:
    for number in range(20):
        text = {"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": ["a" * 10 * number]}
        body = json.dumps({"inputs": [text]}).encode()
        sender.send(fleet.source("texts"), body, id=f"{round_}-{number}")
    sender.flush()


@pytest.mark.parametrize("name", NAMES)
def test_every_query_finds_something(stand: Stand, name: str, record_property: pytest.RecordProperty) -> None:
    """Panels, annotations and variables of a dashboard, each with the values that Grafana would fill in."""
    span = math.ceil(time.time() - stand.began)
    values = {"__rate_interval": "5s", "__range": f"{span}s", "datasource": "prometheus"}
    for variable in variables(load(name)).values():
        found = variable_values(stand.server, variable, values)
        assert "sums" in found, (variable["name"], found)
        values[variable["name"]] = variable["allValue"] if variable["includeAll"] else "sums"
    every = list(queries(name))
    # What stands in for a sum without series would hide that there are none.
    exprs = [filled(asked.expr, values).replace(" or vector(0)", "") for asked in every]
    empty = [
        str(asked) for asked, expr in zip(every, exprs, strict=True) if not stand.ask(asked.instant, expr)
    ]
    assert not empty, "\n".join(["these find nothing:", *empty])
    for asked, expr in zip(every, exprs, strict=True):
        if asked.exemplar:
            traces = {each["labels"]["trace_id"] for each in stand.server.exemplars(expr)}
            assert traces == {TRACE}, str(asked)
    metrics = {metric for expr in exprs for metric in re.findall(r"\b(?:inferfleet|process)_\w+", expr)}
    assert [metric for metric in sorted(metrics) if not stand.server.query(metric)] == []
    record_property(
        f"dashboard_{name.removesuffix('.json')}", f"{len(every)} queries, {len(metrics)} metrics"
    )
