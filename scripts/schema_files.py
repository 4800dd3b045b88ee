"""The files of ``schemas/``, made from the message types; ``./scripts/schemas`` writes them.

What a type says comes from the type. What a type cannot say (bounds, patterns, which members exclude each
other) is added here, beside the rule of the decoder that holds it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import xxhash

from inferfleet.coordinator.openapi import description
from inferfleet.core.routing import bucket
from inferfleet.datatypes import DATATYPES
from inferfleet.errors import RULES, Code
from inferfleet.records import Answer, AnswerForm, Chunk, Requests, Signature, Stream, TensorSpec
from inferfleet.wire.encode import AnswerWriter, error_body
from inferfleet.wire.headers import MAX_ID_BYTES
from inferfleet.wire.messages import (
    AMQP_HEADERS,
    DEAD_LETTER_HEADERS,
    OUTCOME_HEADERS,
    REQUEST_HEADERS,
    RETRY_HEADERS,
    ErrorOutcome,
    HeaderRule,
    InferenceResponse,
)
from inferfleet.wire.request import MAX_TENSORS, InferenceRequest, InputTensor
from inferfleet.wire.tensors import MAX_DIMENSION
from scripts.revision_files import revision_schema, timed_vectors

FOLDER = Path(__file__).resolve().parents[1] / "schemas"
_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_ID = {
    "type": "string",
    "minLength": 1,
    "maxLength": MAX_ID_BYTES,
    "pattern": "^[^\\u0000-\\u0020\\u007f{}]+$",
    "description": f"At most {MAX_ID_BYTES} bytes of UTF-8; no control character, space or brace.",
}
_OUTCOME_ID = {
    "type": "string",
    "minLength": 1,
    "description": "The request's id; where it has none on Kafka, <topic>-<partition>-<offset>.",
}
Document = dict[str, Any]


def files() -> dict[str, str]:
    """Return every file's text by its path inside ``schemas/``."""
    documents: dict[str, Any] = {
        "request.v1.json": request_schema(),
        "columns.v1.json": columns_schema(),
        "response.v1.json": response_schema(),
        "error.v1.json": error_schema(),
        "headers.v1.json": header_tables(),
        "routing-vectors.json": routing_vectors(),
        "revision.v1.json": revision_schema(),
        "openapi.v1.json": description(),
    }
    documents |= {f"examples/{name}.json": example for name, example in examples().items()}
    return {
        path: json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        for path, document in documents.items()
    } | {"timed-routing-vectors.json": timed_vectors()}


def _components(kind: type[msgspec.Struct]) -> tuple[Document, Document]:
    """Return the schema of a type without its name, and those of the types it holds."""
    (found,), parts = msgspec.json.schema_components([kind], ref_template="#/$defs/{name}")
    top = parts.pop(found["$ref"].rpartition("/")[2])
    return top, parts


def _headed(name: str, title: str, top: Document, parts: Document, description: str) -> Document:
    head = {"$schema": _DIALECT, "$id": f"urn:inferfleet:schema:{name}:1", "title": title}
    tail = {"$defs": parts} if parts else {}
    return head | top | {"title": title, "description": description} | tail


def _without_nulls(schema: Document, *members: str) -> None:
    """Members that are never written as null: absent is how they say nothing."""
    for member in members:
        found = schema["properties"][member]
        found.pop("default", None)
        kinds = [kind for kind in found.pop("anyOf") if kind != {"type": "null"}]
        found |= kinds[0]


def _readable(kind: type[msgspec.Struct]) -> type[msgspec.Struct]:
    """Return the type with plain JSON in place of text that is read later."""
    fields: list[Any] = []
    for each in msgspec.structs.fields(kind):
        if each.type is msgspec.Raw:
            fields.append((each.name, list[Any] | None, None))
        elif each.required:
            fields.append((each.name, each.type))
        else:
            fields.append((each.name, each.type, each.default))
    made: type[msgspec.Struct] = msgspec.defstruct(kind.__name__, fields, namespace={"__doc__": kind.__doc__})
    return made


def request_schema() -> Document:
    """Return the schema of a V2 JSON request, which is also the JSON part of a body with binary tensors."""
    top, parts = _components(_with_inputs())
    tensor = parts["InputTensor"]
    _without_nulls(tensor, "data")
    tensor["properties"]["shape"] = _shape("Rows first, then one row's shape.", 1)
    tensor["properties"]["datatype"] = {"enum": list(DATATYPES)}
    tensor["properties"]["data"] |= {
        "description": "Flat or nested, row-major; numbers, truth values or texts."
    }
    tensor["oneOf"] = [
        {"required": ["data"], "not": _binary_size()},
        {"not": {"required": ["data"]}, **_binary_size()},
    ]
    top["properties"]["inputs"] |= {"minItems": 1, "maxItems": MAX_TENSORS}
    top["properties"]["id"] = {"anyOf": [_ID, {"type": "null"}]}
    return _headed(
        "request",
        "Inference request",
        top,
        parts,
        "Open Inference Protocol V2. Unknown members are ignored; of a repeated member the last wins. FP16 "
        "and BF16 have no JSON form: such tensors are binary.",
    )


def _with_inputs() -> type[msgspec.Struct]:
    readable = _readable(InputTensor)
    fields: list[Any] = []
    for each in msgspec.structs.fields(InferenceRequest):
        kind: Any = list[readable] if each.name == "inputs" else each.type  # type: ignore[valid-type]
        fields.append((each.name, kind) if each.required else (each.name, kind, each.default))
    made: type[msgspec.Struct] = msgspec.defstruct("InferenceRequest", fields)
    return made


def _shape(description: str, least: int) -> Document:
    return {
        "type": "array",
        "items": {"type": "integer", "minimum": least, "maximum": MAX_DIMENSION},
        "minItems": 1,
        "description": description,
    }


def _binary_size() -> Document:
    return {
        "required": ["parameters"],
        "properties": {
            "parameters": {
                "type": "object",
                "required": ["binary_data_size"],
                "properties": {"binary_data_size": {"type": "integer", "minimum": 0}},
            }
        },
    }


def columns_schema() -> Document:
    """Return the schema of a body on a route with ``input = "columns"``."""
    element = {"type": ["number", "boolean", "string"]}
    return {
        "$schema": _DIALECT,
        "$id": "urn:inferfleet:schema:columns:1",
        "title": "Columns",
        "description": "One row: each member is an input of the model, flat or nested. `id` is the "
        "request's id where no input is called so.",
        "type": "object",
        "minProperties": 1,
        "additionalProperties": {"anyOf": [element, {"$ref": "#/$defs/Nested"}]},
        "$defs": {"Nested": {"type": "array", "items": {"anyOf": [element, {"$ref": "#/$defs/Nested"}]}}},
    }


def response_schema() -> Document:
    """Return the schema of an answer, which is also the JSON part of a binary answer."""
    top, parts = _components(InferenceResponse)
    output = parts["ResponseOutput"]
    _without_nulls(output, "data", "parameters")
    _without_nulls(top, "parameters")
    output["properties"]["shape"] = _shape("Rows first; as many as the request has.", 0)
    output["properties"]["datatype"] = {"enum": list(DATATYPES)}
    output["oneOf"] = [
        {
            "required": ["data"],
            "not": _binary_size(),
            "properties": {"datatype": {"not": {"enum": ["FP16", "BF16"]}}},
        },
        {"not": {"required": ["data"]}, **_binary_size()},
    ]
    top["properties"]["id"] = _OUTCOME_ID
    top["properties"]["model_version"] = {"type": "string", "pattern": "^[1-9][0-9]*$"}
    return _headed(
        "response",
        "Inference response",
        top,
        parts,
        "An answer. FP16 and BF16 are widened to FP32 in JSON; BYTES that are not UTF-8 are base64, and "
        "`parameters.encoding` says so. NaN and infinity, where a route allows them, are null in JSON.",
    )


def error_schema() -> Document:
    """Return the schema of an error outcome's body."""
    top, parts = _components(ErrorOutcome)
    _without_nulls(top, "parameters")
    top["properties"]["code"] = {"enum": [code.value for code in Code]}
    top["properties"]["id"] = _OUTCOME_ID
    top["oneOf"] = [
        {
            "properties": {
                "code": {"enum": [code.value for code in Code if RULES[code].retryable is retryable]},
                "retryable": {"const": retryable},
            }
        }
        for retryable in (False, True)
    ]
    return _headed(
        "error",
        "Error outcome",
        top,
        parts,
        "Why a request has no answer: in words, as a code, and whether sending it again may help.",
    )


def header_tables() -> Document:
    """Return the headers of requests, outcomes, dead letters and further attempts."""

    def table(rules: tuple[HeaderRule, ...]) -> list[Document]:
        return [
            {"name": r.name, "presence": r.presence, "pattern": f"^({r.pattern})$", "meaning": r.meaning}
            for r in rules
        ]

    return {
        "title": "Headers",
        "description": "Text in UTF-8, the same lower-case names on Kafka and AMQP; names are compared in "
        "lower case, and of a repeated header of a request the first value wins. A dead letter carries the "
        "request's own headers first, so of its own the last value wins; so does a record in a retry topic. "
        "`pattern` is for the whole value.",
        "request": table(REQUEST_HEADERS),
        "amqp": table(AMQP_HEADERS),
        "outcome": table(OUTCOME_HEADERS),
        "dead_letter": table(DEAD_LETTER_HEADERS),
        "retry": table(RETRY_HEADERS),
    }


def routing_vectors() -> Document:
    """Return keys with their hashes and buckets, for other languages to check themselves against."""
    salt = "inferfleet/digits"
    texts = ["", "a", "order-42", "Zoë", "k" * 17, "k" * 129, "k" * 241, *(f"user-{i}" for i in range(16))]
    cases = [(salt, text.encode()) for text in texts]
    cases += [("", b""), ("other/route", b"order-42"), (salt, bytes(range(256)))]
    return {
        "title": "Routing test vectors",
        "description": "bucket = floor(hash * 10000 / 2^64), where hash is the unsigned 64-bit xxh3 (seed 0) "
        "of the UTF-8 bytes of salt + ':' followed by the key's bytes. A variant owns the buckets from its "
        "lower bound up to its upper one, exclusive.",
        "vectors": [
            {
                "salt": salt_text,
                "key_hex": key.hex(),
                "hash_hex": f"{xxhash.xxh3_64_intdigest(salt_text.encode() + b':' + key):016x}",
                "bucket": bucket(salt_text, key),
            }
            for salt_text, key in cases
        ],
    }


# Examples: requests that the decoder must read, and outcomes as the encoder writes them.


def examples() -> dict[str, Any]:
    """Return the examples by name; the word before the first dash is the schema that each must meet."""
    image = {"name": "image", "shape": [1, 4], "datatype": "FP32", "data": [0.0, 0.5, 1.0, 0.25]}
    binary = {"name": "image", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": 16}}
    two_rows = {**image, "shape": [2, 4], "data": [[0, 0.5, 1, 0.25], [1, 1, 0, 0]]}
    asked = [{"name": "label", "parameters": {"binary_data": True}}]
    found: dict[str, Any] = {
        "request-one-row": {"id": "order-42", "inputs": [image]},
        "request-two-rows-nested": {"inputs": [two_rows], "outputs": [{"name": "probabilities"}]},
        "request-json-part-of-binary": {"id": "order-43", "inputs": [binary], "outputs": asked},
        "columns-one-row": {"id": "order-44", "image": [0.0, 0.5, 1.0, 0.25]},
    }
    found |= {name: json.loads(body) for name, body in _answers().items()}
    for code, text in (
        (Code.SHAPE, "input image: shape [1, 3]; expected rows and [4]"),
        (Code.DEADLINE, "the deadline passed before the request ran"),
        (Code.INTERNAL, "the worker failed"),
    ):
        found[f"error-{code.name.lower()}"] = json.loads(error_body(text, code, "order-42"))
    return found


def _answers() -> dict[str, bytes]:
    outputs = (TensorSpec("probabilities", "FP32", (2,)), TensorSpec("label", "BYTES", ()))
    writer = AnswerWriter("digits", "2", Signature((), outputs))
    labels = np.empty(2, object)
    labels[:] = [b"seven", b"\xff\xfe"]
    arrays = {"probabilities": np.array([[0.25, 0.75], [1, 0]], np.float32), "label": labels}

    def answer(form: AnswerForm) -> Answer:
        chunk = Chunk(Stream("digits.requests", 0), 1, [7], [None], [b"{}"], [None], [0], 0.0)
        return Answer(Requests(chunk, [0], ["order-42"], {}, [2], form=form), arrays)

    (json_body,) = writer.json_bodies(answer(AnswerForm()))
    (binary_body,), (length,) = writer.binary_bodies(answer(AnswerForm(binary=True)))
    return {"response-two-rows": json_body, "response-json-part-of-binary": binary_body[: int(length)]}


def main() -> int:
    """Write the files; with ``--check`` only say which would change, and exit 1 if any would."""
    wanted = files()
    stale = {str(p.relative_to(FOLDER)) for p in FOLDER.rglob("*.json")} - wanted.keys()
    changed = [
        path
        for path, text in wanted.items()
        if not (FOLDER / path).exists() or (FOLDER / path).read_text(encoding="utf-8") != text
    ]
    if "--check" in sys.argv[1:]:
        for path in sorted({*stale, *changed}):
            print(f"schemas: {path} differs from the message types; run ./scripts/schemas", file=sys.stderr)
        return 1 if stale or changed else 0
    for path in changed:
        (FOLDER / path).parent.mkdir(parents=True, exist_ok=True)
        (FOLDER / path).write_text(wanted[path], encoding="utf-8")
    for path in stale:
        (FOLDER / path).unlink()
    print(f"schemas: {len(wanted)} files, {len(changed)} written, {len(stale)} removed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
