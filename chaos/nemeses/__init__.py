"""Faults: each strikes, holds for a while, and is undone whatever happened in between."""
