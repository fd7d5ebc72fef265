"""Checks of values that more than one part of a configuration holds."""

from __future__ import annotations


def check_amount(amount: float) -> None:
    """Raises ValueError for an amount outside [0, 1)."""
    if not 0 <= amount < 1:
        raise ValueError(f"amount={amount} is outside [0, 1): give the fraction to remove, such as 0.5")
