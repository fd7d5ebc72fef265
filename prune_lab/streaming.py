"""What a run can do with a model larger than memory, and what it refuses.

It holds: the interpreter (some 300 MB); embeddings, last norm, head; one block (two on a GPU); states of the windows,
256 MB of them at most (prune_lab/models/states.py), the others in a file; and while a block is at work, what pruning
its largest matrix takes (about 20 bytes for each of its weights; SparseGPT: inputs x inputs x 4 bytes several times)
and the activations of one batch. The pruned weights go to `.weights` in the run's folder, as large as the model.
"""

from __future__ import annotations

from prune_lab.config.parts import Parts
from prune_lab.errors import Refused
from prune_lab.post.none import NoPost
from prune_lab.system import launch


def check_streaming(parts: Parts) -> None:
    """Refuses what needs a whole model in memory, where model.stream=true says that it need not fit."""
    if not parts.model.stream:
        return
    measure = parts.measure
    for is_wanted, reason in (
        (parts.recovery.training_steps > 0, "training needs the whole model in memory; give recovery=none"),
        (not isinstance(parts.post, NoPost), "post-compression works on a model in memory; give post=none"),
        (measure.latency, "a model that is read while it runs cannot be timed; give measure=quality_only"),
        (measure.memory, "peak memory is that of a model in memory; give measure.memory=false"),
        (bool(measure.tasks), "tasks put short texts through the model one batch at a time; give measure.tasks=[]"),
        (launch.size() > 1, "several processes share a training, and there is none; start one"),
    ):
        if is_wanted:
            raise Refused(f"model.stream=true: {reason}")
    if parts.method.needs_whole_model is not None:
        raise Refused(f"model.stream=true: {parts.method.needs_whole_model}")
