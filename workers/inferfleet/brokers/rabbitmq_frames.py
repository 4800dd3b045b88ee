"""AMQP frames of the record path, cut out of a connection's bytes without an object for each.

Deliveries, confirmations and returned messages of watched channels go straight to their sink; everything
else, the handshake, heartbeats, answers and closed channels, is handed on to the client library untouched. A
library that makes frame objects, queues them to a reader task and starts a task for each message spends ten
times what is spent here.
"""

from __future__ import annotations

import struct
from typing import NamedTuple, Protocol

_FRAME = struct.Struct(">BHI")
_U64 = struct.Struct(">Q")
_HEAD, _TAIL = 7, 1
_METHOD, _HEADER, _BODY, _END = 1, 2, 3, 0xCE
_DELIVER, _RETURN, _ACK, _NACK = (struct.pack(">HH", 60, number) for number in (60, 50, 80, 120))
_CONTENT_METHODS = (_DELIVER, _RETURN)
_CLOSE = struct.pack(">HH", 20, 40)
_BLOCKED, _UNBLOCKED = (struct.pack(">HH", 10, number) for number in (60, 61))
_PUBLISH = struct.pack(">HHH", 60, 40, 0)
_CONTENT = struct.pack(">HH", 60, 0)
_DIRECT_REPLY = b"amq.rabbitmq.reply-to."
HEARTBEAT = b"\x08\x00\x00\x00\x00\x00\x00\xce"
FRAME_OVERHEAD = _HEAD + _TAIL


class FrameError(Exception):
    """The bytes are no AMQP frames: the connection cannot be read any further."""


class Sink(Protocol):
    """Whoever watches a channel. ``flush`` follows when a read has been cut."""

    def delivered(self, tag: int, redelivered: bool, header: bytes, body: bytes) -> None:
        """Hear of a message: the payload of its header frame, and its body, perhaps cut."""

    def returned(self, code: int, text: str, key: bytes, header: bytes, body: bytes) -> None:
        """Hear of a message of ours that no queue took; its confirmation follows."""

    def confirmed(self, tag: int, multiple: bool, accepted: bool) -> None:
        """Hear that the broker has taken a message, or all up to it, or will not."""

    def closed(self) -> None:
        """Hear that the broker has closed the channel: what is sent on it now would end the connection."""

    def flush(self) -> None:
        """Hear that all that arrived together has been told."""


class _Content:
    """A message whose body has not arrived in full."""

    __slots__ = ("header", "left", "method", "parts", "room")

    def __init__(self, method: bytes, header: bytes, size: int, room: int) -> None:
        self.method = method
        self.header = header
        self.left = size
        self.room = room
        self.parts: list[bytes] = []

    def add(self, part: bytes) -> bool:
        """Take a piece, as much as there is room for; return whether it was the last."""
        self.left -= len(part)
        if self.room > 0:
            self.parts.append(part[: self.room])
            self.room -= len(part)
        return self.left <= 0


class Splitter:
    """Cuts what one connection brings. ``sinks`` maps the number of each watched channel to its sink.

    Of a body longer than ``max_body_bytes`` only so much is kept: its length stands in its header.
    """

    def __init__(self, max_body_bytes: int) -> None:
        self.sinks: dict[int, Sink] = {}
        self.blocked = False
        self._max_body_bytes = max_body_bytes
        self._rest = b""
        self._contents: dict[int, _Content] = {}

    def forget(self, number: int) -> None:
        """Watch a channel no longer: what still comes for it is the library's."""
        self.sinks.pop(number, None)
        self._contents.pop(number, None)

    def feed(self, data: bytes) -> bytes:
        """Cut ``data``, tell the sinks, and return what is not theirs. Raises :class:`FrameError`."""
        if self._rest:
            data = self._rest + data
        sinks, told = self.sinks, set()
        at, kept_from, end = 0, 0, len(data)
        others: list[bytes] = []
        while end - at >= _HEAD + _TAIL:
            kind, number, size = _FRAME.unpack_from(data, at)
            stop = at + _HEAD + size + _TAIL
            if stop > end:
                break
            sink = sinks.get(number)
            if sink is None:
                if number == 0 and kind == _METHOD:
                    self._control(data[at + _HEAD : at + _HEAD + 4])
                at = stop
                continue
            if data[stop - 1] != _END:
                raise FrameError(f"a frame of {size} bytes on channel {number} has no end")
            ends = self._ours(sink, data, at, kind, number, stop)
            if ends == 0:
                break
            if ends > 0:
                told.add(sink)
                if kept_from < at:
                    others.append(data[kept_from:at])
                at = kept_from = ends
            else:
                at = stop
        if kept_from < at:
            others.append(data[kept_from:at])
        self._rest = data[at:]
        for sink in told:
            sink.flush()
        return b"".join(others)

    def _ours(self, sink: Sink, data: bytes, at: int, kind: int, number: int, stop: int) -> int:
        """Tell the sink of what begins at ``at`` and return its end.

        -1: it is the library's. 0: its header frame has not arrived yet.
        """
        if kind == _METHOD:
            method = data[at + 7 : at + 11]
            if method in _CONTENT_METHODS:
                return self._content(sink, data, at + 7, number, stop)
            if method == _ACK:
                sink.confirmed(_U64.unpack_from(data, at + 11)[0], bool(data[at + 19] & 1), True)
                return stop
            if method == _NACK:
                sink.confirmed(_U64.unpack_from(data, at + 11)[0], bool(data[at + 19] & 1), False)
                return stop
            if method == _CLOSE:
                sink.closed()
            return -1
        content = self._contents.get(number)
        if kind != _BODY or content is None:
            return -1
        if content.add(data[at + _HEAD : stop - 1]):
            del self._contents[number]
            _tell(sink, content.method, content.header, b"".join(content.parts))
        return stop

    def _content(self, sink: Sink, data: bytes, method_at: int, number: int, stop: int) -> int:
        """Read a message from its method on; return where it ends, or so far as it has arrived."""
        end = len(data)
        if end - stop < _HEAD + _TAIL:
            return 0
        size: int
        kind, channel, size = _FRAME.unpack_from(data, stop)
        body_at = stop + _HEAD + size + _TAIL
        if body_at > end:
            return 0
        if kind != _HEADER or channel != number or data[body_at - 1] != _END:
            raise FrameError(f"a message on channel {number} has no header")
        header = data[stop + _HEAD : body_at - 1]
        length: int = _U64.unpack_from(header, 4)[0]
        if not length:
            _tell(sink, data[method_at : stop - 1], header, b"")
            return body_at
        if end - body_at >= _HEAD + length + _TAIL and length <= self._max_body_bytes:
            kind, channel, size = _FRAME.unpack_from(data, body_at)
            if size == length and kind == _BODY and channel == number:
                close = body_at + _HEAD + size
                if data[close] != _END:
                    raise FrameError(f"a body on channel {number} has no end")
                _tell(sink, data[method_at : stop - 1], header, data[body_at + _HEAD : close])
                return close + 1
        method = data[method_at : stop - 1]
        self._contents[number] = _Content(method, header, length, self._max_body_bytes)
        return body_at

    def _control(self, method: bytes) -> None:
        if method in (_BLOCKED, _UNBLOCKED):
            self.blocked = method == _BLOCKED


def _tell(sink: Sink, method: bytes, header: bytes, body: bytes) -> None:
    if method[3] == 60:  # deliver: consumer tag, delivery tag, redelivered
        at = 5 + method[4]
        sink.delivered(_U64.unpack_from(method, at)[0], bool(method[at + 8]), header, body)
        return
    code = method[4] << 8 | method[5]  # return: code, text, exchange, routing key
    text, at = _short(method, 6)
    at = _short(method, at)[1]
    key = _short(method, at)[0]
    sink.returned(code, text.decode("utf-8", "replace"), key, header, body)


def _short(data: bytes, at: int) -> tuple[bytes, int]:
    end = at + 1 + data[at]
    return data[at + 1 : end], end


class Route(NamedTuple):
    """Where messages go: their channel, and the method frame that publishes each."""

    number: int
    method: bytes


def route(number: int, exchange: bytes, key: bytes) -> Route:
    """Return the way to a routing key of an exchange; what no queue takes comes back.

    All but direct replies: those the broker returns although it has delivered them. Raises ValueError for
    names longer than AMQP's.
    """
    for name in (exchange, key):
        if len(name) > 255:
            raise ValueError(f"a name of {len(name)} bytes; AMQP has room for 255")
    bits = b"\x00" if key.startswith(_DIRECT_REPLY) else b"\x01"
    payload = b"".join((_PUBLISH, bytes((len(exchange),)), exchange, bytes((len(key),)), key, bits))
    return Route(number, _frame(_METHOD, number, payload))


def message(way: Route, properties: bytes, body: bytes, frame_max: int) -> list[bytes]:
    """Return the pieces of a published message. Raises ValueError for properties larger than a frame."""
    number, method = way
    room = frame_max - FRAME_OVERHEAD
    size = len(_CONTENT) + 8 + len(properties)
    if size > room:
        raise ValueError(f"headers of {size} bytes; the broker takes {room} in one frame")
    length = len(body)
    pieces = [method, _FRAME.pack(_HEADER, number, size), _CONTENT, _U64.pack(length), properties]
    if length <= room:
        if length:
            pieces += (b"\xce", _FRAME.pack(_BODY, number, length), body)
        pieces.append(b"\xce")
        return pieces
    pieces.append(b"\xce")
    for at in range(0, length, room):
        part = body[at : at + room]
        pieces += (_FRAME.pack(_BODY, number, len(part)), part, b"\xce")
    return pieces


def acknowledgement(number: int, tag: int) -> bytes:
    """Return the frame that acknowledges every message of a channel up to ``tag``, which is above 0."""
    return _frame(_METHOD, number, _ACK + _U64.pack(tag) + b"\x01")


def _frame(kind: int, number: int, payload: bytes) -> bytes:
    return b"".join((_FRAME.pack(kind, number, len(payload)), payload, b"\xce"))
