"""Classes of capture processors with the call signature of the processor that they stand in for."""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0

_MADE: weakref.WeakKeyDictionary[type, dict[type, type]] = weakref.WeakKeyDictionary()
"""Class of the user's processor -> capture class -> the class made for both. Goes with the user's class."""


def class_for(base: type, inner: object) -> type:
    """`base` with the call signature of the processor `inner`: diffusers drops the keyword arguments that a processor's
    signature does not name."""
    kind = type(inner)
    if kind is AttnProcessor2_0:
        return base
    made = _MADE.setdefault(kind, {})
    if base not in made:
        made[base] = _with_signature_of(base, kind)
    return made[base]


@contextlib.contextmanager
def projected_tokens(projection: torch.nn.Module, processor: object) -> Iterator[list[int]]:
    """How many tokens a processor projects to keys, in the order of its calls; empty for diffusers' own processors.

    The processors of the first IP-Adapter and of InstantID project the text alone, and take the last of the states that
    they get for an image prompt. Inside `torch.compile` nothing is noted.

    Args:
        projection: `to_k` of the layer, called with states [B, T, C].
        processor: the user's.
    """
    counts: list[int] = []
    if type(processor).__module__.startswith("diffusers.") or torch.compiler.is_compiling():
        yield counts
        return
    handle = projection.register_forward_pre_hook(lambda _, args: counts.append(args[0].shape[1]))
    try:
        yield counts
    finally:
        handle.remove()


def _with_signature_of(base: type, inner: type) -> type:
    """A real function with these parameters, made from text as `dataclasses` does: a `__signature__` is what
    `torch.compile` cannot follow in every attention class."""
    signature = inspect.signature(inner.__call__)  # type: ignore[attr-defined]
    kinds = {p.kind for p in inspect.signature(base.__call__).parameters.values()}  # type: ignore[attr-defined]
    takes_any = inspect.Parameter.VAR_POSITIONAL in kinds  # then what comes by position goes on by position
    parameters = [p for p in signature.parameters.values() if takes_any or p.kind is not p.VAR_POSITIONAL]
    if sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) < 3:
        return base  # it names nothing, as `forward` of a module does not: diffusers passes it nothing by name
    header = [p.replace(annotation=p.empty, default=p.empty if p.default is p.empty else None) for p in parameters]
    by_position = takes_any and any(p.kind is p.VAR_POSITIONAL for p in parameters)
    names = [_passed(p, by_position) for p in parameters[3:]]
    passed = [p.name for p in parameters[:3]] + names  # self, the module, its hidden states; others by name
    call = "call"
    while call in signature.parameters:
        call += "_"
    scope: dict[str, Any] = {call: base.__call__}  # type: ignore[attr-defined]
    exec(f"def __call__{inspect.Signature(header)}: return {call}({', '.join(passed)})", scope)
    function, optional = scope["__call__"], [p for p in parameters if p.default is not p.empty]
    function.__defaults__ = tuple(p.default for p in optional if p.kind is not p.KEYWORD_ONLY)
    function.__kwdefaults__ = {p.name: p.default for p in optional if p.kind is p.KEYWORD_ONLY}
    return type(base.__name__, (base,), {"__call__": function, "__module__": base.__module__})


def _passed(parameter: inspect.Parameter, by_position: bool) -> str:
    """How a parameter goes on to another call, as text: by name, or by position where others follow by position."""
    kind = parameter.kind
    stars = "*" if kind is parameter.VAR_POSITIONAL else "**" if kind is parameter.VAR_KEYWORD else ""
    if stars or (by_position and kind is not parameter.KEYWORD_ONLY):
        return f"{stars}{parameter.name}"
    return f"{parameter.name}={parameter.name}"
