"""Memories that were added and deleted: none lost, none twice, none back from the dead."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from agentmem_chaos.checkers.base import Evidence, Finding, Stored, finding
from agentmem_chaos.workloads.history import Op, Outcome

NO_INVENTORY = "the memories could not be listed at the end"
MEMORIES = "memories"
MEMORIES_CLAIM = "no acknowledged memory is lost, none is there twice, none that was deleted"
SEARCH = "search"
SEARCH_CLAIM = "every acknowledged memory is found by search, at once and at the end"
ONCE = "exactly-once"
ONCE_CLAIM = "a tick sent many times under one key is counted once; the counters are exact"


def _by_content(evidence: Evidence) -> dict[str, list[Stored]]:
    found: dict[str, list[Stored]] = defaultdict(list)
    for stored in (evidence.inventory or {}).values():
        for memory in stored:
            found[memory.content].append(memory)
    return found


def memories(evidence: Evidence) -> Finding:
    adds = [op for op in evidence.ops if op.kind == "add"]
    if evidence.inventory is None and adds:
        return finding(MEMORIES, MEMORIES_CLAIM, 0, [], unknown=NO_INVENTORY)
    deletes: dict[str, list[Op]] = defaultdict(list)
    for op in evidence.ops:
        if op.kind == "delete":
            deletes[op.key].append(op)
    found = _by_content(evidence)
    violations = [
        violation
        for op in adds
        for violation in _wrong(op, deletes[op.key], found.get(str(op.value), []))
    ]
    written = {op.value for op in evidence.ops}
    strangers = [content for content in found if content not in written]
    violations += [f"{content!r} is stored, but nobody added it" for content in strangers]
    return finding(MEMORIES, MEMORIES_CLAIM, len(adds), violations)


def _wrong(add: Op, deletes: list[Op], stored: list[Stored]) -> Iterator[str]:
    what = f"{add.key} of {add.owner} (added at {add.invoked_s:.3f} s)"
    if len(stored) > 1:
        yield f"{what} is there {len(stored)} times: {[one.memory_id for one in stored]}"
    if add.outcome is Outcome.FAILED:
        if stored:
            yield f"{what} was refused with {add.code!r} and is there"
        return
    if add.outcome is Outcome.UNKNOWN:
        return
    gone = [op for op in deletes if op.is_ok and op.result]
    maybe_gone = [op for op in deletes if op.outcome is Outcome.UNKNOWN]
    missed = [op for op in deletes if op.is_ok and not op.result]
    if gone and stored:
        yield f"{what} was deleted at {gone[0].returned_s:.3f} s and is back"
    if missed and not gone and not maybe_gone:
        yield f"{what} was acknowledged, and a delete at {missed[0].invoked_s:.3f} s found nothing"
    elif not deletes or all(op.outcome is Outcome.FAILED for op in deletes):
        if not stored:
            yield f"{what} was acknowledged at {add.returned_s:.3f} s and is lost"
        elif stored[0].memory_id != add.result:
            yield f"{what} was acknowledged as {add.result} and is {stored[0].memory_id}"


def search(evidence: Evidence) -> Finding:
    """During the run by the client that added, at the end by one that did not."""
    added = {op.key: op for op in evidence.ops if op.kind == "add" and op.is_ok}
    first_delete: dict[str, float] = {}
    for op in evidence.ops:
        if op.kind == "delete":
            first_delete[op.key] = min(op.invoked_s, first_delete.get(op.key, op.invoked_s))
    looked_at = 0
    violations = []
    for op in evidence.ops:
        add = added.get(op.key)
        if op.kind != "search" or not op.is_ok or add is None:
            continue
        certain = add.returned_s <= op.invoked_s
        if certain and op.returned_s < first_delete.get(op.key, op.returned_s + 1):
            looked_at += 1
            if not op.result:
                violations.append(
                    f"{op.key} of {op.owner}, acknowledged at {add.returned_s:.3f} s, was not "
                    f"found by a search from {op.invoked_s:.3f} to {op.returned_s:.3f} s"
                )
    unknown = ""
    if evidence.searched is None and added:
        unknown = "the searches at the end were not answered"
    for word, was_found in (evidence.searched or {}).items():
        if word in added and word not in first_delete:
            looked_at += 1
            if not was_found:
                violations.append(f"{word} of {added[word].owner} is not found at the end")
    return finding(SEARCH, SEARCH_CLAIM, looked_at, violations, unknown=unknown)


def exactly_once(evidence: Evidence) -> Finding:
    sent: dict[str, list[Op]] = defaultdict(list)
    for op in evidence.ops:
        if op.kind in ("tick", "again"):
            sent[op.key].append(op)
    if evidence.inventory is None and sent:
        return finding(ONCE, ONCE_CLAIM, 0, [], unknown=NO_INVENTORY)
    found = _by_content(evidence)
    violations = []
    expected: Counter[str] = Counter()
    counted: Counter[str] = Counter()
    uncertain: Counter[str] = Counter()
    for text, ops in sent.items():
        owner = ops[0].owner
        stored = found.get(text, [])
        counted[owner] += len(stored)
        ids = {str(answer) for op in ops if op.is_ok for answer in op.result}
        if len(stored) > 1:
            violations.append(f"{text!r} of {owner} is counted {len(stored)} times")
        if len(ids) > 1:
            violations.append(f"{text!r} of {owner} was answered with {len(ids)} ids: {ids}")
        if ids:
            expected[owner] += 1
            if not stored:
                violations.append(f"{text!r} of {owner} was acknowledged and is not counted")
            elif stored[0].memory_id not in ids:
                violations.append(f"{text!r} of {owner} is {stored[0].memory_id}, not {ids}")
        elif any(op.outcome is Outcome.UNKNOWN for op in ops):
            uncertain[owner] += 1
        elif stored:
            violations.append(f"{text!r} of {owner} was refused every time and is counted")
    for owner, count in counted.items():
        low, high = expected[owner], expected[owner] + uncertain[owner]
        if not low <= count <= high:
            violations.append(f"{owner} counts {count}, and should count {low} to {high}")
    return finding(ONCE, ONCE_CLAIM, len(sent), violations)
