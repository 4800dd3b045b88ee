"""One Open Inference Protocol V2 request: the general reader, for every legal form.

The fast path for the usual form is in ``decode``; what it does not take comes here, one request at a time,
and either becomes a :class:`Parsed` or raises the code that names what is wrong.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from inferfleet.datatypes import DATATYPES
from inferfleet.errors import Code, RequestError
from inferfleet.records import AnswerForm, Array, Signature, Tensors, TensorSpec
from inferfleet.wire import tensors as checks
from inferfleet.wire.headers import check_id
from inferfleet.wire.tensors import clip

Scalar = str | int | float | bool
MAX_TENSORS = 64


class InputTensor(msgspec.Struct, gc=False):
    """One input of a request; ``data`` is absent where the tensor is binary."""

    name: str
    shape: list[int]
    datatype: str
    data: msgspec.Raw = msgspec.Raw(b"")
    parameters: dict[str, Scalar] | None = None


class RequestedOutput(msgspec.Struct, gc=False):
    """One output that the caller asks for."""

    name: str
    parameters: dict[str, Scalar] | None = None


class InferenceRequest(msgspec.Struct, gc=False):
    """The body of a V2 inference request; unknown members are ignored, as the protocol asks."""

    inputs: list[InputTensor]
    id: str | None = None
    outputs: list[RequestedOutput] | None = None
    parameters: dict[str, Scalar] | None = None
    model_name: str | None = None
    model_version: str | None = None


class Parsed(NamedTuple):
    """A request that passed every check; ``id`` is what its body says."""

    id: str | None
    tensors: Tensors
    rows: int
    form: AnswerForm


_DECODER = msgspec.json.Decoder(InferenceRequest)
_COLUMNS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_NO_INPUTS = "Object missing required field `inputs`"


class Limits(NamedTuple):
    """Bounds of one request; ``nan_allowed`` lets NaN and infinity pass in binary tensors."""

    max_bytes: int
    max_rows: int
    nan_allowed: bool = False


class RequestReader:
    """Reads requests for one model's signature."""

    def __init__(self, model: str, versions: frozenset[str], signature: Signature, limits: Limits) -> None:
        self.model = model
        self.versions = versions
        self.signature = signature
        self.limits = limits
        self._inputs = {spec.name: spec for spec in signature.inputs}
        self._outputs = frozenset(spec.name for spec in signature.outputs)

    def json(self, body: bytes) -> Parsed:
        """Read a JSON body."""
        try:
            request = self._decode(body)
        except RequestError as error:
            raise self._with_hint(error, body) from None
        form = self._form(request, binary=False)
        return Parsed(request.id, *self._tensors(request, b""), form)

    def binary(self, body: bytes, json_length: int) -> Parsed:
        """Read a JSON body of ``json_length`` bytes with binary tensors behind it."""
        if json_length > len(body):
            raise RequestError(
                Code.HEADER,
                f"inference-header-content-length is {json_length}, the body has {len(body)} bytes",
            )
        request = self._decode(body[:json_length])
        form = self._form(request, binary=True)
        return Parsed(request.id, *self._tensors(request, body[json_length:]), form)

    def raw(self, body: bytes) -> Parsed:
        """Read a body that is one raw tensor: one row of a model with a single input."""
        if len(self.signature.inputs) != 1:
            raise RequestError(
                Code.SCHEMA, f"a raw body needs a model with one input; this has {len(self._inputs)}"
            )
        spec = self.signature.inputs[0]
        shape = self._raw_shape(spec, len(body))
        count = checks.check_shape(spec, shape, self.limits.max_rows)
        if spec.datatype != "BYTES":
            array = checks.from_bytes(spec, shape, body, count)
        elif count == 1:
            array = checks.object_array([body], shape)
        else:
            raise RequestError(Code.SHAPE, f"input {spec.name}: a raw body is one element; a row has {count}")
        checks.check_finite(spec, array, self.limits.nan_allowed)
        return Parsed(None, {spec.name: array}, 1, AnswerForm(binary=True))

    def columns(self, body: bytes) -> Parsed:
        """Read plain columns, ``{"name": values}``: one row."""
        checks.check_text(body)
        checks.check_depth(body)
        try:
            columns = _COLUMNS.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _decode_error(error) from None
        request_id: str | None = None
        if "id" in columns and "id" not in self._inputs:
            request_id = _column_id(columns.pop("id"))
        self._check_names(list(columns))
        tensors: Tensors = {}
        for spec in self.signature.inputs:
            raw = bytes(columns[spec.name])
            values = raw if raw.lstrip()[:1] == b"[" else b"[" + raw + b"]"
            shape = self._column_shape(spec, values)
            count = checks.check_shape(spec, shape, 1)
            tensors[spec.name] = checks.from_json(spec, shape, values, count)
        return Parsed(request_id, tensors, 1, AnswerForm())

    def _decode(self, body: bytes) -> InferenceRequest:
        checks.check_text(body)
        checks.check_depth(body)
        try:
            request = _DECODER.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise _decode_error(error) from None
        self.check_model(request.model_name, request.model_version)
        if len(request.inputs) > MAX_TENSORS:
            raise RequestError(
                Code.TOO_LARGE, f"{len(request.inputs)} inputs; at most {MAX_TENSORS} are read"
            )
        return request

    def _with_hint(self, error: RequestError, body: bytes) -> RequestError:
        """Say more to whoever sends plain columns to a route that reads V2: the mend is in the route."""
        if error.code is not Code.SCHEMA or not error.text.startswith(_NO_INPUTS):
            return error
        try:
            columns = _COLUMNS.decode(body)
        except (ValueError, RecursionError):  # what follows the object is read only now
            return error
        if self._inputs.keys().isdisjoint(columns):
            return error
        return RequestError(
            Code.SCHEMA, f'{error.text}; plain columns need a route with input = "columns", this one reads V2'
        )

    def check_model(self, name: str | None, version: str | None) -> None:
        """Raise ``E_MODEL_UNKNOWN`` when a request names another model or version than its route."""
        if name is not None and name != self.model:
            raise RequestError(
                Code.MODEL_UNKNOWN,
                f"the request names model {clip(name)!r}; this route answers with {self.model!r}",
            )
        if version is not None and version not in self.versions:
            raise RequestError(
                Code.MODEL_UNKNOWN,
                f"the request names version {clip(version)!r}; this route serves {sorted(self.versions)}",
            )

    def _check_names(self, names: list[str]) -> None:
        seen: set[str] = set()
        for name in names:
            if name not in self._inputs:
                raise RequestError(
                    Code.SCHEMA, f"the model has no input {clip(name)!r}; it takes {sorted(self._inputs)}"
                )
            if name in seen:
                raise RequestError(Code.SCHEMA, f"input {name!r} is given twice")
            seen.add(name)
        missing = [name for name in self._inputs if name not in seen]
        if missing:
            raise RequestError(Code.SCHEMA, f"input {missing[0]!r} is missing")

    def _tensors(self, request: InferenceRequest, blob: bytes) -> tuple[Tensors, int]:
        self._check_names([tensor.name for tensor in request.inputs])
        at = 0
        rows: int | None = None
        tensors: Tensors = {}
        for tensor in request.inputs:
            spec = self._inputs[tensor.name]
            count = self._check_tensor(spec, tensor)
            if rows is not None and tensor.shape[0] != rows:
                raise RequestError(
                    Code.SHAPE, f"input {spec.name}: {tensor.shape[0]} rows, another input has {rows}"
                )
            rows = tensor.shape[0]
            parameters = tensor.parameters or {}
            size = parameters.get("binary_data_size")
            if size is None:
                if not bytes(tensor.data):
                    raise RequestError(Code.SCHEMA, f"input {spec.name} has no data")
                array = checks.from_json(
                    spec, tensor.shape, bytes(tensor.data), count, parameters.get("encoding")
                )
            else:
                array, at = self._binary_tensor(spec, tensor, blob, at, size, count)
            tensors[spec.name] = array
        if at != len(blob):
            raise RequestError(
                Code.SHAPE, f"{len(blob)} bytes follow the JSON part; its tensors declare {at}"
            )
        return {spec.name: tensors[spec.name] for spec in self.signature.inputs}, rows or 0

    def _check_tensor(self, spec: TensorSpec, tensor: InputTensor) -> int:
        if tensor.datatype not in DATATYPES:
            raise RequestError(Code.DTYPE, f"input {spec.name}: {clip(tensor.datatype)!r} is no V2 datatype")
        if tensor.datatype != spec.datatype:
            raise RequestError(
                Code.DTYPE, f"input {spec.name}: datatype {tensor.datatype}; the model takes {spec.datatype}"
            )
        return checks.check_shape(spec, tensor.shape, self.limits.max_rows)

    def _binary_tensor(
        self, spec: TensorSpec, tensor: InputTensor, blob: bytes, at: int, size: object, count: int
    ) -> tuple[Array, int]:
        if type(size) is not int or size < 0:
            raise RequestError(Code.SCHEMA, f"input {spec.name}: binary_data_size must be an integer >= 0")
        if bytes(tensor.data):
            raise RequestError(Code.SCHEMA, f"input {spec.name} has both data and binary_data_size")
        if at + size > len(blob):
            raise RequestError(Code.SHAPE, f"input {spec.name}: binary_data_size passes the end of the body")
        array = checks.from_bytes(spec, tensor.shape, blob[at : at + size], count)
        checks.check_finite(spec, array, self.limits.nan_allowed)
        return array, at + size

    def _raw_shape(self, spec: TensorSpec, size: int) -> list[int]:
        """Return the shape of one raw row; a single varying dimension takes what the size leaves."""
        if spec.datatype == "BYTES" or -1 not in spec.shape:
            return [1, *(1 if dim == -1 else dim for dim in spec.shape)]
        if spec.shape.count(-1) > 1:
            raise RequestError(
                Code.SHAPE, f"input {spec.name}: more than one dimension varies; raw cannot say which"
            )
        fixed = DATATYPES[spec.datatype].width or 1
        for dim in spec.shape:
            fixed *= 1 if dim == -1 else dim
        return [1, *(size // fixed if dim == -1 else dim for dim in spec.shape)]

    def _column_shape(self, spec: TensorSpec, raw: bytes) -> list[int]:
        if -1 not in spec.shape:
            return [1, *spec.shape]
        level = checks.any_json(spec, raw)
        shape = [1]
        for _ in spec.shape:
            shape.append(len(level) if isinstance(level, list) else 1)
            level = level[0] if isinstance(level, list) and level else None
        return shape

    def _form(self, request: InferenceRequest, binary: bool) -> AnswerForm:
        wanted = (request.parameters or {}).get("binary_data_output")
        if isinstance(wanted, bool):
            binary = wanted
        if request.outputs is None:
            return AnswerForm(binary)
        names: list[str] = []
        binary_names: set[str] = set()
        for output in request.outputs[: MAX_TENSORS + 1]:
            if output.name not in self._outputs:
                raise RequestError(
                    Code.SCHEMA,
                    f"the model has no output {clip(output.name)!r}; it gives {sorted(self._outputs)}",
                )
            if output.name in names:
                raise RequestError(Code.SCHEMA, f"output {output.name!r} is asked for twice")
            names.append(output.name)
            if (output.parameters or {}).get("binary_data", binary) is True:
                binary_names.add(output.name)
        if not names:
            return AnswerForm(binary)
        uniform = binary_names == set(names) if binary else not binary_names
        return AnswerForm(
            binary or bool(binary_names), tuple(names), None if uniform else frozenset(binary_names)
        )


def _column_id(raw: msgspec.Raw) -> str:
    try:
        return msgspec.json.decode(raw, type=str)
    except msgspec.DecodeError:
        raise RequestError(Code.ID, "the id must be a string") from None


def _decode_error(error: Exception) -> RequestError:
    """Return the code of a body that does not read as a V2 request, by where the reader stopped."""
    text = clip(str(error), 160)
    if not isinstance(error, msgspec.ValidationError):
        return RequestError(Code.DECODE, f"the body is not JSON: {text}")
    if "$.id`" in text:
        return RequestError(Code.ID, f"the id must be a string: {text}")
    if ".shape" in text:
        return RequestError(Code.SHAPE, text)
    if ".datatype" in text:
        return RequestError(Code.DTYPE, text)
    return RequestError(Code.SCHEMA, text)


class _OnlyId(msgspec.Struct, gc=False):
    id: str | None = None


_ONLY_ID = msgspec.json.Decoder(_OnlyId)


def find_id(body: bytes) -> str | None:
    """Return the id of a body that was refused, where it can still be read."""
    try:
        checks.check_depth(body)
        found = _ONLY_ID.decode(body).id
        return None if found is None else check_id(found)
    except (ValueError, RecursionError, RequestError):
        return None
