"""Classes of capture processors with the call signature of the processor that they wrap.

diffusers drops keyword arguments that a processor's signature does not name. Nothing here refers to a class or an object
of the user: a class is kept for a signature, and has no other trace of whose signature it is.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any

from diffusers.models.attention_processor import AttnProcessor2_0

Parameters = tuple[tuple[str, Any, Any], ...]
"""(name, kind, default) of each parameter after the first two, the module and its hidden states."""

_PLAIN = (type(None), bool, int, float, str)


def class_for(base: type, inner: object) -> type:
    """`base`, or a subclass of it with the parameters that `inner.__call__` names."""
    if type(inner) is AttnProcessor2_0:
        return base
    parameters = [
        p for p in inspect.signature(inner.__call__).parameters.values()  # type: ignore[operator]
        if p.kind is not p.VAR_POSITIONAL
    ]  # fmt: skip
    if sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) < 2:
        return base  # it names nothing, as `forward` of a module does not: diffusers passes it nothing by name
    others = tuple((p.name, p.kind, p.default) for p in parameters[2:])
    kept = all(p.default is p.empty or type(p.default) in _PLAIN for p in parameters[2:])
    return (_subclass if kept else _subclass.__wrapped__)(base, others)


@functools.lru_cache(maxsize=256)
def _subclass(base: type, others: Parameters) -> type:
    """A subclass of `base` that is called with the module, its hidden states, and these parameters.

    A real function with these parameters, made from text as `dataclasses` does: a `__signature__` is what
    `torch.compile` cannot follow in every attention class.
    """
    taken = {name for name, _, _ in others}
    own, attn, states, call = (_free(name, taken) for name in ("self", "attn", "hidden_states", "call"))
    first = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in (own, attn, states)]
    empty = inspect.Parameter.empty
    rest = [inspect.Parameter(name, kind, default=empty if value is empty else None) for name, kind, value in others]
    passed = [f"**{p.name}" if p.kind is p.VAR_KEYWORD else f"{p.name}={p.name}" for p in rest]
    scope: dict[str, Any] = {call: base.__call__}  # type: ignore[attr-defined]
    header = inspect.Signature([*first, *rest])
    exec(f"def __call__{header}: return {call}({', '.join([own, attn, states, *passed])})", scope)
    function = scope["__call__"]
    optional = [(name, kind, value) for name, kind, value in others if value is not empty]
    by_keyword = inspect.Parameter.KEYWORD_ONLY
    function.__defaults__ = tuple(value for _, kind, value in optional if kind is not by_keyword)
    function.__kwdefaults__ = {name: value for name, kind, value in optional if kind is by_keyword}
    return type(base.__name__, (base,), {"__call__": function, "__module__": base.__module__})


def _free(name: str, taken: set[str]) -> str:
    """The name, with underscores until no parameter has it."""
    while name in taken:
        name += "_"
    return name
