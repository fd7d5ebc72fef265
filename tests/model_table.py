"""The tables of docs/models.md and docs/image_text_models.md: what works of each type that stock transformers builds.

python tests/model_table.py [TYPE ...]     prints the rows of some types, or writes both pages with those of all

A type is a small model with random weights (model_types.py), loaded from its folder as any model is. `yes` says of a
method that exactly half of the weights in scope are zero afterwards, that no number is infinite, that what is left
alone is as it was, and that stock transformers reads what was written with the same logits; of units that the model
without half of them is the model with zeros in their place, and is read so.
"""

from __future__ import annotations

import copy
import os
import re
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from model_types import tiny_folder
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)
from transformers.utils import logging

from prune_lab.errors import Refused
from prune_lab.methods.base import Method
from prune_lab.methods.experts import Experts
from prune_lab.methods.magnitude import Magnitude
from prune_lab.methods.sparsegpt import SparseGPT
from prune_lab.methods.structured import Structured
from prune_lab.methods.wanda import Wanda
from prune_lab.models.anatomy import Anatomy, out_in, scope_of
from prune_lab.models.auto_class import auto_class
from prune_lab.models.export import save_model
from prune_lab.models.load import HubModel, Loaded
from prune_lab.models.removable_blocks import blocks_that_stay
from prune_lab.pruning.calibration import Calibrator
from prune_lab.system.device import Device

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
IMAGE_TEXT_PAGE = PAGE.with_name("image_text_models.md")
CPU = Device(torch.device("cpu"), torch.float32)
WINDOWS = torch.randint(4, 300, (6, 24), generator=torch.Generator().manual_seed(7))
METHODS = {
    "magnitude": Magnitude(amount=0.5),
    "wanda": Wanda(amount=0.5),
    "sparsegpt": SparseGPT(amount=0.5),
    "2:4": Wanda(amount=0.5, pattern="2:4"),
}
UNITS: dict[str, Method] = {
    "channels": Structured(amount=0.5, units=("mlp",), score="wifv", refit="inputs"),
    "KV groups": Structured(amount=0.5, units=("heads",), score="l2"),
    "query heads": Structured(amount=0.5, units=("query_heads",), score="l2"),
    "hidden": Structured(amount=0.5, units=("hidden",), score="minitron"),
    "experts": Experts(amount=0.5, score="frequency"),
}

NO_EXPERTS = "none are there"


@dataclass(frozen=True)
class Row:
    """A row of the table: cells by method, "yes" or the reason; the rest of a type that cannot be loaded is empty.

    removable: number of blocks that can be removed, each alone, and of all blocks.
    """

    model_type: str
    share: float | None
    cells: dict[str, str]
    removable: tuple[int, int] | None = None
    whole: bool = False
    remark: str = ""

    def works(self, names: Iterable[str]) -> bool:
        """True where these methods do."""
        return all(self.cells.get(name) == "yes" for name in names)

    def __str__(self) -> str:
        share = "" if self.share is None else f"{self.share:.1%}"
        said = {name: {"yes": "yes", NO_EXPERTS: ""}.get(cell, "no") for name, cell in self.cells.items()}
        weights, units = ([said.get(name, "no") for name in names] for names in (METHODS, UNITS))
        depth = "no" if self.removable is None else f"{self.removable[0]} of {self.removable[1]}"
        calibrated = "" if self.share is None else "whole model" if self.whole else "block by block"
        cells = [self.model_type, share, *weights, depth, *units, calibrated, self.remark]
        return f"| {' | '.join(cells)} |"


def row_of(model_type: str, place: Path) -> Row:
    """The row of a type; `place` is for its files."""
    try:
        loaded = HubModel(name=str(tiny_folder(place / "model", model_type))).load(CPU, seed=0)
        anatomy = Anatomy(loaded.model)
        scope, layout, removable = scope_of(anatomy), anatomy.found, removable_of(anatomy)
    except Exception as error:  # of any modelling code of transformers: the reason is what the table is for
        return Row(model_type, None, {}, remark=_said(error))
    left = sorted({reason for reason, _ in scope.left_alone.values()})
    cells = {name: _try(loaded, method, place / name.replace(":", "_")) for name, method in METHODS.items()}
    cells |= {name: _try_units(loaded, method, place / name) for name, method in UNITS.items()}
    whys = sorted({cell for name, cell in cells.items() if cell != "yes" and name in METHODS})
    whys += [f"{name}: {cells[name]}" for name in UNITS if cells[name] not in ("yes", NO_EXPERTS)]
    whole = layout is not None and not layout.one_by_one
    return Row(
        model_type,
        scope.share,
        cells,
        removable,
        whole,
        "; ".join([*whys, *[f"left alone: {', '.join(left)}"] * bool(left)]),
    )


def removable_of(anatomy: Anatomy) -> tuple[int, int]:
    """Number of blocks of which each alone can be removed, and of all."""
    count = len(anatomy.blocks)
    return count - (len(blocks_that_stay(anatomy)) if anatomy.found is not None else 0), count


def _try(dense: Loaded, method: Method, folder: Path) -> str:
    """Result of a method on a copy: "yes", or the reason why not."""
    loaded = Loaded(copy.deepcopy(dense.model), dense.tokenizer, dense.name, dense.family)
    try:
        calibrator = Calibrator(WINDOWS) if method.calibrated else None
        method.prune(Anatomy(loaded.model), method.amount, 0, calibrator)
        for name, linear in Anatomy(loaded.model).linears():
            weight = out_in(linear, linear.weight)
            if int((weight == 0).sum()) != weight.numel() // 2 or not bool(weight.isfinite().all()):
                return f"{name} has {int((weight == 0).sum())} zeros of {weight.numel()}"
        for name in scope_of(Anatomy(loaded.model)).left_alone:
            if not torch.equal(loaded.model.get_parameter(name), dense.model.get_parameter(name)):
                return f"{name} changed"
        return _reads(loaded, folder)
    except Exception as error:  # as above
        return _said(error)


def _reads(loaded: Loaded, folder: Path) -> str:
    """Result of writing a model and reading it with stock transformers: "yes", or how far its logits are off."""
    save_model(loaded, folder)
    again: Any = auto_class(loaded.model.config).from_pretrained(folder).eval()
    gap = _gap(again, loaded.model)
    return "yes" if gap < 1e-4 else f"the logits differ by {gap:.1g} when read again"


@torch.no_grad()
def _gap(model: Any, other: Any) -> float:
    """Largest difference of the logits of two models, as a part of the largest one."""
    found, wanted = (m(input_ids=WINDOWS[:1].long(), use_cache=False).logits for m in (model, other))
    return float((found - wanted).abs().max() / wanted.abs().max())


def _try_units(dense: Loaded, method: Method, folder: Path) -> str:
    """Result of removing units from a copy: "yes", or the reason why not.

    What is left is compared with zeros in the place of units; of experts and of channels of the hidden size it is as
    they go (pruning/surgery.py, models/hidden.py).
    """
    try:
        models = []
        with_zeros = isinstance(method, Structured) and not method.is_of_hidden
        for way in (method, replace(method, physical=False)) if with_zeros else (method, method):
            loaded = Loaded(copy.deepcopy(dense.model), dense.tokenizer, dense.name, dense.family)
            calibrator = Calibrator(WINDOWS) if method.calibrated else None
            pruned = way.prune(Anatomy(loaded.model), method.amount, 0, calibrator)
            if with_zeros and abs(pruned.realized - method.amount) > 0.02:
                return f"{pruned.realized:.2f} of the units are gone"
            models.append(loaded)
        gap = _gap(models[0].model, models[1].model)
        return _reads(models[0], folder) if gap < 1e-4 else f"the logits differ by {gap:.1g} from those with zeros"
    except Exception as error:  # as above
        return _said(error)


def _said(error: Exception) -> str:
    text = " ".join(str(error).split()).replace("|", "/")
    text = re.sub("^model family '[^']*':? ", "", text)
    text = re.sub("^[^']*'[^']*/[^']*' ", "", text)  # without the name of a folder
    for before in ("cannot be removed: ", "blocks and matrices cannot be found, as it "):
        text = text.partition(before)[2] or text
    if "has no experts" in text or "have no experts" in text:
        return NO_EXPERTS
    kind = "" if isinstance(error, Refused) else f"{type(error).__name__}: "
    text = text if len(text) <= 90 else f"{text[:90].rstrip()}..."
    return f"{kind}{text}" if text else type(error).__name__


def rows_of(types: Iterable[str]) -> Iterable[Row]:
    """Rows one after the other, each type in a folder of its own."""
    for model_type in types:
        with tempfile.TemporaryDirectory() as place:
            yield row_of(model_type, Path(place))


def types_of_transformers() -> list[str]:
    """Types that AutoModelForCausalLM has, but for those that cannot be built from a config of their own."""
    return sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - NOT_BUILT)


def image_text_types() -> list[str]:
    """Types that AutoModelForImageTextToText alone has, but for those that cannot be built."""
    here = set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return sorted(here - NOT_BUILT)


# timm is missing; drafters that need the states of another model; configs that AutoModelForCausalLM does not take; no
# small config was found.
NOT_BUILT = {
    "gemma3n", "gemma4_assistant", "gemma4_unified_assistant", "musicgen", "musicgen_melody", "dots3_note",
    "fast_vlm", "perception_lm", "evolla", "florence2", "pi0", "t5gemma2",
}  # fmt: skip

CAUSAL = "# Models", "every type of causal language model that it builds"
IMAGE_TEXT = (
    "# Image-text models",
    "every type of model that it builds with `AutoModelForImageTextToText` alone",
)
OF_IMAGES = """

Only the text part is pruned, and only on text is it measured:

- All other parts (vision tower, projector) are unchanged in the export, and so are the files of the processor.
- Types are refused that do not run without an image or other inputs, or in which a token changes the predictions
  before it.
- The model after `method=depth` is compared on text. Where image features enter at several blocks (Qwen3-VL), they
  enter at the blocks of the same index among those that are left."""
HEAD = """{title}

What can be pruned of which model type. Look for the `model_type` of your `config.json` in the table.

Written on {date} by `python tests/model_table.py` with transformers {transformers}:
{what} ({count}), each tried as a
small model with random weights. `python tests/model_table.py TYPE` tries one type. This is the number of types for
which each kind of pruning works:

| single weights, all four methods | all blocks | some blocks | channels | KV groups | query heads | hidden | experts |
|---|---|---|---|---|---|---|---|
| {works} | {every} | {some} | {channels} | {heads} | {query_heads} | {hidden} | {experts} |

The columns of the table below:

- **share**: the part of the weights of the decoder blocks that methods of single weights prune. The rest is left
  alone: norms and biases, routers of experts, convolutions and state parameters of recurrent layers. Experts that are
  fused into one tensor are pruned like other matrices, each with its own tokens.
- **magnitude, wanda, sparsegpt, 2:4** (Wanda's): `yes` if exactly half of the weights in scope are zero afterwards,
  what is left alone is unchanged, and stock transformers reads the result with the same logits.
- **depth**: how many of the blocks `method=depth` can remove, each alone. The model without the block, as
  transformers builds it from its config, has the logits of the model that bypasses the block. A block cannot be
  removed if other blocks use more of it than its output states, or if its index or the number of blocks changes what
  they compute. A run that asks for more is refused, and says why.
- **channels, KV groups, query heads**: whether `method=structured` removes half of them (`method.units=[mlp]`,
  `[heads]`, `[query_heads]`; channels of experts and shared experts are MLP channels). The smaller model has the
  logits of the model with zeros in their place, and stock transformers reads it with the same. KV groups cannot be
  removed if a head would compute something else with fewer of them, or if a norm spans all heads. Query heads are
  those that share a key and value with others, the same number of each KV group.
- **hidden**: whether half of the channels of the hidden size can be removed (`method.units=[hidden]`), with the same
  two comparisons. They cannot be if a norm subtracts the mean over all of them.
- **experts**: whether `method=experts` removes half of the experts of each block, if there are any. The smaller model
  has the logits of the model whose routers avoid the removed experts, and stock transformers reads it with the same.
- **calibrated**: "block by block", behind pruned blocks; or "whole model", behind dense blocks, for types whose
  blocks cannot be called one by one. What is calibrated block by block can be streamed
  ([`model.stream=true`](offloading.md)), unless blocks share weights.
- **remark**: the reason for a "no", shortened, and what is left alone.{more}

{columns}
"""


def page_of(title: str, what: str, rows: list[Row], more: str = "") -> str:
    """Contents of a page with these rows."""
    columns = ["type", "share", *METHODS, "depth", *UNITS, "calibrated", "remark"]
    able = [row.removable for row in rows if row.removable is not None]
    head = HEAD.format(
        title=title,
        what=what,
        more=more,
        columns=f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|",
        date=date.today(),
        transformers=version("transformers"),
        count=len(rows),
        works=sum(row.works(METHODS) for row in rows),
        channels=sum(row.works(["channels"]) for row in rows),
        heads=sum(row.works(["KV groups"]) for row in rows),
        query_heads=sum(row.works(["query heads"]) for row in rows),
        hidden=sum(row.works(["hidden"]) for row in rows),
        experts=sum(row.works(["experts"]) for row in rows),
        every=sum(some == of_all for some, of_all in able),
        some=sum(0 < some < of_all for some, of_all in able),
    )
    return head + "\n".join(map(str, rows)) + "\n"


def printed(types: Iterable[str]) -> list[Row]:
    """Rows of types, each printed when it is there."""
    rows = []
    for row in rows_of(types):
        print(row, flush=True)
        rows.append(row)
    return rows


def main(asked: list[str]) -> None:
    """Prints rows, and writes the pages where all of them were asked for."""
    logging.set_verbosity_error()
    if asked:
        printed(asked)
        return
    PAGE.write_text(page_of(*CAUSAL, printed(types_of_transformers())), encoding="utf-8")
    IMAGE_TEXT_PAGE.write_text(page_of(*IMAGE_TEXT, printed(image_text_types()), OF_IMAGES), encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("PRUNE_LAB_TURNS", tempfile.mkdtemp())
    main(sys.argv[1:])
