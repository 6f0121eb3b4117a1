"""The link between nodes: one mutually authenticated connection per pair, Raft and calls on it."""
