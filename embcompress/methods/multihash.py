"""Several hashed rows of one table, summed; with learned weights: hash embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from embcompress.methods import register
from embcompress.methods.base import Method, TableSpec
from embcompress.plan import Hash, LookupPlan, MurmurHash, Probe, Store, Weight

if TYPE_CHECKING:
    from embcompress.modules import Embedding

_THINC_HASHES = 4


@register
@dataclass(frozen=True)
class MultiHash(Method):
    """Multi-hash, Σ E[hₜ(x)]: an id is the sum of k hashed rows of one table.

    Two ids have the same vector only if all k rows agree. With ``weighted`` every row has a
    learned weight, gathered by another hash: Σ p[h₀(x)]ₜ·E[hₜ(x)] ("hash embeddings").

    Memory: m·d numbers for m rows; with weights (m + w·k/d)·d, where w = min(n, m ·
    ``weight_ratio``).

    Source: spaCy and thinc's ``HashEmbed`` (k = 4, unweighted); Svenstrup, Hansen, Winther: "Hash
    embeddings for efficient word representations", NeurIPS 2017, section 2 (weighted). What
    differs: weights start at 1, not at random, and hashes are keyed by the table's name.

    Attributes:
        hashes: k, at least 1.
        weighted: whether the rows have learned weights.
        weight_ratio: rows of weights for each row of the table.
    """

    name: ClassVar[str] = "multihash"
    hashes: int = 4
    weighted: bool = False
    weight_ratio: int = 4

    def __post_init__(self) -> None:
        for field in ("hashes", "weight_ratio"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{field} must be an integer of at least 1, got {value!r}")

    def sizes(self, table: TableSpec) -> range:
        return range(1, table.num_embeddings + 1)

    def plan(self, table: TableSpec, size: int) -> LookupPlan:
        stores = [Store("weight", size, table.embedding_dim, table.dtype)]
        scales: list[Weight | None] = [None] * self.hashes
        if self.weighted:
            rows = min(table.num_embeddings, size * self.weight_ratio)
            stores.append(Store("importance", rows, self.hashes, table.dtype))
            row = Hash(table.key(self.hashes), rows)
            scales = [Weight("importance", row, column) for column in range(self.hashes)]
        return LookupPlan(
            table.num_embeddings,
            table.embedding_dim,
            stores=tuple(stores),
            probes=tuple(
                Probe("weight", Hash(table.key(t), size), scale) for t, scale in enumerate(scales)
            ),
        )

    @staticmethod
    def from_thinc(array: Tensor, seed: int, *, num_embeddings: int = 2**63 - 1) -> Embedding:
        """The table of a trained thinc or spaCy ``HashEmbed``, giving the same vectors.

        Args:
            array: (rows, width) float32, the layer's parameter ``E``, as a tensor.
            seed: the layer's ``attrs["seed"]``, an unsigned 32-bit integer.
            num_embeddings: ids are in ``[0, num_embeddings)``. Ids of 2**63 and more, which
                thinc's unsigned ids may have, cannot be looked up.

        Returns:
            An :class:`~embcompress.Embedding` that shares memory with ``array`` and trains.

        Raises:
            ValueError: an array that is not 2-D, or a seed that is not 32 bits.
        """
        from embcompress.modules import Embedding
        from embcompress.tables.store_tensors import dtype_name

        if array.dim() != 2:
            raise ValueError(f"array must be 2-D, (rows, width), got {array.dim()}-D")
        rows, width = array.shape
        plan = LookupPlan(
            num_embeddings,
            width,
            stores=(Store("weight", rows, width, dtype_name(array.dtype)),),
            probes=tuple(
                Probe("weight", MurmurHash(seed, word, rows)) for word in range(_THINC_HASHES)
            ),
        )
        module = Embedding.from_plan(plan, MultiHash.name, device="meta")
        return module.adopt_stores({"weight": array})
