"""Searches: from a request to one order of results, whatever number of shards holds them.

A search that names a user concerns one shard, which ranks by itself. Any other is asked of one
replica of every shard in two rounds: first the statistics that ranking needs (how many memories,
how many of them with a word), then each shard's candidates, scored with the statistics of all.
So one shard and sixteen give the same order; what the second round costs, `benchmarks` measures.
"""

from __future__ import annotations
