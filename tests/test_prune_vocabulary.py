"""Language models: the vocabulary is cut to a corpus and put back, tied layers and all."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import embcompress as ec

TOKENS, WIDTH, PAD, UNKNOWN = 500, 8, 1, 3
CORPUS = torch.tensor([[10, 20, 30, 20], [40, 10, 499, PAD]])
KEPT = torch.tensor([PAD, 10, 20, 30, 40, 499])
PRUNED = torch.tensor([x for x in range(TOKENS) if x not in KEPT])


class LanguageModel(nn.Module):
    """The interface of Hugging Face's causal models, in a few lines."""

    def __init__(self, *, tied: bool = True, bias: bool = True, padding: int | None = PAD) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = SimpleNamespace(vocab_size=TOKENS)
        self.model = nn.ModuleDict({"embed_tokens": nn.Embedding(TOKENS, WIDTH, padding)})
        self.mixer = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.lm_head = nn.Linear(WIDTH, TOKENS, bias=bias)
        if tied:
            self.lm_head.weight = self.model["embed_tokens"].weight

    def get_input_embeddings(self) -> nn.Module:
        return self.model["embed_tokens"]

    def set_input_embeddings(self, module: nn.Module) -> None:
        self.model["embed_tokens"] = module

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = self.lm_head(self.mixer(self.get_input_embeddings()(input_ids))[0])
        if labels is None:
            return logits
        return F.cross_entropy(logits.reshape(-1, self.config.vocab_size), labels.reshape(-1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("remap", [True, False])
@pytest.mark.parametrize("fallback_token", [None, UNKNOWN])
def test_logits_of_kept_tokens_stay_what_they_are(
    remap: bool, bias: bool, fallback_token: int | None
) -> None:
    model = LanguageModel(bias=bias)
    original = copy.deepcopy(model)
    vocabulary = ec.prune_vocabulary(model, CORPUS, fallback_token=fallback_token, remap=remap)
    first = -1 if fallback_token is None else UNKNOWN
    assert vocabulary.token_ids.tolist() == [first, *KEPT.tolist()]
    embedding = model.get_input_embeddings()
    assert embedding.weight is model.lm_head.weight and embedding.weight.shape == (7, WIDTH)
    assert model.lm_head.out_features == model.config.vocab_size == 7
    assert len(list(model.parameters())) == len(list(original.parameters()))

    logits = model(CORPUS if remap else vocabulary.encode(CORPUS))
    expected = original(CORPUS)
    rows = vocabulary.encode(KEPT)
    torch.testing.assert_close(logits[..., rows], expected[..., KEPT])
    assert torch.equal(vocabulary.decode(rows), KEPT)
    if fallback_token is None:
        # Logits are linear, so the fallback's is the mean of those that it stands for.
        torch.testing.assert_close(logits[..., 0], expected[..., PRUNED].mean(-1))
    else:
        torch.testing.assert_close(logits[..., 0], expected[..., UNKNOWN])
        assert torch.equal(vocabulary.encode(torch.tensor([UNKNOWN, 4])), torch.tensor([0, 0]))


def test_input_ids_stay_the_old_ones_where_the_model_remaps() -> None:
    model = LanguageModel()
    weight = model.lm_head.weight.detach().clone()
    vocabulary = ec.prune_vocabulary(model, CORPUS)
    table = model.get_input_embeddings()
    assert isinstance(table, ec.Embedding) and table.padding_idx == PAD
    assert table.num_embeddings == TOKENS
    assert torch.equal(table(KEPT), weight[KEPT])
    table(KEPT).sum().backward()
    assert table.weight.grad[:, 0].tolist() == [0, 0, 1, 1, 1, 1, 1]  # fallback, padding, tokens
    torch.testing.assert_close(table(PRUNED[:3]), weight[PRUNED].mean(0).expand(3, -1))
    assert ec.TrainingProcedure(model).tables == {}  # the tokens keep their rows and logits
    report = ec.memory(model)
    assert report.total == 7 * WIDTH * 4 + -(-TOKENS * 3 // 8)
    assert torch.equal(vocabulary.pruned_tokens(), PRUNED)


@pytest.mark.parametrize("backup", [None, "memory", "file"])
@pytest.mark.parametrize("remap", [True, False])
@pytest.mark.parametrize("fallback_token", [None, UNKNOWN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restoring_is_exact(
    backup: str | None, remap: bool, fallback_token: int | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = LanguageModel().to(dtype)
    original = copy.deepcopy(model)
    place = tmp_path / "rows.npy" if backup == "file" else backup
    vocabulary = ec.prune_vocabulary(
        model, CORPUS, remap=remap, backup=place, fallback_token=fallback_token
    )
    fallback = model.lm_head.weight[0].detach().clone()
    ec.restore_vocabulary(model, vocabulary)
    embedding = model.get_input_embeddings()
    assert type(embedding) is nn.Embedding and embedding.weight is model.lm_head.weight
    assert embedding.padding_idx == PAD and embedding.num_embeddings == TOKENS
    assert model.lm_head.out_features == model.config.vocab_size == TOKENS
    expected = copy.deepcopy(original.state_dict())
    if backup is None:
        lost = vocabulary.pruned_tokens()
        for key in ("lm_head.weight", "model.embed_tokens.weight"):
            expected[key][lost] = fallback
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key
    assert list(tmp_path.iterdir()) == ([place] if backup == "file" else [])


@pytest.mark.parametrize("remap", [True, False])
def test_training_a_cut_model_trains_the_rows_of_the_whole_one(remap: bool) -> None:
    """Plain SGD, with logits of kept tokens alone in the loss: the same numbers, bit by bit."""
    model = LanguageModel()
    whole = copy.deepcopy(model)
    vocabulary = ec.prune_vocabulary(model, CORPUS, remap=remap)
    rows = vocabulary.encode(KEPT)
    inputs, labels = CORPUS[:, :-1], CORPUS[:, 1:]
    for each, ids, kept in (
        (whole, inputs, KEPT),
        (model, inputs if remap else vocabulary.encode(inputs), rows),
    ):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1, momentum=0.9)
        for _ in range(3):
            optimizer.zero_grad()
            logits = each(ids)[..., kept]
            targets = torch.searchsorted(KEPT, labels.contiguous())
            F.cross_entropy(logits.reshape(-1, len(KEPT)), targets.reshape(-1)).backward()
            optimizer.step()
    torch.testing.assert_close(model.lm_head.weight[rows], whole.lm_head.weight[KEPT])
    loss = model(
        inputs if remap else vocabulary.encode(inputs),
        vocabulary.encode(labels.masked_fill(labels == PAD, -100)),
    )
    assert loss.isfinite()


def test_optimizer_state_follows_the_tokens() -> None:
    model = LanguageModel()
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.01) for each in (model, twin)]

    def step(each: LanguageModel, optimizer: torch.optim.Optimizer, rows: Tensor) -> None:
        optimizer.zero_grad()
        each(CORPUS)[..., rows].square().sum().backward()
        optimizer.step()

    for each, optimizer in zip((model, twin), optimizers, strict=True):
        step(each, optimizer, KEPT)
    vocabulary = ec.prune_vocabulary(model, CORPUS, optimizer=optimizers[0], backup="memory")
    step(model, optimizers[0], vocabulary.encode(KEPT))
    ec.restore_vocabulary(model, vocabulary, optimizer=optimizers[0])
    step(model, optimizers[0], KEPT)
    for _ in range(2):
        step(twin, optimizers[1], KEPT)
    assert {*optimizers[0].param_groups[0]["params"]} == {*model.parameters()}
    assert {*optimizers[0].state} == {*model.parameters()}
    torch.testing.assert_close(model.lm_head.weight[KEPT], twin.lm_head.weight[KEPT])
    torch.testing.assert_close(model.lm_head.bias[KEPT], twin.lm_head.bias[KEPT])
    moments = optimizers[0].state[model.lm_head.weight]["exp_avg"]
    assert moments.shape == (TOKENS, WIDTH) and not moments[PRUNED].any()


def test_every_form_of_corpus_and_tokens_to_keep(tmp_path: Path) -> None:
    path = tmp_path / "tokens.txt"
    ec.write_ids(path, KEPT)

    def batches() -> Iterator[Tensor]:
        yield from CORPUS

    for tokens in (CORPUS, CORPUS.numpy(), batches(), [CORPUS.tolist()], str(path), path):
        vocabulary = ec.prune_vocabulary(LanguageModel(), tokens)
        assert vocabulary.token_ids.tolist() == [-1, *KEPT.tolist()]
    vocabulary = ec.prune_vocabulary(LanguageModel(), CORPUS, keep=(0, 2))
    assert vocabulary.token_ids.tolist() == [-1, 0, PAD, 2, *KEPT[1:].tolist()]
    everything = ec.prune_vocabulary(LanguageModel(), torch.arange(TOKENS))
    assert everything.pruned_tokens().numel() == 0


def test_models_without_the_interface_and_untied_layers() -> None:
    model = nn.Sequential(nn.Embedding(TOKENS, WIDTH), nn.Linear(WIDTH, TOKENS))
    expected = model(CORPUS)
    vocabulary = ec.prune_vocabulary(model, CORPUS, module="0")
    assert torch.equal(model(CORPUS), expected)  # the output layer is as it was
    assert vocabulary.outputs == () and vocabulary.embeddings == ("0",)
    with pytest.raises(ValueError, match="name its embedding with module="):
        ec.prune_vocabulary(nn.Sequential(nn.Embedding(9, 2)), CORPUS)


def test_embeddings_that_share_a_weight_stay_tied() -> None:
    model = LanguageModel(bias=False)
    model.decoder = nn.ModuleDict({"embed": nn.Embedding(TOKENS, WIDTH, PAD)})
    model.decoder["embed"].weight = model.lm_head.weight
    model.again = model.get_input_embeddings()
    vocabulary = ec.prune_vocabulary(model, CORPUS)
    assert vocabulary.embeddings == ("model.embed_tokens", "decoder.embed")
    weights = {id(p) for n, p in model.named_parameters(remove_duplicate=False) if "mixer" not in n}
    assert len(weights) == 1 and model.again is model.get_input_embeddings()
    assert torch.equal(model.decoder["embed"](CORPUS), model.again(CORPUS))
    ec.restore_vocabulary(model, vocabulary)
    assert model.again is model.get_input_embeddings() is not model.decoder["embed"]
    assert model.decoder["embed"].weight is model.again.weight is model.lm_head.weight


def test_a_padding_row_that_is_not_zero_is_read_as_before() -> None:
    model = LanguageModel()
    with torch.no_grad():
        model.lm_head.weight[PAD] = 5.0
    expected = model(CORPUS)
    vocabulary = ec.prune_vocabulary(model, CORPUS)
    rows = vocabulary.encode(KEPT)
    torch.testing.assert_close(model(CORPUS)[..., rows], expected[..., KEPT])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(CORPUS), model(CORPUS))
        assert twin.lm_head.weight is twin.get_input_embeddings().weight


def test_a_subclass_keeps_its_class_where_it_is_not_replaced() -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 3

    model = nn.Sequential(Scaled(TOKENS, WIDTH))
    expected = model(CORPUS)
    with pytest.raises(ValueError, match=r"'0' is a Scaled or has hooks.*use remap=False"):
        ec.prune_vocabulary(model, CORPUS, module="0")
    vocabulary = ec.prune_vocabulary(model, CORPUS, module="0", remap=False)
    assert torch.equal(model(vocabulary.encode(CORPUS)), expected)


def test_encode_refuses_what_is_no_token() -> None:
    vocabulary = ec.prune_vocabulary(LanguageModel(), CORPUS)
    assert vocabulary.encode(torch.tensor([-100, 10, 11])).tolist() == [-100, 2, 0]
    for bad in (-1, TOKENS):
        with pytest.raises(IndexError, match=rf"token {bad} is outside \[0, 500\)"):
            vocabulary.encode(torch.tensor([bad]))
    with pytest.raises(IndexError, match="token -100"):
        vocabulary.encode(torch.tensor([-100]), ignore_index=None)


def test_wrong_use_changes_nothing(tmp_path: Path) -> None:
    model = LanguageModel()
    before = copy.deepcopy(model.state_dict())
    weight = model.lm_head.weight
    for arguments, error, message in (
        ({"tokens": torch.tensor([TOKENS])}, IndexError, "batch 0 has id 500"),
        ({"tokens": []}, ValueError, "tokens is empty"),
        ({"tokens": CORPUS, "keep": [TOKENS]}, IndexError, "has 500, which is outside"),
        ({"tokens": CORPUS, "fallback_token": -1}, IndexError, "has -1, which is outside"),
        ({"tokens": CORPUS, "module": "mixer"}, ValueError, "must be an nn.Embedding"),
        ({"tokens": CORPUS, "backup": "rows.bin"}, ValueError, r"path of a \.npy file"),
        ({"tokens": CORPUS, "backup": tmp_path / "no" / "r.npy"}, OSError, "No such file"),
        ({"tokens": CORPUS, "optimizer": [3]}, TypeError, "must be a torch optimizer"),
    ):
        with pytest.raises(error, match=message):
            ec.prune_vocabulary(model, **arguments)
        assert model.lm_head.weight is weight is model.get_input_embeddings().weight
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.odd = nn.Bilinear(1, 1, 1)
    model.odd.register_parameter("shared", weight)
    with pytest.raises(ValueError, match="shared with odd, which are neither"):
        ec.prune_vocabulary(model, CORPUS)


def test_only_the_model_that_was_cut_is_restored(tmp_path: Path) -> None:
    model, path = LanguageModel(), tmp_path / "rows.npy"
    vocabulary = ec.prune_vocabulary(model, CORPUS, backup=path)
    with pytest.raises(ValueError, match="is not cut to the vocabulary of 7 rows"):
        ec.restore_vocabulary(LanguageModel(), vocabulary)
    untied = copy.deepcopy(model)
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    with pytest.raises(ValueError, match="tie them again first"):
        ec.restore_vocabulary(untied, vocabulary)
    path.unlink()
    ec.prune_vocabulary(LanguageModel(), CORPUS[:1], backup=path)
    with pytest.raises(ValueError, match=r"the backup holds \(496, 8\) numbers"):
        ec.restore_vocabulary(model, vocabulary)
