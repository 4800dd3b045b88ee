"""Settings come from variables, then the file, then defaults; what is wrong is named with the mend."""

from __future__ import annotations

import string
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferfleet.config import (
    SECTIONS,
    Config,
    Kafka,
    check_supported,
    dead_letter_topic,
    kafka_client_config,
    load,
    load_with_origins,
    parse,
)
from inferfleet.errors import ConfigError


def refusal(text: str, environ: dict[str, str] | None = None) -> str:
    """Return what the refusal of this document says."""
    with pytest.raises(ConfigError) as caught:
        parse(text, environ)
    said = str(caught.value)
    assert "\n" not in said
    return said


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "fleet.toml").write_text('[fleet]\nname = "one"\n[redis]\npassword_file = "redis.secret"\n')
    (tmp_path / "redis.secret").write_text("first\n")
    return tmp_path


def test_an_empty_document_gives_the_contracts_defaults() -> None:
    """Nothing has to be set."""
    config = parse("")

    assert config == Config()
    assert (config.fleet.name, config.group) == ("inferfleet", "inferfleet.default")
    assert (config.batching.max_batch_size, config.batching.max_queue_delay_ms) == (64, 5)
    assert config.retry.delays_ms == (5_000, 30_000, 300_000)
    assert config.limits.in_flight_bytes == 268_435_456
    assert config.kafka.session_timeout_ms == 6000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[kafak]", 'there is no section [kafak]; did you mean "kafka"?'),
        ("kafka = 1", "kafka must be a section, written [kafka]"),
        ("[kafka]\nbootstrap_server = 'x'", 'no key "bootstrap_server"; did you mean "bootstrap_servers"?'),
        ("[fleet]\nbase = 'x'", 'no key "base"'),
        ("[path]", "there is no section [path]"),
        ("[fleet]\nname = 'x'\n[kafka", "config:3: "),
        ("a =", "config:1: "),
        ("[batching]\nmax_batch_size = 0", "[batching] max_batch_size is 0, must be a whole number >= 1"),
        ("[batching]\nmax_batch_size = '8'", 'max_batch_size is "8", must be a whole number >= 1'),
        ("[batching]\nmax_batch_size = true", "max_batch_size is true, must be a whole number"),
        ("[worker]\nguarantee = 'exactly'", 'must be one of "at_least_once", "exactly_once"'),
        ("[worker]\ndevice = 'gpu'", 'must be "auto", "cpu", "cuda" or "cuda:1"'),
        ("[worker]\nadmin_address = '8471'", 'must be an address such as "127.0.0.1:8471"'),
        ("[fleet]\nname = 'Up'", "must be a name of small letters"),
        ('[fleet]\nname = "a\\n"', "must be a name of small letters"),
        ("[retry]\ndelays_ms = [0]", "must be a list, each of it a whole number >= 1"),
        ("[brake]\nshare = 2.0", "must be a number > 0 and <= 1"),
        ("[kafka]\nstart = 'x'", 'must be "earliest", "latest" or a timestamp'),
        ("[names]\ndlt = '{source}'", 'needs "{group}"'),
        ("[names]\nretry = '{source}.{group}.{mss}'", 'has no field "{mss}"; did you mean "ms"?'),
        ("[dlt]\ninclude = ['E_DEADLIN']", 'did you mean "E_DEADLINE"?'),
        ("[redis]\nmode = 'sentinel'", "needs nodes and sentinel_master"),
        ("[redis]\nurl = 'localhost'", "[redis] url must start with redis://"),
        ("[kafka.client]\n'group.id' = 'x'", '"group.id" is inferfleet\'s own; set [kafka] group instead'),
        ("[kafka.consumer]\n'enable.auto.commit' = true", "is inferfleet's own"),
        ("[kafka.producer]\nenable.idempotence = false", "is inferfleet's own"),
        ("[kafka.client]\n'bootstrap.servers' = 'x'", "set [kafka] bootstrap_servers instead"),
        ("[kafka.client]\nx = [1]", '"x" must be a text, a number or a bool'),
        ("[kafka]\nclient = 'x'", "client must be a table of properties"),
        ("[redis]\npassword = 5", "[redis] password is a secret, must be a text"),
        ("[redis]\npassword = 'x'\npassword_file = 'y'", "has both password and password_file; keep one"),
        ("[redis]\npassword_file = 'absent'", "password_file: absent does not exist"),
        ("[batching]\nmax_batch_size_file = 'x'", 'no key "max_batch_size_file"'),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_in_one_line(text: str, said: str) -> None:
    """Every refusal names the key and, where known, the mend."""
    assert said in refusal(text)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("INFERFLEET__BATCHING__MAX_BATCH", "1", 'did you mean "INFERFLEET__BATCHING__MAX_BATCH_SIZE"?'),
        ("INFERFLEET__BATCHING", "1", "names no setting"),
        ("INFERFLEET__NOTHING__HERE", "1", "names no setting"),
        ("INFERFLEET__BATCHING__MAX_BATCH_SIZE", "many", "INFERFLEET__BATCHING__MAX_BATCH_SIZE: [batching]"),
        ("INFERFLEET__KAFKA__CLIENT__GROUP_ID", "x", "is inferfleet's own"),
        ("INFERFLEET__KAFKA__CLIENT", "x", "must be a table of properties"),
        ("INFERFLEET__RETRY__DELAYS_MS", "[1", "[retry] delays_ms"),
    ],
)
def test_a_wrong_variable_is_named(name: str, value: str, said: str) -> None:
    """A variable that is none of ours in our own namespace is an error, not silence."""
    assert said in refusal("", {name: value})


@pytest.mark.parametrize(
    ("name", "value", "key", "expected"),
    [
        ("BATCHING__MAX_QUEUE_DELAY_MS", "2.5", "batching.max_queue_delay_ms", 2.5),
        ("BATCHING__MAX_BATCH_SIZE", "8", "batching.max_batch_size", 8),
        ("KAFKA__STATIC_MEMBERSHIP", "true", "kafka.static_membership", True),
        ("MODELS__TRUSTED", "a, b", "models.trusted", ("a", "b")),
        ("MODELS__TRUSTED", '["a,b"]', "models.trusted", ("a,b",)),
        ("RETRY__DELAYS_MS", "1,2", "retry.delays_ms", (1, 2)),
        ("CONTROL__URL", "redis://c/1", "control.url", "redis://c/1"),
        ("REDIS__PASSWORD", "123", "redis.password", "123"),
        ("KAFKA__START", "latest", "kafka.start", "latest"),
    ],
)
def test_a_variable_is_read_as_its_keys_type(name: str, value: str, key: str, expected: object) -> None:
    """Text from the environment becomes what the key takes."""
    section, attribute = key.split(".")

    assert getattr(getattr(parse("", {f"INFERFLEET__{name}": value}), section), attribute) == expected


def test_librdkafka_properties_may_be_quoted_nested_or_variables() -> None:
    """All three spellings give the same dotted name; a variable is stronger than the file."""
    text = "[kafka.client]\n'security.protocol' = 'SSL'\nssl.ca.location = 'ca'\nretries = 3\nx.y = true"
    config = parse(text, {"INFERFLEET__KAFKA__CLIENT__SECURITY_PROTOCOL": "SASL_SSL"})

    assert config.kafka.client == {
        "security.protocol": "SASL_SSL", "ssl.ca.location": "ca", "retries": "3", "x.y": "true",
    }  # fmt: skip


def test_properties_with_an_underscore_of_their_own_can_be_variables() -> None:
    """ssl_ca is no ssl.ca."""
    config = parse("", {"INFERFLEET__KAFKA__CLIENT__SSL_CA": "pem"})

    assert config.kafka.client == {"ssl_ca": "pem"}


def test_a_secret_file_is_read_and_read_again(folder: Path) -> None:
    """current() sees what the file holds now; the loaded value stays as it was."""
    config = load(folder / "fleet.toml", {})
    (folder / "redis.secret").write_text("second")

    assert config.redis.password == "first"
    assert config.current("redis.password") == "second"
    assert config.current("redis.url") == "redis://localhost:6379/0"


def test_a_secret_property_can_come_from_a_file(folder: Path) -> None:
    """A client property has a _file sibling too, in the file and as a variable."""
    (folder / "fleet.toml").write_text('[kafka.client]\n"sasl.password_file" = "redis.secret"\n')
    from_file = load(folder / "fleet.toml", {})
    (folder / "fleet.toml").write_text("")
    environ = {"INFERFLEET__KAFKA__CLIENT__SASL_PASSWORD_FILE": str(folder / "redis.secret")}
    from_variable = load(folder / "fleet.toml", environ)

    assert kafka_client_config(from_file)["sasl.password"] == "first"
    assert kafka_client_config(from_variable)["sasl.password"] == "first"
    assert from_variable.current("kafka.client.sasl.password") == "first"


def test_a_variable_replaces_the_other_spelling_of_the_file(folder: Path) -> None:
    """PASSWORD given as a variable wins over password_file in the file, and is not read from it."""
    config, origins = load_with_origins(folder / "fleet.toml", {"INFERFLEET__REDIS__PASSWORD": "own"})

    assert config.redis.password == config.current("redis.password") == "own"
    assert origins["redis.password"] == "INFERFLEET__REDIS__PASSWORD"


def test_every_key_has_an_origin(folder: Path) -> None:
    """Each value says default, the file, a variable, or the secret's file."""
    environ = {"INFERFLEET__LOG__LEVEL": "debug", "INFERFLEET__KAFKA__CLIENT__SASL_USERNAME": "u"}
    config, origins = load_with_origins(folder / "fleet.toml", environ)
    file = str(folder / "fleet.toml")

    assert origins["fleet.name"] == file
    assert origins["log.level"] == "INFERFLEET__LOG__LEVEL"
    assert origins["kafka.client.sasl.username"] == "INFERFLEET__KAFKA__CLIENT__SASL_USERNAME"
    assert origins["redis.password"] == f"{file} (password_file = redis.secret)"
    assert origins["batching.max_batch_size"] == "default"
    for name in SECTIONS:
        section = getattr(config, name)
        for key in section.__struct_fields__ if section is not None else ():
            assert isinstance(getattr(section, key), dict) or f"{name}.{key}" in origins


def test_the_file_is_found_by_argument_variable_or_place(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--config, else $INFERFLEET_CONFIG, else ./fleet.toml; none of them is an error that says so."""
    (folder / "other.toml").write_text('[fleet]\nname = "two"')
    monkeypatch.chdir(folder)

    assert load(Path("other.toml"), {"INFERFLEET_CONFIG": "fleet.toml"}).fleet.name == "two"
    assert load(None, {"INFERFLEET_CONFIG": "other.toml"}).fleet.name == "two"
    assert load(None, {}).fleet.name == "one"
    with pytest.raises(ConfigError, match=r"config file .* cannot be read: File name too long"):
        load(Path("x" * 300) / "fleet.toml", {})
    with pytest.raises(ConfigError, match=r"config file absent.toml does not exist$"):
        load(Path("absent.toml"), {})
    (folder / "fleet.toml").unlink()
    with pytest.raises(ConfigError, match=r"does not exist: name yours by --config or .*, or write one"):
        load(None, {})


def test_relative_paths_start_at_the_files_folder(folder: Path) -> None:
    """Models and routes are looked for beside the file, wherever the process was started."""
    config = load(folder / "fleet.toml", {})

    assert config.base == folder
    assert config.models_path == folder / "models"
    assert config.routes_path == folder / "routes.toml"
    assert parse("[models]\nrepository = '/m'").models_path == Path("/m")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[worker]\nguarantee = 'exactly_once'", "does not exist yet"),
    ],
)
def test_what_does_not_exist_yet_is_refused_at_start(text: str, said: str) -> None:
    """The contract's later parts parse and are refused with what to use instead."""
    with pytest.raises(ConfigError, match=said):
        check_supported(parse(text))
    check_supported(Config())


def test_secrets_never_show() -> None:
    """repr masks them wherever they stand, and lists them for the log's mask."""
    config = parse(
        "[redis]\nurl = 'redis://u:canary1@h/0'\npassword = 'canary2'\n[rabbitmq]\npassword = 'canary3'\n"
        "[kafka.client]\n'sasl.password' = 'canary4'\n'ssl.key.pem' = 'canary5'\n'sasl.username' = 'visible'"
    )

    assert "canary" not in repr(config)
    assert "visible" in repr(config)
    assert {"canary2", "canary3", "canary4", "canary5"} <= config.secrets


def test_switching_verification_off_needs_the_word_insecure() -> None:
    """TLS without a check of the name or the chain is refused, unless it is meant."""
    text = "[kafka.client]\n'ssl.endpoint.identification.algorithm' = 'none'"

    assert "insecure = true" in refusal(text)
    assert "insecure = true" in refusal("[kafka.client]\n'enable.ssl.certificate.verification' = false")
    assert parse(f"[kafka]\ninsecure = true\n{text}").kafka.insecure


def test_names_derive_from_fleet_pool_and_template() -> None:
    """Groups and dead letters follow the contract, a template changes them."""
    config = parse("[fleet]\nname = 'f'\n[worker]\npool = 'p'\n[names]\ndlt = 'dead.{source}.{group}'")

    assert config.group == "f.p"
    assert config.group_of("q") == "f.q"
    assert dead_letter_topic(Config(), "t") == "t.inferfleet.default.dlt"
    assert dead_letter_topic(config, "t", "g") == "dead.t.g"
    assert parse("[kafka]\ngroup = 'mine'").group == "mine"


def test_the_client_configuration_is_quiet_unless_debugging() -> None:
    """librdkafka's log goes to standard error: only with its own debug property."""
    assert kafka_client_config(Config())["log_level"] == 2
    assert "log_level" not in kafka_client_config(parse("[kafka.client]\ndebug = 'broker'"))
    assert kafka_client_config(parse("[worker]\nid = 'w-1'"))["client.id"] == "w-1"


def test_a_start_may_be_an_instant() -> None:
    """A TOML timestamp and a text give the same epoch milliseconds; without a zone it is UTC."""
    written = parse("[kafka]\nstart = 2026-11-01T00:00:00Z").kafka

    assert (
        written.start_timestamp_ms == Kafka(start="2026-11-01T00:00:00").start_timestamp_ms == 1793491200000
    )
    assert Kafka().start_timestamp_ms is None


@given(st.text(alphabet=string.ascii_letters + string.digits + "-_.\n", max_size=70))
def test_names_have_one_alphabet(name: str) -> None:
    """A fleet's name is accepted exactly if it fits the contract's pattern."""
    good = (
        0 < len(name) <= 63
        and set(name) <= set(string.ascii_lowercase + string.digits + "-")
        and name[0] != "-"
    )
    try:
        config = parse("", {"INFERFLEET__FLEET__NAME": name})
    except ConfigError:
        assert not good
    else:
        assert good
        assert config.fleet.name == name


@given(st.text(max_size=200))
def test_any_document_is_read_or_refused(text: str) -> None:
    """Whatever stands in the file, the outcome is settings or one line."""
    try:
        parse(text)
    except ConfigError as error:
        said = str(error)
    else:
        said = "config"

    assert said.startswith("config")
