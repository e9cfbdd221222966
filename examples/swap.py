"""Swap the tables of a plain PyTorch model for compressed ones, in one line."""

import torch
from torch import nn

import embcompress as ec


class TwoTower(nn.Module):
    """A user and an item tower over embedding tables."""

    def __init__(self, users: int, items: int, width: int = 32) -> None:
        super().__init__()
        self.user = nn.Embedding(users, width)
        self.items = nn.EmbeddingBag(items, width, mode="mean")
        self.country = nn.Embedding(200, width)

    def forward(self, user: torch.Tensor, history: torch.Tensor, country: torch.Tensor):
        return ((self.user(user) + self.country(country)) * self.items(history)).sum(dim=1)


torch.manual_seed(0)
model = TwoTower(users=1_000_000, items=200_000)
batch = torch.randint(1_000_000, (8,)), torch.randint(200_000, (8, 20)), torch.randint(200, (8,))
print("before:", model(*batch).shape, f"{ec.memory(model).total:,} bytes of tables")

report = ec.compress(model, method="qr", budget="2%")

print(report)
print("after: ", model(*batch).shape, f"{ec.memory(model).total:,} bytes of tables")
