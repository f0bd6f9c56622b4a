"""Classes of capture processors that diffusers takes for the processor that they wrap."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0


@functools.cache
def _with_signature_of(base: type, inner: type) -> type:
    """`base` with the call signature of `inner`: diffusers drops keyword arguments that the signature does not name.

    A real function with these parameters, made from text as `dataclasses` does: a `__signature__` is what
    `torch.compile` cannot follow in every attention class.
    """
    signature = inspect.signature(inner.__call__)  # type: ignore[attr-defined]
    parameters = [p for p in signature.parameters.values() if p.kind is not p.VAR_POSITIONAL]
    if sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) < 3:
        return base  # it names nothing, as `forward` of a module does not: diffusers passes it nothing by name
    header = [p.replace(annotation=p.empty, default=p.empty if p.default is p.empty else None) for p in parameters]
    names = [f"**{p.name}" if p.kind is p.VAR_KEYWORD else f"{p.name}={p.name}" for p in parameters[3:]]
    passed = [p.name for p in parameters[:3]] + names  # self, the module, its hidden states; others by name
    scope: dict[str, Any] = {"call": base.__call__}  # type: ignore[attr-defined]
    exec(f"def __call__{inspect.Signature(header)}: return call({', '.join(passed)})", scope)
    call, optional = scope["__call__"], [p for p in parameters if p.default is not p.empty]
    call.__defaults__ = tuple(p.default for p in optional if p.kind is not p.KEYWORD_ONLY)
    call.__kwdefaults__ = {p.name: p.default for p in optional if p.kind is p.KEYWORD_ONLY}
    return type(base.__name__, (base,), {"__call__": call, "__module__": base.__module__})


@functools.cache
def _passing_for(base: type, inner: type) -> type:
    """`base` that answers `isinstance` and attribute access like `inner`, a processor with weights and settings.

    diffusers finds IP-Adapter processors by class to set their scale, in callbacks too, while the capture is installed.
    """

    def __getattr__(self, name: str):
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    namespace = {"__class__": property(lambda self: inner), "__getattr__": __getattr__, "__module__": base.__module__}
    return type(base.__name__, (_with_signature_of(base, inner),), namespace)


def class_for(base: type, inner: object) -> type:
    kind: type = type(inner)
    if kind is AttnProcessor2_0:
        return base
    return (_passing_for if isinstance(inner, torch.nn.Module) else _with_signature_of)(base, kind)
