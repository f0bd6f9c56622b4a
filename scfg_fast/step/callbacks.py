"""The user's callbacks in the arguments of a pipeline's call."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

Aside = Callable[[], contextlib.AbstractContextManager[Any]]
"""Makes a context in which evaluations of the denoiser are not the pipeline's own."""


def watched_callbacks(
    signature: inspect.Signature, args: tuple, kwargs: dict[str, Any], aside: Aside
) -> tuple[tuple, dict[str, Any]]:
    """The arguments of a call, with its callbacks run `aside`.

    Args:
        signature: of the call, without the pipeline.
        args, kwargs: of the call. What is callable and called "callback" something is a callback.
        aside: the context.
    """

    def watched(name: str, value: Any) -> Any:
        return Callback(value, aside) if "callback" in name and callable(value) else value

    names = [*signature.parameters, *[""] * len(args)]
    positional = tuple(watched(name, value) for name, value in zip(names, args, strict=False))
    return positional, {name: watched(name, value) for name, value in kwargs.items()}


class Callback:
    """A user's callback, while which evaluations of the denoiser are stock; it passes for the user's own object, of
    whose class diffusers makes something."""

    def __init__(self, callback: Callable[..., Any], aside: Aside) -> None:
        self._callback, self._aside = callback, aside

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._aside():
            return self._callback(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._callback, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # type: ignore[override]
        return type(self._callback)
