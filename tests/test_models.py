"""The reference models beside DLRM (``test_dlrm.py``): formulas, gradients, and that they learn."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import embcompress as ec
from embcompress.models import DCN, MODELS, ClickModel, DeepFM, WideDeep
from embcompress.training.recipe import binary_step, initialize_tables, make_optimizer

WIDTH, BATCH = 8, 2
# Feature-major bags of two rows; the first bag of "b" has two ids, the second of "c" none.
IDS, OFFSETS = torch.tensor([1, 2, 3, 4, 5, 6]), torch.tensor([0, 1, 2, 4, 5, 6, 6])


def build(kind: Callable[..., ClickModel], num_dense: int = 3, **options: object) -> ClickModel:
    torch.manual_seed(0)
    tables = [ec.TableConfig(name, 100, WIDTH) for name in ("a", "b", "c")]
    collection = ec.EmbeddingBagCollection(tables, method="hash", budget="50%")
    model = kind(collection, num_dense, **options)
    with torch.no_grad():  # nothing may hide behind a zero
        for parameter in model.parameters():
            parameter.normal_()
    return model


def dense_rows(num_dense: int = 3) -> Tensor:
    return torch.randn(BATCH, num_dense, generator=torch.Generator().manual_seed(1))


def perceptron(layers: torch.nn.Sequential, x: Tensor) -> Tensor:
    """The multilayer perceptron by its matrices."""
    linear = [layer for layer in layers if isinstance(layer, torch.nn.Linear)]
    for layer in linear[:-1]:
        x = (x @ layer.weight.T + layer.bias).clamp_min(0)
    return x @ linear[-1].weight.T + linear[-1].bias


def test_deepfm_is_the_papers_formula() -> None:
    model, dense = build(DeepFM, deep_widths=(5,)), dense_rows()
    pooled = model.embeddings(IDS, OFFSETS).split(WIDTH, dim=1)
    vectors = [*pooled, *(dense[:, k : k + 1] * model.dense_vectors[k] for k in range(3))]
    weights = model.first_order.weight[0].split(WIDTH)
    first = sum(v @ w for v, w in zip(vectors, weights, strict=True))
    pairs = sum((vectors[f] * vectors[g]).sum(1) for g in range(6) for f in range(g))
    deep = perceptron(model.deep, torch.cat(vectors, dim=1)).squeeze(1)
    torch.testing.assert_close(model(dense, IDS, OFFSETS), first + pairs + deep)


def test_dcn_is_the_papers_formula() -> None:
    model, dense = build(DCN, cross_layers=3, deep_widths=(5, 4)), dense_rows()
    first = torch.cat([model.embeddings(IDS, OFFSETS), dense], dim=1)
    x, deep = first, first
    for layer in model.cross:
        x = first * (x @ layer.linear.weight.T + layer.linear.bias) + x
    for layer in (model.deep[0], model.deep[2]):
        deep = F.relu(deep @ layer.weight.T + layer.bias)
    expected = perceptron(model.logit, torch.cat([x, deep], dim=1)).squeeze(1)
    torch.testing.assert_close(model(dense, IDS, OFFSETS), expected)


def test_wide_and_deep_is_the_papers_formula() -> None:
    model, dense = build(WideDeep, deep_widths=(5,)), dense_rows()
    x = torch.cat([model.embeddings(IDS, OFFSETS), dense], dim=1)
    expected = x @ model.wide.weight[0] + perceptron(model.deep, x).squeeze(1)
    torch.testing.assert_close(model(dense, IDS, OFFSETS), expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("num_dense", [0, 3])
def test_shapes_and_gradients(name: str, num_dense: int) -> None:
    model = build(MODELS[name], num_dense)
    logits = model(dense_rows(num_dense), IDS, OFFSETS)
    assert logits.shape == (BATCH,) and logits.dtype == torch.float32
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    one = model(dense_rows(num_dense)[:1], IDS[:3], torch.tensor([0, 1, 2, 3]))
    assert one.shape == (1,)


@pytest.mark.parametrize("name", MODELS)
def test_all_that_is_known_of_an_id_is_in_the_tables(name: str) -> None:
    """No parameter of a model grows with the number of ids."""
    sizes = []
    for rows in (100, 10_000):
        tables = [ec.TableConfig(name, rows, WIDTH) for name in ("a", "b")]
        collection = ec.EmbeddingBagCollection(tables, method="hash", budget=3200)
        model = MODELS[name](collection, 2)
        own = {id(p) for p in collection.parameters()}
        sizes.append(sum(p.numel() for p in model.parameters() if id(p) not in own))
    assert sizes[0] == sizes[1] > 0


@pytest.mark.parametrize("name", MODELS)
def test_it_learns(name: str) -> None:
    """Labels that only a product of two ids' vectors can tell."""
    generator = torch.Generator().manual_seed(3)
    torch.manual_seed(0)
    tables = [ec.TableConfig(feature, 40, WIDTH) for feature in ("a", "b")]
    model = MODELS[name](ec.EmbeddingBagCollection(tables), 1)
    initialize_tables(model, 0.3)
    optimizer = make_optimizer(model, 0.1)
    ids = torch.randint(0, 40, (2, 1024), generator=generator)
    label = ((ids[0] ^ ids[1]) % 2).float()
    dense, offsets = torch.randn(1024, 1, generator=generator), torch.arange(2 * 1024 + 1)

    def loss() -> float:
        with torch.no_grad():
            logits = model(dense, ids.flatten(), offsets)
        return F.binary_cross_entropy_with_logits(logits, label).item()

    before = loss()
    for _ in range(150):
        binary_step(optimizer, model(dense, ids.flatten(), offsets), label)
    assert loss() < 0.2 < before


@pytest.mark.parametrize("name", ["deepfm", "dlrm"])
def test_features_of_different_widths_are_refused(name: str) -> None:
    tables = [ec.TableConfig("a", 100, 8), ec.TableConfig("b", 100, 4)]
    with pytest.raises(ValueError, match=r"needs features of one width, got \[4, 8\]"):
        MODELS[name](ec.EmbeddingBagCollection(tables), 0)


@pytest.mark.parametrize("kind", [DCN, WideDeep])
def test_features_may_have_different_widths(kind: type[ClickModel]) -> None:
    tables = [ec.TableConfig("a", 100, 8), ec.TableConfig("b", 100, 4)]
    model = kind(ec.EmbeddingBagCollection(tables), 1)
    assert model(torch.zeros(1, 1), torch.tensor([1, 2]), torch.tensor([0, 1, 2])).shape == (1,)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="cross_layers must be at least 1, got 0"):
        build(DCN, cross_layers=0)
    with pytest.raises(ValueError, match="deep_widths must name at least one"):
        build(DCN, deep_widths=())
    with pytest.raises(ValueError, match="num_dense must be at least 0, got -1"):
        build(WideDeep, num_dense=-1)
