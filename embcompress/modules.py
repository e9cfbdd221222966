"""``Embedding`` and ``EmbeddingBag``: torch's modules over any lookup plan."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from embcompress.budget import Budget, default_plan, fit_plan, parse_budget
from embcompress.engine import Bags, GradientOptions, make_bags
from embcompress.engine.bags import check_tensor
from embcompress.methods import Method, TableSpec, resolve_method
from embcompress.plan import LookupPlan, Pool
from embcompress.tables.compressed_table import CompressedTable, TableType
from embcompress.tables.plan_table import run_plain_bags
from embcompress.tables.store_tensors import dtype_name


def make_plan(table: TableSpec, method: Method, budget: Budget | None) -> LookupPlan:
    """The method's plan for the table within the budget (None: its default size)."""
    if budget is None:
        return default_plan(method, table)
    return fit_plan(method, table, parse_budget(budget, table.dense_bytes))


def _normalize_padding(padding_idx: int | None, num_embeddings: int) -> int | None:
    """Torch's rule: a negative padding_idx counts from the end."""
    if padding_idx is None:
        return None
    if not -num_embeddings <= padding_idx < num_embeddings:
        raise ValueError(
            f"padding_idx must be in [{-num_embeddings}, {num_embeddings}), got {padding_idx}"
        )
    return padding_idx % num_embeddings


def _check_options(plan: LookupPlan, method: str, options: GradientOptions) -> None:
    if plan.is_dense:
        return
    if options.max_norm is not None:
        raise ValueError(
            f"max_norm renormalizes rows of the dense table, and {method!r} has no such rows: a "
            "physical row is a part of many vectors; use method='full' or leave max_norm None"
        )
    if options.scale_grad_by_freq:
        raise ValueError(
            f"scale_grad_by_freq divides by how often an id occurs in the batch, and rows of "
            f"{method!r} are shared by several ids; use method='full' or leave it False"
        )


def _check_weight(weight: Tensor, plan: LookupPlan, method: str) -> None:
    if not plan.is_dense:
        raise ValueError(
            f"_weight is a dense table and cannot be the stores of method {method!r}; "
            "use method='full', or load a state_dict of the compressed module"
        )
    expected = (plan.num_embeddings, plan.embedding_dim)
    if tuple(weight.shape) != expected:
        raise ValueError(f"_weight has shape {tuple(weight.shape)}, expected {expected}")


def _construct(
    module: CompressedTable,
    num_embeddings: int,
    embedding_dim: int,
    pool: Pool,
    padding_idx: int | None,
    options: GradientOptions,
    weight: Tensor | None,
    freeze: bool,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    method: str | Method,
    budget: Budget | None,
    seed: int,
    name: str,
    counts: Tensor | None,
) -> None:
    """The one constructor behind both modules' signatures."""
    method = resolve_method(method)
    if dtype is None:
        dtype = torch.get_default_dtype() if weight is None else weight.dtype
    table = TableSpec(num_embeddings, embedding_dim, name, seed, dtype_name(dtype), counts)
    plan = make_plan(table, method, budget)
    plan = plan.with_pool(pool, _normalize_padding(padding_idx, num_embeddings))
    _check_options(plan, method.name, options)
    if weight is not None:
        _check_weight(weight, plan, method.name)
        CompressedTable.__init__(module, plan, method, options, device="meta")
        setattr(module, plan.stores[0].name, nn.Parameter(weight))
    else:
        CompressedTable.__init__(module, plan, method, options, device=device)
        module.reset_parameters()
        method.fill(table, plan, module.stores())
    module.keep_spec(table)
    if freeze:
        module.requires_grad_(False)


class Embedding(CompressedTable):
    """A drop-in for :class:`torch.nn.Embedding` over a compressed table.

    Args:
        num_embeddings, embedding_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq,
        sparse, _weight, _freeze, device, dtype: as in :class:`torch.nn.Embedding`. ``max_norm``,
            ``scale_grad_by_freq`` and ``_weight`` speak of dense rows: for ``"full"`` alone.
        method: a name from :func:`embcompress.methods`, or a method object with its settings.
        budget: bytes (int), ``"16MiB"``, ``"5%"`` or 0.05 of the dense float32 table. None:
            10 %, or the smallest size that the method can take if that is more.
        seed: hash keys are derived from it (start values come from torch's generator).
        name: the table's name; hash keys are derived from it.
        counts: (num_embeddings,) how often each id occurs in the training data, for methods that
            treat frequent ids better.

    Where it differs from torch: the vector of ``padding_idx`` of a compressed table is always
    zero, and ids outside ``[0, num_embeddings)`` raise IndexError on every backend.

    Raises:
        BudgetError: the budget cannot be met; the error says which could.
        ValueError: an argument that makes no sense, or none for this method.

    Example::

        >>> import torch, embcompress as ec
        >>> table = ec.Embedding(1_000_000, 16, method="hash", budget="1%")
        >>> table(torch.tensor([[3, 999_999]])).shape
        torch.Size([1, 2, 16])
        >>> table.plan.bytes
        640000
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        method: str | Method = "full",
        budget: Budget | None = None,
        seed: int = 0,
        name: str = "",
        counts: Tensor | None = None,
    ) -> None:
        options = GradientOptions(max_norm, norm_type, scale_grad_by_freq, sparse)
        _construct(
            self, num_embeddings, embedding_dim, "none", padding_idx, options, _weight, _freeze,
            device, dtype, method, budget, seed, name, counts,
        )  # fmt: skip

    @classmethod
    def from_plan(
        cls,
        plan: LookupPlan,
        method: str | Method = "plan",
        *,
        sparse: bool = False,
        deployed: bool = False,
        device: torch.device | str | None = None,
    ) -> Embedding:
        """A module that runs any plan (its pooling is replaced by none).

        Args:
            deployed: hold quantized stores packed, never as latents: to serve what is loaded.
        """
        plan = plan.with_pool("none", plan.padding_idx)
        return _from_plan(cls, plan, method, sparse, deployed, device)

    @classmethod
    def from_pretrained(
        cls,
        embeddings: Tensor,
        freeze: bool = True,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        *,
        method: str | Method = "full",
        budget: Budget | None = None,
        seed: int = 0,
        name: str = "",
        counts: Tensor | None = None,
    ) -> Embedding:
        """A table from trained embeddings.

        With ``method="full"`` as :meth:`torch.nn.Embedding.from_pretrained`, around
        ``embeddings`` itself; otherwise the nearest table that the method has within the budget
        (:meth:`embcompress.Method.fit`).
        """
        if embeddings.dim() != 2:
            raise ValueError(f"embeddings must be 2-D, got {embeddings.dim()}-D")
        rows, width = embeddings.shape
        if resolve_method(method).name != "full":
            module = cls(
                rows, width, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse,
                device=embeddings.device, dtype=embeddings.dtype,
                method=method, budget=budget, seed=seed, name=name, counts=counts,
            )  # fmt: skip
            module.fit_(embeddings, seed, name, counts)
            return module.requires_grad_(False) if freeze else module
        return cls(
            rows, width, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse,
            _weight=embeddings, _freeze=freeze,
        )  # fmt: skip

    def forward(self, input: Tensor) -> Tensor:
        """Vectors of the ids.

        Args:
            input: (*) int32 or int64.

        Returns:
            (*, embedding_dim).
        """
        check_tensor("input", input)
        if input.dim() == 1:
            return self._run(Bags(input, input))
        ids = input.reshape(-1)
        vectors = self._run(Bags(ids, ids))
        return vectors.reshape(*input.shape, self.embedding_dim)


class EmbeddingBag(CompressedTable):
    """A drop-in for :class:`torch.nn.EmbeddingBag` over a compressed table.

    Args:
        num_embeddings, embedding_dim, max_norm, norm_type, scale_grad_by_freq, mode, sparse,
        _weight, include_last_offset, padding_idx, device, dtype: as in
            :class:`torch.nn.EmbeddingBag`.
        method, budget, seed, name, counts: as in :class:`Embedding`.

    Every id's vector is assembled before the bag is pooled. Where it differs from torch: offsets
    that do not end at the number of ids, and per-sample weights with another mode than
    ``"sum"``, raise ValueError; ids outside the vocabulary raise IndexError.

    Example::

        >>> import torch, embcompress as ec
        >>> bags = ec.EmbeddingBag(1_000_000, 16, mode="sum", method="qr", budget="1%")
        >>> bags(torch.tensor([3, 5, 999_999]), torch.tensor([0, 2])).shape
        torch.Size([2, 16])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        _weight: Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        method: str | Method = "full",
        budget: Budget | None = None,
        seed: int = 0,
        name: str = "",
        counts: Tensor | None = None,
    ) -> None:
        if mode not in ("sum", "mean", "max"):
            raise ValueError(f"mode must be 'sum', 'mean' or 'max', got {mode!r}")
        options = GradientOptions(max_norm, norm_type, scale_grad_by_freq, sparse)
        _construct(
            self, num_embeddings, embedding_dim, cast(Pool, mode), padding_idx, options, _weight,
            False, device, dtype, method, budget, seed, name, counts,
        )  # fmt: skip
        self.include_last_offset = include_last_offset

    @classmethod
    def from_plan(
        cls,
        plan: LookupPlan,
        method: str | Method = "plan",
        *,
        sparse: bool = False,
        include_last_offset: bool = False,
        deployed: bool = False,
        device: torch.device | str | None = None,
    ) -> EmbeddingBag:
        """A module that runs any plan that pools.

        Args:
            deployed: hold quantized stores packed, never as latents: to serve what is loaded.

        Raises:
            ValueError: ``plan.pool`` is ``"none"``.
        """
        if plan.pool == "none":
            raise ValueError("plan.pool is 'none'; use plan.with_pool('sum') or Embedding")
        module = _from_plan(cls, plan, method, sparse, deployed, device)
        module.include_last_offset = include_last_offset
        return module

    @classmethod
    def from_pretrained(
        cls,
        embeddings: Tensor,
        freeze: bool = True,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        *,
        method: str | Method = "full",
        budget: Budget | None = None,
        seed: int = 0,
        name: str = "",
        counts: Tensor | None = None,
    ) -> EmbeddingBag:
        """A table from trained embeddings; see :meth:`Embedding.from_pretrained`."""
        if embeddings.dim() != 2:
            raise ValueError(f"embeddings must be 2-D, got {embeddings.dim()}-D")
        rows, width = embeddings.shape
        if resolve_method(method).name != "full":
            module = cls(
                rows, width, max_norm, norm_type, scale_grad_by_freq, mode, sparse, None,
                include_last_offset, padding_idx, embeddings.device, embeddings.dtype,
                method=method, budget=budget, seed=seed, name=name, counts=counts,
            )  # fmt: skip
            module.fit_(embeddings, seed, name, counts)
            return module.requires_grad_(False) if freeze else module
        module = cls(
            rows, width, max_norm, norm_type, scale_grad_by_freq, mode, sparse, embeddings,
            include_last_offset, padding_idx,
        )  # fmt: skip
        return module.requires_grad_(not freeze)

    @property
    def mode(self) -> str:
        return self._plan.pool

    def forward(
        self,
        input: Tensor,
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Pooled vectors of bags of ids.

        Args:
            input: (N,) ids with ``offsets``, (B, L) ids, or a 2-D jagged nested tensor; int32 or
                int64.
            offsets: (B,) start of each bag, or (B + 1,) with ``include_last_offset``; rising
                from 0.
            per_sample_weights: float, of the shape of ``input``; ``mode="sum"`` alone.

        Returns:
            (B, embedding_dim); zeros for empty bags.
        """
        if offsets is not None and per_sample_weights is None and not torch.is_grad_enabled():
            program = self._program
            pooled = run_plain_bags(program, (self,), input, offsets, self.include_last_offset)
            if pooled is not None:
                return pooled
        if per_sample_weights is not None and self.mode != "sum":
            raise ValueError(f"per_sample_weights needs mode='sum', this module has {self.mode!r}")
        bags = make_bags(
            input,
            offsets,
            per_sample_weights,
            include_last_offset=self.include_last_offset,
            check=False,
        )
        return self._run(bags)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode!r}"


def _from_plan(
    cls: type[TableType],
    plan: LookupPlan,
    method: str | Method,
    sparse: bool,
    deployed: bool,
    device: torch.device | str | None,
) -> TableType:
    module = cls.__new__(cls)
    options = GradientOptions(sparse=sparse)
    CompressedTable.__init__(module, plan, method, options, deployed=deployed, device=device)
    module.reset_parameters()
    return module
