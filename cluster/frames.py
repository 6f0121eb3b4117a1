"""Length-prefixed msgpack frames: four bytes of length, big-endian, then one value.

Whatever bytes arrive, the decoder returns values or raises BadFrame: it never allocates more
than what was received, nor more than its cap.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import msgpack

LENGTH_BYTES: Final = 4
_LENGTH: Final = struct.Struct(">I")


class BadFrame(ValueError):
    """The stream cannot be read any further; the connection must go."""


def encode_frame(value: Any, frame_bytes_max: int) -> bytes:
    """Raises ValueError for a value that is too large or that msgpack does not know."""
    try:
        body: bytes = msgpack.packb(value)
    except (TypeError, OverflowError) as wrong:
        raise ValueError(f"it cannot be a frame: {wrong}") from wrong
    if len(body) > frame_bytes_max:
        raise ValueError(f"a frame of {len(body)} bytes is over the limit of {frame_bytes_max}")
    return _LENGTH.pack(len(body)) + body


def decode_value(body: bytes | bytearray | memoryview) -> Any:
    """Raises BadFrame. Depth is bounded by msgpack (1,024), lengths by what was received."""
    try:
        return msgpack.unpackb(body, strict_map_key=False, ext_hook=_no_extensions)
    except (ValueError, TypeError, RecursionError, msgpack.UnpackException) as wrong:
        raise BadFrame(f"a frame is not msgpack: {wrong}") from wrong


def _no_extensions(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code}")


class FrameDecoder:
    """Bytes in, values out. `frame_bytes_max` may be raised once the peer is known."""

    def __init__(self, frame_bytes_max: int) -> None:
        self.frame_bytes_max = frame_bytes_max
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """The values that `data` completes. Raises BadFrame; the decoder is of no use after."""
        return [value for value, _ in self.feed_sized(data)]

    def feed_sized(self, data: bytes) -> list[tuple[Any, int]]:
        """Like `feed`, each value with its size in bytes."""
        if self._rest:
            self._rest += data
            if len(self._rest) < self._needed():
                return []
            data = bytes(self._rest)
            self._rest.clear()
        values: list[tuple[Any, int]] = []
        at, end = 0, len(data)
        view = memoryview(data)
        while end - at >= LENGTH_BYTES:
            (size,) = _LENGTH.unpack_from(data, at)
            if size > self.frame_bytes_max:
                raise BadFrame(f"a frame of {size} bytes is over the limit")
            stop = at + LENGTH_BYTES + size
            if stop > end:
                break
            values.append((decode_value(view[at + LENGTH_BYTES : stop]), size))
            at = stop
        self._rest += view[at:]
        return values

    def _needed(self) -> int:
        if len(self._rest) < LENGTH_BYTES:
            return LENGTH_BYTES
        return LENGTH_BYTES + int(_LENGTH.unpack_from(self._rest)[0])
