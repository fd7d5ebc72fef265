"""post=sparse_2_4: the kernels for two of every four weights, of GPUs from Ampere on.

In memory such a weight is its values and two bits of place for each (torch.sparse.to_sparse_semi_structured). On disk
it is dense: stock transformers loads the export, without the kernels. (Serving stacks dropped sparse weight formats.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from prune_lab.errors import Refused
from prune_lab.post.base import Post

if TYPE_CHECKING:
    from prune_lab.models.anatomy import Anatomy
    from prune_lab.system.device import Device


@dataclass(frozen=True)
class Sparse24(Post):
    """Semi-structured weights (2104.08378) in every prunable Linear.

    kernel_search: the fastest of cuSPARSELt's kernels is looked for by trying all for each shape of inputs. Version 0.8
    then multiplies 2048 rows and more 1.3 to 1.6 times as fast as dense on an H100, where its first kernel is slower
    than dense; but on a small model (widths of 128) one of the kernels ended the program.
    """

    kernel_search: bool = False

    exact: ClassVar[bool] = False  # the export is dense: other kernels add in another order

    def check(self, device: Device) -> None:
        """Raises Refused where the GPU has no 2:4 kernels, or none for the number type."""
        if device.compute_capability < (8, 0):
            raise Refused(
                f"post=sparse_2_4 needs a GPU with 2:4 kernels (compute capability 8.0: Ampere and later); here is "
                f"{device.name}: zeros in dense tensors cost what other weights cost there"
            )
        if device.dtype_name == "float32":
            raise Refused("post=sparse_2_4 has no kernels for dtype=float32: give dtype=bfloat16 or float16")

    def compress(self, anatomy: Anatomy) -> list[str]:
        """Replaces every prunable Linear; raises Refused where one does not keep 2 of every 4 inputs."""
        from prune_lab.models.low_bit import semi_structured

        semi_structured.replace_linears(anatomy, self.kernel_search)
        if self.kernel_search:
            return []
        return [
            "the first of the 2:4 kernels may be slower than dense ones: post.kernel_search=true looks for the fastest "
            "one, but may end the program on small models"
        ]
