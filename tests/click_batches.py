"""A small model of users and items, and clicks for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

USERS, ITEMS = 300, 1000


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.user, self.item = nn.Embedding(USERS, 8), nn.EmbeddingBag(ITEMS, 8, mode="sum")
        initial = 0.05
        for table in (self.user, self.item):
            nn.init.normal_(table.weight, std=initial)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, user: Tensor, items: Tensor) -> Tensor:
        return self.scale * (self.user(user) * self.item(items)).sum(1)


class TablesAlone(Model):
    def __init__(self) -> None:
        super().__init__()
        del self.scale

    def forward(self, user: Tensor, items: Tensor) -> Tensor:
        return (self.user(user) * self.item(items)).sum(1)


def batches(count: int = 60, size: int = 100) -> list[tuple[tuple[Tensor, Tensor], Tensor]]:
    """Clicks by latent vectors of two columns."""
    generator = torch.Generator().manual_seed(1)
    users, items = torch.randn(USERS, 2, generator=generator), torch.randn(ITEMS, 2)
    items = torch.randn(ITEMS, 2, generator=generator)
    result = []
    for _ in range(count):
        user = torch.randint(0, USERS, (size,), generator=generator)
        item = (ITEMS * torch.rand(size, generator=generator) ** 4).long()
        logit = 2 * (users[user] * items[item]).sum(1)
        label = (torch.rand(size, generator=generator) < torch.sigmoid(logit)).float()
        result.append(((user, item[:, None]), label))
    return result
