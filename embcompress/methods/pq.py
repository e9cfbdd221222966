"""Product quantization: packed codes and small codebooks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from embcompress.families.product_method import CodeShape, ProductMethod
from embcompress.layouts.product import ProductLayout
from embcompress.methods import register
from embcompress.methods.base import TableSpec
from embcompress.procedures.base import TableProcedure
from embcompress.procedures.code_learning import CodeLearning


@register
@dataclass(frozen=True)
class ProductQuantization(ProductMethod):
    """Product quantization, C₁[c₁(x)] ‖ … ‖ C_s[c_s(x)]: packed codes into s small codebooks.

    A vector is cut into s parts, each the codeword that a code of b bits names. From a trained
    table, codes and codebooks are the k-means of each part; the codebooks can be trained further.
    A new table has hashed codes, and learns its codebooks: two ids have the same vector only if
    all s codes agree. Codes stay, or are learned too.

    Tables that share a budget get codes of the same shape.

    Memory: n·s·b bits, and (2^b − 1)·d numbers (the last code stands for "absent", a zero
    vector); with norms apart also n·b' bits and 2^b' − 1 numbers.

    Source: Jégou, Douze, Schmid: "Product quantization for nearest neighbor search", PAMI 2011,
    section II; Joulin et al.: "FastText.zip", 2016, section 3.2 (norms apart, codebooks trained
    further, and rows of the smallest norm dropped). Learned codes: van den Oord et al., "Neural
    discrete representation learning", 2017, section 3.2 (straight-through); ours move every few
    steps instead of in every lookup.

    Attributes:
        parts: s, a divisor of the width. None: follows from the budget.
        bits: b, 1 to 16. None: 4 to 12, follows from the budget.
        norm_bits: b', 1 to 16: parts hold vectors of unit norm, and another code an id names its
            norm. None: no norms apart.
        drop: share of the ids, those of the smallest count·norm², that :meth:`fit` makes absent.
        codes: "learned" while the table trains, where there is a
            :class:`~embcompress.TrainingProcedure`, which then holds n·(d + 1) numbers more; or
            "fixed".
        interval: learned codes move every so many steps.
        code_rate: learning rate of the ids' own steps that codes follow, in row-wise Adagrad, by
            that of the codebooks.
    """

    name: ClassVar[str] = "pq"
    norm_bits: int | None = None
    drop: float = 0.0
    codes: Literal["fixed", "learned"] = "learned"
    interval: int = 10
    code_rate: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm_bits is not None and not 1 <= self.norm_bits <= 16:
            raise ValueError(f"norm_bits must be in [1, 16], got {self.norm_bits}")
        if not 0 <= self.drop < 1:
            raise ValueError(f"drop must be in [0, 1), got {self.drop}")
        if self.codes not in ("fixed", "learned"):
            raise ValueError(f"codes must be 'fixed' or 'learned', got {self.codes!r}")
        if self.interval < 1:
            raise ValueError(f"interval must be at least 1, got {self.interval}")
        if not self.code_rate > 0:
            raise ValueError(f"code_rate must be positive, got {self.code_rate}")

    def layout(self, table: TableSpec, parts: int, code: CodeShape) -> ProductLayout:
        (bits,), shape = code, (table.num_embeddings, table.embedding_dim)
        return ProductLayout(*shape, parts, bits, self.norm_bits)

    def procedure(self) -> TableProcedure | None:
        return CodeLearning(self) if self.codes == "learned" else None

    def dropped(self, table: TableSpec, weight: Tensor) -> Tensor:
        """The ids whose vectors are missed least."""
        importance = weight.detach().float().square().sum(1).cpu()
        if table.counts is not None:
            importance = importance * table.counts.float().cpu()
        return importance.argsort(stable=True)[: int(self.drop * table.num_embeddings)]
