"""A TCP proxy that misbehaves on command and speaks Toxiproxy's HTTP API.

The real Toxiproxy is a Go program; this one needs nothing but Python, so that the same scenarios
run where no container does. Whatever drives the one drives the other: `toxiproxy-python` does.
"""
