"""The operator's verbs: what is planned, judged and shown; brokers here are librdkafka's embedded one."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from confluent_kafka import KafkaError, Producer
from confluent_kafka.admin import ResourcePatternType

from inferfleet.cli import cli, kafka
from inferfleet.cli.deadletters import DeadLetter, failed_at
from inferfleet.cli.dlt import clean
from inferfleet.cli.examination import judge_count
from inferfleet.cli.kafka import Position, explained
from inferfleet.cli.topology import Principals, Right, plan_rights, plan_topics
from inferfleet.config import Config, parse
from inferfleet.routes import parse_routes
from tests.support.acls import parse_acls

ROUTES = """
[[route]]
name = "digits"
source = "kafka:digits.requests"
results = ["kafka:shared.results", "redis"]
model = "digits"
version = "1"
[[route]]
name = "files"
source = "kafka:files.requests"
results = ["kafka:shared.results"]
model = "files"
version = "1"
pool = "slow"
"""
WHO = Principals("User:w", "User:c", "User:o")
GROUP = "digits.requests.inferfleet.default"
RETRIES = [f"{GROUP}.retry.{delay}" for delay in (5000, 30000, 300000)]
DERIVED = [f"{GROUP}.dlt", *RETRIES]


@pytest.fixture(scope="module")
def broker() -> Iterator[str]:
    """The address of an embedded broker; topics appear when they are written to."""
    producer = Producer({"test.mock.num.brokers": 1, "bootstrap.servers": "unused", "log_level": 0})
    (found,) = producer.list_topics(timeout=10).brokers.values()
    address = f"{found.host}:{found.port}"
    for topic in ("digits.requests", "shared.results", *DERIVED):
        headers = [("inferfleet-code", b"E_SHAPE"), ("inferfleet-id", b"r-1")]
        producer.produce(topic, b"{}", headers=headers)
    assert producer.flush(10) == 0
    yield address
    producer.flush(1)


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    (tmp_path / "fleet.toml").write_text('[worker]\nadmin_address = "127.0.0.1:0"\n')
    (tmp_path / "routes.toml").write_text(ROUTES)
    return tmp_path / "fleet.toml"


def run(fleet: Path, *arguments: str, broker: str = "127.0.0.1:1", code: int = 0) -> Result:
    env = {"INFERFLEET__KAFKA__BOOTSTRAP_SERVERS": broker}
    result = CliRunner().invoke(cli, ["--config", str(fleet), *arguments], env=env)
    assert result.exit_code == code, result.output
    return result


def test_each_topic_is_planned_once_with_all_its_roles() -> None:
    """A shared results topic is one topic; each pool has dead letters and retries of its own."""
    routes = parse_routes(ROUTES, "inferfleet", "x").routes
    planned = plan_topics(Config(), routes, 6, 3)

    assert [(each.name, each.roles, each.routes, each.partitions, each.replication) for each in planned] == [
        ("digits.requests", ("source",), ("digits",), 6, 3),
        ("shared.results", ("results",), ("digits", "files"), 6, 3),
        ("digits.requests.inferfleet.default.dlt", ("dead letters",), ("digits",), 1, 3),
        *((name, ("retries",), ("digits",), 1, 3) for name in RETRIES),
        ("files.requests", ("source",), ("files",), 6, 3),
        ("files.requests.inferfleet.slow.dlt", ("dead letters",), ("files",), 1, 3),
        *(
            (name.replace("digits", "files").replace("default", "slow"), ("retries",), ("files",), 1, 3)
            for name in RETRIES
        ),
    ]


def test_a_worker_gets_exactly_what_it_needs() -> None:
    """Read the sources and its groups, write results and dead letters, both for retries, nothing else."""
    routes = parse_routes(ROUTES, "inferfleet", "x").routes[:1]
    rights = plan_rights(Config(), routes, WHO)

    assert [each for each in rights if each.principal == "User:w"] == [
        Right("User:w", "topic", "digits.requests", "Read"),
        Right("User:w", "topic", "shared.results", "Write"),
        Right("User:w", "topic", "digits.requests.inferfleet.default.dlt", "Write"),
        *(Right("User:w", "topic", name, operation) for name in RETRIES for operation in ("Read", "Write")),
        Right("User:w", "group", "inferfleet.default", "Read"),
        Right("User:w", "group", "inferfleet.default.retry", "Read"),
    ]
    written = {each.name for each in rights if (each.principal, each.operation) == ("User:o", "Write")}
    assert written == {*DERIVED, "inferfleet.default.digits.redrive"}  # by redrive
    read = {each.name for each in rights if (each.principal, each.operation) == ("User:o", "Read")}
    assert read == set(DERIVED)  # by dlt, and by status where transactions end
    assert len(set(rights)) == len(rights)


def test_the_acl_lines_mean_the_planned_rights(fleet: Path) -> None:
    """What is printed parses to as many rules; only the clients' group is a prefix."""
    printed = run(fleet, "topics", "plan", "--format", "acls", "--principal", "User:o'brien").stdout
    rules = parse_acls(printed)
    plain = json.loads(run(fleet, "topics", "plan", "--json").stdout)

    assert len(rules) == len(plain["rights"]) == len(printed.splitlines())
    assert "User:o'brien" in {each.principal for each in rules}
    prefixed = [each.name for each in rules if each.resource_pattern_type == ResourcePatternType.PREFIXED]
    assert prefixed == ["inferfleet.client."]


def test_secured_clusters_get_an_administrators_file(fleet: Path) -> None:
    """The lines for a cluster with a login say where the administrator's credentials go."""
    fleet.write_text('[kafka.client]\n"security.protocol" = "SASL_SSL"\n')

    for form in ("sh", "acls"):
        for line in run(fleet, "topics", "plan", "--format", form).stdout.splitlines():
            assert shlex.split(line)[3:5] == ["--command-config", "admin.properties"]


def test_the_other_forms_name_every_topic(fleet: Path) -> None:
    """text, sh and strimzi hold the same topics."""
    names = [each["name"] for each in json.loads(run(fleet, "topics", "plan", "--json").stdout)["topics"]]
    for form in ("text", "sh", "strimzi"):
        printed = run(fleet, "topics", "plan", "--format", form).stdout
        assert all(name in printed for name in names)
    assert run(fleet, "topics", "plan", "--format", "strimzi").stdout.count("kind: KafkaTopic") == len(names)


def test_one_route_can_be_planned_alone(fleet: Path) -> None:
    """Named routes only; an unknown one is refused; creating goes with text or json."""
    assert "files" not in run(fleet, "topics", "plan", "digits").stdout
    assert 'did you mean "digits"' in run(fleet, "topics", "plan", "digit", code=1).stderr
    run(fleet, "topics", "plan", "--apply", "--format", "sh", code=2)


def test_topics_that_stand_are_left_alone(fleet: Path, broker: str) -> None:
    """--apply with nothing missing changes nothing."""
    rows = json.loads(run(fleet, "topics", "plan", "digits", "--apply", "--json", broker=broker).stdout)

    assert {row["outcome"] for row in rows} == {"stood"}


def test_an_embedded_broker_says_that_it_creates_nothing(
    fleet: Path, broker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no controller to wait for; the error names the demo that has one."""
    monkeypatch.setattr(kafka, "CONTROLLER_S", 0.0)
    said = run(fleet, "topics", "plan", "files", "--apply", broker=broker, code=1).stderr

    assert said.count("\n") == 1
    assert "topic files.requests was not created" in said
    assert f"Kafka {broker} has no controller; an embedded broker creates no topics" in said
    assert "--real-kafka" in said


@pytest.mark.parametrize(
    ("role", "count", "source_count", "expected", "order", "verdict"),
    [
        ("source", 6, 6, None, "none", "ok"),
        ("source", 1, 1, None, "none", "warn"),
        ("source", 4, 4, 6, "none", "FAIL"),
        ("source", 6, 6, 6, "none", "ok"),
        ("results", 6, 6, 6, "none", "ok"),
        ("results", 3, 6, None, "none", "warn"),
        ("results", 3, 6, None, "key", "FAIL"),
        ("results", 3, 0, None, "none", "ok"),
        ("dead letters", 1, 6, 6, "key", "ok"),
    ],
)
def test_partition_counts_are_judged(
    role: str, count: int, source_count: int, expected: int | None, order: str, verdict: str
) -> None:
    """A count is wrong against what was said or promised, surprising where keys move to other numbers."""
    text = ROUTES.replace('version = "1"\n', f'version = "1"\norder = "{order}"\n')
    route = parse_routes(text, "f", "x").routes[0]

    assert judge_count("topic t", role, route, count, source_count, expected).verdict == verdict  # type: ignore[arg-type]


def test_doctor_stops_at_settings_that_cannot_be_read(fleet: Path) -> None:
    """Without settings nothing else can be looked at."""
    fleet.write_text("[worker]\nguarantee = 'exactly_once'")
    findings = json.loads(run(fleet, "doctor", "--json", code=1).stdout)

    assert [(each["name"], each["verdict"]) for each in findings] == [("config", "FAIL")]
    assert "does not exist yet" in findings[0]["text"]


def test_doctor_looks_on_past_a_failure(fleet: Path, broker: str) -> None:
    """A broker without groups, a Redis that is away and models that are missing: a line each."""
    fleet.write_text('[redis]\nurl = "redis://127.0.0.1:1/0"\n[worker]\nadmin_address = "127.0.0.1:0"\n')
    output = run(fleet, "doctor", broker=broker, code=1).stdout
    verdicts = {line[6:].partition(": ")[0]: line[:4].strip() for line in output.splitlines()}

    assert verdicts == {
        "config": "ok",
        "routes": "ok",
        "kafka": "ok",
        "topic digits.requests": "ok",
        "topic shared.results": "ok",
        **dict.fromkeys((f"topic {name}" for name in DERIVED), "ok"),
        "group inferfleet.default": "warn",
        "group inferfleet.default.retry": "warn",
        "redis": "FAIL",
        "model digits version 1": "FAIL",
        "admin": "ok",
    }


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (('pool = "slow"', 'pool = "default"\norder = "key"'), 'order = "key" does not exist yet'),
        (('"1"', '"latest"'), 'name the number, such as "1"'),
    ],
)
def test_doctor_names_what_a_worker_would_refuse(
    fleet: Path, broker: str, change: tuple[str, str], said: str
) -> None:
    """Routes are judged as the worker's start judges them."""
    fleet.with_name("routes.toml").write_text(ROUTES.replace(*change))
    findings = json.loads(run(fleet, "doctor", "--json", broker=broker, code=1).stdout)

    assert said in next(each["text"] for each in findings if each["name"] == "routes")


def test_a_taken_admin_port_is_named(fleet: Path, broker: str) -> None:
    """Somebody else's port is a FAIL, one's own worker there a warning."""
    from prometheus_client import CollectorRegistry

    from inferfleet.telemetry.admin import AdminServer, Health, WorkerStatus

    status = WorkerStatus(worker="w-1", group="inferfleet.default")
    admin = ("127.0.0.1:0", CollectorRegistry(), lambda: Health(True, True))
    for server, verdict, said in (
        (AdminServer(*admin), "FAIL", "Address already in use"),
        (AdminServer(*admin, lambda: status), "warn", "worker w-1 of this fleet runs there"),
    ):
        with server:
            fleet.write_text(f'[worker]\nadmin_address = "{server.address}"\n')
            findings = json.loads(run(fleet, "doctor", "--json", broker=broker, code=1).stdout)
        found = next(each for each in findings if each["name"] == "admin")
        assert found["verdict"] == verdict
        assert said in found["text"]


def test_status_says_what_an_embedded_broker_cannot_tell(fleet: Path, broker: str) -> None:
    """No members, but lag; a missing source and an absent worker are a line each; still exit 0."""
    pools = json.loads(run(fleet, "status", "--json", broker=broker).stdout)["pools"]
    text = run(fleet, "status", "--admin", "127.0.0.1:1", broker=broker).stdout

    assert "cannot be described" in pools[0]["note"]
    assert (pools[0]["state"], pools[0]["lag"]) == ("unknown", 1)
    assert {each["holder"] for each in pools[0]["partitions"]} == {"?"}
    assert "topic files.requests does not exist" in pools[1]["note"]
    assert "no worker answers at 127.0.0.1:1" in text


def test_dead_letters_can_be_read_from_an_embedded_broker(fleet: Path, broker: str) -> None:
    """Empty partitions beside the one that holds the record do not hold it up."""
    (found,) = json.loads(run(fleet, "dlt", "list", "digits", "--json", broker=broker).stdout)
    place = f"{found['partition']}:{found['offset']}"

    assert found["body"] == "{}"
    assert "inferfleet-code: E_SHAPE" in run(fleet, "dlt", "show", "digits", place, broker=broker).stdout
    assert (
        "has the partitions 0 to" in run(fleet, "dlt", "show", "digits", "99:0", broker=broker, code=1).stderr
    )
    run(fleet, "dlt", "show", "digits", place, "--raw", "--json", code=2)
    assert "did you mean" in run(fleet, "dlt", "list", "digits", "--code", "E_SHAP", code=2).stderr


def letter(
    headers: list[tuple[str, bytes | None]], body: bytes = b"", key: bytes | None = None
) -> DeadLetter:
    return DeadLetter("t.dlt", 0, 5, key, body, tuple(headers))


def test_our_headers_stand_behind_the_callers() -> None:
    """A caller cannot fake a code or an origin; its id is its own, the first one."""
    forged = letter(
        [
            ("inferfleet-id", b"a"),
            ("inferfleet-id", b"b"),
            ("inferfleet-code", b"fake"),
            ("Inferfleet-Code", b"E_ID"),
        ]
    )

    assert (forged.id, forged.header("inferfleet-code"), forged.header("absent")) == ("a", "E_ID", "")


def test_without_an_id_the_place_names_the_request() -> None:
    """The id that a record without one has: topic, partition, offset."""
    origin = [
        (f"inferfleet-origin-{n}", v) for n, v in (("topic", b"t"), ("partition", b"2"), ("offset", b"7"))
    ]

    assert letter(origin).id == "t-2-7"
    assert letter(origin).origin == "t[2]@7"
    assert (letter([]).id, letter([]).origin) == ("", "")


def test_bytes_that_are_no_text_are_base64_under_their_own_name() -> None:
    """JSON loses nothing: the name says how to read the value."""
    plain = letter([("h", None), ("x", b"\xff")], b"\xfe", b"k").as_plain()

    assert plain["key"] == "k"
    assert plain["body_base64"] == "/g=="
    assert plain["headers"] == [{"name": "h", "value": None}, {"name": "x", "value_base64": "/w=="}]


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (b"1790000000000", "2026-09-21T14:13:20.000+00:00"),
        (b"2026-01-01", "2026-01-01"),
        (b"9" * 30, "9" * 30),
        (b"", ""),
    ],
)
def test_the_time_of_failure_is_readable(header: bytes, said: str) -> None:
    """Epoch milliseconds become ISO 8601; anything else stays what it is."""
    assert failed_at(letter([("inferfleet-failed-at", header)])) == said


def test_what_strangers_wrote_cannot_steer_a_terminal() -> None:
    """Controls are replaced, line ends and tabs of a body stay."""
    assert clean("a\x1b[2J\r\x9bb\n\tc") == "a�[2J��b\n\tc"


@pytest.mark.parametrize(
    ("committed", "low", "end", "lag"), [(None, 5, 20, 15), (10, 5, 20, 10), (2, 5, 20, 15), (20, 20, 20, 0)]
)
def test_lag_counts_what_is_still_there(committed: int | None, low: int, end: int, lag: int) -> None:
    """Records that retention has removed are no lag."""
    assert Position("t", 0, committed, low, end).lag == lag


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (KafkaError._AUTHENTICATION, "refused the login"),
        (KafkaError.SASL_AUTHENTICATION_FAILED, "check sasl.username"),
        (KafkaError._SSL, "check ssl.ca.location"),
        (KafkaError._TRANSPORT, "check [kafka] bootstrap_servers"),
        (KafkaError.TOPIC_EXCEPTION, "Kafka h:1: "),
    ],
)
def test_a_failure_names_what_to_look_at(code: int, said: str) -> None:
    """Login, TLS and absence have different mends."""
    assert said in str(explained("h:1", KafkaError(code)))


def test_a_property_that_librdkafka_does_not_know_is_named(fleet: Path) -> None:
    """A typo under [kafka.client] is the settings' fault, not the broker's."""
    fleet.write_text('[kafka.client]\n"sasl.passwort" = "x"\n')
    said = run(fleet, "status", code=1).stderr

    assert f"{fleet}: [kafka.client]" in said
    assert "sasl.passwort" in said


def test_the_group_may_be_named_by_hand() -> None:
    """kafka.group goes into dead letters and rights alike."""
    config = parse("[kafka]\ngroup = 'mine'")
    routes = parse_routes(ROUTES, "inferfleet", "x").routes[:1]
    rights = plan_rights(config, routes, WHO)

    groups = {each.name for each in rights if each.resource == "group"}
    assert groups == {"mine", "mine.retry", "inferfleet.client."}
    names = [each.name for each in plan_topics(config, routes, 1, 1)]
    assert names[-4:-2] == ["digits.requests.mine.dlt", "digits.requests.mine.retry.5000"]
