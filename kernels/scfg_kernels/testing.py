"""Tools for testing the operators, and kernels of your own against them. Nothing here runs in production.

* `assert_as_accurate_as`: an error bound relative to what a naive implementation in the same dtype already makes.
* `assert_masks_agree`: for argmax results; exact away from ties, few true crossings inside a narrow band.
* `Recorder`: the largest tensor that an operator makes, and the shapes of its matrix products.
* `guarded_empty`, `guarded_copy`: memory that starts as NaN between guard zones that must stay untouched.
* `as_layout`: the same values in another memory layout, with NaN in the gaps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LAYOUTS = ("contiguous", "projection", "sliced", "strided", "expanded", "channels_last")

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Quiet NaNs with a payload that arithmetic does not produce, so that overwriting one by another NaN is noticed too.
_POISON = {
    torch.float16: 0x7E5A,
    torch.bfloat16: 0x7FDA,
    torch.float32: 0x7FC05A5A,
    torch.float64: 0x7FF8_5A5A_5A5A_5A5A,
}


def _rms(x: torch.Tensor) -> float:
    return math.sqrt(float(x.square().mean())) if x.numel() else 0.0


def assert_as_accurate_as(
    actual: torch.Tensor, naive: torch.Tensor, truth: torch.Tensor, factor: float = 2.0, name: str = "result"
) -> None:
    """Assert that `actual` is at most `factor` times as far from `truth` as `naive` is.

    In maximum, which catches a wrong element, and in root mean square, which catches a small error everywhere (a bias).
    Where the naive result happens to be exact, one rounding unit of `actual.dtype` at the truth's scale is allowed.

    Args:
        actual: the result under test.
        naive: a straightforward implementation's result in the dtype of the inputs.
        truth: the result in fp64.
        factor: how many times the naive error is allowed.
        name: what the message calls the result.

    Raises:
        AssertionError: shapes differ, the truth is not fp64, a value is not finite where the truth is, or an error is
            too large.
    """
    assert truth.dtype == torch.float64, f"{name}: the truth must be fp64, got {truth.dtype}"
    assert actual.shape == naive.shape == truth.shape, (
        f"{name}: shapes differ, actual {tuple(actual.shape)}, naive {tuple(naive.shape)}, truth {tuple(truth.shape)}"
    )
    lost = int((truth.isfinite() & ~actual.isfinite()).sum())
    assert lost == 0, f"{name}: {lost} of {truth.numel()} values are not finite"
    error = actual.double() - truth
    naive_error = naive.double() - truth
    unit = torch.finfo(actual.dtype).eps
    measures: tuple[tuple[str, Callable[[torch.Tensor], float]], ...] = (
        ("maximum", lambda x: float(x.abs().max()) if x.numel() else 0.0),
        ("root mean square", _rms),
    )
    for kind, measure in measures:
        found, allowed = measure(error), max(factor * measure(naive_error), unit * measure(truth))
        assert found <= allowed, (
            f"{name}: {kind} error {found:.3e} exceeds {allowed:.3e}; "
            f"the naive implementation makes {measure(naive_error):.3e}"
        )


def assert_masks_agree(
    actual: torch.Tensor,
    expected: torch.Tensor,
    margin: torch.Tensor,
    *,
    band: float = 1e-5,
    max_crossings: int = 0,
    runner_up: torch.Tensor | None = None,
    name: str = "mask",
) -> None:
    """Assert that two results of an argmax or of a comparison agree, up to rounding at ties.

    Args:
        actual: ids or booleans under test.
        expected: ids or booleans of the reference.
        margin: how far the reference's winner is ahead of the second, relative to the winner, same shape.
        band: where `margin` exceeds it the two must be equal.
        max_crossings: how many elements inside the band may differ.
        runner_up: the reference's second; an element that differs must have fallen to it.
        name: what the message calls the result.

    Raises:
        AssertionError: shapes differ, an element outside the band differs, too many inside differ, or one fell to a
            third value.
    """
    assert actual.shape == expected.shape == margin.shape, (
        f"{name}: shapes differ, actual {tuple(actual.shape)}, expected {tuple(expected.shape)}, "
        f"margin {tuple(margin.shape)}"
    )
    differs = actual != expected
    outside = differs & ~(margin <= band)
    assert not outside.any(), (
        f"{name}: {int(outside.sum())} of {actual.numel()} differ away from a tie, "
        f"the clearest by a margin of {float(margin[outside].max()):.3e} (band {band:.0e})"
    )
    crossings = int(differs.sum())
    assert crossings <= max_crossings, f"{name}: {crossings} crossings inside the band, {max_crossings} allowed"
    if runner_up is not None:
        strangers = int((differs & (actual != runner_up)).sum())
        assert strangers == 0, f"{name}: {strangers} elements fell to neither of the reference's two best"


@dataclass(frozen=True)
class Seen:
    """One tensor that an operator made: operator name, shape, dtype."""

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Recorder(TorchDispatchMode):
    """Records every tensor made while it is active, also inside this package's custom operators.

    Operators that are made of others are taken apart. Views count with their own number of elements, which overstates
    them if at all. Memory that a fused kernel of torch keeps to itself is not seen.

    Example:
        with Recorder() as recorder:
            self_attention_map(q, k, v)
        recorder.assert_none_larger_than(1 << 20)
    """

    PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Seen] = []
        self.products: list[tuple[tuple[int, ...], ...]] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "scfg_kernels":
            device = next(leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))
            key = torch._C.DispatchKey.CUDA if device.type == "cuda" else torch._C.DispatchKey.CPU
            with self:
                return func.redispatch(torch._C.DispatchKeySet(key), *args, **kwargs)
        with self:
            result = func.decompose(*args, **kwargs)  # NotImplemented unless it is made of other operators
        if result is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        name = func._schema.name.split("::")[-1]
        self.made += [Seen(name, tuple(x.shape), x.dtype) for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        if name in self.PRODUCTS:
            self.products.append(tuple(tuple(x.shape) for x in args if isinstance(x, torch.Tensor))[-2:])
        return result

    @property
    def largest(self) -> Seen:
        """The tensor with the most elements."""
        assert self.made, "nothing was recorded"
        return max(self.made, key=lambda seen: seen.numel)

    def assert_none_larger_than(self, numel: int) -> None:
        """Assert that no recorded tensor has more than `numel` elements."""
        largest = self.largest
        assert largest.numel <= numel, f"{largest.op} made {largest.shape} {largest.dtype}, more than {numel} elements"

    def assert_no_product(self, rows: int, inner: int, columns: int) -> None:
        """Assert that no [rows, inner] x [inner, columns] matrix product ran, batched or not."""
        for left, right in self.products:
            found = (left[-2], left[-1], right[-1]) == (rows, inner, columns)
            assert not found, f"a product of {left} and {right} ran"


def _poisoned(numel: int, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """`numel` elements of poison as raw bits: NaN for floating dtypes, 0x5A in every byte for the others."""
    bits = _BITS[dtype.itemsize]
    pattern = _POISON.get(dtype, int.from_bytes(b"\x5a" * dtype.itemsize, "little"))
    return torch.full((numel,), pattern, dtype=bits, device=device)


@dataclass(frozen=True)
class Guarded:
    """A tensor between two guard zones; see `guarded_empty`."""

    tensor: torch.Tensor
    _bits: torch.Tensor
    _guard: int

    def _is_poison(self) -> torch.Tensor:
        return self._bits == _poisoned(1, self.tensor.dtype, self._bits.device)

    def assert_guards_intact(self) -> None:
        """Assert that nothing was written outside the tensor."""
        poison = self._is_poison()
        before, after = poison[: self._guard], poison[poison.numel() - self._guard :]
        broken = int((~before).sum()), int((~after).sum())
        assert broken == (0, 0), f"{broken[0]} elements before and {broken[1]} elements after the tensor were written"

    def assert_written(self) -> None:
        """Assert that every element of the tensor was written and that no element is NaN."""
        poison = self._is_poison()
        left = int(poison[self._guard : poison.numel() - self._guard].sum())
        assert left == 0, f"{left} of {self.tensor.numel()} elements were never written"
        if self.tensor.is_floating_point():
            nans = int(self.tensor.isnan().sum())
            assert nans == 0, f"{nans} of {self.tensor.numel()} elements are NaN"


def guarded_empty(
    shape: Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", guard: int = 256
) -> Guarded:
    """A contiguous output tensor full of poison, with `guard` elements of poison on either side.

    A kernel that leaves an element out, writes beside the tensor or reads beside it (NaN spreads) is caught by the
    methods of the result.
    """
    if guard < 1:
        raise ValueError(f"guard must be at least 1, got {guard}")
    numel = math.prod(shape)
    bits = _poisoned(numel + 2 * guard, dtype, device)
    return Guarded(bits.view(dtype)[guard : guard + numel].view(tuple(shape)), bits, guard)


def guarded_copy(x: torch.Tensor, guard: int = 256) -> Guarded:
    """A contiguous copy of an input between guard zones of poison: a read beside it turns the result into NaN."""
    guarded = guarded_empty(x.shape, x.dtype, x.device, guard)
    guarded.tensor.copy_(x)
    return guarded


def as_layout(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of a 4-D tensor in another memory layout.

    Args:
        x: [B, H, N, d] or [B, C, H, W], floating point.
        layout: `"contiguous"`; `"projection"`, the transposed view [B, N, H*d] -> [B, H, N, d] that attention layers
            produce; `"sliced"`, a window of a larger tensor; `"strided"`, every second element of the last dimension;
            `"expanded"`, the first sample repeated with stride 0 (the only layout with other values);
            `"channels_last"`.

    Returns:
        A tensor of the same shape. Gaps in memory hold NaN.
    """
    if layout == "contiguous":
        return x.contiguous()
    if layout == "projection":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":
        window = x.new_full([length + 2 for length in x.shape], torch.nan)[1:-1, 1:-1, 1:-1, 1:-1]
        return window.copy_(x)
    if layout == "strided":
        return x.new_full([*x.shape[:-1], 2 * x.shape[-1]], torch.nan)[..., ::2].copy_(x)
    if layout == "expanded":
        return x[:1].contiguous().expand_as(x)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    raise ValueError(f"layout={layout!r} is unknown; use one of {', '.join(map(repr, LAYOUTS))}")
