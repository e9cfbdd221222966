"""Many tables, looked up in one call."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from embcompress.budget import Budget, allocate, default_plans, parse_budget
from embcompress.engine import Bags, GradientOptions, Program, make_bags
from embcompress.engine.bags import check_tensor
from embcompress.engine.fused import FusedStores
from embcompress.methods import Method, TableSpec, resolve_method
from embcompress.methods.full import Full
from embcompress.modules import EmbeddingBag
from embcompress.plan import LookupPlan, Pool
from embcompress.tables.compressed_table import tie_shared_stores
from embcompress.tables.fused_table import fused_stores
from embcompress.tables.plan_table import run_plain_bags
from embcompress.tables.store_tensors import dtype_name

#: What a feature of a batch may be: (B,) ids, (B, L) bags, a jagged nested tensor, or
#: (ids, offsets) or (ids, offsets, per_sample_weights) as for EmbeddingBag.
FeatureInput = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class TableConfig:
    """One table of a collection.

    Attributes:
        name: name of the module; hash keys are derived from it. No dots.
        num_embeddings, embedding_dim: shape of the table that it stands for.
        features: names of the features that read it (default: its own name).
        mode: ``"sum"``, ``"mean"`` or ``"max"``.
        counts: (num_embeddings,) how often each id occurs in the training data, or None.
        queries: ids that an example looks up, on average.
        co_occurrence: (num_embeddings, k) int64 what each id occurs with, or None; see
            :class:`embcompress.methods.TableSpec`.
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    features: tuple[str, ...] = ()
    mode: Pool = "sum"
    counts: Tensor | None = field(default=None, compare=False, repr=False)
    queries: float = 1.0
    co_occurrence: Tensor | None = field(default=None, compare=False, repr=False)

    @property
    def feature_names(self) -> tuple[str, ...]:
        return self.features or (self.name,)


def full_plan(table: TableSpec) -> LookupPlan:
    """The uncompressed plan of a table."""
    method = Full()
    return method.plan(table, method.sizes(table)[0])


class EmbeddingBagCollection(nn.Module):
    """Tables of many features under one budget, looked up in one call.

    Args:
        tables: the tables; feature names must be unique over all of them.
        method: one method for all; tables that are better left full under the budget are.
        budget: for all tables together, as in :class:`~embcompress.EmbeddingBag`; fractions are
            of all dense float32 tables. None: every table at its default size.
        seed: hash keys are derived from it and from each table's name.
        plans: of the tables, each of its shape, made by the method before: instead of a budget.
        device, dtype: of the stores; plans have dtypes of their own.

    Attributes:
        embedding_bags: ModuleDict of :class:`~embcompress.EmbeddingBag` by table name.
        feature_names: order of the features in input and output.
        embedding_dims: width of each feature's columns in the output.

    Raises:
        BudgetError: the budget cannot be met; the error names the smallest that can.
        ValueError: names that are not unique or cannot name a module; plans beside a budget, or
            that are not those of the tables.

    Example::

        >>> import torch, embcompress as ec
        >>> tables = [ec.TableConfig("user", 1000, 8), ec.TableConfig("item", 5000, 8)]
        >>> collection = ec.EmbeddingBagCollection(tables, method="hash", budget="10%")
        >>> collection({"user": torch.tensor([1, 2]), "item": torch.tensor([[3, 4], [5, 6]])}).shape
        torch.Size([2, 16])
    """

    def __init__(
        self,
        tables: Sequence[TableConfig],
        *,
        method: str | Method = "full",
        budget: Budget | None = None,
        seed: int = 0,
        plans: Sequence[LookupPlan] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_names(tables)
        resolved = resolve_method(method)
        specs = _specs(tables, seed, dtype)
        if plans is None:
            plans = _plans(specs, resolved, budget)
        else:
            _check_plans(tables, plans, budget)
        self.embedding_bags = nn.ModuleDict()
        for table, spec, plan in zip(tables, specs, plans, strict=True):
            is_full = plan.is_dense and not resolved.searches_plans
            used = "full" if is_full else resolved
            bag = EmbeddingBag.from_plan(plan.with_pool(table.mode), used, device=device)
            if not plan.is_dense:
                resolved.fill(spec, plan, bag.stores())
            bag.keep_spec(spec)
            self.embedding_bags[table.name] = bag
        tie_shared_stores(self._bags_of_tables())
        self._set_features(
            {feature: table.name for table in tables for feature in table.feature_names}
        )

    @classmethod
    def from_tables(
        cls, tables: Mapping[str, EmbeddingBag], features: Mapping[str, str]
    ) -> EmbeddingBagCollection:
        """A collection of tables that there are already.

        Args:
            tables: by name; no dots.
            features: the table's name of each feature, in the order of the features.
        """
        collection = cls.__new__(cls)
        nn.Module.__init__(collection)
        collection.embedding_bags = nn.ModuleDict(tables)
        collection._set_features(features)
        return collection

    def _set_features(self, features: Mapping[str, str]) -> None:
        self._tables_of_features = dict(features)
        # Here, not at the first call: a compiler would take the first call for a special case.
        self._encoded = self._encode(self._bags_of_features())

    @property
    def feature_names(self) -> tuple[str, ...]:
        return tuple(self._tables_of_features)

    @property
    def embedding_dims(self) -> tuple[int, ...]:
        return tuple(bag.embedding_dim for bag in self._bags_of_features())

    def tables_of_features(self) -> dict[str, EmbeddingBag]:
        """The table that each feature reads, in the order of the features."""
        bags = self.embedding_bags._modules  # far cheaper than a ModuleDict's own lookups
        return {
            feature: cast(EmbeddingBag, bags[table])
            for feature, table in self._tables_of_features.items()
        }

    def _bags_of_features(self) -> list[EmbeddingBag]:
        bags = self.embedding_bags._modules
        return [cast(EmbeddingBag, bags[table]) for table in self._tables_of_features.values()]

    def _bags_of_tables(self) -> list[EmbeddingBag]:
        return [cast(EmbeddingBag, bag) for bag in self.embedding_bags.values()]

    def reset_parameters(self, std: float = 1.0) -> None:
        """Draw all stores anew, vectors of every table with this standard deviation."""
        for bag in self.embedding_bags.values():
            assert isinstance(bag, EmbeddingBag)
            bag.reset_parameters(std)

    def forward(
        self,
        input: Tensor | Mapping[str, FeatureInput],
        offsets: Tensor | None = None,
        per_sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Pooled vectors of all features.

        Args:
            input: a mapping with one entry a feature (see :data:`FeatureInput`); or (N,) ids,
                feature-major: all bags of the first feature, then all of the second, …
            offsets: with ids: (F * B + 1,), from 0 to N; bag b of feature f is number f * B + b.
            per_sample_weights: with ids: (N,) float, for features of ``mode="sum"``.

        Returns:
            (B, sum of embedding_dims), the columns of each feature in order.
        """
        weighted: list[str] | None = None
        if isinstance(input, Mapping):
            if offsets is not None or per_sample_weights is not None:
                raise ValueError("a mapping carries its own offsets and weights")
            weighted = [
                name
                for name, value in input.items()
                if isinstance(value, tuple) and len(value) == 3 and name in self._tables_of_features
            ]
            input, offsets, per_sample_weights = self._concatenate(input)
        elif offsets is None:
            raise ValueError("offsets must be given with ids; or pass a mapping of features")
        modules = self._bags_of_features()
        program, tables = self._program(modules), list(dict.fromkeys(modules))
        if per_sample_weights is None and not torch.is_grad_enabled():
            pooled = run_plain_bags(program, tables, input, offsets, ends_are_given=True)
            if pooled is not None:
                return pooled
        bags = make_bags(input, offsets, per_sample_weights, include_last_offset=True, check=False)
        if per_sample_weights is not None and weighted is None:
            weighted = list(self.feature_names)
        for feature in weighted or []:
            mode = self.embedding_bags[self._tables_of_features[feature]].mode
            if mode != "sum":
                raise ValueError(
                    f"feature {feature!r} has mode {mode!r}; per-sample weights need 'sum'"
                )
        if any(table.fused_rule is not tables[0].fused_rule for table in tables):
            raise ValueError("some tables have another fused optimizer; fuse the whole collection")
        fused: FusedStores | list[FusedStores | None] | None
        if program.parts:
            fused = [fused_stores(part, tables) for _, part in program.parts]
        else:
            fused = fused_stores(program, tables)
        return program([module.stores() for module in modules], bags, fused)

    def _program(self, modules: Sequence[EmbeddingBag]) -> Program:
        """The features' plans, encoded again only when one of them has changed."""
        if not all(map(operator.is_, self._encoded.plans, [module._plan for module in modules])):
            self._encoded = self._encode(modules)
        return self._encoded

    def _encode(self, modules: Sequence[EmbeddingBag]) -> Program:
        numbers = {module: number for number, module in enumerate(dict.fromkeys(modules))}
        options = [GradientOptions(sparse=module.gradient_options.sparse) for module in modules]
        plans = [module.plan for module in modules]
        return Program(plans, options, [numbers[module] for module in modules])

    def _concatenate(
        self, features: Mapping[str, FeatureInput]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Feature-major ids, offsets and weights of a mapping."""
        missing = [name for name in self.feature_names if name not in features]
        if missing:
            raise ValueError(f"input lacks the features {missing}")
        bags = [feature_bags(name, features[name]) for name in self.feature_names]
        batches = {
            name: bag.offsets.numel() - 1
            for name, bag in zip(self.feature_names, bags, strict=True)
        }
        if len(set(batches.values())) > 1:
            raise ValueError(f"features have different batch sizes: {batches}")
        ids = torch.cat([bag.ids.long() for bag in bags])
        starts, base = [], 0
        for bag in bags:
            starts.append(bag.offsets[:-1].long() + base)
            base += bag.ids.numel()
        offsets = torch.cat([*starts, ids.new_full((1,), base)])
        if all(bag.weights is None for bag in bags):
            return ids, offsets, None
        dtype = next(bag.weights.dtype for bag in bags if bag.weights is not None)
        weights = [
            torch.ones_like(bag.ids, dtype=dtype) if bag.weights is None else bag.weights
            for bag in bags
        ]
        return ids, offsets, torch.cat(weights)


def feature_bags(name: str, value: FeatureInput) -> Bags:
    """Canonical bags of one feature; errors name the feature."""
    parts = value if isinstance(value, tuple) else (value,)
    if not 1 <= len(parts) <= 3:
        raise ValueError(f"feature {name!r}: expected ids, offsets and weights at most")
    ids = parts[0]
    offsets = parts[1] if len(parts) > 1 else None
    weights = parts[2] if len(parts) > 2 else None
    check_tensor(f"feature {name!r}: input", ids)
    if ids.dim() == 1 and offsets is None and not ids.is_nested:
        ids = ids[:, None]  # one id a bag
    try:
        return make_bags(ids, offsets, weights, include_last_offset=False)
    except (TypeError, ValueError) as error:
        raise type(error)(f"feature {name!r}: {error}") from None


def plan_tables(
    tables: Sequence[TableConfig],
    *,
    method: str | Method,
    budget: Budget | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> list[LookupPlan]:
    """The plans that :class:`EmbeddingBagCollection` gives the tables, without the tables.

    Raises:
        BudgetError: the budget cannot be met; the error names the smallest that can.
    """
    return _plans(_specs(tables, seed, dtype), resolve_method(method), budget)


def _specs(tables: Sequence[TableConfig], seed: int, dtype: torch.dtype | None) -> list[TableSpec]:
    name = dtype_name(torch.get_default_dtype() if dtype is None else dtype)
    return [
        TableSpec(
            t.num_embeddings,
            t.embedding_dim,
            t.name,
            seed,
            name,
            t.counts,
            t.queries,
            t.co_occurrence,
        )
        for t in tables
    ]


def _plans(specs: Sequence[TableSpec], method: Method, budget: Budget | None) -> list[LookupPlan]:
    if budget is None:
        return default_plans(method, specs)
    limit = parse_budget(budget, sum(spec.dense_bytes for spec in specs))
    return allocate(specs, [method] * len(specs), limit, full_plan)


def _check_plans(
    tables: Sequence[TableConfig], plans: Sequence[LookupPlan], budget: Budget | None
) -> None:
    if budget is not None:
        raise ValueError(f"give either plans or a budget, not both; got a budget of {budget!r}")
    if len(plans) != len(tables):
        raise ValueError(f"plans must be one a table: {len(plans)} for {len(tables)} tables")
    for table, plan in zip(tables, plans, strict=True):
        shape = plan.num_embeddings, plan.embedding_dim
        if shape != (table.num_embeddings, table.embedding_dim):
            raise ValueError(
                f"plans: that of table {table.name!r} is of {shape[0]} × {shape[1]}, the table of "
                f"{table.num_embeddings} × {table.embedding_dim}"
            )


def _check_names(tables: Sequence[TableConfig]) -> None:
    if not tables:
        raise ValueError("tables must not be empty")
    names = [table.name for table in tables]
    features = [feature for table in tables for feature in table.feature_names]
    for what, values in (("table", names), ("feature", features)):
        if len(set(values)) != len(values):
            raise ValueError(f"{what} names must be unique, got {values}")
    for name in names:
        if not name or "." in name or hasattr(nn.ModuleDict, name):
            raise ValueError(
                f"table name {name!r} cannot name a module; use e.g. "
                f"TableConfig('table_{name.replace('.', '_')}', …, features=({name!r},))"
            )
