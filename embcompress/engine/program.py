"""Which engine runs a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from embcompress.engine import ops
from embcompress.engine.bags import Bags, check_ids, check_offsets
from embcompress.engine.dense import GradientOptions, lookup_dense
from embcompress.engine.encoding import EncodedPlans, can_encode, encode_plans, needs_cpu_kernels
from embcompress.engine.fused import FusedStores, lookup_fused
from embcompress.engine.groups import FeatureBags, FeatureGroup, ends_in_torch, group_features
from embcompress.engine.heads import apply_head, is_linear
from embcompress.engine.kernel_plans import gathered_plan, kernel_plan, promoted_dtype
from embcompress.engine.reference import lookup_reference, pool_bags, vectors_after_head
from embcompress.plan import LookupPlan

Stores = Mapping[str, Tensor]


class Program:
    """The plans of some features, encoded once; call it with the stores and the bags.

    Args:
        plans: one for each feature; those of several features must pool.
        options: of all features, or for each; only :attr:`GradientOptions.sparse` applies to plans
            that are not dense. Where any rows are in a file, gradients are sparse in any case: a
            dense one would fill the memory.
        owners: number of the table that each feature reads; features of one table share its
            stores (default: every feature has its own).
        heads_follow: the plans are gathered for heads that torch runs: padding must be zero, so
            that torch's own operator for a full table does not do.

    Attributes:
        stores: (owner, store name) of every tensor that the operators take, in order.
        is_plain: whether one call of the operator is all that these plans need, where it
            :meth:`runs_on` the device.
        parts: a group of features and its program, where one call cannot run them all; else empty.
    """

    def __init__(
        self,
        plans: Sequence[LookupPlan],
        options: GradientOptions | Sequence[GradientOptions] = GradientOptions(),
        owners: Sequence[int] | None = None,
        *,
        heads_follow: bool = False,
    ) -> None:
        self.plans = tuple(plans)
        self.owners = tuple(range(len(plans)) if owners is None else owners)
        each = [options] * len(plans) if isinstance(options, GradientOptions) else options
        self.options = each[0]
        self.stores: list[tuple[int, str]] = []
        self._sources: list[tuple[int, str]] = []
        self._dense = len(plans) == 1 and plans[0].is_dense and not heads_follow
        self._encoded: EncodedPlans | None = None
        self.parts = self._divide(each) if len(plans) > 1 else []
        self._ends_in_torch = ends_in_torch(plans[0])
        if not self.parts and ops.is_available() and all(map(can_encode, plans)):
            self._encode()
        self._has_vectors = plans[0].pool == "none" or self._ends_in_torch  # for every id, no bags
        self._is_for_cpu = any(map(needs_cpu_kernels, plans))
        self._before_heads = self._without_heads() if ops.has_kernels_without_heads() else None
        self._sparse_stores = [
            [store.name for store in plan.stores if store.sparsity is not None] for plan in plans
        ]
        self._has_sparse = any(self._sparse_stores)
        self._has_files = any(store.is_in_file for plan in plans for store in plan.stores)
        self._sparse = self.options.sparse or self._has_files
        self._dtype = promoted_dtype(plans)
        self.is_plain = (
            self._encoded is not None
            and not (self._dense or self._has_vectors)
            and self._dtype == torch.float32
        )

    def _divide(self, options: Sequence[GradientOptions]) -> list[tuple[FeatureGroup, Program]]:
        """The groups of the features and their programs; nothing if one call runs all."""
        groups = group_features(self.plans, self.owners, options)
        if len(groups) == 1 and not groups[0].is_one_table:
            return []
        parts = []
        for group in groups:
            features = group.features[:1] if group.is_one_table else group.features
            program = Program(
                [self.plans[feature] for feature in features],
                options[features[0]],
                [self.owners[feature] for feature in features],
            )
            parts.append((group, program))
        return parts

    def _encode(self) -> None:
        plans = list(map(kernel_plan, self.plans)) if self._ends_in_torch else list(self.plans)
        positions: dict[tuple[int | str, str], int] = {}
        numbers: list[dict[str, int]] = []
        for plan, owner in zip(plans, self.owners, strict=True):
            numbers.append({})
            for store in plan.stores:
                key = ("shared", store.shared) if store.shared else (owner, store.name)
                if key not in positions:
                    positions[key] = len(positions)
                    self.stores.append((owner, store.name))
                numbers[-1][store.name] = positions[key]
        # Where the tensors are among the arguments of a call.
        self._sources = [(self.owners.index(owner), name) for owner, name in self.stores]
        self._encoded = encode_plans(plans, numbers)

    def _without_heads(self) -> Program | None:
        """What a device gathers and pools whose kernels run no heads, where nothing else is amiss.

        Sums and means may be taken before linear heads, which are then torch's affair.
        """
        is_float32 = promoted_dtype(self.plans) == torch.float32
        if self._encoded is None or self._ends_in_torch or not is_float32:
            return None
        plans = list(map(gathered_plan, self.plans))
        if not self._is_for_cpu or any(map(needs_cpu_kernels, plans)):
            return None
        return Program(plans, self.options, self.owners, heads_follow=True)

    @property
    def is_compiled(self) -> bool:
        """Whether the compiled operators run these plans in one call, on a device that runs all
        that they need (:meth:`runs_on`)."""
        return self._encoded is not None

    def runs_on(self, device: torch.device) -> bool:
        """Whether a device's kernels run these plans: heads, overlapping and sparse rows."""
        return not self._is_for_cpu or ops.runs_every_plan(device)

    def _trains_packed(self, stores: Sequence[Stores]) -> bool:
        """Whether the kept numbers of a sparse store take gradients, which no kernel gives."""
        return torch.is_grad_enabled() and any(
            each[name].dim() == 1 and each[name].requires_grad
            for each, names in zip(stores, self._sparse_stores, strict=True)
            for name in names
        )

    def __call__(
        self,
        stores: Sequence[Stores],
        bags: Bags,
        fused: FusedStores | Sequence[FusedStores | None] | None = None,
    ) -> Tensor:
        """Vectors (one feature, ``pool="none"``), or the pooled bags of all features.

        Args:
            stores: for each feature its tensors by store name: float ones of the store's shape,
                packed ones (bytes,) uint8, the kept numbers of packed sparse ones (stored,).
            bags: feature-major ids and offsets.
            fused: stores that the backward pass updates; for compiled programs. A sequence of
                them, one a part, for a program of parts.

        Returns:
            (N, embedding_dim), or (B, sum of embedding_dim).

        Raises:
            TypeError: inputs or plans that the compiled engine does not run, with ``fused``.
            IndexError: an id outside ``[0, num_embeddings)``.
            ValueError: offsets that describe no bags.
        """
        if self._dense and fused is None and self._is_for_torch(bags):
            return self._run_dense(stores[0], bags.complete())
        if self.parts:
            return self._run_parts(stores, bags, fused)
        assert not isinstance(fused, Sequence)
        runs_on_device = self.runs_on(bags.ids.device)
        is_for_kernels = _is_for_kernels(bags) and not (
            self._has_sparse and self._trains_packed(stores)
        )
        if self._encoded is not None and is_for_kernels and runs_on_device:
            return self._run_compiled(self._encoded, stores, bags, fused)
        if fused is not None and not runs_on_device:
            raise TypeError(
                f"the kernels of a {bags.ids.device.type} device run no heads and no overlapping "
                "or sparse rows, and the optimizer was fused on another device; move the module "
                "first, then fuse the optimizer"
            )
        if fused is not None:
            raise TypeError(
                "a fused optimizer takes ids on the CPU or a CUDA device and per_sample_weights of "
                "float32 at most; call .float() on the weights"
            )
        if self._before_heads is not None and not runs_on_device and self._takes(bags):
            return self._run_heads(stores, self._before_heads(stores, bags))
        return self._run_reference(stores, bags.complete())

    def run_plain_bags(
        self, stores: list[Tensor], ids: Tensor, offsets: Tensor, ends_are_given: bool
    ) -> Tensor | None:
        """Pooled bags without gradients, by one call of the operator, which checks everything.

        For small batches, of which Python would take the half. Where :attr:`is_plain`, on a device
        that runs these plans.

        Args:
            stores: the tensors that :attr:`stores` names.

        Returns:
            (B, sum of embedding_dim); None where the operator refused: then :meth:`__call__` says
            what is wrong.
        """
        encoded = self._encoded
        assert encoded is not None
        try:
            return ops.lookup_forward(
                stores, ids, offsets, None, encoded.tensor, ends_are_given, len(self.plans),
                encoded.num_columns, False,
            )  # fmt: skip
        except RuntimeError as error:
            if ops.is_report(error):  # which is made once: another call would not raise it
                self._check(Bags(ids, offsets, ends_are_given=ends_are_given).complete())
                raise
            return None

    # -- several calls

    def _run_parts(
        self,
        stores: Sequence[Stores],
        bags: Bags,
        fused: FusedStores | Sequence[FusedStores | None] | None,
    ) -> Tensor:
        updates = fused if isinstance(fused, Sequence) else [None] * len(self.parts)
        split = FeatureBags(bags.complete(), len(self.plans))
        columns: dict[int, Tensor] = {}
        for (group, program), update in zip(self.parts, updates, strict=True):
            own = [stores[feature] for feature in group.features[: len(program.plans)]]
            output = program(own, split.of(group.features), update)
            columns.update(group.columns(output, program.plans))
        return torch.cat([columns[feature] for feature in range(len(self.plans))], dim=1)

    # -- torch's own operator

    def _is_for_torch(self, bags: Bags) -> bool:
        """Whether torch looks a dense table up: on the CPU, or where the kernels do not do as it.

        The kernels of a GPU report wrong ids when they meet them, and nothing waits for a check.
        """
        (plan,), options = self.plans, self.options
        if plan.pool == "max" and options.sparse:  # which torch refuses
            return False
        if ops.runs_every_plan(bags.ids.device) or self._encoded is None:
            return True
        has_options = options.max_norm is not None or options.scale_grad_by_freq
        reads_padding = plan.pool == "none" and plan.padding_idx is not None
        return has_options or reads_padding or not self._takes(bags)

    def _takes(self, bags: Bags) -> bool:
        """Whether the compiled operators take these inputs, and give the gradients asked for.

        In a graph of torch.compile their gradients are dense. Where sparse ones are asked for,
        torch gathers, but not of several features, whose ids only the offsets tell apart.
        """
        is_sparse = self._sparse and len(self.plans) == 1
        return _is_for_kernels(bags) and not (is_sparse and torch.compiler.is_compiling())

    def _run_dense(self, stores: Stores, bags: Bags) -> Tensor:
        (plan,) = self.plans
        return lookup_dense(plan, stores[plan.stores[0].name], bags, self.options)

    # -- the compiled operators

    def _run_compiled(
        self,
        encoded: EncodedPlans,
        stores: Sequence[Stores],
        bags: Bags,
        fused: FusedStores | None,
    ) -> Tensor:
        if self._has_files and fused is None:
            self._check_gradients(stores)
        weights = None if self._ends_in_torch else bags.weights
        arguments = (
            [stores[feature][name] for feature, name in self._sources],
            bags.ids.contiguous(),
            None if self._has_vectors else bags.offsets.contiguous(),
            None if weights is None else weights.contiguous(),
            encoded.tensor,
            bags.ends_are_given,
            len(self.plans),
            encoded.num_columns,
            self._sparse and not torch.compiler.is_compiling(),
        )
        try:
            if fused is not None and torch.is_grad_enabled():
                pooled = lookup_fused(fused, arguments)
            else:
                pooled = ops.lookup(*arguments)
        except RuntimeError:
            if not torch.compiler.is_compiling():
                # The kernel says that something is wrong; the check says what, and raises it.
                self._check(bags.complete())
            raise
        if self._ends_in_torch:
            pooled = self._finish(stores[0], bags, pooled)
        # Rounded once, at the end.
        return pooled if self._dtype == torch.float32 else pooled.to(self._dtype)

    def _finish(self, stores: Stores, bags: Bags, vectors: Tensor) -> Tensor:
        """From what the kernels gathered for every id: a head that is not linear, and the pool."""
        (plan,) = self.plans
        if not is_linear(plan.head):
            vectors = vectors_after_head(plan, stores, bags.ids, vectors)
        if plan.pool == "none":
            return vectors
        bags = bags.complete()
        if not bags.checked:
            check_offsets(bags.offsets, bags.ids.numel())
        return pool_bags(plan, vectors, bags)

    def _run_heads(self, stores: Sequence[Stores], pooled: Tensor) -> Tensor:
        """What the kernels gathered and pooled of all features, after their linear heads."""
        columns = pooled.split([plan.width for plan in self.plans], dim=1)
        features = zip(self.plans, stores, columns, strict=True)
        outputs = [apply_head(plan, own, part) for plan, own, part in features]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _check_gradients(self, stores: Sequence[Stores]) -> None:
        """Refuse dense gradients of rows in a file, which compilers ask for; export asks for none.

        Where graphs may break, the compiler takes the refusal for a break and runs it as it is.
        """
        if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return
        for plan, own in zip(self.plans, stores, strict=True):
            for store in plan.stores:
                if store.is_in_file and own[store.name].requires_grad and torch.is_grad_enabled():
                    raise TypeError(
                        f"store {store.name!r} is in a file, and a compiled graph would take a "
                        "gradient of all its rows; call embcompress.fuse_optimizer, or compile "
                        "under torch.no_grad()"
                    )

    # -- the reference

    def _feature_bags(self, bags: Bags) -> list[Bags]:
        """The bags of each feature."""
        if len(self.plans) == 1:
            return [bags]
        split = FeatureBags(bags, len(self.plans))
        return [split.of((feature,)) for feature in range(len(self.plans))]

    def _check(self, bags: Bags) -> None:
        """Raise what is wrong with ids or offsets."""
        for plan, part in zip(self.plans, self._feature_bags(bags), strict=True):
            if plan.pool != "none" and not part.checked:
                check_offsets(part.offsets, part.ids.numel())
            check_ids(part.ids, plan.num_embeddings)

    def _run_reference(self, stores: Sequence[Stores], bags: Bags) -> Tensor:
        columns = []
        for plan, each, part in zip(self.plans, stores, self._feature_bags(bags), strict=True):
            check_ids(part.ids, plan.num_embeddings)
            if plan.pool != "none" and not part.checked:
                check_offsets(part.offsets, part.ids.numel())
            if _computes_vectors(plan):
                columns.append(_lookup_distinct(plan, each, part))
            else:
                columns.append(lookup_reference(plan, each, part, sparse=self._sparse))
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)


def _computes_vectors(plan: LookupPlan) -> bool:
    """Whether vectors are computed of the ids alone, so that an id should come once a batch."""
    is_wide = all(store.dtype in ("float32", "float64") for store in plan.stores)
    return plan.inputs is not None and is_wide and not torch.compiler.is_compiling()


def _lookup_distinct(plan: LookupPlan, stores: Stores, bags: Bags) -> Tensor:
    """The reference's answer, with the vector of each distinct id computed once."""
    ids, positions = bags.ids.unique(return_inverse=True)
    vectors = plan.with_pool("none", plan.padding_idx)
    each = F.embedding(positions, lookup_reference(vectors, stores, Bags(ids, ids)))
    return each if plan.pool == "none" else pool_bags(plan, each, bags)


def _is_for_kernels(bags: Bags) -> bool:
    if bags.weights is not None and bags.weights.dtype == torch.float64:
        return False
    return ops.runs_on(bags.ids.device)
