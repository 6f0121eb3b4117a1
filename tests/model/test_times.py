"""Times: written in one way, read in many."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentmem_cluster.errors import InvalidField
from agentmem_node.model.times import TIME_MS_MAX, TIME_MS_MIN, format_ms, parse_time_ms

times = st.integers(TIME_MS_MIN, TIME_MS_MAX)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@given(times)
def test_a_written_time_reads_back(ms: int) -> None:
    assert parse_time_ms(format_ms(ms)) == ms


@given(times)
def test_a_written_time_is_what_datetime_says(ms: int) -> None:
    moment = EPOCH + timedelta(milliseconds=ms)
    expected = moment.strftime("%m-%dT%H:%M:%S") + f".{moment.microsecond // 1000:03d}Z"
    assert format_ms(ms) == f"{moment.year:04d}-{expected}"


@given(times, times)
def test_written_times_sort_as_text(a: int, b: int) -> None:
    assert (format_ms(a) < format_ms(b)) == (a < b)


@given(
    st.datetimes(min_value=datetime(2, 1, 1), max_value=datetime(9998, 1, 1)),
    st.integers(-23 * 60, 23 * 60),
)
def test_a_time_with_a_zone_is_the_same_moment(moment: datetime, minutes: int) -> None:
    sign = "-" if minutes < 0 else "+"
    zone = f"{sign}{abs(minutes) // 60:02d}:{abs(minutes) % 60:02d}"
    utc = moment.replace(tzinfo=UTC) - timedelta(minutes=minutes)
    text = moment.isoformat(timespec="microseconds") + zone
    assert parse_time_ms(text) == (utc - EPOCH) // timedelta(milliseconds=1)


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("2026-01-31", "2026-01-31T00:00:00.000Z"),
        ("2026-01-31T09:30", "2026-01-31T09:30:00.000Z"),
        ("2026-01-31 09:30:05", "2026-01-31T09:30:05.000Z"),
        ("2026-01-31t09:30:05z", "2026-01-31T09:30:05.000Z"),
        ("2026-01-31T09:30:05.1Z", "2026-01-31T09:30:05.100Z"),
        ("2026-01-31T09:30:05,123456789Z", "2026-01-31T09:30:05.123Z"),
        ("2026-01-31T09:30:05+0130", "2026-01-31T08:00:05.000Z"),
        ("1969-12-31T23:59:59.999Z", "1969-12-31T23:59:59.999Z"),
        ("2016-12-31T23:59:60Z", "2016-12-31T23:59:59.000Z"),
        ("  2026-01-31  ", "2026-01-31T00:00:00.000Z"),
    ],
)
def test_usual_spellings_are_read(text: str, same: str) -> None:
    assert format_ms(parse_time_ms(text)) == same


@pytest.mark.parametrize(
    "text",
    [
        "",
        "yesterday",
        "2026",
        "2026-13-01",
        "2026-02-30",
        "2026-01-31T24:00:00Z",
        "2026-01-31T09:60:00Z",
        "2026-01-31T09:30:61Z",
        "2026-01-31T09:30:05+24:00",
        "2026-01-31T09:30:05+01:60",
        "0001-01-01T00:00:00+01:00",
        "9999-12-31T23:59:59-01:00",
        "0000-01-01",
        "1769848200",
        "٢٠٢٦-01-31",
        "2026-01-31\n09:30",
    ],
)
def test_what_is_no_time_is_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidField, match="created_at") as refused:
        parse_time_ms(text, "created_at")
    assert "2026-01-31" in refused.value.hint


@given(st.text(max_size=40))
def test_any_text_is_a_time_or_refused(text: str) -> None:
    try:
        assert TIME_MS_MIN <= parse_time_ms(text) <= TIME_MS_MAX
    except InvalidField:
        pass


@pytest.mark.parametrize("ms", [TIME_MS_MIN - 1, TIME_MS_MAX + 1])
def test_a_time_outside_the_calendar_is_not_written(ms: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        format_ms(ms)
