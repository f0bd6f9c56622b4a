"""The class of one pipeline object, replaced by a subclass of its own, so that its calls go through S-CFG.

`pipe(...)` looks `__call__` up on the type: an attribute of the object cannot intercept it, and a change of the class
would change pipelines that nobody asked about. Two classes are made for each enabled object::

    Outer(the object's class, Inner)      sees the call as the user makes it, and takes `scfg_kwargs` out of it
    ...the object's class                 a subclass of the user's, perhaps; its super() finds Inner
    Inner(the stock class)                sees the call as the pipeline of diffusers gets it
    the stock class

Everybody else goes on seeing the object's own class. `type(pipe)(...)` and `type(pipe).from_pipe(...)` make stock
pipelines. What is set on `type(pipe)` is set on the object's own class, where it was meant to go, and `__call__` is
read there: the wrapper of another library goes on and off in any order. The two classes go with the object.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, cast

_ORIGINAL = "_scfg_original"
"""Attribute of an `Outer` class: the class that the object had."""

_MADE = "_scfg_made"
"""Attribute of every class that is made here."""

Intercept = Callable[[Any, Callable[..., Any], tuple, dict[str, Any]], Any]
"""(object, the call that goes on, its arguments, its keyword arguments) -> what the call returns."""


def original_of(cls: type) -> type | None:
    """The class that an `Outer` class stands for; None for any other class, one derived from an `Outer` too."""
    return type.__getattribute__(cls, "__dict__").get(_ORIGINAL)


def ancestry(cls: type) -> list[type]:
    """The classes that an object is of, without those that are made here."""
    return [each for each in cls.__mro__ if _MADE not in vars(each)]


class _Transparent(type):
    """The metaclass of `Outer`: the class behaves as the one it stands for. Classes derived from it are ordinary."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        original = original_of(cls)
        return super().__call__(*args, **kwargs) if original is None else original(*args, **kwargs)

    def __getattribute__(cls, name: str) -> Any:
        if name == "__call__":
            original = original_of(cls)
            if original is not None:
                return getattr(original, name)
        return super().__getattribute__(name)

    def __setattr__(cls, name: str, value: Any) -> None:
        original = original_of(cls)
        super().__setattr__(name, value) if original is None else setattr(original, name, value)

    def __delattr__(cls, name: str) -> None:
        original = original_of(cls)
        super().__delattr__(name) if original is None else delattr(original, name)

    def __instancecheck__(cls, instance: Any) -> bool:
        original = original_of(cls)
        return super().__instancecheck__(instance) if original is None else isinstance(instance, original)

    def __subclasscheck__(cls, subclass: type) -> bool:
        original = original_of(cls)
        return super().__subclasscheck__(subclass) if original is None else issubclass(subclass, original)


def intercept(instance: Any, stock: type, outer: Intercept, inner: Intercept) -> None:
    """Put `outer` and `inner` around the calls of one object. Harmless where they are there already.

    Args:
        instance: the object.
        stock: the class of diffusers in its ancestry whose `__call__` does the work.
        outer: gets the call of the object; `scfg_kwargs` is among its keyword arguments.
        inner: gets the call of `stock`, however deep inside; its keyword arguments may have `scfg_kwargs`, too.
    """
    if any(original_of(cls) is not None for cls in type(instance).__mro__):
        return
    original = type(instance)
    below = _class(stock, (stock,), type(stock), inner, {})
    bases = (below,) if original is stock else (original, below)

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        # Copies and pickles are of the stock class: S-CFG belongs to the object that it was enabled on, and a pickle
        # must load where this package is not installed.
        _, _, *rest = cast(Any, original).__reduce_ex__(self, protocol)
        return (object.__new__, (original,), *rest)

    kind = type(original)
    metaclass = _Transparent if kind is type else type("_Transparent", (_Transparent, kind), {})
    extra = {_ORIGINAL: original, "__reduce_ex__": __reduce_ex__}
    instance.__class__ = _class(original, bases, metaclass, outer, extra)


def release(instance: Any) -> None:
    """Give the object its own class back. Where somebody derived another class from ours, that one stays, and calls
    pass through."""
    original = original_of(type(instance))
    if original is not None:
        instance.__class__ = original


def _class(like: type, bases: tuple[type, ...], metaclass: type, through: Intercept, extra: dict[str, Any]) -> type:
    """A class that passes for `like` and whose calls go `through`."""
    made: Any

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return through(self, super(made, self).__call__, args, kwargs)

    call: Any = like.__call__
    signature = inspect.signature(call)
    parameters = list(signature.parameters.values())
    last = next((i for i, p in enumerate(parameters) if p.kind is p.VAR_KEYWORD), len(parameters))
    parameters.insert(last, inspect.Parameter("scfg_kwargs", inspect.Parameter.KEYWORD_ONLY, default=None))
    cast(Any, __call__).__signature__ = signature.replace(parameters=parameters)
    __call__.__doc__ = call.__doc__
    namespace = {"__call__": __call__, "__module__": like.__module__, "__qualname__": like.__qualname__, _MADE: True}
    made = metaclass(like.__name__, bases, namespace | extra | {"__doc__": like.__doc__})
    return made


def hands_on(cls: type, stock: type) -> bool:
    """Whether a call of `cls` can be expected to reach `stock` through `super()`: every `__call__` above it uses
    `super()`, or takes whatever it is given."""
    for each in cls.__mro__[: cls.__mro__.index(stock)]:
        call = vars(each).get("__call__")
        code = getattr(inspect.unwrap(call), "__code__", None) if call is not None else None
        if code is None or "__class__" in code.co_freevars:
            continue
        if _names_arguments(cast(Any, call)):
            return False
    return True


def described(call: Callable[..., Any]) -> Callable[..., Any]:
    """A call, or what it wraps where it names no argument itself: the wrapper of another library that takes
    `(*args, **kwargs)` and does not say what it wraps. That is found among what the wrapper refers to."""
    function = getattr(call, "__func__", call)
    seen = []
    while not _names_arguments(function):
        seen.append(function)
        wrapped = [f for f in _referred(function) if f.__name__ == "__call__" and f not in seen]
        if not wrapped:
            return call
        function = wrapped[0]
    instance = getattr(call, "__self__", None)
    return function if instance is None else function.__get__(instance)


def _referred(function: Callable[..., Any]) -> list[Callable[..., Any]]:
    """The functions that a function refers to by a variable around it."""
    code = getattr(function, "__code__", None)
    if code is None:
        return []
    around = inspect.getclosurevars(function)
    return [value for value in (*around.nonlocals.values(), *around.globals.values()) if inspect.isfunction(value)]


def _names_arguments(function: Callable[..., Any]) -> bool:
    """Whether a function, `self` aside, takes more than `(*args, **kwargs)`."""
    parameters = list(inspect.signature(function).parameters.values())[1:]
    return any(p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters)
