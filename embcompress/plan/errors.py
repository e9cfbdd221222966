"""What is wrong with a plan."""

from __future__ import annotations


class PlanError(ValueError):
    """A plan that contradicts itself, or JSON that is not a plan."""


def require(condition: bool, message: str) -> None:
    """Raise :class:`PlanError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise PlanError(message)
