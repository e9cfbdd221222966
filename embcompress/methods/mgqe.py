"""Multi-granular quantized embeddings: more codewords for frequent ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from embcompress.approximation.calibration import check_finite
from embcompress.clustering import cluster, nearest
from embcompress.families.product_method import CodeShape
from embcompress.layouts.granular import GranularLayout, hot_ids
from embcompress.layouts.packing import pack_codes
from embcompress.layouts.product import CODES, HOT_CODES, codebook
from embcompress.methods import register
from embcompress.methods.base import TableSpec
from embcompress.methods.dpq import DifferentiableProductQuantization
from embcompress.plan import LookupPlan
from embcompress.procedures.base import TableProcedure
from embcompress.procedures.query_learning import QueryLearning

#: What is tried where settings leave it open: so many bits fewer than codes of hot ids have those
#: of others, and so many percent of the ids have rows for codes of hot ids.
_FEWER = (1, 2, 3, 4)
_HOT = (10, 15, 20, 25, 30)


@register
@dataclass(frozen=True)
class MultiGranularQuantization(DifferentiableProductQuantization):
    """Multi-granular codes, C₁[c₁(x)] ‖ … ‖ C_s[c_s(x)]: frequent ids choose among more codewords.

    Codes of ids that occur often have b bits, those of all others b' < b, which name the first
    2^b' − 1 codewords of the same codebooks. They are learned as in
    :class:`~embcompress.DifferentiableProductQuantization`: every id has a query in training, which
    gets the gradient of its vector, and its codes name the nearest of the codewords that it may
    choose.

    The codes of b bits are in a table of their own, whose m rows ids find by a hash. Each row
    belongs to the most frequent id that hashes to it (without counts, to one that another hash
    draws). That id's codes of b' bits say "absent", and so lead there. The id of frequency rank r
    gets a row with probability e^(−r/m).

    Tables that share a budget get codes of the same shape.

    Memory: s·(n·b' + m·b) bits, and (2^b − 1)·d numbers (the last code stands for "absent"). While
    it trains, with a :class:`~embcompress.TrainingProcedure`, the full table of queries and 2·n
    numbers more; without one, codes stay as they are, hashed.

    Source: Kang et al., "Learning multi-granular quantized embeddings for large-vocab categorical
    features in recommender systems", WWW 2020 (companion), the form in which groups of ids differ
    in the number of centroids and share these. What differs: there are two groups; ids are not
    sorted by frequency, but the most frequent one of every bucket is in the first, so that no map
    of the ids is stored; what differs in :class:`~embcompress.DifferentiableProductQuantization`.

    Attributes:
        parts: s, a divisor of the width. None: follows from the budget.
        bits: b, 1 to 16. None: 4 to 12, follows from the budget.
        tail_bits: b', 1 to b. None: 1 to 4 fewer than b, at least 2, follows from the budget.
        hot: m in percent of the ids, 1 to 99. None: 10 to 30, follows from the budget.
        query_rate: learning rate of the queries, by that of the codebooks.
        commitment: share of the way to its codewords that a query goes in a step, in [0, 1).
        pull: share of the way to the mean of its queries in a batch that a codeword goes, in
            [0, 1).
    """

    name: ClassVar[str] = "mgqe"
    tail_bits: int | None = None
    hot: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tail_bits is not None and not 1 <= self.tail_bits <= (self.bits or 12):
            raise ValueError(
                f"tail_bits must be in [1, bits = {self.bits or 12}], got {self.tail_bits}"
            )
        hot = 1 if self.hot is None else self.hot
        if not isinstance(hot, int) or isinstance(hot, bool) or not 1 <= hot <= 99:
            raise ValueError(f"hot must be a whole percentage from 1 to 99, got {self.hot!r}")

    def codes_tried(self) -> Sequence[CodeShape]:
        """Bits of a code of a hot id and of another one, and percent of the ids that m is."""
        lengths: list[tuple[int, int]] = []
        for bits in [self.bits] if self.bits else self.bits_tried():
            if self.tail_bits is None:
                lengths += [(bits, max(min(2, bits), bits - fewer)) for fewer in _FEWER]
            elif self.tail_bits <= bits:
                lengths.append((bits, self.tail_bits))
        shares = _HOT if self.hot is None else (self.hot,)
        return [(bits, tail_bits, hot) for bits, tail_bits in lengths for hot in shares]

    def mean_bits(self, code: CodeShape) -> float:
        bits, tail_bits, hot = code
        return tail_bits + hot / 100 * (bits - tail_bits)

    def layout(self, table: TableSpec, parts: int, code: CodeShape) -> GranularLayout:
        bits, tail_bits, hot = code
        rows = max(1, hot * table.num_embeddings // 100)
        return GranularLayout.of_size(table, parts, bits, tail_bits, rows)

    def procedure(self) -> TableProcedure | None:
        return QueryLearning(self, GranularLayout)

    def fill(self, table: TableSpec, plan: LookupPlan, stores: Mapping[str, Tensor]) -> None:
        """Hashed codes of both lengths, and which ids are hot."""
        super().fill(table, plan, stores)
        if HOT_CODES in stores and stores[HOT_CODES].device.type != "meta":
            layout = GranularLayout.of(plan)
            ids = hot_ids(layout, table, plan.padding_idx)
            layout.make_hot(stores, ids.to(stores[CODES].device))

    def fit(self, table: TableSpec, plan: LookupPlan, weight: Tensor) -> dict[str, Tensor]:
        """K-means of every part: of all ids for the first codewords, of hot ids for the others.

        Raises:
            ValueError: numbers that are NaN or infinite.
        """
        check_finite(weight)
        layout, stores = GranularLayout.of(plan), dict[str, Tensor]()
        hot, counts = hot_ids(layout, table, plan.padding_idx), table.counts
        hot_counts = None if counts is None else counts[hot.to(counts.device)]
        columns, hot_columns = [], []
        for t, part in enumerate(weight.detach().float().cpu().chunk(layout.parts, dim=1)):
            seed, more = table.seed + t, layout.words - layout.tail_words
            book, codes = cluster(part, layout.tail_words, counts, seed)
            if more and hot.numel():
                book = torch.cat([book, cluster(part[hot], more, hot_counts, seed)[0]])
            stores[codebook(t)] = book.new_zeros(layout.words, part.shape[1])
            stores[codebook(t)][: len(book)] = book
            columns.append(codes)
            hot_columns.append(nearest(part[hot], book))
        hot_codes = torch.zeros(layout.bucket.buckets, layout.parts, dtype=torch.int64)
        hot_codes[layout.rows(hot)] = torch.stack(hot_columns, 1)
        stores[HOT_CODES] = pack_codes(hot_codes.reshape(-1), layout.bits)
        stores[CODES] = pack_codes(torch.stack(columns, 1).reshape(-1), layout.tail_bits)
        layout.make_hot(stores, hot)
        return stores
