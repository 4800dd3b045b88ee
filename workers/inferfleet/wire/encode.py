"""Answers and errors to bodies and headers: columns in, columns out.

A JSON answer is one text around two varying parts, the id and the data; the text is made once per version
and shape, and the data of a whole part is written by one encoder call and cut at the row borders.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from inferfleet.datatypes import bf16_to_fp32
from inferfleet.errors import RULES, Code
from inferfleet.records import Answer, Array, Header, Requests, Served, Signature, TensorSpec
from inferfleet.trace_context import headers_of_trace
from inferfleet.wire import headers as names

_ENCODER = msgspec.json.Encoder()
_encode = _ENCODER.encode
_WIDENED = ("FP16", "BF16")

STATUS_OK: Header = (names.STATUS, b"ok")
STATUS_ERROR: Header = (names.STATUS, b"error")
_OCTETS: Header = (names.CONTENT_TYPE, b"application/octet-stream")


def error_body(text: str, code: Code, request_id: str | None) -> bytes:
    """Return the JSON body of an error outcome."""
    return _encode(
        {
            "error": text.encode("utf-8", "replace").decode(),
            "code": code.value,
            "id": request_id,
            "retryable": RULES[code].retryable,
        }
    )


def served_header(served: Served, worker: str) -> Header:
    """Return the ``inferfleet-served`` header, one value for everything a version answers."""
    text = (
        f"route={served.route};model={served.model};version={served.version};"
        f"variant={served.variant};revision={served.revision};worker={worker}"
    )
    if served.fallback:
        text += ";fallback=1"
    return (names.SERVED, text.encode())


class AnswerWriter:
    """Writes the answers of one model version; ``signature`` says what its outputs are called."""

    def __init__(self, model: str, version: str, signature: Signature) -> None:
        self._specs = {spec.name: spec for spec in signature.outputs}
        self._head = b'{"model_name":%b,"model_version":%b,"id":' % (_encode(model), _encode(version))

    def json_bodies(self, answer: Answer, outputs: Sequence[str] | None = None) -> list[bytes]:
        """Return one JSON body per request."""
        part = answer.part
        specs = self._chosen(outputs if outputs is not None else part.form.outputs)
        ids = _json_ids(part.ids)
        if len(specs) == 1 and part.row_counts is None and specs[0].datatype != "BYTES":
            spec = specs[0]
            array = answer.outputs[spec.name]
            texts = _row_texts(spec, array)
            head = self._head
            middle = b',"outputs":[' + _json_tensor_head(spec, (1, *array.shape[1:])) + b'"data":['
            return [head + i + middle + text + b"]}]}" for i, text in zip(ids, texts, strict=True)]
        bounds = part.bounds()
        bodies: list[bytes] = []
        for index, request_id in enumerate(ids):
            tensors = b",".join(
                _json_tensor(spec, answer.outputs[spec.name][bounds[index] : bounds[index + 1]])
                for spec in specs
            )
            bodies.append(self._head + request_id + b',"outputs":[' + tensors + b"]}")
        return bodies

    def binary_bodies(self, answer: Answer) -> tuple[list[bytes], list[bytes]]:
        """Return one body of JSON + binary tensors per request, and the JSON length of each as text."""
        part = answer.part
        specs = self._chosen(part.form.outputs)
        ids = _json_ids(part.ids)
        if len(specs) == 1 and part.row_counts is None and specs[0].datatype not in ("BYTES", *_WIDENED):
            return self._binary_rows(specs[0], answer.outputs[specs[0].name], ids, part)
        bounds = part.bounds()
        bodies: list[bytes] = []
        lengths: list[bytes] = []
        for index, request_id in enumerate(ids):
            texts: list[bytes] = []
            blobs: list[bytes] = []
            for spec in specs:
                array = answer.outputs[spec.name][bounds[index] : bounds[index + 1]]
                if part.form.binary_outputs is not None and spec.name not in part.form.binary_outputs:
                    texts.append(_json_tensor(spec, array))
                    continue
                blob = _blob(spec, array)
                texts.append(_binary_tensor_head(spec, array.shape, len(blob)))
                blobs.append(blob)
            head = self._head + request_id + b',"outputs":[' + b",".join(texts) + b"]}"
            bodies.append(head + b"".join(blobs))
            lengths.append(b"%d" % len(head))
        return bodies, lengths

    def _binary_rows(
        self, spec: TensorSpec, array: Array, ids: list[bytes], part: Requests
    ) -> tuple[list[bytes], list[bytes]]:
        if part.form.binary_outputs is not None and spec.name not in part.form.binary_outputs:
            bodies = self.json_bodies(Answer(part, {spec.name: array}))
            return bodies, [b"%d" % len(body) for body in bodies]
        blob = np.ascontiguousarray(array).tobytes()
        width = len(blob) // max(1, len(ids))
        head = self._head
        tail = b',"outputs":[' + _binary_tensor_head(spec, (1, *array.shape[1:]), width) + b"]}"
        fixed = len(head) + len(tail)
        bodies = [
            head + i + tail + blob[at : at + width]
            for i, at in zip(ids, [index * width for index in range(len(ids))], strict=True)
        ]
        sizes = list(map(len, ids))
        texts = {size: b"%d" % (fixed + size) for size in set(sizes)}
        return bodies, [texts[size] for size in sizes]

    def floats(self, name: str, array: Array) -> Array | None:
        """Return an output's values where they may be NaN or infinite, else ``None``."""
        if array.dtype.kind == "f":
            return array
        return bf16_to_fp32(array) if self._specs[name].datatype == "BF16" else None

    def _chosen(self, outputs: Sequence[str] | None) -> list[TensorSpec]:
        return list(self._specs.values()) if outputs is None else [self._specs[name] for name in outputs]


def ok_headers(part: Requests, served: Header, lengths: list[bytes] | None = None) -> list[list[Header]]:
    """Return the headers of each answer; ``lengths`` are the JSON lengths of binary bodies."""
    identity = names.ID
    if lengths is None:
        made: list[list[Header]] = [[(identity, i.encode()), STATUS_OK, served] for i in part.ids]
    else:
        made = [
            [(identity, i.encode()), STATUS_OK, served, _OCTETS, (names.JSON_LENGTH, length)]
            for i, length in zip(part.ids, lengths, strict=True)
        ]
    if part.traces is not None:
        for headers, trace in zip(made, part.traces, strict=True):
            if trace is not None:
                headers += headers_of_trace(trace)
    return made


def error_headers(request_id: str, code: Code, served: Header, trace: bytes | None) -> list[Header]:
    """Return the headers of an error outcome."""
    headers: list[Header] = [
        (names.ID, request_id.encode()),
        STATUS_ERROR,
        (names.CODE, code.value.encode()),
        served,
    ]
    if trace is not None:
        headers += headers_of_trace(trace)
    return headers


def _json_ids(ids: list[str]) -> list[bytes]:
    """Return each id as JSON text."""
    text = _encode(ids)
    if b"\\" in text:  # an id holds a quote or a backslash: it could look like a border
        return [_encode(i) for i in ids]
    return [b'"' + cut + b'"' for cut in text[2:-2].split(b'","')]


def _widen(spec: TensorSpec, array: Array) -> Array:
    if spec.datatype == "FP16":
        return array.astype(np.float32)
    if spec.datatype == "BF16":
        return bf16_to_fp32(array)
    return array


def _shown(spec: TensorSpec) -> str:
    return "FP32" if spec.datatype in _WIDENED else spec.datatype


def _row_texts(spec: TensorSpec, array: Array) -> list[bytes]:
    """Return each row's elements as JSON text without the brackets."""
    count = len(array)
    flat = _widen(spec, array).reshape(count, -1)
    return _encode(flat.tolist())[2:-2].split(b"],[")


def _texts(elements: list[bytes]) -> tuple[list[str], bool]:
    """Return BYTES elements as text, and whether they had to become base64."""
    try:
        return [element.decode() for element in elements], False
    except UnicodeDecodeError:
        return [base64.b64encode(element).decode() for element in elements], True


def _json_tensor_head(spec: TensorSpec, shape: Sequence[int]) -> bytes:
    return b'{"name":%b,"shape":%b,"datatype":%b,' % (
        _encode(spec.name),
        _encode(list(shape)),
        _encode(_shown(spec)),
    )


def _json_tensor(spec: TensorSpec, array: Array) -> bytes:
    head = _json_tensor_head(spec, array.shape)
    data: list[Any]
    if spec.datatype == "BYTES":
        data, encoded = _texts(array.reshape(-1).tolist())
        if encoded:
            head += b'"parameters":{"encoding":"base64"},'
    else:
        data = _widen(spec, array).reshape(-1).tolist()
    return head + b'"data":' + _encode(data) + b"}"


def _binary_tensor_head(spec: TensorSpec, shape: Sequence[int], size: int) -> bytes:
    return b'{"name":%b,"shape":%b,"datatype":%b,"parameters":{"binary_data_size":%d}}' % (
        _encode(spec.name),
        _encode(list(shape)),
        _encode(spec.datatype),
        size,
    )


def _blob(spec: TensorSpec, array: Array) -> bytes:
    if spec.datatype != "BYTES":
        return np.ascontiguousarray(array).tobytes()
    elements: list[bytes] = array.reshape(-1).tolist()
    return b"".join(len(element).to_bytes(4, "little") + element for element in elements)
