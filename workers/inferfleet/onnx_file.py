"""Reads from an ONNX file what inferfleet must know before any ONNX library sees it.

Its inputs and outputs, so that ``inferfleet model add`` works where no runtime is installed; and every
reference to another file, because a runtime that follows one on its own would read bytes that nobody
verified. An ONNX file is one protobuf message: its wire format is walked, weights are skipped unread.
Field numbers are those of ``onnx.proto``.
"""

from __future__ import annotations

from collections.abc import Iterator

from inferfleet.records import Signature, TensorSpec

# TensorProto.DataType
DATATYPE_OF_ELEMENT = {
    1: "FP32", 2: "UINT8", 3: "INT8", 4: "UINT16", 5: "INT16", 6: "INT32", 7: "INT64", 8: "BYTES", 9: "BOOL",
    10: "FP16", 11: "FP64", 12: "UINT32", 13: "UINT64", 16: "BF16",
}  # fmt: skip

_INCOMPLETE = "it is not a complete ONNX model"

_MODEL, _GRAPH, _NODE, _ATTRIBUTE, _SPARSE, _TENSOR = (
    "model",
    "graph",
    "node",
    "attribute",
    "sparse",
    "tensor",
)
_FUNCTION, _TRAINING = "function", "training"
# Wherever a tensor can be, by the number of the field that holds it.
_NESTED: dict[str, dict[int, str]] = {
    _MODEL: {7: _GRAPH, 20: _TRAINING, 25: _FUNCTION},
    _TRAINING: {1: _GRAPH, 2: _GRAPH},
    _FUNCTION: {7: _NODE, 11: _ATTRIBUTE},
    _GRAPH: {1: _NODE, 5: _TENSOR, 15: _SPARSE},
    _NODE: {5: _ATTRIBUTE},
    _ATTRIBUTE: {5: _TENSOR, 6: _GRAPH, 10: _TENSOR, 11: _GRAPH, 22: _SPARSE, 23: _SPARSE},
    _SPARSE: {1: _TENSOR, 2: _TENSOR},
}
_WEIGHTS = (_MODEL, _GRAPH)
_TENSOR_EXTERNAL_DATA, _TENSOR_DATA_LOCATION = 13, 14
_ENTRY_KEY, _ENTRY_VALUE = 1, 2

_MODEL_GRAPH = 7
_GRAPH_INITIALIZER, _GRAPH_INPUT, _GRAPH_OUTPUT = 5, 11, 12
_TENSOR_NAME = 8
_VALUE_NAME, _VALUE_TYPE = 1, 2
_TYPE_TENSOR = 1
_TENSOR_ELEMENT, _TENSOR_SHAPE = 1, 2
_SHAPE_DIMENSION = 1
_DIMENSION_SIZE = 1

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def read_signature(raw: bytes) -> Signature:
    """Return the file's tensors, per row; the first dimension of each must be the batch.

    Raises ValueError for what is no ONNX model or cannot be batched.
    """
    try:
        graph = _last(memoryview(raw), _MODEL_GRAPH)
        inputs, outputs, constants = [], [], set()
        for number, value in _fields(graph):
            if number == _GRAPH_INITIALIZER and isinstance(value, memoryview):
                constants.add(_text(value, _TENSOR_NAME))
            elif number == _GRAPH_INPUT and isinstance(value, memoryview):
                inputs.append(value)
            elif number == _GRAPH_OUTPUT and isinstance(value, memoryview):
                outputs.append(value)
        # Files older than IR version 4 list their weights among the inputs.
        taken = [each for each in inputs if _text(each, _VALUE_NAME) not in constants]
        return Signature(tuple(_spec(each) for each in taken), tuple(_spec(each) for each in outputs))
    except (IndexError, UnicodeDecodeError):
        raise ValueError(_INCOMPLETE) from None


def external_files(raw: bytes) -> list[str]:
    """Return the files that the weights refer to, as they are written there.

    Raises ValueError if anything else does: ONNX Runtime takes the files of the main graph's initializers
    from memory, and looks for those of nested graphs, sparse tensors and attributes in the working directory.
    """
    locations: dict[str, None] = {}
    try:
        for place, tensor in _tensors(memoryview(raw), _MODEL, ()):
            entries = [value for number, value in _fields(tensor) if number == _TENSOR_EXTERNAL_DATA]
            stored = [value for number, value in _fields(tensor) if number == _TENSOR_DATA_LOCATION]
            if not entries and not any(stored):
                continue
            if place != _WEIGHTS:
                name = _text(tensor, _TENSOR_NAME)
                raise ValueError(f"tensor {name!r} refers to another file and is no weight of the main graph")
            for entry in entries:
                if isinstance(entry, memoryview) and _text(entry, _ENTRY_KEY) == "location":
                    locations[_text(entry, _ENTRY_VALUE)] = None
    except (IndexError, UnicodeDecodeError, RecursionError):
        raise ValueError(_INCOMPLETE) from None
    return list(locations)


def _tensors(
    message: memoryview, kind: str, place: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], memoryview]]:
    """Yield every TensorProto in ``message`` with the kinds of the messages around it."""
    within = (*place, kind)
    below = _NESTED[kind]
    for number, value in _fields(message):
        nested = below.get(number)
        if nested is None or not isinstance(value, memoryview):
            continue
        if nested == _TENSOR:
            yield within, value
        else:
            yield from _tensors(value, nested, within)


def _spec(value: memoryview) -> TensorSpec:
    name = _text(value, _VALUE_NAME)
    tensor = _first(_last(value, _VALUE_TYPE), _TYPE_TENSOR)
    if tensor is None:
        raise ValueError(
            f"{name} is not a tensor (a sequence or map); export plain tensors, e.g. zipmap=False"
        )
    element = _number(tensor, _TENSOR_ELEMENT)
    if element not in DATATYPE_OF_ELEMENT:
        raise ValueError(f"{name} has ONNX element type {element}, which the V2 protocol has no name for")
    shape = _first(tensor, _TENSOR_SHAPE)
    if shape is None:
        raise ValueError(f"{name} has no shape in the file; declare it in --settings")
    sizes = [_size(each) for number, each in _fields(shape) if number == _SHAPE_DIMENSION]
    if not sizes:
        raise ValueError(f"{name} is a scalar; its first dimension must be the batch")
    if sizes[0] >= 0:
        raise ValueError(f"{name} has a fixed batch of {sizes[0]}; export it with a dynamic first dimension")
    return TensorSpec(name, DATATYPE_OF_ELEMENT[element], tuple(sizes[1:]))


def _size(dimension: int | memoryview) -> int:
    """Return a dimension's size, -1 where it has a name or nothing."""
    for number, value in _fields(dimension):
        if number == _DIMENSION_SIZE and isinstance(value, int):
            return value if 0 < value < 1 << 63 else -1
    return -1


def _fields(message: int | memoryview | None) -> Iterator[tuple[int, int | memoryview]]:
    """Yield each field's number with its value: an int, or a view of its bytes."""
    if not isinstance(message, memoryview):
        raise IndexError
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        if kind == _LENGTH:
            width, at = _varint(message, at)
        elif kind == _FIXED64:
            width = 8
        elif kind == _FIXED32:
            width = 4
        else:
            raise IndexError
        if at + width > len(message):
            raise IndexError
        yield number, message[at : at + width]
        at += width


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise IndexError


def _first(message: int | memoryview | None, number: int) -> memoryview | None:
    for found, value in _fields(message):
        if found == number and isinstance(value, memoryview):
            return value
    return None


def _last(message: memoryview, number: int) -> memoryview:
    """Return the last field of that number, as protobuf does for a field that is not repeated."""
    found = [value for each, value in _fields(message) if each == number and isinstance(value, memoryview)]
    return found[-1]


def _number(message: memoryview, number: int) -> int:
    found = [value for each, value in _fields(message) if each == number and isinstance(value, int)]
    return found[-1] if found else 0


def _text(message: memoryview, number: int) -> str:
    value = _first(message, number)
    return "" if value is None else str(value, "utf-8")
