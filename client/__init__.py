"""The Python client of AgentMem: `Client` blocks, `AsyncClient` awaits, and both think alike.

from agentmem_client import Client

with Client("http://127.0.0.1:7700") as memory:
    memory.add("Ana likes oolong tea", user_id="ana")
    for found in memory.search("what does Ana drink?", user_id="ana"):
        print(found.score, found.content)
"""

from agentmem_client.aio import AsyncClient
from agentmem_client.blocking import Client
from agentmem_client.errors import (
    AgentMemError,
    BadRequest,
    ClientClosed,
    Conflict,
    ConnectionFailed,
    DeadlineExceeded,
    DiskFull,
    Forbidden,
    InvalidCursor,
    InvalidField,
    InvalidFilter,
    MapMoved,
    MethodNotAllowed,
    ModelUnavailable,
    NoQuorum,
    NotFound,
    NotLeader,
    Overloaded,
    ProtocolError,
    RequestRefused,
    ServerError,
    ShuttingDown,
    StateDamaged,
    TemporarilyUnavailable,
    TooLarge,
    Unauthorized,
    Unavailable,
    WrongShard,
)
from agentmem_client.policy import Policy
from agentmem_client.results import (
    Added,
    AddResult,
    Deleted,
    DeleteResult,
    Found,
    Health,
    HistoryEntry,
    Memory,
    Page,
    SearchResult,
)
from agentmem_client.topology import Shard, Topology

__all__ = [
    "AddResult",
    "Added",
    "AgentMemError",
    "AsyncClient",
    "BadRequest",
    "Client",
    "ClientClosed",
    "Conflict",
    "ConnectionFailed",
    "DeadlineExceeded",
    "DeleteResult",
    "Deleted",
    "DiskFull",
    "Forbidden",
    "Found",
    "Health",
    "HistoryEntry",
    "InvalidCursor",
    "InvalidField",
    "InvalidFilter",
    "MapMoved",
    "Memory",
    "MethodNotAllowed",
    "ModelUnavailable",
    "NoQuorum",
    "NotFound",
    "NotLeader",
    "Overloaded",
    "Page",
    "Policy",
    "ProtocolError",
    "RequestRefused",
    "SearchResult",
    "ServerError",
    "Shard",
    "ShuttingDown",
    "StateDamaged",
    "TemporarilyUnavailable",
    "TooLarge",
    "Topology",
    "Unauthorized",
    "Unavailable",
    "WrongShard",
]
