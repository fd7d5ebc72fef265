"""Matrices that hardly a token of the calibration text came to (experts), which are pruned by magnitude."""

from __future__ import annotations

# Tokens of the calibration text under which an expert's inputs say more of those tokens than of the expert.
FEW_TOKENS = 16


def warning_of(unseen: list[str], matrices: int) -> list[str]:
    """A warning of those of so many matrices in scope, or none where all were seen."""
    if not unseen:
        return []
    return [
        f"{len(unseen)} of {matrices} matrices ({', '.join(unseen[:3])}{', ...' * (len(unseen) > 3)}) saw fewer than "
        f"{FEW_TOKENS} tokens of the calibration text, or have no gradient there, and were pruned by magnitude: give "
        "more text (dataset.calibration.n_samples)"
    ]
