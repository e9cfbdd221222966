"""Cut a language model's vocabulary to the tokens of a corpus, train it, and put the rest back.

    python examples/prune_vocabulary.py

The model is a tiny one in plain torch with the interface of Hugging Face's models: a tied output
layer and ``get_input_embeddings()``. The corpus is synthetic: few tokens are frequent.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import embcompress as ec

TOKENS, WIDTH, FIRST_WORD = 50_000, 64, 10


class TinyLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.mixer = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.embed.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def set_input_embeddings(self, module: nn.Module) -> None:
        self.embed = module

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.mixer(self.embed(input_ids))[0])


def main() -> None:
    torch.manual_seed(0)
    corpus = (FIRST_WORD + torch.rand(64, 33) ** 6 * (TOKENS - FIRST_WORD)).long()
    model = TinyLanguageModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    before = model.embed.weight.numel() * 4
    vocabulary = ec.prune_vocabulary(
        model, corpus, keep=range(FIRST_WORD), backup="memory", optimizer=optimizer
    )
    print(f"{TOKENS} tokens cut to {len(vocabulary.token_ids)}, {before} bytes to", end=" ")
    print(ec.memory(model).total)
    labels = vocabulary.encode(corpus[:, 1:])  # logits are numbered by the kept tokens
    for step in range(30):
        loss = F.cross_entropy(model(corpus[:, :-1]).flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 10 == 0 or step == 29:
            print(f"step {step}: loss {loss.item():.3f}")
    rows = vocabulary.token_ids >= 0
    kept, trained = vocabulary.token_ids[rows], model.embed.weight[rows].detach().clone()
    ec.restore_vocabulary(model, vocabulary, optimizer=optimizer)
    exact = torch.equal(model.embed.weight[kept], trained)
    print(f"restored to {len(model.embed.weight)} tokens, the trained ones exactly: {exact}")


if __name__ == "__main__":
    main()
