"""A real Prometheus on loopback that scrapes and evaluates as often as a test needs, and its questions."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from tests.support import programs
from tests.support.process import ServerError, ServerProcess, free_ports
from tests.support.waiting import wait_until

API = "/api/v1/"


class Sample(NamedTuple):
    """One series of an instant query and its value."""

    labels: dict[str, str]
    value: float


class Series(NamedTuple):
    """One series of a range query: pairs of Unix seconds and value, oldest first."""

    labels: dict[str, str]
    points: list[tuple[float, float]]


class Target(NamedTuple):
    """Somebody who is scraped; ``health`` is ``up``, ``down`` or ``unknown``, ``error`` says why."""

    job: str
    address: str
    health: str
    error: str


class Alert(NamedTuple):
    """An alert that is ``pending`` or ``firing``; ``labels`` hold its name as ``alertname``."""

    name: str
    state: str
    labels: dict[str, str]
    annotations: dict[str, str]


class PrometheusServer:
    """A Prometheus whose configuration and data live in ``folder``; usable as a context manager.

    ``targets`` maps a job to the addresses that it scrapes (:meth:`aim` changes them later), ``rules`` are
    rule files; targets are scraped and rules evaluated every ``every_s`` seconds. ``config`` is merged over
    the configuration that comes from these, section by section, and ``flags`` are further words of the
    command line. Exemplars are stored.
    """

    def __init__(
        self,
        folder: Path,
        targets: Mapping[str, Sequence[str]],
        *,
        rules: Sequence[Path] = (),
        every_s: float = 0.5,
        config: Mapping[str, Any] | None = None,
        flags: Sequence[str] = (),
    ) -> None:
        self.folder = folder
        (self.port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}"
        self._targets = {job: list(addresses) for job, addresses in targets.items()}
        self._rules = list(rules)
        self._every = f"{round(every_s * 1000)}ms"
        self._more = dict(config or {})
        self._flags = list(flags)
        self._process = ServerProcess("Prometheus", folder / "prometheus.log")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, timeout_s: float = 60.0) -> None:
        """Start the server; return once it answers queries."""
        binary = programs.prometheus()
        self.folder.mkdir(parents=True, exist_ok=True)
        for job, addresses in self._targets.items():
            self._write_targets(job, addresses)
        # JSON is YAML, so no writer of YAML is needed.
        file = self.folder / "prometheus.json"
        file.write_text(json.dumps({**self._config(), **self._more}, indent=1))
        place = [f"--storage.tsdb.path={self.folder / 'data'}", "--storage.tsdb.retention.time=6h"]
        place += [f"--config.file={file}", f"--web.listen-address=127.0.0.1:{self.port}"]
        features = ["--enable-feature=exemplar-storage"]
        self._process.start([binary, *place, *features, *self._flags], cwd=self.folder)
        self._process.wait_ready(self._answers, timeout_s)

    def stop(self) -> None:
        """End the server in order; twice is fine."""
        self._process.stop()

    def aim(self, job: str, addresses: Sequence[str]) -> None:
        """Scrape these addresses in ``job`` from now on; returns once Prometheus knows them.

        That takes up to five seconds, as at its start: it passes on what changed no more often.
        """
        if job not in self._targets:
            raise ValueError(f"no job of this Prometheus is named {job!r}")
        self._targets[job] = list(addresses)
        self._write_targets(job, addresses)
        # It is told of the change, and reads anew every second in case it was not.
        wanted = set(addresses)
        wait_until(
            lambda: {each.address for each in self.targets() if each.job == job} == wanted,
            30,
            f"Prometheus scrapes {sorted(wanted)} as {job}",
        )

    def reload(self) -> None:
        """Have the rule files read anew (SIGHUP); returns once that is done, raises if it was refused."""
        before = self._loaded()
        os.kill(self._process.pid, signal.SIGHUP)
        wait_until(lambda: self._loaded() > before, 30, "Prometheus has read its configuration anew")

    def query(self, expression: str, at: float | None = None) -> list[Sample]:
        """Return what an instant query finds, now or at Unix second ``at``; a scalar has no labels."""
        found = self.api("query", query=expression, **({} if at is None else {"time": repr(at)}))
        if found["resultType"] == "scalar":
            return [Sample({}, float(found["result"][1]))]
        return [Sample(each["metric"], float(each["value"][1])) for each in found["result"]]

    def value(self, expression: str, default: float = 0.0) -> float:
        """Return the sum of what an instant query finds, ``default`` where it finds nothing."""
        found = self.query(expression)
        return sum(each.value for each in found) if found else default

    def query_range(
        self, expression: str, *, start: float | None = None, end: float | None = None, step_s: float = 1.0
    ) -> list[Series]:
        """Return what a range query finds; without ``start`` and ``end`` the last five minutes."""
        end = time.time() if end is None else end
        start = end - 300 if start is None else start
        given = {"query": expression, "start": repr(start), "end": repr(end), "step": repr(step_s)}
        return [
            Series(each["metric"], [(float(at), float(value)) for at, value in each["values"]])
            for each in self.api("query_range", **given)["result"]
        ]

    def exemplars(self, expression: str) -> list[dict[str, Any]]:
        """Return the exemplars of the series in ``expression``: dicts with labels, value and timestamp."""
        now = time.time()
        found = self.api("query_exemplars", query=expression, start=repr(now - 3600), end=repr(now + 60))
        return [exemplar for series in found for exemplar in series["exemplars"]]

    def targets(self) -> list[Target]:
        """Return everybody who is scraped."""
        return [
            Target(each["scrapePool"], each["labels"]["instance"], each["health"], each["lastError"])
            for each in self.api("targets", state="active")["activeTargets"]
        ]

    def all_up(self, timeout_s: float = 30.0) -> None:
        """Return once every target was scraped; raise with what is down otherwise."""

        def down() -> list[Target]:
            return [each for each in self.targets() if each.health != "up"]

        wait_until(lambda: self.targets() and not down(), timeout_s, f"every target is up: {self.targets()}")

    def alerts(self, name: str | None = None) -> list[Alert]:
        """Return the alerts that are pending or firing, all or those of one name."""
        found = [
            Alert(each["labels"]["alertname"], each["state"], each["labels"], each["annotations"])
            for each in self.api("alerts")["alerts"]
        ]
        return [each for each in found if name in (None, each.name)]

    def firing(self, name: str | None = None) -> list[Alert]:
        """Return the alerts that fire, all or those of one name."""
        return [each for each in self.alerts(name) if each.state == "firing"]

    def broken_rules(self) -> list[str]:
        """Return one line for every rule whose last evaluation failed."""
        groups = self.api("rules")["groups"]
        rules = [rule for group in groups for rule in group["rules"]]
        return [f"{each['name']}: {each['lastError']}" for each in rules if each["health"] == "err"]

    def api(self, path: str, **parameters: str) -> Any:
        """Return ``data`` of an answer of the HTTP API; raise :class:`ServerError` with its error."""
        asked = f"{self.url}{API}{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(asked, timeout=30) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            with error:
                said = error.read().decode(errors="replace")
            raise ServerError(f"Prometheus refused {path} {parameters}: {said}") from None

    def _config(self) -> dict[str, Any]:
        jobs = [
            {
                "job_name": job,
                "file_sd_configs": [{"files": [str(self._target_file(job))], "refresh_interval": "1s"}],
            }
            for job in self._targets
        ]
        often = {"scrape_interval": self._every, "scrape_timeout": self._every}
        return {
            "global": {**often, "evaluation_interval": self._every},
            "rule_files": [str(each.resolve()) for each in self._rules],
            "scrape_configs": jobs,
        }

    def _target_file(self, job: str) -> Path:
        return self.folder / f"targets-{job}.json"

    def _write_targets(self, job: str, addresses: Sequence[str]) -> None:
        file = self._target_file(job)
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps([{"targets": list(addresses)}]))
        fresh.replace(file)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def _loaded(self) -> float:
        """Return when the configuration was last read well; raise if the last try was refused."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        found = dict(line.rsplit(" ", 1) for line in lines if line.startswith("prometheus_config_last_"))
        if float(found["prometheus_config_last_reload_successful"]) != 1:
            raise ServerError(f"Prometheus refused its configuration:\n{self._process.log_tail(5)}")
        return float(found["prometheus_config_last_reload_success_timestamp_seconds"])


def run_promtool(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``promtool`` to its end, whatever its exit code."""
    return subprocess.run(
        [programs.promtool(), *arguments], capture_output=True, text=True, check=False, timeout=120
    )
