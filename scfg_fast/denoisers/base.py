"""How a class of denoisers is read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch

from ..capture.layers import BlockInfo
from ..config import SCFGConfig
from ..layouts import View


class Denoiser(Protocol):
    """How a class of denoisers is read.

    Attributes:
        sample: name of the first argument, the latents.
        foreground: half that the foreground is read from by default; None where the pipeline decides.
        conditional_first: whether the conditional samples of a batch come first.
    """

    @property
    def sample(self) -> str: ...

    @property
    def foreground(self) -> str | None: ...

    @property
    def conditional_first(self) -> bool: ...

    def blocks(self, model: torch.nn.Module) -> Iterator[tuple[BlockInfo, torch.nn.Module]]:
        """The blocks that can be captured, in the order of the model."""

    def layers(self) -> tuple[str, ...]:
        """Names of the attention modules of a block that get a processor; "" for the block itself."""

    def wrap(self, info: BlockInfo, block: torch.nn.Module, config: SCFGConfig) -> tuple[BlockInfo, tuple[Any, ...]]:
        """The block as it will be captured, and a processor for each of its `layers`."""

    def geometry(self, model: torch.nn.Module, sample: Any, arguments: dict[str, Any], size: tuple[int, int] | None):
        """Size of the latents of one call, a `Geometry`. `size` is the pipeline's (H, W), for packed latents."""

    def view(self, model: torch.nn.Module) -> View:
        """How predictions are opened."""
