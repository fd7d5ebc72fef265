"""method=active_experts: sends each token to fewer experts of a mixture; no weight changes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prune_lab.errors import Refused
from prune_lab.methods.base import Method
from prune_lab.models.anatomy import ACTIVE
from prune_lab.models.families import FAMILIES
from prune_lab.pruning.pruned import Pruned

if TYPE_CHECKING:
    from prune_lab.models.active_experts import TopK
    from prune_lab.models.anatomy import Anatomy
    from prune_lab.pruning.calibration import Calibrator

_NOTE = (
    "no weight is gone, each token goes to fewer experts: params/active and compute/macs_per_token say what that saves"
)


@dataclass(frozen=True)
class ActiveExperts(Method):
    """A lower top k: each token goes to the best of the experts that it went to, at least one; shared experts stay.

    It is a field of the config, found by its effect (models/active_experts.py).
    """

    def check(self, config: Any, amounts: Iterable[float]) -> None:
        """Raises Refused for a family that has no experts."""
        if config.model_type in FAMILIES:
            raise Refused(f"method=active_experts: {config.model_type} models have no experts; give method=structured")

    def check_model(self, anatomy: Anatomy, amounts: Iterable[float]) -> None:
        """Raises Refused where the experts of a token are not known, or an amount leaves what the router cannot do."""
        from prune_lab.models.active_experts import top_k_of_model

        top = top_k_of_model(anatomy.model)
        for amount in amounts:
            self._count_to_keep(anatomy, top, amount)

    def prune(self, anatomy: Anatomy, amount: float, seed: int, calibrator: Calibrator | None = None) -> Pruned:
        """Lowers the number of experts of a token in the config."""
        from prune_lab.models.active_experts import top_k_of_model
        from prune_lab.models.resize import dense_count
        from prune_lab.pruning.surgery import set_active_experts

        top = top_k_of_model(anatomy.model)
        count, total = self._count_to_keep(anatomy, top, amount), dense_count(anatomy, ACTIVE)
        set_active_experts(anatomy, count)
        return Pruned(warnings=[_NOTE] if count < total else [], counted=(total, total - count))

    def _count_to_keep(self, anatomy: Anatomy, top: TopK, amount: float) -> int:
        """Number of experts of a token that stay; raises Refused for one that the router cannot choose."""
        from prune_lab.models.active_experts import has_count
        from prune_lab.models.resize import dense_count
        from prune_lab.pruning.selection import count_to_remove

        total = dense_count(anatomy, ACTIVE)
        count = min(max(1, total - count_to_remove(total, amount)), top.count)
        if count != top.count and not has_count(anatomy.model, top, count):
            possible = [n for n in range(1, top.count) if has_count(anatomy.model, top, n)]
            amounts = ", ".join(f"{n} (amount={1 - n / total:g})" for n in [*possible, top.count])
            raise Refused(
                f"method.amount={amount:g} leaves {count} of {total} experts of a token, which the router of this "
                f"{anatomy.config.model_type} model cannot choose: possible are {amounts}"
            )
        return count
