"""Checks of values that more than one part of a configuration holds."""

from __future__ import annotations

AUTOCAST = ("auto", "bfloat16", "none")  # auto: bfloat16 where the hardware multiplies it


def check_autocast(autocast: str) -> None:
    """Raises ValueError for what is no setting of a key `autocast`."""
    if autocast not in AUTOCAST:
        raise ValueError(f"autocast={autocast!r} is not one of {', '.join(AUTOCAST)}")


def check_amount(amount: float) -> None:
    """Raises ValueError for an amount outside [0, 1)."""
    if not 0 <= amount < 1:
        raise ValueError(f"amount={amount} is outside [0, 1): give the fraction to remove, such as 0.5")
