"""Ten ways to set a fleet up wrongly: doctor and the start name each in one line, exit 1, no traceback."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from onnx import TensorProto, helper

from inferfleet.models.repository import Repository
from tests.support.fleet import Fleet
from tests.support.servers import KafkaServer, RedisServer

pytestmark = pytest.mark.service


def doubled(width: int = 4) -> bytes:
    """Return an ONNX file: y = x + x, FP32 [n, width]."""
    sides = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ("n", width)) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "g", sides[:1], sides[1:])
    opset = helper.make_opsetid("", 17)
    return helper.make_model(graph, opset_imports=[opset], ir_version=9).SerializeToString()


def add_model(fleet: Fleet, version: str, content: bytes, settings: str | None = None) -> Path:
    """Add a version of the ONNX model and return its file in the repository."""
    file = fleet.folder / "model.onnx"
    file.write_bytes(content)
    return (
        Repository(fleet.folder / "models").add("doubled", version, [file], settings=settings).path
        / file.name
    )


@pytest.fixture(scope="module")
def sound(
    kafka: KafkaServer, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fleet]:
    """A fleet in which nothing is wrong."""
    with Fleet(tmp_path_factory.mktemp("sound"), kafka, redis_server) as made:
        add_model(made, "1", doubled())
        made.route("r", model="doubled", redis=True, partitions=2)
        yield made.prepare()


@pytest.fixture
def fleet(sound: Fleet, tmp_path: Path) -> Fleet:
    """The sound fleet's settings, topics and model once more, in a folder of its own to be spoilt."""
    made = Fleet(tmp_path, sound.kafka, sound.redis)
    made.name = sound.name
    made.settings["fleet"] = {"name": sound.name}
    add_model(made, "1", doubled())
    made.route("r", model="doubled", redis=True, partitions=2)
    made.write()
    return made


def refused(fleet: Fleet, *words: str, doctor: tuple[str, ...] = (), start: bool = True) -> None:
    """Check that doctor fails with exactly one line that holds ``words``, and that the start says so too."""
    examined = fleet.run("doctor", *doctor, code=1)
    failed = [line for line in examined.stdout.splitlines() if line.startswith("FAIL")]
    assert len(failed) == 1, examined.stdout
    said = failed
    if start:
        started = fleet.run("worker", code=1)
        assert len(started.errors) == 1, started.stderr
        assert started.errors[0].startswith("Error: ")
        assert "Traceback" not in started.stderr
        said = failed + started.errors
    print("", *said, sep="\n")
    for line in said:
        missing = [word for word in words if word not in line]
        assert not missing, (missing, line)


def test_a_sound_fleet_passes_and_works(sound: Fleet) -> None:
    """Nothing to say: doctor exits 0 and a worker ends idle with 0."""
    assert "FAIL" not in sound.run("doctor").stdout
    assert sound.launch("w-1", "--until-idle", "0.2").wait() == 0


def test_a_missing_topic(fleet: Fleet) -> None:
    """The topic, what it is for, and what prints the mend."""
    fleet.routes["r"]["source"] = "kafka:nobody.made.this"
    fleet.write()
    output = fleet.run("doctor", code=1).stdout
    started = fleet.run("worker", code=1)

    assert "FAIL  topic nobody.made.this: source of route r: does not exist" in output
    (line,) = started.errors
    assert "nobody.made.this" in line
    assert "source of route r" in line
    assert "topics plan" in line


def test_a_wrong_partition_count(fleet: Fleet) -> None:
    """Doctor compares with the count that was meant; a worker takes what there is."""
    refused(fleet, fleet.source("r"), "2 partitions, expected 6", doctor=("--partitions", "6"), start=False)


def test_an_unknown_key(fleet: Fleet) -> None:
    """The file, the key, and the nearest right one."""
    fleet.settings["worker"]["drain_timeout"] = 5
    fleet.write()
    refused(fleet, "fleet.toml", "drain_timeout", "drain_timeout_s")


def flipped_byte(fleet: Fleet) -> None:
    """Change one byte of the model."""
    file = fleet.folder / "models" / "doubled" / "1" / "model.onnx"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def cut_off(fleet: Fleet) -> None:
    """Add a version that is no ONNX file, with a manifest that says so."""
    add_model(
        fleet,
        "2",
        b"no onnx",
        'input = [{name = "x", datatype = "FP32", shape = [4]}]\n'
        'output = [{name = "y", datatype = "FP32", shape = [4]}]\n',
    )
    fleet.routes["r"]["version"] = "2"
    fleet.write()


def other_shape(fleet: Fleet) -> None:
    """Add a version whose description and file differ in a shape."""
    add_model(
        fleet,
        "2",
        doubled(5),
        'input = [{name = "x", datatype = "FP32", shape = [4]}]\n'
        'output = [{name = "y", datatype = "FP32", shape = [4]}]\n',
    )
    fleet.routes["r"]["version"] = "2"
    fleet.write()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (flipped_byte, ("model doubled version 1", "model.onnx", "manifest.json")),
        (cut_off, ("model doubled version 2",)),
        (other_shape, ("model doubled version 2", "x")),
    ],
)
def test_a_model_that_cannot_be_served(
    fleet: Fleet, spoil: Callable[[Fleet], None], words: tuple[str, ...]
) -> None:
    """A byte that differs, a file that is no model, a shape that does not fit: model, version and what."""
    spoil(fleet)
    refused(fleet, *words)


def test_redis_down(fleet: Fleet) -> None:
    """Doctor names it; a worker starts and waits, because Redis may come back."""
    fleet.settings["redis"]["url"] = "redis://127.0.0.1:1/0"
    fleet.write()
    refused(fleet, "redis", "[redis]", start=False)
    worker = fleet.worker("w-1")
    assert worker.finish() == 0


def test_the_admin_port_is_taken(fleet: Fleet) -> None:
    """The address and the key that changes it."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        fleet.settings["worker"]["admin_address"] = address
        fleet.write()
        refused(fleet, address, "admin_address")


def test_cuda_where_there_is_none(fleet: Fleet) -> None:
    """The device that was asked for, and what there is."""
    fleet.settings["worker"]["device"] = "cuda:7"
    fleet.write()
    refused(fleet, "cuda")


def test_wrong_use_is_two(fleet: Fleet) -> None:
    """An option that does not exist is wrong use: exit 2."""
    done = fleet.run("worker", "--until-bored", "1", code=2)
    assert "--until-bored" in done.stderr


def test_kafka_that_is_not_there(fleet: Fleet) -> None:
    """Doctor says that nothing answers, and which key holds the address."""
    fleet.settings["kafka"]["bootstrap_servers"] = "127.0.0.1:1"
    fleet.write()
    output = fleet.run("doctor", "--no-load", code=1).stdout
    assert any("127.0.0.1:1" in line and "bootstrap_servers" in line for line in output.splitlines())
