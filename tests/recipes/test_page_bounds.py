"""The count of pages that a decoding step could leave out (recipes/benchmark/page_bounds.py)."""

from __future__ import annotations

import pytest
import torch

from recipes.benchmark.page_bounds import PAGES, _upper_bounds, read_shares


@pytest.mark.parametrize("kind", ["box", "ball"])
@pytest.mark.parametrize("page", PAGES)
def test_bounds_hold_every_key_of_a_page(kind: str, page: int) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(3, 8, dtype=torch.float64), torch.randn(256, 8, dtype=torch.float64)
    largest = (query @ key.T).unflatten(-1, (-1, page)).amax(-1)
    assert torch.all(_upper_bounds(query, key, page, kind) >= largest - 1e-12)


def test_pages_with_support_are_always_read() -> None:
    torch.manual_seed(0)
    query, key = 3 * torch.randn(2, 4, 16), torch.randn(256, 16)
    for row in read_shares(query, key, 0.25, torch.tensor([0.0, 0.05])):
        assert row["pages_with_support"] <= row["pages_read, tau"] <= row["pages_read, max - 1"] <= 1


def test_a_page_of_opposite_keys_is_left_out() -> None:
    direction = torch.nn.functional.normalize(torch.ones(16), dim=0)
    key = torch.cat([8 * direction.expand(128, -1), -8 * direction.expand(128, -1)])
    rows = list(read_shares(direction.expand(1, 4, -1), key, 1.0, torch.zeros(1)))
    assert [row["pages_read, tau"] for row in rows] == [0.5] * len(rows)
