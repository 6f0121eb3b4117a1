"""AgentMem beside a chroma server: searches within owners, and adds with vectors.

    python -m benchmarks.vs_chroma [--scale 0.1] [--json FILE]

Both servers get the same 100,000 x 384 vectors, owners of 100, 1,000 and 10,000 memories, and the
same requests from the same load generator, one after the other in one run. Searches: AgentMem
answers hybrid searches (words and vector, linearizable, whole memories in the answer) on one node;
chroma its filtered vector query. Adds: AgentMem on three nodes, each memory replicated three times
and synced before the answer; chroma unreplicated.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from agentmem_cluster.ring import slot_of
from benchmarks import servers
from benchmarks.dataset import (
    Dataset,
    body,
    exact_top,
    floats,
    make,
    queries,
    query_vector,
)
from benchmarks.load import Result, http_request, median_run, run
from benchmarks.report import Row, benchmark_main

_CHROMA = "/api/v2/tenants/default_tenant/databases/default_database/collections"
_QUERIES = 400
_TOP_K = 10
_BATCH = 100
_IN_FLIGHT = 64
_ROUNDS = 3


# -- the same work in each server's words -----------------------------------------------------


def agentmem_item(data: Dataset, row: int) -> dict[str, Any]:
    return {
        "content": data.texts[row],
        "user_id": data.owners[row],
        "vector": floats(data.vectors[row]),
        "metadata": {"row": row},
    }


def agentmem_search(data: Dataset, owner: str, row: int) -> bytes:
    words = " ".join(data.texts[row].split()[:4])
    document = {
        "query": words,
        "vector": floats(query_vector(data, row, row)),
        "user_id": owner,
        "top_k": _TOP_K,
    }
    return http_request("POST", "/api/v1/memories/search", body(document))


def vector_only_search(data: Dataset, owner: str, row: int) -> bytes:
    document = {
        "vector": floats(query_vector(data, row, row)),
        "user_id": owner,
        "top_k": _TOP_K,
        "legs": ["vector"],
    }
    return http_request("POST", "/api/v1/memories/search", body(document))


def chroma_search(data: Dataset, collection: str, owner: str, row: int) -> bytes:
    document = {
        "query_embeddings": [floats(query_vector(data, row, row))],
        "n_results": _TOP_K,
        "where": {"owner": owner},
        "include": ["documents", "metadatas", "distances"],
    }
    return http_request("POST", f"{_CHROMA}/{collection}/query", body(document))


def chroma_add(data: Dataset, collection: str, rows: Sequence[int]) -> bytes:
    document = {
        "ids": [str(row) for row in rows],
        "embeddings": [floats(data.vectors[row]) for row in rows],
        "documents": [data.texts[row] for row in rows],
        "metadatas": [{"owner": data.owners[row]} for row in rows],
    }
    return http_request("POST", f"{_CHROMA}/{collection}/add", body(document))


def chunks(rows: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def new_collection(server: servers.Server, name: str) -> str:
    made = servers.request("POST", server.url() + _CHROMA, {"name": name, "get_or_create": True})
    return str(made["id"])


# -- searches ---------------------------------------------------------------------------------


async def load_agentmem(port: int, data: Dataset) -> Result:
    requests = [
        http_request(
            "POST",
            "/api/v1/memories/batch",
            body({"memories": [agentmem_item(data, row) for row in rows]}),
        )
        for rows in chunks(range(len(data.texts)), _BATCH)
    ]
    return await run("127.0.0.1", port, requests, seconds=900, in_flight=8, count=len(requests))


async def load_chroma(port: int, data: Dataset, collection: str) -> Result:
    requests = [
        chroma_add(data, collection, rows) for rows in chunks(range(len(data.texts)), _BATCH)
    ]
    return await run("127.0.0.1", port, requests, seconds=900, in_flight=4, count=len(requests))


def recall(
    data: Dataset, picks: Sequence[tuple[str, int]], found: Sequence[Sequence[int]]
) -> float:
    """Share of the exact ten nearest that were found."""
    shares = []
    for (owner, row), rows in zip(picks, found, strict=True):
        exact = set(exact_top(data, owner, query_vector(data, row, row), _TOP_K))
        shares.append(len(exact & set(rows)) / len(exact))
    return sum(shares) / len(shares)


def ask(port: int, request: bytes) -> Any:
    """One prepared request, outside the clock."""

    async def one() -> Any:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
        answer = await asyncio.wait_for(reader.read(), 60)
        writer.close()
        head, _, text = answer.partition(b"\r\n\r\n")
        if b"chunked" in head.lower():
            text = text.split(b"\r\n", 1)[1].rsplit(b"\r\n0\r\n", 1)[0]
        return json.loads(text)

    return asyncio.run(one())


def measure(port: int, requests: list[bytes], seconds: float, in_flight: int) -> Result:
    runs = [
        asyncio.run(
            run("127.0.0.1", port, requests, seconds=seconds, in_flight=in_flight, warm_up_s=1.0)
        )
        for _ in range(_ROUNDS)
    ]
    return median_run(runs)


def searches(data: Dataset, progress: Callable[[str], None]) -> list[Row]:
    rows: list[Row] = []
    ours: dict[int, tuple[Result, float]] = {}
    theirs: dict[int, tuple[Result, float]] = {}
    with servers.agentmem_node() as node:
        progress("loading AgentMem")
        port = node.ports[0]
        loaded = asyncio.run(load_agentmem(port, data))
        if loaded.errors:
            raise RuntimeError(f"loading failed: {loaded.first_error}")
        for size in (100, 1_000, 10_000):
            progress(f"AgentMem, owners of {size:,}")
            picks = queries(data, size, _QUERIES)
            found = [
                [
                    hit["metadata"]["row"]
                    for hit in ask(port, vector_only_search(data, *p))["results"]
                ]
                for p in picks[:100]
            ]
            requests = [agentmem_search(data, *p) for p in picks]
            ours[size] = (measure(port, requests, 4.0, 16), recall(data, picks[:100], found))
        sustained = ours[1_000][0].rate * 0.7
        progress("AgentMem, open loop")
        open_loop = asyncio.run(
            run(
                "127.0.0.1",
                port,
                [agentmem_search(data, *p) for p in queries(data, 1_000, _QUERIES)],
                seconds=5.0,
                in_flight=64,
                rate=sustained,
            )
        )
    with servers.chroma() as chroma:
        progress("loading chroma")
        port = chroma.ports[0]
        collection = new_collection(chroma, "searches")
        loaded = asyncio.run(load_chroma(port, data, collection))
        if loaded.errors:
            raise RuntimeError(f"loading chroma failed: {loaded.first_error}")
        for size in (100, 1_000, 10_000):
            progress(f"chroma, owners of {size:,}")
            picks = queries(data, size, _QUERIES)
            requests = [chroma_search(data, collection, *p) for p in picks]
            found = [[int(i) for i in ask(port, request)["ids"][0]] for request in requests[:50]]
            theirs[size] = (measure(port, requests, 4.0, 16), recall(data, picks[:50], found))
    for size in (100, 1_000, 10_000):
        (us, our_recall), (them, their_recall) = ours[size], theirs[size]
        rows.append(
            Row(
                f"hybrid searches/s within an owner of {size:,}, one node",
                us.rate,
                "1/s",
                target=6_000 if size == 1_000 else None,
                detail={**us.summary(), "recall_at_10": our_recall},
            )
        )
        rows.append(
            Row(
                f"... times chroma's filtered rate ({them.rate:,.0f}/s, recall {their_recall:.3f})",
                us.rate / them.rate,
                "x",
                target=100 if size == 1_000 else None,
                detail={**them.summary(), "recall_at_10": their_recall},
            )
        )
        rows.append(
            Row(f"... recall@10 of the vector leg, owner of {size:,}", our_recall, "", target=0.99)
        )
    rows.append(
        Row(
            f"open loop at {sustained:,.0f}/s: p99",
            open_loop.percentile(0.99),
            "ms",
            detail=open_loop.summary(),
        )
    )
    return rows


# -- adds -------------------------------------------------------------------------------------


def by_leader(server: servers.Server, owners: Sequence[str]) -> list[int]:
    """The port of the node that leads each owner's shard: what a cluster-aware client does."""
    view = servers.request("GET", server.url() + "/api/v1/cluster")
    ports = {name: int(node["http"].rsplit(":", 1)[1]) for name, node in view["nodes"].items()}
    ranges = sorted(
        (first, last, shard["leader"])
        for shard in view["shards"].values()
        for first, last in shard["slots"]
    )
    return [
        next(ports[leader] for first, last, leader in reversed(ranges) if slot >= first)
        for slot in (slot_of("default", f"user:{owner}") for owner in owners)
    ]


async def add_to_cluster(
    requests: dict[int, list[bytes]], in_flight: int, count_each: Callable[[list[bytes]], int]
) -> Result:
    """All nodes at once, each with its share of the requests under way."""
    total = sum(len(r) for r in requests.values())
    results = await asyncio.gather(
        *(
            run(
                "127.0.0.1",
                port,
                share,
                seconds=300,
                in_flight=max(1, round(in_flight * len(share) / total)),
                count=count_each(share),
            )
            for port, share in requests.items()
        )
    )
    return Result(
        max(r.seconds for r in results),
        sum(r.answered for r in results),
        sum(r.errors for r in results),
        [latency for r in results for latency in r.latencies_ms],
        None,
        next((r.first_error for r in results if r.first_error), ""),
    )


def adds(data: Dataset, progress: Callable[[str], None]) -> list[Row]:
    total = len(data.texts)
    batch_rows = list(range(min(20_000, total // 2)))
    single_rows = list(range(len(batch_rows), min(total, len(batch_rows) + 6_000)))
    # A batch is what one user's application sends: memories of one owner.
    ordered = sorted(batch_rows, key=lambda row: data.owners[row])
    batches = list(chunks(ordered, _BATCH))
    with servers.agentmem_cluster(3) as cluster:
        progress("adds to AgentMem, three nodes")
        leaders = by_leader(cluster, [data.owners[rows[0]] for rows in batches])
        shares: dict[int, list[bytes]] = {}
        for port, rows in zip(leaders, batches, strict=True):
            document = {"memories": [agentmem_item(data, row) for row in rows]}
            shares.setdefault(port, []).append(
                http_request("POST", "/api/v1/memories/batch", body(document))
            )
        batched_us = asyncio.run(add_to_cluster(shares, 12, len))
        leaders = by_leader(cluster, [data.owners[row] for row in single_rows])
        shares = {}
        for port, row in zip(leaders, single_rows, strict=True):
            shares.setdefault(port, []).append(
                http_request("POST", "/api/v1/memories", body(agentmem_item(data, row)))
            )
        single_us = asyncio.run(add_to_cluster(shares, _IN_FLIGHT, len))
        one = {port: share[:400] for port, share in list(shares.items())[:1]}
        lone_us = asyncio.run(add_to_cluster(one, 1, len))
    with servers.chroma() as chroma:
        progress("adds to chroma")
        port = chroma.ports[0]
        collection = new_collection(chroma, "adds")
        requests = [chroma_add(data, collection, rows) for rows in batches]
        batched_them = asyncio.run(
            run("127.0.0.1", port, requests, seconds=300, in_flight=4, count=len(requests))
        )
        some = single_rows[:2_000]
        requests = [chroma_add(data, collection, [row]) for row in some]
        single_them = asyncio.run(
            run("127.0.0.1", port, requests, seconds=300, in_flight=_IN_FLIGHT, count=len(requests))
        )
    for name, result in (
        ("AgentMem batches", batched_us),
        ("AgentMem singles", single_us),
        ("AgentMem one in flight", lone_us),
        ("chroma batches", batched_them),
        ("chroma singles", single_them),
    ):
        if result.errors:
            raise RuntimeError(f"{name}: {result.errors} errors, first: {result.first_error}")
    return [
        Row(
            "adds/s in batches of 100, three copies, synced",
            batched_us.rate * _BATCH,
            "1/s",
            detail=batched_us.summary(),
        ),
        Row(
            f"... times chroma's unreplicated rate ({batched_them.rate * _BATCH:,.0f}/s)",
            batched_us.rate / batched_them.rate,
            "x",
            target=3,
            detail=batched_them.summary(),
        ),
        Row(
            "adds/s one by one, 64 in flight, three copies, synced",
            single_us.rate,
            "1/s",
            detail=single_us.summary(),
        ),
        Row(
            f"... times chroma's unreplicated rate ({single_them.rate:,.0f}/s)",
            single_us.rate / single_them.rate,
            "x",
            target=5,
            detail=single_them.summary(),
        ),
        Row(
            "one write in flight, three copies, synced: p50",
            lone_us.percentile(0.5),
            "ms",
            target=5,
            lower_is_better=True,
            detail=lone_us.summary(),
        ),
    ]


def measure_all(scale: float, progress: Callable[[str], None]) -> list[Row]:
    data = make(scale)
    return [*searches(data, progress), *adds(data, progress)]


if __name__ == "__main__":
    benchmark_main("AgentMem and chroma", measure_all)
