"""Times: RFC 3339 outside, milliseconds since 1970-01-01 UTC inside.

Written times are always UTC with milliseconds, so that they sort as text. Read times may be a
date, lack seconds or a zone (then UTC), or have any fraction (cut to milliseconds).
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from agentmem_cluster.errors import InvalidField

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_DAY_MS = 86_400_000
# Years 0001 to 9999: what RFC 3339 can write.
TIME_MS_MIN = -62_135_596_800_000
TIME_MS_MAX = 253_402_300_799_999

_TIME = re.compile(
    r"([0-9]{4})-([0-9]{2})-([0-9]{2})"
    r"(?:[T ]([0-9]{2}):([0-9]{2})(?::([0-9]{2})(?:[.,]([0-9]{1,9}))?)?"
    r"\s?(Z|[+-][0-9]{2}:?[0-9]{2})?)?",
    re.IGNORECASE,
)
# The date part of the last day formatted: nearly all times of a batch fall on one day.
_last_day = -1
_last_date = ""


def format_ms(ms: int) -> str:
    """`2026-01-31T09:30:00.000Z`. Raises ValueError outside the years 1 to 9999.

    >>> format_ms(0)
    '1970-01-01T00:00:00.000Z'
    """
    global _last_day, _last_date
    if not TIME_MS_MIN <= ms <= TIME_MS_MAX:
        raise ValueError(f"{ms} ms is outside the years 1 to 9999")
    day, rest = divmod(ms, _DAY_MS)
    date = _last_date
    if day != _last_day:
        date = (_EPOCH + timedelta(days=day)).date().isoformat()
        _last_day, _last_date = day, date
    seconds, millis = divmod(rest, 1000)
    minutes, second = divmod(seconds, 60)
    hour, minute = divmod(minutes, 60)
    return f"{date}T{hour:02d}:{minute:02d}:{second:02d}.{millis:03d}Z"


def parse_time_ms(text: str, field: str = "time") -> int:
    """Milliseconds since 1970 of an RFC 3339 time or a date. Raises InvalidField, naming `field`.

    >>> parse_time_ms("2026-01-31T10:30:00+01:00")
    1769848200000
    """
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise _invalid(text, field)
    year, month, day, hour, minute, second, fraction, zone = match.groups()
    # A leap second has no millisecond of its own: 23:59:60 is read as the second before.
    whole_second = min(int(second or 0), 59) if second != "60" else 59
    try:
        moment = datetime(
            int(year),
            int(month),
            int(day),
            int(hour or 0),
            int(minute or 0),
            whole_second if second is None or int(second) <= 60 else int(second),
            tzinfo=UTC,
        )
    except ValueError:
        raise _invalid(text, field) from None
    ms = (moment - _EPOCH) // timedelta(milliseconds=1)
    if fraction is not None:
        ms += int(fraction.ljust(3, "0")[:3])
    if zone is not None and zone not in ("Z", "z"):
        hours, minutes = int(zone[1:3]), int(zone[-2:])
        if hours > 23 or minutes > 59:
            raise _invalid(text, field)
        offset = (hours * 60 + minutes) * 60_000
        ms += -offset if zone[0] == "+" else offset
    if not TIME_MS_MIN <= ms <= TIME_MS_MAX:
        raise _invalid(text, field)
    return ms


def _invalid(text: str, field: str) -> InvalidField:
    shown = text if len(text) <= 64 else text[:61] + "..."
    return InvalidField(
        f"`{field}` is not a time: {shown!r}.",
        hint="Write 2026-01-31T09:30:00Z (RFC 3339) or a date such as 2026-01-31.",
        field=field,
    )
