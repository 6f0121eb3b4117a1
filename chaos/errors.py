"""What can keep a chaos run from happening. The message says what, why and what to do."""

from __future__ import annotations


class ChaosError(Exception):
    """Printed as it is; no run took place, or it could not go on."""
