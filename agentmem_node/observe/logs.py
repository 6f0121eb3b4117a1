"""Logging to stderr: a line for people on a terminal, a JSON object for machines."""

from __future__ import annotations

import datetime
import logging
import re
import sys
from typing import TextIO

import msgspec

# API keys must not get into a log, whatever else goes wrong.
_SECRET = re.compile(r"\b(am_[a-z2-7]{8})[a-z2-7]{8,}")
_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}


def without_secrets(text: str) -> str:
    """`text` with the greater part of each API key replaced.

    >>> without_secrets("key am_abcdefghijklmnopqrstuvwxyz234567 refused")
    'key am_abcdefgh... refused'
    """
    return _SECRET.sub(r"\1...", text) if "am_" in text else text


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, message, and the `fields` of the record."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields = getattr(record, "fields", None)
        if isinstance(fields, dict):
            line |= fields
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return without_secrets(msgspec.json.encode(line, enc_hook=str).decode())


class TextFormatter(logging.Formatter):
    """`12:30:00.123 warning agentmem.http  message  key=value ...`"""

    def format(self, record: logging.LogRecord) -> str:
        clock = _time(record)[11:23]
        text = f"{clock} {record.levelname.lower():7} {record.name}  {record.getMessage()}"
        fields = getattr(record, "fields", None)
        if isinstance(fields, dict):
            text += "  " + " ".join(f"{name}={value}" for name, value in fields.items())
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return without_secrets(text)


def _time(record: logging.LogRecord) -> str:
    at = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def set_up_logging(level: str, format_: str, stream: TextIO | None = None) -> None:
    """Log `level` and above to `stream` (stderr); `format_` is auto, text or json.

    Libraries are kept to warnings: at info they tell what concerns them, not the operator.
    """
    stream = sys.stderr if stream is None else stream
    handler = logging.StreamHandler(stream)
    as_text = format_ == "text" or (format_ == "auto" and stream.isatty())
    handler.setFormatter(TextFormatter() if as_text else JsonFormatter())
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(max(_LEVELS["warning"], _LEVELS[level]))
    logging.getLogger("agentmem").setLevel(_LEVELS[level])
