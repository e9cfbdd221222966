"""The layout of a product-quantized table: codes, codebooks, and norms apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from embcompress.clustering import nearest
from embcompress.layouts.packing import absent_code, unpack_codes, write_codes
from embcompress.plan import Address, Code, Digit, LookupPlan, Probe, Scale, Store, Weight

CODES, NORM_CODES, NORMS = "codes", "norm_codes", "norms"
HOT_CODES = "hot_codes"
_TURNS = 2
_TINY = 1e-20


def codebook(part: int) -> str:
    """Name of the store of a part's codewords."""
    return f"codebook_{part}"


@dataclass(frozen=True)
class ProductLayout:
    """Where the parts of a product-quantized vector are.

    Attributes:
        num_embeddings, embedding_dim: of the table.
        parts: codebooks, each for as many columns.
        bits: of a code.
        norm_bits: of the code of a vector's norm; None where vectors have no norm apart.
        one_book: whether all parts share one codebook.
    """

    num_embeddings: int
    embedding_dim: int
    parts: int
    bits: int
    norm_bits: int | None = None
    one_book: bool = False

    @classmethod
    def of(cls, plan: LookupPlan) -> ProductLayout:
        """The layout of a plan that :meth:`plan` made.

        Raises:
            ValueError: another kind of plan.
        """
        stores = {store.name: store for store in plan.stores}
        if CODES in stores and codebook(0) in stores:
            norm_bits = stores[NORM_CODES].bits if NORM_CODES in stores else None
            codes = stores[CODES]
            one_book = codes.width > 1 and codebook(1) not in stores
            shape = (plan.num_embeddings, plan.embedding_dim)
            layout = cls(*shape, codes.width, codes.bits, norm_bits, one_book)
            if plan.with_pool("none") == layout.plan(stores[codebook(0)].dtype):
                return layout
        raise ValueError(f"this is not the plan of a product-quantized table: {plan}")

    @property
    def words(self) -> int:
        """Codewords of a part; the last code stands for "absent"."""
        return absent_code(self.bits)

    def plan(self, dtype: str) -> LookupPlan:
        """The plan, without pooling, with codewords in this dtype."""
        probes = tuple(
            Probe(self.book(t), self.address(t), self._norm()) for t in range(self.parts)
        )
        stores = (*self.code_stores(), *self._book_stores(dtype))
        shape = (self.num_embeddings, self.embedding_dim)
        return LookupPlan(*shape, stores, probes, combine="concat")

    def bytes(self, dtype: str) -> int:
        """Bytes of the plan, without its probes, of which there are as many as parts."""
        one, *others = (store.bytes for store in self._book_stores(dtype, books=1))
        codes = sum(store.bytes for store in self.code_stores())
        return codes + len(self.codebooks) * one + sum(others)

    def address(self, part: int) -> Address:
        """Address of the codeword of a part."""
        return Code(CODES, self.words, Digit(1, self.num_embeddings), part)

    def code_stores(self) -> list[Store]:
        """The stores of codes."""
        stores = [Store(CODES, self.num_embeddings, self.parts, f"uint{self.bits}")]
        if self.norm_bits is not None:
            stores.append(Store(NORM_CODES, self.num_embeddings, 1, f"uint{self.norm_bits}"))
        return stores

    def _book_stores(self, dtype: str, books: int | None = None) -> list[Store]:
        """The stores that codes point into, or the first of the codebooks and the norms."""
        width = self.embedding_dim // self.parts
        stores = [Store(name, self.words, width, dtype) for name in self.codebooks[:books]]
        if self.norm_bits is not None:
            stores.append(Store(NORMS, absent_code(self.norm_bits), 1, dtype))
        return stores

    def _norm(self) -> Scale | None:
        if self.norm_bits is None:
            return None
        norms = Code(NORM_CODES, absent_code(self.norm_bits), Digit(1, self.num_embeddings))
        return Weight(NORMS, norms)

    @property
    def books(self) -> tuple[str, ...]:
        """Names of the stores that codes point into: the codebooks, then the norms."""
        return self.codebooks if self.norm_bits is None else (*self.codebooks, NORMS)

    @property
    def codebooks(self) -> tuple[str, ...]:
        """Names of the stores of codewords."""
        return tuple(codebook(t) for t in range(1 if self.one_book else self.parts))

    def book(self, part: int) -> str:
        """Name of the store of a part's codewords."""
        return codebook(0 if self.one_book else part)

    # -- codes: a column for every part, and one for the norms

    def read_codes(self, stores: Mapping[str, Tensor], first: int, last: int) -> Tensor:
        """(last - first, columns) codes of consecutive ids."""
        codes = unpack_codes(stores[CODES], first * self.parts, last * self.parts, self.bits)
        codes = codes.view(-1, self.parts)
        if self.norm_bits is None:
            return codes
        norms = unpack_codes(stores[NORM_CODES], first, last, self.norm_bits)
        return torch.cat([codes, norms[:, None]], dim=1)

    def write_codes(self, stores: Mapping[str, Tensor], ids: Tensor, codes: Tensor) -> None:
        """Write the (N, columns) codes of N distinct ids."""
        positions = ids[:, None] * self.parts + torch.arange(self.parts, device=ids.device)
        parts = codes[:, : self.parts]
        write_codes(stores[CODES], positions.reshape(-1), parts.reshape(-1), self.bits)
        if self.norm_bits is not None:
            write_codes(stores[NORM_CODES], ids, codes[:, self.parts], self.norm_bits)

    def are_absent(self, codes: Tensor) -> Tensor:
        """(N,) whether a code says so."""
        absent = (codes[:, : self.parts] >= self.words).any(1)
        if self.norm_bits is not None:
            absent = absent | (codes[:, self.parts] >= absent_code(self.norm_bits))
        return absent

    # -- vectors

    def decode(self, books: Mapping[str, Tensor], codes: Tensor) -> Tensor:
        """(N, embedding_dim) float32 vectors of codes of which none is absent."""
        parts = [books[self.book(t)][codes[:, t]] for t in range(self.parts)]
        vectors = torch.cat(parts, dim=1).float()
        return vectors if self.norm_bits is None else vectors * books[NORMS][codes[:, self.parts]]

    def encode(self, books: Mapping[str, Tensor], vectors: Tensor) -> Tensor:
        """(N, columns) the nearest codeword of every part; with norms, found in turns with these.

        Trained codewords need not have norm 1, so the norm is the one that fits them best.
        """
        if self.norm_bits is None:
            return self._encode_parts(books, vectors)
        directions, _ = unit_norm(vectors)
        for _ in range(_TURNS):
            codes = self._encode_parts(books, directions)
            columns = [books[self.book(t)][codes[:, t]].float() for t in range(self.parts)]
            chosen = torch.cat(columns, dim=1)
            lengths = chosen.square().sum(1, keepdim=True).clamp(min=_TINY)
            best = (vectors * chosen).sum(1, keepdim=True) / lengths
            norm_codes = nearest(best, books[NORMS])
            norms = books[NORMS][norm_codes].float()
            directions = torch.where(norms.abs() > _TINY, vectors / norms, directions)
        return torch.cat([codes, norm_codes[:, None]], dim=1)

    def codes_for(self, stores: Mapping[str, Tensor], ids: Tensor, vectors: Tensor) -> Tensor:
        """(N, columns) the nearest codewords that the ids may have, here all."""
        return self.encode(stores, vectors)

    def _encode_parts(self, books: Mapping[str, Tensor], vectors: Tensor) -> Tensor:
        pieces = zip(self.codebooks, self.pieces(vectors), strict=True)
        shape = (len(vectors), self.parts // len(self.codebooks))
        return torch.cat([nearest(piece, books[name]).view(shape) for name, piece in pieces], 1)

    def pieces(self, vectors: Tensor) -> list[Tensor]:
        """For each codebook (M, width) what of (N, embedding_dim) vectors its codewords stand for.

        Every part by itself, or all parts of a vector one after another where they share a book.
        """
        if self.one_book:
            return [vectors.reshape(len(vectors) * self.parts, -1)]
        return list(vectors.chunk(self.parts, dim=1))


def unit_norm(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors divided by their norms (zero stays zero), and (N, 1) the norms."""
    norms = vectors.norm(dim=1, keepdim=True)
    return vectors / norms.clamp(min=torch.finfo(vectors.dtype).tiny), norms
