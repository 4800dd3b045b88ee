"""The pods of ``deploy/kubernetes`` as processes on real servers: their own settings, calls, TLS."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import redis
from onnx import TensorProto, helper, numpy_helper

from tests.support.certificates import Certificates, write_certificates
from tests.support.fleet import COMMAND
from tests.support.manifest_pods import SECRETS, commands
from tests.support.manifests import Rendered, Workload, render
from tests.support.servers import KafkaServer, RedisServer

pytestmark = pytest.mark.service

PASSWORD = "valkey-secret"


class TlsFront:
    """Ends TLS before a plain server on loopback, on a thread of its own: not every Valkey can do TLS."""

    def __init__(self, behind: int, certificates: Certificates) -> None:
        self._behind = behind
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self._context.load_cert_chain(certificates.chain, certificates.key)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tls-front", daemon=True)
        self._thread.start()
        self._server = asyncio.run_coroutine_threadsafe(self._open(), self._loop).result(10)
        self.port: int = self._server.sockets[0].getsockname()[1]

    async def _open(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner, outer = await asyncio.open_connection("127.0.0.1", self._behind)
        async with asyncio.TaskGroup() as both:
            both.create_task(self._copy(reader, outer))
            both.create_task(self._copy(inner, writer))

    @staticmethod
    async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65_536):
                sink.write(data)
                await sink.drain()
        sink.close()

    def close(self) -> None:
        """Let nobody in any more, and end what goes on."""
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _stop(self) -> None:
        self._server.close()
        running = [each for each in asyncio.all_tasks() if each is not asyncio.current_task()]
        for each in running:
            each.cancel()
        await asyncio.gather(*running, return_exceptions=True)


@pytest.fixture
def secure_redis(secure_kafka: KafkaServer, tmp_path: Path) -> Iterator[RedisServer]:
    """A server with a password behind TLS; its URL is that of the front, its port the plain one."""
    assert secure_kafka.certificates is not None
    with RedisServer(tmp_path / "redis", config=["--requirepass", PASSWORD]) as server:
        front = TlsFront(server.port, secure_kafka.certificates)
        server.url = f"rediss://localhost:{front.port}/0"
        yield server
        front.close()


def digits_model(file: Path) -> Path:
    """Write an ONNX model of 64 numbers in and 10 out."""
    shape = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["image", "w"], ["scores"])],
        "digits",
        [shape("image", TensorProto.FLOAT, ["n", 64])],
        [shape("scores", TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array(np.ones((64, 10), np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    file.write_bytes(model.SerializeToString())
    return file


class Pods:
    """Lays out what pods mount, with the addresses of this machine's servers, and runs their commands."""

    def __init__(self, rendered: Rendered, root: Path, kafka: KafkaServer, server: RedisServer) -> None:
        assert kafka.certificates is not None
        self._rendered, self._root = rendered, root
        self.secret = {
            "kafka-username": "admin",
            "kafka-password": kafka.users["admin"],
            "redis-username": "default",
            "redis-password": PASSWORD,
            "ca.crt": kafka.certificates.authority.read_text(),
        }
        self._here = {
            "kafka-bootstrap.kafka.svc:9093": kafka.bootstrap_servers,
            "rediss://valkey.valkey.svc:6380/0": server.url,
            "0.0.0.0:8471": "127.0.0.1:0",
            '"/models"': f'"{root}/models"',
            '"/var/lib': f'"{root}/var/lib',
            SECRETS: f"{root}{SECRETS}",
        }

    def environment(self, workload: Workload) -> dict[str, str]:
        """Write what a pod finds, and return its variables."""
        for path, volume in workload.mounted().items():
            place = self._root / path.lstrip("/")
            place.mkdir(parents=True, exist_ok=True)
            if "configMap" in volume:
                for name, text in self._rendered.data(workload, path).items():
                    for there, here in self._here.items():
                        assert name != "fleet.toml" or there in text, there
                        text = text.replace(there, here)
                    (place / name).write_text(text)
            elif "secret" in volume:
                for name, text in self.secret.items():
                    (place / name).write_text(text)
        return {name: f"{self._root}{value}" for name, value in workload.environment.items()}

    def run(self, workload: Workload, arguments: list[str], code: int = 0) -> str:
        """Run ``inferfleet`` with a pod's files to its end and check the exit code; return what it said."""
        env = {**os.environ, **self.environment(workload)}
        command = [*COMMAND, *arguments]
        done = subprocess.run(
            command, cwd=self._root, env=env, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == code, (arguments, done.stdout, done.stderr)
        return done.stdout + done.stderr


def page_calls(root: Path, model: Path) -> list[list[str]]:
    """Return the calls of ``inferfleet`` that the page makes in the toolbox, with this machine's paths."""
    found = []
    for words in commands():
        if "deploy/toolbox" in words and "inferfleet" in words[4:]:
            call = words[words.index("inferfleet", 4) + 1 :]
            call = [f"{root}{word}" if word.startswith("/etc/") else word for word in call]
            found.append([str(model) if word == "/tmp/model.onnx" else word for word in call])
    return found


def test_the_pages_way_from_nothing_to_an_answer(
    secure_kafka: KafkaServer, secure_redis: RedisServer, tmp_path: Path
) -> None:
    """Topics, model and routes by the page's calls; then a job's own command answers all and ends."""
    rendered, root = render("overlays/job"), tmp_path / "pod"
    pods = Pods(rendered, root, secure_kafka, secure_redis)
    toolbox, job = rendered.workload("toolbox"), rendered.workload("worker")
    for call in page_calls(root, digits_model(tmp_path / "model.onnx")):
        # One broker: it can keep one replica.
        pods.run(toolbox, [*call, "--replication", "1"] if "topics" in call else call)
    pods.run(toolbox, ["submit", "digits", "--sample", "200"])

    arguments = job.container["args"]
    assert arguments[-2] == "--until-idle"
    pods.run(job, [*arguments[:-1], "1"])

    with redis.Redis(port=secure_redis.port, password=PASSWORD) as client:
        assert sum(1 for _ in client.scan_iter("inferfleet:result:digits:*", count=1000)) == 200

    # It was TLS with a check of who answers: another authority is not believed.
    pods.secret["ca.crt"] = write_certificates(tmp_path / "other").authority.read_text()
    assert "certificate" in pods.run(toolbox, ["route", "list"], code=1).lower()
