"""The bare loop: consume, decode, one model call, encode, produce, in one process, and nothing else.

It is the yardstick beside every figure: what the same client library, codec and model reach when nothing
is routed, validated, confirmed or committed. It loses records on a crash. Run as
``python -m loadtest.bareloop JOB.json``; SIGTERM ends it.
"""

from __future__ import annotations

import gc
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from confluent_kafka import Consumer, Producer

Step = Callable[[list[bytes]], list[bytes]]
"""Request bodies of one batch to answer bodies, in order."""


class Job(msgspec.Struct, frozen=True):
    """One run of the bare loop; ``latency`` takes the first record by ``poll`` and lingers for nothing."""

    workload: str
    bootstrap: str
    requests: str
    results: str
    group: str
    model_folder: str
    batch: int = 500
    latency: bool = False


class Tensor(msgspec.Struct, gc=False):
    """An input or output in the V2 JSON form."""

    name: str
    shape: list[int]
    datatype: str
    data: list[float]


class Request(msgspec.Struct, gc=False):
    """A V2 request with one FP32 input."""

    id: str
    inputs: list[Tensor]


class TextTensor(msgspec.Struct, gc=False):
    """A BYTES input in the V2 JSON form."""

    name: str
    shape: list[int]
    datatype: str
    data: list[str]


class TextRequest(msgspec.Struct, gc=False):
    """A V2 request with one BYTES input."""

    id: str
    inputs: list[TextTensor]


class Answer(msgspec.Struct, gc=False):
    """A V2 response."""

    model_name: str
    model_version: str
    id: str
    outputs: list[Tensor]


def _mlp(folder: Path) -> Any:
    import torch
    from safetensors.torch import load_file

    from loadtest.handlers.mlp import Mlp

    model = Mlp()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    model.eval()
    torch.set_num_threads(1)
    return model


def _answer_encoder(output: str, width: int) -> Callable[[str, list[float]], bytes]:
    encoder = msgspec.json.Encoder()
    tensor = Tensor(output, [1, width], "FP32", [])
    answer = Answer("bare", "1", "", [tensor])

    def encode(request_id: str, row: list[float]) -> bytes:
        answer.id = request_id
        tensor.data = row
        return encoder.encode(answer)

    return encode


def tiny_step(folder: Path) -> Step:
    """Return the step for V2 JSON requests of 32 floats."""
    import torch

    model = _mlp(folder)
    decode = msgspec.json.Decoder(Request).decode
    encode = _answer_encoder("y", 10)
    pack = struct.Struct("<32f").pack

    def step(values: list[bytes]) -> list[bytes]:
        requests = [decode(value) for value in values]
        # struct packs 32 floats three times as fast as numpy turns a list of lists into an array.
        joined = bytearray().join([pack(*request.inputs[0].data) for request in requests])
        with torch.inference_mode():
            rows = model(torch.frombuffer(joined, dtype=torch.float32).view(-1, 32)).tolist()
        return [encode(request.id, row) for request, row in zip(requests, rows, strict=True)]

    return step


def raw_step(folder: Path) -> Step:
    """Return the step for requests that are 32 little-endian floats and answers that are 10."""
    import torch

    model = _mlp(folder)

    def step(values: list[bytes]) -> list[bytes]:
        x = torch.frombuffer(bytearray().join(values), dtype=torch.float32).view(-1, 32)
        with torch.inference_mode():
            joined = model(x).numpy().tobytes()
        return [joined[at : at + 40] for at in range(0, len(joined), 40)]

    return step


def embed_step(folder: Path) -> Step:
    """Return the step for V2 JSON texts: sorted by length, in batches of 8."""
    from loadtest.handlers.embed import Encoder

    model = Encoder(folder)
    decode = msgspec.json.Decoder(TextRequest).decode
    encode = _answer_encoder("embedding", 384)

    def step(values: list[bytes]) -> list[bytes]:
        requests = [decode(value) for value in values]
        tokens = model.tokenize([request.inputs[0].data[0] for request in requests])
        order = sorted(range(len(tokens)), key=lambda at: len(tokens[at]))
        answers = [b""] * len(requests)
        for low in range(0, len(order), 8):
            part = order[low : low + 8]
            rows = model.encode([tokens[at] for at in part]).tolist()
            for at, row in zip(part, rows, strict=True):
                answers[at] = encode(requests[at].id, row)
        return answers

    return step


STEPS: dict[str, Callable[[Path], Step]] = {"tiny": tiny_step, "raw": raw_step, "embed": embed_step}


def _clients(job: Job) -> tuple[Consumer, Producer]:
    consumer = Consumer(
        {
            "bootstrap.servers": job.bootstrap,
            "group.id": job.group,
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "queued.min.messages": 1_000_000,
            "queued.max.messages.kbytes": 262_144,
            "fetch.queue.backoff.ms": 2,
            "fetch.max.bytes": 16_777_216,
            "max.partition.fetch.bytes": 4_194_304,
            "fetch.wait.max.ms": 10,
        }
    )
    producer = Producer(
        {
            "bootstrap.servers": job.bootstrap,
            "partitioner": "murmur2_random",
            "linger.ms": 0 if job.latency else 5,
            "batch.size": 1_000_000,
            "batch.num.messages": 100_000,
            "queue.buffering.max.messages": 10_000_000,
            "queue.buffering.max.kbytes": 1_048_576,
        }
    )
    consumer.subscribe([job.requests])
    return consumer, producer


def run(job: Job) -> None:
    """Loop until SIGTERM or SIGINT."""
    step = STEPS[job.workload](Path(job.model_folder))
    consumer, producer = _clients(job)
    stopping: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda signum, _frame: stopping.append(signum))
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)
    produce, topic, batch = producer.produce, job.results, job.batch
    while not stopping:
        if job.latency:
            first = consumer.poll(0.1)
            messages = [] if first is None else [first, *consumer.consume(batch - 1, 0)]
        else:
            messages = consumer.consume(batch, 0.02)
        if not messages:
            producer.poll(0)
            continue
        answers = step([message.value() for message in messages])
        for message, answer in zip(messages, answers, strict=True):
            produce(topic, answer, message.key())
        producer.poll(0)
    producer.flush(10)
    consumer.close()


if __name__ == "__main__":
    run(msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Job))
