"""Environment variables of a launcher of several processes (accelerate launch, torchrun). Imports nothing heavy."""

from __future__ import annotations

import os

from prune_lab.system.files import owner_suffix


def size() -> int:
    """Number of processes; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number among them."""
    return int(os.environ.get("RANK", "0")) if size() > 1 else 0


def is_sharded() -> bool:
    """True where the model is sharded in training, as `accelerate launch --use_fsdp` asks."""
    return size() > 1 and os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


def local_rank() -> int:
    """Its number among those of this machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def for_this_process(arguments: list[str]) -> list[str]:
    """The command line as this process is to run it: the first records the run, the others only help.

    They export nothing whatever they are told, and keep the group `export`: of a sweep over it all run the same jobs.
    """
    if rank() == 0:
        return arguments
    import tempfile

    folder = tempfile.mkdtemp(prefix="prune_lab-", suffix=owner_suffix())
    helping = ["tracking=none", "quiet=true", f"hydra.run.dir={folder}", f"hydra.sweep.dir={folder}"]
    given = [number for number, word in enumerate(arguments) if "=" in word and not word.startswith("-")]
    end = given[-1] + 1 if given else len(arguments)  # overrides must stand together, and the last one counts
    return [*arguments[:end], *helping, *arguments[end:]]
