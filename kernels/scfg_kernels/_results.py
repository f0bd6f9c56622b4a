"""Shapes and dtypes of results, and the records that operators hand to their twins and launchers: below both."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def layers_by_size(self_maps: Sequence[torch.Tensor]) -> list[tuple[int, list[int]]]:
    """N and the numbers of the layers that have N tokens, in the order in which the sizes first appear."""
    groups: list[tuple[int, list[int]]] = []
    for index, layer in enumerate(self_maps):
        n = layer.shape[1]  # compared, not hashed: it may be a symbol
        members = next((members for size, members in groups if size == n), None)
        if members is None:
            groups.append((n, [index]))
        else:
            members.append(index)
    return groups


def completed(
    self_maps: Sequence[torch.Tensor], cross_maps: Sequence[torch.Tensor], unconditional: int
) -> list[torch.Tensor]:
    """Results of `complete`, not yet written: tokens [L, B - U, T, N] of every size, then start [L, U, N] of every
    size, in the dtype of S."""
    batch, _, tokens = cross_maps[0].shape
    groups = layers_by_size(self_maps)
    own = self_maps[0]
    return [own.new_empty((len(layers), batch - unconditional, tokens, n)) for n, layers in groups] + [
        own.new_empty((len(layers), unconditional, n)) for n, layers in groups
    ]
