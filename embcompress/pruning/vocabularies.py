"""Language models: cut the vocabulary to the tokens of a corpus, and put it back."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from embcompress.layouts.pruned import CODES, WEIGHT, PrunedLayout
from embcompress.methods.pruned import Pruned
from embcompress.modules import Embedding
from embcompress.plan import Digit
from embcompress.pruning.ids import count_ids, read_ids
from embcompress.pruning.token_vocabulary import FALLBACK, TokenVocabulary, load_backup, save_backup
from embcompress.tables.compressed_table import CompressedTable
from embcompress.tables.store_tensors import dtype_name
from embcompress.training.optimizer_state import (
    Optimizers,
    as_optimizers,
    replace_parameter,
    take_rows,
)


class TokenEmbedding(Embedding):
    """An :class:`~embcompress.Embedding` whose padding token is treated as torch does it.

    The padding token's row is read as it is (a tied output layer may have trained it) and takes
    no gradient from the lookup. Compressed tables would read zeros.
    """

    padding_token: int | None = None

    @property
    def padding_idx(self) -> int | None:
        return self.padding_token

    def forward(self, input: Tensor) -> Tensor:
        vectors = super().forward(input)
        if self.padding_token is None:
            return vectors
        return torch.where((input == self.padding_token)[..., None], vectors.detach(), vectors)


def prune_vocabulary(
    model: nn.Module,
    tokens: Tensor | str | os.PathLike[str] | Iterable[Any],
    *,
    module: str | None = None,
    keep: Sequence[int] = (),
    fallback_token: int | None = None,
    remap: bool = True,
    backup: str | os.PathLike[str] | None = None,
    optimizer: Optimizers = None,
) -> TokenVocabulary:
    """Cut the vocabulary of a language model to the tokens of a corpus, in place.

    The embedding keeps the rows of the tokens that occur; all others read one fallback row. Output
    layers that share its weight (``nn.Linear``) are cut alike and stay tied: logit j is for token
    ``vocabulary.token_ids[j]``, so map labels with :meth:`TokenVocabulary.encode`. Vectors and
    logits of kept tokens, and the optimizer's state for them, stay what they are.

    Args:
        model: with ``get_input_embeddings()``, as Hugging Face's models have it, or any module.
        tokens: the corpus or its vocabulary: token ids in a tensor or array, an iterable of
            those (read once, never held whole), or the path of a file with one id a line.
        module: path of the ``nn.Embedding``; default: what ``get_input_embeddings()`` returns.
        keep: further tokens to keep, such as special ones. The padding token is always kept.
        fallback_token: the token that pruned ones are read as, such as the unknown token;
            default: a row of its own, the mean of the pruned rows.
        remap: the model goes on to take the old token ids: the embedding becomes an
            :class:`~embcompress.Embedding` with packed codes. False: it remains the same, smaller
            ``nn.Embedding``, and is to be fed with :meth:`TokenVocabulary.encode`.
        backup: ``"memory"``, or the path of a ``.npy`` file (written aside and renamed), where
            the pruned tokens' vectors are kept for :func:`restore_vocabulary`; None: nowhere.
        optimizer: the torch optimizers that train the model.

    Returns:
        The vocabulary; keep it for labels and for :func:`restore_vocabulary`.

    Where the model has a ``config.vocab_size`` equal to the old vocabulary, and an output layer
    was cut, it is set to the number of rows. An output layer of its own weight stays as it is.

    Raises:
        ValueError: no embedding is found, it cannot be replaced, or its weight is shared with
            something that is no embedding or linear layer. Nothing is changed then.
        IndexError: a token outside the vocabulary.

    Source: Williams & Aletras, "Frustratingly simple memory efficiency for pre-trained language
    models via dynamic embedding pruning", arXiv 2309.08708, 2023.
    """
    optimizers = as_optimizers(optimizer)
    tied = _find_tied(model, module, remap)
    weight = tied.weight
    token_ids = _rows_of_tokens(tokens, tied, keep, fallback_token)
    vocabulary = TokenVocabulary(
        weight.shape[0],
        token_ids,
        remap,
        tuple(tied.embeddings),
        tuple(tied.outputs),
        padding={path: table.padding_idx for path, table in tied.embeddings.items()},
    )
    pruned = vocabulary.pruned_tokens()
    fallback = _mean_rows(weight, pruned)
    vocabulary = replace(
        vocabulary,
        backup=save_backup(backup, weight, pruned),
        biases={
            path: output.bias.detach().cpu()[pruned]
            for path, output in tied.outputs.items()
            if output.bias is not None
        },
    )
    sources = token_ids.to(weight.device)
    _Resizer(model, tied, optimizers).resize(sources, fallback, vocabulary)
    return vocabulary


@torch.no_grad()
def restore_vocabulary(
    model: nn.Module, vocabulary: TokenVocabulary, *, optimizer: Optimizers = None
) -> None:
    """Put the vocabulary back that :func:`prune_vocabulary` has cut, in place.

    Kept tokens have their present vectors, biases and optimizer state, bit for bit. Pruned tokens
    get the vectors of the backup, or without one the fallback's; their biases are those that they
    had; their optimizer state starts fresh.

    Args:
        model: the pruned model, or a copy of it.
        vocabulary: what :func:`prune_vocabulary` returned.
        optimizer: the torch optimizers that train the model.

    Raises:
        ValueError: the model was not cut to this vocabulary, or the backup is of another one.
    """
    tied = _pruned_modules(model, vocabulary)
    weight, pruned = tied.weight.detach(), vocabulary.pruned_tokens()
    backup = load_backup(vocabulary, pruned.numel(), weight)
    all_tokens = torch.arange(vocabulary.num_embeddings, device=weight.device)
    rows = vocabulary.encode(all_tokens)
    restored = weight[rows]
    if backup is not None:
        restored[pruned.to(weight.device)] = backup.to(weight.device)
    sources = rows.index_fill(0, pruned.to(weight.device), -1)
    _Resizer(model, tied, as_optimizers(optimizer)).restore(sources, restored, vocabulary)


# ------------------------------------------------------------------------------------- finding


@dataclass(frozen=True)
class _Tied:
    """Modules that share one weight, by path."""

    weight: nn.Parameter
    embeddings: dict[str, nn.Embedding | CompressedTable]
    outputs: dict[str, nn.Linear]
    others: tuple[str, ...] = ()


def _modules_of(model: nn.Module, weight: nn.Parameter) -> _Tied:
    """The modules of a model that hold a parameter."""
    embeddings: dict[str, nn.Embedding | CompressedTable] = {}
    outputs: dict[str, nn.Linear] = {}
    others = []
    for path, module in model.named_modules():
        if not any(p is weight for p in module.parameters(recurse=False)):
            continue
        if isinstance(module, nn.Embedding | CompressedTable):
            embeddings[path] = module
        elif isinstance(module, nn.Linear) and module.weight is weight:
            outputs[path] = module
        else:
            others.append(path)
    return _Tied(weight, embeddings, outputs, tuple(others))


def _find_embedding(model: nn.Module, path: str | None) -> nn.Embedding:
    if path is not None:
        embedding = model.get_submodule(path)
    elif hasattr(model, "get_input_embeddings"):
        embedding = cast(Any, model).get_input_embeddings()
    else:
        raise ValueError("model has no get_input_embeddings(); name its embedding with module=")
    if not isinstance(embedding, nn.Embedding) or embedding is model:
        raise ValueError(
            "the embedding must be an nn.Embedding inside the model, got a "
            f"{type(embedding).__name__}"
        )
    return embedding


def _find_tied(model: nn.Module, path: str | None, remap: bool) -> _Tied:
    embedding = _find_embedding(model, path)
    tied = _modules_of(model, cast(nn.Parameter, embedding.weight))
    if not tied.embeddings:
        raise ValueError("the embedding's weight is parametrized; remove the parametrization")
    if tied.others:
        raise ValueError(
            f"the embedding's weight is shared with {', '.join(tied.others)}, which are neither "
            "embeddings nor linear layers"
        )
    for name, module in tied.embeddings.items():
        assert isinstance(module, nn.Embedding)
        if module.max_norm is not None or module.scale_grad_by_freq:
            raise ValueError(f"{name!r} has max_norm or scale_grad_by_freq and cannot be pruned")
        if remap and (type(module) is not nn.Embedding or _has_hooks(module)):
            raise ValueError(
                f"{name!r} is a {type(module).__name__} or has hooks, which a replacement would "
                "lose; use remap=False"
            )
    return tied


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _pruned_modules(model: nn.Module, vocabulary: TokenVocabulary) -> _Tied:
    """The modules that were cut to a vocabulary."""
    modules = dict(model.named_modules())
    first = modules.get(vocabulary.embeddings[0])
    weight = getattr(first, WEIGHT, None)
    if not isinstance(weight, nn.Parameter) or len(weight) != vocabulary.token_ids.numel():
        raise ValueError(
            f"module {vocabulary.embeddings[0]!r} is not cut to the vocabulary of "
            f"{vocabulary.token_ids.numel()} rows: {first}"
        )
    tied = _modules_of(model, weight)
    if {*vocabulary.embeddings} != {*tied.embeddings} or {*vocabulary.outputs} != {*tied.outputs}:
        raise ValueError(
            f"the pruned weight was shared by {vocabulary.embeddings + vocabulary.outputs}, and is "
            f"now by {(*tied.embeddings, *tied.outputs, *tied.others)}; tie them again first"
        )
    return tied


def _rows_of_tokens(
    tokens: Any, tied: _Tied, keep: Sequence[int], fallback_token: int | None
) -> Tensor:
    """(rows,) the token of each row, the fallback's first, the others rising."""
    count = tied.weight.shape[0]
    if isinstance(tokens, str | os.PathLike):
        tokens = read_ids(tokens, count)
    occurs = count_ids(tokens, count) > 0
    if not bool(occurs.any()):
        raise ValueError("tokens is empty: there is no token to keep")
    paddings = [table.padding_idx for table in tied.embeddings.values()]
    for token in [*keep, *paddings, fallback_token]:
        if token is None:
            continue
        if not 0 <= int(token) < count:
            raise IndexError(f"keep or fallback_token has {token}, which is outside [0, {count})")
        occurs[int(token)] = True
    first = FALLBACK if fallback_token is None else fallback_token
    if fallback_token is not None:
        occurs[fallback_token] = False
    return torch.cat([torch.tensor([first]), occurs.nonzero().flatten()])


def _mean_rows(weight: Tensor, rows: Tensor) -> Tensor:
    """(width,) mean of some rows, zero where there are none."""
    total = weight.new_zeros(weight.shape[1], dtype=torch.float64)
    for chunk in rows.split(1 << 14):
        total += weight.detach()[chunk.to(weight.device)].double().sum(0)
    return (total / max(1, rows.numel())).to(weight.dtype)


# ------------------------------------------------------------------------------------- resizing


class _Resizer:
    """Gives tied modules another number of rows."""

    def __init__(self, model: nn.Module, tied: _Tied, optimizers: Any) -> None:
        self.model, self.tied, self.optimizers = model, tied, optimizers

    def _replace(self, old: nn.Parameter, values: Tensor, sources: Tensor) -> nn.Parameter:
        new = nn.Parameter(values, requires_grad=old.requires_grad)
        replace_parameter(self.optimizers, old, new, sources)
        return new

    @torch.no_grad()
    def resize(self, sources: Tensor, fallback: Tensor, vocabulary: TokenVocabulary) -> None:
        """Cut to the rows ``sources``; -1 takes the fallback's values."""
        values = take_rows(self.tied.weight.detach(), sources, 0.0)
        values[sources < 0] = fallback
        weight = self._replace(self.tied.weight, values, sources)
        pruned = vocabulary.pruned_tokens().to(sources.device)
        for output in self.tied.outputs.values():
            self._set_output(output, weight, sources, lambda bias: bias[pruned].mean())
        for embedding in self.tied.embeddings.values():
            assert isinstance(embedding, nn.Embedding)
            if vocabulary.remaps:
                self._swap(embedding, _remapping(embedding, weight, vocabulary))
            else:
                padding = embedding.padding_idx
                if padding is not None:
                    padding = int(vocabulary.encode(torch.tensor(padding)))
                _set_rows(embedding, weight, padding)
        self._set_vocabulary_size(vocabulary.num_embeddings, weight.shape[0])

    @torch.no_grad()
    def restore(self, sources: Tensor, values: Tensor, vocabulary: TokenVocabulary) -> None:
        """Put all tokens back."""
        rows = self.tied.weight.shape[0]
        weight = self._replace(self.tied.weight, values, sources)
        pruned = vocabulary.pruned_tokens().to(sources.device)
        for path, output in self.tied.outputs.items():
            self._set_output(output, weight, sources, None)
            if output.bias is not None:
                output.bias[pruned] = vocabulary.biases[path].to(output.bias)
        for path, embedding in self.tied.embeddings.items():
            padding = vocabulary.padding[path]
            if isinstance(embedding, nn.Embedding):
                _set_rows(embedding, weight, padding)
            else:
                plain = nn.Embedding(1, 1, sparse=embedding.sparse, device="meta")
                _set_rows(plain, weight, padding)
                self._swap(embedding, plain)
        self._set_vocabulary_size(rows, vocabulary.num_embeddings)

    def _set_output(
        self, output: nn.Linear, weight: nn.Parameter, sources: Tensor, fallback: Any
    ) -> None:
        output.weight, output.out_features = weight, weight.shape[0]
        if output.bias is not None:
            values = take_rows(output.bias.detach(), sources, 0.0)
            if fallback is not None and bool((sources < 0).any()):
                values[sources < 0] = fallback(output.bias.detach())
            output.bias = self._replace(output.bias, values, sources)

    def _swap(self, old: nn.Module, new: nn.Module) -> None:
        """Put a module in another's places."""
        getter: Any = getattr(self.model, "get_input_embeddings", None)
        is_input = getter is not None and getter() is old
        new.train(old.training)
        for parent in list(self.model.modules()):
            for name, child in list(parent._modules.items()):
                if child is old:
                    setattr(parent, name, new)
        if is_input and hasattr(self.model, "set_input_embeddings"):
            cast(Any, self.model).set_input_embeddings(new)

    def _set_vocabulary_size(self, old: int, new: int) -> None:
        config: Any = getattr(self.model, "config", None)
        if self.tied.outputs and getattr(config, "vocab_size", None) == old:
            config.vocab_size = new


def _set_rows(embedding: nn.Embedding, weight: nn.Parameter, padding_idx: int | None) -> None:
    embedding.weight, embedding.padding_idx = weight, padding_idx
    embedding.num_embeddings, embedding.embedding_dim = weight.shape


def _remapping(
    embedding: nn.Embedding, weight: nn.Parameter, vocabulary: TokenVocabulary
) -> TokenEmbedding:
    """An embedding that takes the old token ids and reads the cut weight."""
    kept = vocabulary.token_ids[1:].to(weight.device)
    layout = PrunedLayout(
        vocabulary.num_embeddings, weight.shape[1], kept.numel(), Digit(1, 1)
    )  # the fallback token's code is "absent", so it reads row 0, its own
    plan = layout.plan(dtype_name(weight.dtype))
    table = TokenEmbedding.from_plan(
        plan,
        Pruned(importance=None),  # logits are numbered by the rows: they stay whose they are
        sparse=embedding.sparse,
        device="meta",
    )
    assert isinstance(table, TokenEmbedding)
    table.padding_token = embedding.padding_idx
    table.replace_stores(plan, {WEIGHT: weight.detach(), CODES: layout.codes(kept)})
    table.weight = weight
    return table
