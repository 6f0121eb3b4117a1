"""Dates as search terms: "what did we plan in July 2023?" prefers memories of that month.

A memory has three terms of the day that it was made (or back-dated to): its year, its month and
its day. A question has those that it names. They are ordinary terms to the ranking, as rare as
their month is among the owner's memories, and start with "@", which no word does.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Final

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_DAY_MS: Final = 86_400_000

_MONTHS: Final = {
    name: number
    for number, names in enumerate(
        (
            "january jan",
            "february feb",
            "march mar",
            "april apr",
            "may",
            "june jun",
            "july jul",
            "august aug",
            "september sep sept",
            "october oct",
            "november nov",
            "december dec",
        ),
        1,
    )
    for name in names.split()
}
_MONTH: Final = rf"(?P<month>{'|'.join(sorted(_MONTHS, key=len, reverse=True))})\b\.?"
_DAY: Final = r"(?P<day>[12]\d|3[01]|0?[1-9])(?:st|nd|rd|th)?"
_YEAR: Final = r"(?:,?\s+(?P<year>(?:19|20)\d\d)\b)"

# "may", "march" and "mar" are words of their own: only beside a number, or after one of these.
_BEFORE_A_MONTH: Final = (
    "in|of|during|since|until|till|by|before|after|last|this|next|early|mid|late|around"
    "|throughout|from|between"
)
_PATTERNS: Final = tuple(
    re.compile(pattern)
    for pattern in (
        rf"\b{_DAY}\s+(?:of\s+)?\b{_MONTH}{_YEAR}?",  # 12 July 2023, 12th of July
        rf"\b{_MONTH}\s+{_DAY}\b{_YEAR}?",  # July 12, July 12th, 2023
        rf"\b{_MONTH}{_YEAR}",  # July 2023
        rf"\b(?:{_BEFORE_A_MONTH})[\s-]+{_MONTH}",
        r"\b(?P<month>january|february|april|june|july|august|september|october|november"
        r"|december)\b",
    )
)
_ISO: Final = re.compile(r"\b((?:19|20)\d\d)-(0[1-9]|1[0-2])(?:-(0[1-9]|[12]\d|3[01]))?\b")
# Any number of this form: one that is no year of any memory is unknown, and ignored.
_BARE_YEAR: Final = re.compile(r"\b(?:19|20)\d\d\b")
# Most questions hold none of these: one scan spares them the patterns.
_WORTH_A_LOOK: Final = re.compile(
    r"\b(?:(?:19|20)\d\d\b|jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)"
)


def document_terms(created_ms: int) -> tuple[str, str, str]:
    """Year, month and day of a memory, in UTC.

    >>> document_terms(1_689_120_000_000)
    ('@y2023', '@m7', '@d7-12')
    """
    return _terms_of_day(created_ms // _DAY_MS)


@lru_cache(maxsize=1024)
def _terms_of_day(day: int) -> tuple[str, str, str]:
    date = _EPOCH + timedelta(days=day)
    return f"@y{date.year}", f"@m{date.month}", f"@d{date.month}-{date.day}"


def query_terms(text: str) -> list[str]:
    """What a question says about time, each term once; mostly nothing.

    >>> query_terms("Where did we eat on 12 July 2023?")
    ['@m7', '@d7-12', '@y2023']
    >>> query_terms("You may march on.")
    []
    """
    text = text.lower()
    if _WORTH_A_LOOK.search(text) is None:
        return []
    found: dict[str, None] = {}  # a set that keeps the order
    for year, month, day in _ISO.findall(text):
        found[f"@y{year}"] = found[f"@m{int(month)}"] = None
        if day:
            found[f"@d{int(month)}-{int(day)}"] = None
    for pattern in _PATTERNS:
        for match in pattern.finditer(text):
            parts = match.groupdict()
            month = _MONTHS[parts["month"]]
            found[f"@m{month}"] = None
            if parts.get("day"):
                found[f"@d{month}-{int(parts['day'])}"] = None
    for year in _BARE_YEAR.findall(text):
        found[f"@y{year}"] = None
    return list(found)
