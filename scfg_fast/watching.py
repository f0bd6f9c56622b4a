"""Masks of words from a pipeline whose pictures stay what they are."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from .capture.maps import StepMaps, shares_of
from .config import SCFGConfig
from .files import replacing
from .handle import HANDLES, check_pipeline
from .patch import disable, enable


@dataclass(frozen=True, eq=False)
class WatchedStep:
    """What the attention of one step says.

    Attributes:
        step: index of the denoising step, from 0.
        token_index: [B, h, w] int64, the token that owns each cell.
        foreground: [B, h, w] bool.
        shares: [B, words, h, w] float32, the share of a cell's attention that each word's tokens get, in [0, 1].
    """

    step: int
    token_index: torch.Tensor
    foreground: torch.Tensor
    shares: torch.Tensor


class Watched:
    """The masks of the last call inside `watch`.

    Attributes:
        words: as they were asked for.
        steps: one `WatchedStep` for every step whose maps were read, in order.
        tokens: [B, words, T] bool, the tokens of each word in each image's prompt; None before the first call.
    """

    def __init__(self, words: Sequence[str] = ()) -> None:
        self.words = tuple(words)
        self.steps: list[WatchedStep] = []
        self.tokens: torch.Tensor | None = None

    def begin(self, tokens: torch.Tensor | None) -> None:
        """Forget the call before; for whoever runs the pipeline."""
        self.steps, self.tokens = [], tokens

    def __call__(self, step: int, maps: StepMaps, token_index: torch.Tensor, foreground: torch.Tensor) -> None:
        """Take the maps of a step; for whoever runs the pipeline."""
        batch = token_index.shape[0]
        if self.tokens is None:
            shares = torch.zeros(batch, 0, *token_index.shape[1:])
        else:
            shares = shares_of(maps, self.tokens.repeat_interleave(batch // len(self.tokens), 0)).float().cpu()
        self.steps.append(WatchedStep(step, token_index.cpu(), foreground.cpu(), shares))

    def shares(self, word: str) -> torch.Tensor:
        """[B, h, w] float32: the word's share of the attention, mean over the steps; divide by its maximum to see it.

        Raises:
            ValueError: the word was not asked for, or nothing was watched yet.
        """
        index = self._index(word)
        return torch.stack([step.shares[:, index] for step in self.steps]).mean(0)

    def mask(self, word: str, step: int = -1) -> torch.Tensor:
        """[B, h, w] bool: the cells that one of the word's tokens owns.

        Args:
            word: one of `words`.
            step: index into `steps`.

        Raises:
            ValueError: the word was not asked for, or nothing was watched yet.
        """
        index = self._index(word)
        ids = self.steps[step].token_index
        tokens = self.tokens[:, index].cpu()  # type: ignore[index]
        owned = tokens.repeat_interleave(len(ids) // len(tokens), 0)  # [B, T]
        return owned.gather(1, ids.flatten(1)).view_as(ids)

    def save(self, path: str | os.PathLike) -> Path:
        """Save as `.npz`, whole or not at all; `numpy.load(path)` reads it, without pickle.

        For S steps of B images and W words: `step` [S], `token_index` [S, B, h, w] int64, `foreground` [S, B, h, w]
        bool, `shares` [S, B, W, h, w] float32 and `words` [W] text.

        Raises:
            ValueError: nothing was watched yet.
        """
        if not self.steps:
            raise ValueError("watch: there is nothing to save; call the pipeline inside the block, with guidance")
        with replacing(path) as file:
            np.savez_compressed(
                file,
                step=np.array([step.step for step in self.steps], dtype=np.int64),
                token_index=np.stack([step.token_index.numpy() for step in self.steps]),
                foreground=np.stack([step.foreground.numpy() for step in self.steps]),
                shares=np.stack([step.shares.float().numpy() for step in self.steps]),
                words=np.array(self.words, dtype=np.str_),
            )
        return Path(path)

    def _index(self, word: str) -> int:
        if word not in self.words:
            raise ValueError(f"watch: {word!r} was not asked for; words are {list(self.words)}")
        if not self.steps:
            raise ValueError("watch: nothing was watched yet; call the pipeline inside the block, with guidance")
        return self.words.index(word)


@contextlib.contextmanager
def watch(pipe: DiffusionPipeline, words: Sequence[str] = (), config: SCFGConfig | None = None) -> Iterator[Watched]:
    """Read masks of words from every call of the pipeline inside the block, and change nothing::

        with scfg_fast.watch(pipe, words=["cat", "sky"]) as maps:
            image = pipe("a cat under a blue sky").images[0]      # the stock picture, bit for bit
        maps.mask("cat")                                            # [1, h, w] bool
        maps.shares("cat")                                          # [1, h, w] float32

    Where S-CFG is enabled with `rates="regions"`, it goes on, and its own regions are read. The call must be guided
    (`guidance_scale` above 1).

    Args:
        pipe: a pipeline that `scfg_fast.supports`.
        words: of the prompt; each may be several tokens. Only for pipelines with a UNet and the prompt's text.
        config: of the capture, for a pipeline without S-CFG; default as for `enable`.

    Yields:
        A `Watched`, filled by each call anew; its tensors are in host memory.

    Raises:
        UnsupportedPipelineError: the pipeline's attention cannot be read.
        ValueError: S-CFG is enabled with other rates, or with `config` too; the configuration captures nothing. In the
            call: a word is in no prompt, or words of a pipeline that has no tokens of them.
    """
    check_pipeline("watch", pipe)
    if isinstance(words, str):
        raise TypeError(f"watch: words must be a list of words, got the text {words!r}; write [{words!r}]")
    handle = HANDLES.get(pipe)
    own = handle is None
    if handle is None:
        handle = enable(pipe, config)
    elif config is not None:
        raise ValueError("watch: S-CFG is enabled and has a configuration; leave out config")
    if handle.config.rates != "regions":
        if own:
            disable(pipe)
        raise ValueError(f"watch: rates={handle.config.rates!r} captures nothing; use rates='regions'")
    maps = Watched(words)
    before = handle.watcher, handle.watches_only
    handle.watcher, handle.watches_only = maps, own
    try:
        yield maps
    finally:
        handle.watcher, handle.watches_only = before
        if own:
            disable(pipe)
