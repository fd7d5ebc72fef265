"""Trains a byte-level BPE tokenizer on a dataset's training split: how the tiny model's came to be.

Command: python -m prune_lab.text.train_tokenizer 2048 FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from prune_lab.text.stdlib import Stdlib

END = "<|endoftext|>"


def train_tokenizer(documents: tuple[str, ...], vocab_size: int, folder: Path, context: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json with exactly `vocab_size` entries, END the first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END, model_max_length=context)
    fast.save_pretrained(folder)


if __name__ == "__main__":
    train_tokenizer(Stdlib().corpus().train, int(sys.argv[1]), Path(sys.argv[2]), context=512)
