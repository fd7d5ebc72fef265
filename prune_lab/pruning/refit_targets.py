"""Targets of a refit by least squares: what the outputs of a pruned Linear should be, and the statistics that says it.

inputs: the outputs of the dense weight on the Linear's own inputs, behind blocks that are pruned already.
dense: the outputs that it has in the model as it was before this pruning, on that model's inputs (OSSCAR's: Meng et
al., 2403.12983).
residual: those of dense, plus the difference of the states that they are added to: a block of which something goes also
repairs what the blocks before it broke. Of a block, one Linear takes that on. Where whole blocks go, it is the MLP
before them that repairs what their absence broke (depth_refit.py).
"""

from __future__ import annotations

NEEDS_OF_TARGET = {
    "inputs": frozenset({"gram"}),
    "dense": frozenset({"gram", "dense_error"}),
    "residual": frozenset({"gram", "residual_error"}),
}
TARGETS = tuple(NEEDS_OF_TARGET)
