"""The control plane's routes on the command line, over a store in memory: apply, history, revert, audit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from inferfleet.cli import cli, control
from inferfleet.control.pauses import Pause
from inferfleet.errors import ControlError
from inferfleet.routes import parse_routes
from tests.support.control_plane import Plane

ONE = """
[[route]]
name = "digits"
source = "kafka:in"
results = ["kafka:out"]
model = "digits"
version = "1"
"""
CANARY = ONE.replace(
    'version = "1"',
    'variants = [ { name = "stable", version = "1", weight = 95 }, '
    '{ name = "canary", version = "2", weight = 5 } ]',
)
OTHER = ONE.replace('"digits"\nsource = "kafka:in"', '"other"\nsource = "kafka:other"', 1)


class Board:
    """Stands in for the pauses in Redis."""

    def __init__(self, shown: dict[str, str]) -> None:
        self.pauses: dict[str, Pause] = {}
        self.shown = shown

    def __call__(self, _config: object) -> Board:
        return self

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def pause(self, route: str, reason: str, actor: str) -> Pause | None:
        stood = self.pauses.get(route)
        self.pauses.setdefault(route, Pause(reason, 1_790_000_000_000, "operator on h", actor))
        self.shown[route] = self.pauses[route].shown
        return stood

    def resume(self, route: str) -> Pause | None:
        self.shown.pop(route, None)
        return self.pauses.pop(route, None)


class Desk:
    """The command line over a control plane in memory."""

    def __init__(self, plane: Plane, folder: Path) -> None:
        self.plane = plane
        self.folder = folder
        self.board = Board(plane.store.pauses)
        self.config = folder / "fleet.toml"
        self.config.write_text('[fleet]\nname = "f"\n[routes]\nsource = "fleet"\n')

    def file(self, text: str) -> str:
        (self.folder / "routes.toml").write_text(text)
        return str(self.folder / "routes.toml")

    def run(self, *arguments: str, code: int = 0, typed: str = "") -> Result:
        result = CliRunner().invoke(cli, ["--config", str(self.config), *arguments], input=typed)
        assert result.exit_code == code, (result.output, result.exception)
        return result

    def apply(self, text: str, *arguments: str, code: int = 0, typed: str = "") -> Result:
        return self.run("route", "apply", self.file(text), *arguments, code=code, typed=typed)

    def json(self, *arguments: str) -> Any:
        return json.loads(self.run(*arguments, "--json").stdout)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    plane = Plane(["w-1", "w-2"])
    monkeypatch.setattr(control, "open_store", lambda _: plane.store)
    monkeypatch.setattr(control, "route_control", lambda *_: plane.control)
    monkeypatch.setattr("inferfleet.route_reader.read_routes", lambda _: plane.store.load().table())
    desk = Desk(plane, tmp_path)
    monkeypatch.setattr("inferfleet.cli.pauses.SharedPauses", desk.board)
    return desk


def test_apply_shows_the_difference_and_makes_it_stand(desk: Desk) -> None:
    """A person reads what is added, what moves, and when it is in force for how many workers."""
    first = desk.apply(ONE, "--reason", "the first").stdout
    assert first.startswith('route digits: added\n  variant stable: version 1, 100%\n  source: "kafka:in"\n')
    assert "route digits: revision 2 is in force from 20" in first
    assert first.endswith("; acknowledged by 2 workers\n")
    assert desk.apply(ONE).stdout == "route digits: unchanged\nnothing to change\n"

    dry = desk.apply(CANARY, "--dry-run").stdout
    assert dry == (
        "route digits: changed, 500 of 10,000 buckets (5%) move to another version\n"
        "  variant stable: version 1, 100% -> 95%\n"
        "  variant canary: version 2, 0% -> 5%\n"
        "nothing was changed (--dry-run)\n"
    )
    assert desk.plane.store.load().head.number == 2
    desk.apply(CANARY, "--actor", "eva")
    assert desk.plane.store.load().head.number == 4


def test_apply_as_json_says_all_of_it(desk: Desk) -> None:
    """The change, and how it ended."""
    said = json.loads(desk.apply(ONE, "--json").stdout)
    assert said["changes"][0] | {"fields": [], "after": None} == {
        "route": "digits",
        "kind": "added",
        "revision": 0,
        "moved_buckets": 0,
        "variants": [
            {
                "variant": "stable",
                "version_before": None,
                "version_after": "1",
                "buckets_before": 0,
                "buckets_after": 10_000,
            }
        ],
        "fields": [],
        "before": None,
        "after": None,
        "announced": None,
    }
    assert said["applied"][0]["revision"] == 2
    assert said["applied"][0]["unacknowledged"] == []


def test_what_a_worker_refuses_is_one_line_and_1(desk: Desk) -> None:
    """And the old route goes on."""
    desk.apply(ONE)
    desk.plane.workers[1].refuses = {"digits:2": "its bytes differ"}
    result = desk.apply(CANARY, code=1)
    assert result.stderr.splitlines()[-1] == (
        "Error: route digits: w-2 refuses digits:2: its bytes differ; what stood serves on"
    )
    assert "1 100%" in desk.run("route", "list").stdout


def test_a_barrier_that_waits_says_for_whom(desk: Desk) -> None:
    """Each worker once, on standard error."""
    desk.apply(ONE)
    desk.plane.workers[0].loads = False
    result = desk.apply(CANARY, "--timeout", "5", code=1)
    assert result.stderr.count("w-1 has not loaded digits:2\n") == 1
    assert "not ready within 5 s" in result.stderr


def test_prune_and_reset_ask_first(desk: Desk) -> None:
    """No means nothing is changed; --yes does not ask."""
    desk.apply(ONE + OTHER)
    assert "other: is not in the file and left alone" in desk.apply(ONE).stdout
    desk.apply(ONE, "--prune", typed="n\n", code=1)
    assert len(desk.plane.store.load().table().routes) == 2
    assert "route other: DELETED" in desk.apply(ONE, "--prune", typed="y\n").stdout
    assert len(desk.plane.store.load().table().routes) == 1

    desk.apply(ONE, "--reset", typed="n\n", code=1)
    assert desk.plane.store.load().head.epoch == 0
    assert "a new log that holds these routes alone" in desk.apply(ONE, "--reset", "--yes").stdout
    assert desk.plane.store.load().head.epoch == 1


def test_who_is_waited_for_is_said_only_where_it_takes_long(desk: Desk) -> None:
    """Workers that answer at their next look are no news; one that does not load is named once."""
    assert desk.apply(ONE).stderr == ""
    desk.plane.workers[0].loads = False
    said = desk.apply(CANARY, "--timeout", "10", code=1).stderr
    assert said.count("route digits waits: w-1 has not loaded digits:2\n") == 1


def test_list_and_show_say_what_is_in_force_and_what_waits(desk: Desk) -> None:
    """In force, coming at its time, announced for its workers."""
    desk.apply(ONE)
    desk.plane.control.announce(desk.plane.control.planned([{**_entry(CANARY)}]), author="eva", reason="soon")
    text = desk.run("route", "list").stdout
    assert "revision 3 for its workers" in text
    assert "revision 3 of epoch 0, from the control plane" in text
    shown = desk.json("route", "show", "digits")
    assert shown["in_force"]["revision"] == 2
    assert shown["announced"]["reason"] == "soon"
    assert shown["in_force"]["route"]["variants"][0]["version"] == "1"
    said = desk.run("route", "show", "digits").stdout
    assert "revision 2 (activate) by " in said
    assert "waits: revision 3 for its workers" in said
    assert 'did you mean "digits"' in desk.run("route", "show", "digts", code=1).stderr
    assert [each["name"] for each in desk.json("route", "list")["routes"]] == ["digits"]


def test_a_pause_says_who_asked_for_it(desk: Desk) -> None:
    """In show, in what a second person is told, and in the audit log, where the resume stands too."""
    desk.apply(ONE)
    assert desk.json("route", "show", "digits")["paused"] is None
    before = len(desk.plane.store.audit())
    said = desk.run("route", "pause", "digits", "--reason", "it is wrong", "--actor", "eva").stdout
    assert "route digits is paused for pool default: it is wrong (by eva)\n" in said
    again = desk.run("route", "pause", "digits", "--actor", "max").stdout
    assert "route digits was paused already: it is wrong (by eva)\n" in again
    assert "\npaused: it is wrong (by eva)\n" in desk.run("route", "show", "digits").stdout
    assert desk.json("route", "show", "digits")["paused"] == "it is wrong (by eva)"
    assert "it was paused: it is wrong (by eva)" in desk.run("route", "resume", "digits").stdout
    desk.run("route", "resume", "digits")
    entries = [entry for entry, _ in desk.plane.store.audit()[before:]]
    assert [(e.actor, e.action, e.subject, e.reason, e.before, e.after) for e in entries] == [
        ("eva", "route pause", "route digits", "it is wrong", None, "it is wrong"),
        (control.actor(), "route resume", "route digits", "", "it is wrong (by eva)", None),
    ]


def test_a_pause_that_cannot_be_audited_stands(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """It must work for a user who may write nothing but pauses; a note says what is missing."""
    desk.apply(ONE)

    def denied(_change: object) -> None:
        raise ControlError("no permission")

    monkeypatch.setattr(desk.plane.store, "commit", denied)
    paused = desk.run("route", "pause", "digits")
    assert f"paused for pool default: by hand (by {control.actor()})" in paused.stdout
    assert paused.stderr == "note: the pause is not in the audit log: no permission\n"


def _entry(text: str) -> dict[str, Any]:
    import tomllib

    entry: dict[str, Any] = tomllib.loads(text)["route"][0]
    return entry


def test_what_show_prints_as_toml_changes_nothing_when_applied(desk: Desk) -> None:
    """Also where the ranges lie in pieces."""
    desk.apply(CANARY.replace("95", "50").replace("weight = 5 ", "weight = 50 "))
    desk.apply(CANARY)
    toml = desk.run("route", "show", "digits", "--toml").stdout
    (stands,) = desk.plane.store.load().table().routes

    assert "ranges = " in toml
    assert parse_routes(toml, "f", "x").routes == (stands,)
    assert desk.apply(toml).stdout.endswith("nothing to change\n")


def test_history_and_revert(desk: Desk) -> None:
    """Who, when, why, and back again."""
    desk.apply(ONE, "--reason", "first")
    desk.apply(CANARY, "--reason", "canary", "--actor", "eva")
    text = desk.run("route", "history", "digits").stdout
    assert text.splitlines()[1].split()[0] == "4"
    assert "canary" in text.splitlines()[1]
    assert "eva" in text.splitlines()[1]
    dry = desk.run("route", "revert", "digits", "--dry-run").stdout
    assert "500 of 10,000 buckets (5%) move" in dry
    desk.run("route", "revert", "digits", "--reason", "no good")
    assert [each["action"] for each in desk.json("route", "history", "digits", "--limit", "2")] == [
        "activate",
        "revert",
    ]
    desk.run("route", "revert", "digits", "--to", "4")
    assert desk.plane.store.load().table().routes[0].variants[1].version == "2"
    assert "has no revision 77" in desk.run("route", "revert", "digits", "--to", "77", code=1).stderr
    assert 'no route is named "none"' in desk.run("route", "history", "none", code=1).stderr


def test_settings_that_read_a_file_are_told(desk: Desk) -> None:
    """Whoever applies to a control plane that nobody with these settings follows hears of it."""
    desk.config.write_text('[fleet]\nname = "f"\n')
    assert "do not follow the control plane" in desk.apply(ONE).stderr


def test_a_wrong_file_names_the_key(desk: Desk) -> None:
    """One line, nothing announced."""
    assert 'did you mean "model"' in desk.apply(ONE.replace("model", "modle"), code=1).stderr
    assert desk.plane.store.load().head.number == 0


def test_topics_are_planned_before_a_route_is_applied(desk: Desk) -> None:
    """Its topics must stand when its workers hear of it; "latest" needs no repository for that."""
    file = desk.file(ONE.replace('version = "1"', 'version = "latest"'))
    said = json.loads(desk.run("topics", "plan", "--json", "--routes", file).stdout)

    assert [each["name"] for each in said["topics"]][:2] == ["in", "out"]
    assert json.loads(desk.run("topics", "plan", "--json").stdout)["topics"] == []


# The audit log


def test_the_audit_log_verifies_from_the_store_and_from_an_export(desk: Desk, tmp_path: Path) -> None:
    """Both walk the same chain and name the same last hash."""
    assert desk.run("audit", "verify").stdout == "the audit log is empty\n"
    desk.apply(ONE)
    desk.apply(CANARY)
    file = tmp_path / "audit.jsonl"
    assert desk.run("audit", "export", "--output", str(file)).stdout == f"{file}: 4 entries\n"
    said = desk.run("audit", "verify").stdout
    assert said.startswith("ok: 4 entries, 1 to 4; the last hash is ")
    assert desk.run("audit", "verify", str(file)).stdout == said
    assert desk.run("audit", "export").stdout_bytes == file.read_bytes()
    assert desk.run("audit", "export", "--after", "3").stdout_bytes == file.read_bytes().splitlines(True)[3]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [each["id"] for each in lines] == [1, 2, 3, 4]
    assert lines[2]["entry"]["subject"] == "route digits"
    last = lines[-1]["hash"]
    desk.run("audit", "verify", "--last-hash", last)


@pytest.mark.parametrize(
    ("touch", "said"),
    [
        (lambda lines: [lines[0], *lines[2:]], "entry 3 follows entry 1"),
        (lambda lines: [lines[1], lines[0]], "entry 1 follows entry 2"),
        (lambda lines: [lines[0].replace(b'"actor":"', b'"actor":"x'), lines[1]], "entry 1 is not what its"),
        (lambda lines: [lines[0], b"{}\n"], "line 2"),
        (lambda lines: [lines[0], b"\xff\n"], "line 2"),
    ],
)
def test_the_first_broken_entry_is_named(desk: Desk, tmp_path: Path, touch: Any, said: str) -> None:
    """Left out, moved, changed, or no entry at all."""
    desk.apply(ONE)
    desk.apply(CANARY)
    file = tmp_path / "audit.jsonl"
    desk.run("audit", "export", "--output", str(file))
    file.write_bytes(b"".join(touch(file.read_bytes().splitlines(True))))

    assert said in desk.run("audit", "verify", str(file), code=1).stderr


def test_a_rewritten_entry_with_a_hash_of_its_own_breaks_the_next(desk: Desk, tmp_path: Path) -> None:
    """Whoever changes one must change all that follow, and then the noted hash."""
    desk.apply(ONE)
    file = tmp_path / "audit.jsonl"
    desk.run("audit", "export", "--output", str(file))
    from inferfleet.core.audit_chain import digest

    first, second = file.read_bytes().splitlines(True)
    body = first.partition(b'"entry":')[2].rstrip()[:-1].replace(b'"actor":"', b'"actor":"x')
    forged = b'{"id":1,"hash":"%b","entry":%b}\n' % (digest(body).encode(), body)
    file.write_bytes(forged + second)
    assert "entry 2 does not continue entry 1" in desk.run("audit", "verify", str(file), code=1).stderr

    file.write_bytes(first)
    noted = json.loads(second)["hash"]
    cut = desk.run("audit", "verify", str(file), "--last-hash", noted, "--json", code=1)
    assert "the log was cut off" in json.loads(cut.stdout)["fault"]


# status


def test_status_shows_the_registered_workers(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    """Who serves which versions by which revision, who is behind and why."""
    desk.apply(ONE)
    desk.plane.workers[1].stale = "redis does not answer"
    desk.plane.workers[1].report()
    desk.plane.control.announce(desk.plane.control.planned([_entry(CANARY)]), author="eva", reason="soon")
    desk.plane.workers[0].step()
    from inferfleet.cli.registered import print_registered, registered
    from inferfleet.config import load

    found = registered(load(desk.config, {}))
    assert found is not None
    first, second = found.workers
    assert (first.worker, first.revision, first.behind, first.revision_age_s) == ("w-1", 3, 0, 0)
    assert (second.worker, second.revision, second.behind) == ("w-2", 2, 1)
    assert second.revision_age_s > 0
    assert first.ready == ["digits:1", "digits:2"]
    print_registered(found)
    said = capsys.readouterr().out
    assert "revision 3 of epoch 0  2 registered workers" in said
    assert "w-2 serves by routes that may be old: redis does not answer" in said


def test_status_without_an_answer_says_so(desk: Desk, capsys: pytest.CaptureFixture[str]) -> None:
    """A control plane that is away does not fail the rest."""
    from inferfleet.cli.registered import print_registered, registered
    from inferfleet.config import load

    desk.plane.store.away = True
    found = registered(load(desk.config, {}))
    assert found is not None
    print_registered(found)
    assert "registered workers are unknown" in capsys.readouterr().out
    desk.config.write_text("")
    assert registered(load(desk.config, {})) is None
