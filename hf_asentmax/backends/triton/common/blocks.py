"""Sizes of blocks on which kernels of different regimes must agree."""

from __future__ import annotations

__all__ = ["KEY_BLOCK", "ROW_BLOCK", "blocks_of"]

# Query rows that fall together to the lists or to the dense tiles.
ROW_BLOCK = 128
# Keys a block of the block map, with which the forward pass tells the dense backward pass what it has to visit. Its
# entries are device.BLOCK_FULL, device.BLOCK_MASKED, and 0 where no key of the block has a weight.
KEY_BLOCK = 128


def blocks_of(length: int, size: int) -> int:
    """How many blocks of `size` hold `length`: ceil(length / size)."""
    return -(-length // size)
