"""Integer, floating, comparison, conversion and move opcodes against numpy and torch, on edge values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lab.ptxsim import SimError
from lab.ptxsim.tests.assembly import evaluate

RNG = np.random.default_rng(0)
S32 = np.concatenate([RNG.integers(-(2**31), 2**31, 24), [0, 1, -1, 2**31 - 1, -(2**31), 7, -7, 31]]).astype(np.int32)
T32 = np.concatenate([RNG.integers(-100, 100, 24), [3, -1, -1, -1, 2, -2, 2, 32]]).astype(np.int32)
S64 = np.concatenate([RNG.integers(-(2**63), 2**63, 28), [0, -1, 2**63 - 1, -(2**63)]]).astype(np.int64)
T64 = np.concatenate([RNG.integers(-(10**6), 10**6, 28), [3, 2, -1, 5]]).astype(np.int64)
F32 = np.concatenate([RNG.standard_normal(24) * 10, [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 3e38, 0.5]]).astype(
    np.float32
)
G32 = np.concatenate([RNG.standard_normal(24), [1.0, -0.0, 2.0, np.inf, 1.0, 1.0, 3e38, -0.5]]).astype(np.float32)
NAMES = {"s16": (S32.astype(np.int16), T32.astype(np.int16)), "s32": (S32, T32), "s64": (S64, T64)}


def exact(values: np.ndarray) -> np.ndarray:
    return values.astype(object)


def wrap(values: np.ndarray, kind: str) -> np.ndarray:
    bits = int(kind[1:])
    unsigned = np.array([int(v) & ((1 << bits) - 1) for v in values], f"u{bits // 8}")
    return unsigned.view(f"{'i' if kind[0] == 's' else 'u'}{bits // 8}")


def same(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(actual, expected)


def truncated(a: int, b: int) -> int:
    return -1 if b == 0 else abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize(
    ("opcode", "function"),
    [
        ("add.{}", lambda a, b: a + b),
        ("sub.{}", lambda a, b: a - b),
        ("mul.lo.{}", lambda a, b: a * b),
        ("mul.hi.{}", None),
        ("min.{}", min),
        ("max.{}", max),
        ("div.{}", truncated),
        ("rem.{}", lambda a, b: a - truncated(a, b) * b),
    ],
)
def test_integer_arithmetic(opcode: str, function, kind: str) -> None:
    a, b = (values.view(f"{'i' if kind[0] == 's' else 'u'}{values.itemsize}") for values in NAMES["s" + kind[1:]])
    a, b = np.resize(a, 32), np.resize(b, 32)
    b = np.where(b == 0, b.dtype.type(3), b)
    function = function or (lambda x, y: (x * y) >> int(kind[1:]))
    expected = wrap([function(int(x), int(y)) for x, y in zip(a, b, strict=True)], kind)
    same(evaluate(f"{opcode.format(kind)} d, a, b", kind, (kind, a), (kind, b)), expected)


@pytest.mark.parametrize("kind", ["s32", "u32"])
def test_wide_products_and_multiply_add(kind: str) -> None:
    a, b = S32.view(f"{'i' if kind[0] == 's' else 'u'}4"), T32.view(f"{'i' if kind[0] == 's' else 'u'}4")
    wide = f"{kind[0]}64"
    expected = wrap(exact(a) * exact(b), wide)
    same(evaluate(f"mul.wide.{kind} d, a, b", wide, (kind, a), (kind, b)), expected)
    c = S64.view(expected.dtype)
    expected = wrap(exact(a) * exact(b) + exact(c), wide)
    same(evaluate(f"mad.wide.{kind} d, a, b, c", wide, (kind, a), (kind, b), (wide, c)), expected)
    expected = wrap(exact(a) * exact(b) + exact(a), kind)
    same(evaluate(f"mad.lo.{kind} d, a, b, a", kind, (kind, a), (kind, b)), expected)


def test_division_by_zero_gives_all_ones() -> None:
    same(evaluate("div.u32 d, a, 0", "u32", ("u32", [5])), np.full(32, 0xFFFFFFFF, np.uint32))


def test_carry_chain_makes_64_bit_sums() -> None:
    a, b = S64.view(np.uint64), np.roll(S64, 3).view(np.uint64)
    text = """mov.b64 {%r10, %r11}, a; mov.b64 {%r12, %r13}, b; add.cc.u32 %r14, %r10, %r12; addc.u32 %r15, %r11, %r13;
        mov.b64 d, {%r14, %r15}"""
    same(evaluate(text, "u64", ("u64", a), ("u64", b)), a + b)


def test_carries_are_passed_on() -> None:
    """64-bit sums whose upper half is the lower half of another one, to which the carry goes on."""
    a, b, c = S32.view(np.uint32), T32.view(np.uint32), np.roll(S32, 5).view(np.uint32)
    wide = [v.astype(np.uint64) for v in (a, b, c)]
    carry = wide[0] + wide[1] >> np.uint64(32)
    carry = wide[0] + wide[2] + carry >> np.uint64(32)
    text = "add.cc.u32 %r10, a, b; addc.cc.u32 %r11, a, c; addc.u32 d, 0, 0"
    same(evaluate(text, "u32", ("u32", a), ("u32", b), ("u32", c)), carry.astype(np.uint32))


def test_multiply_carry_chain() -> None:
    a, b, c = S32.view(np.uint32), T32.view(np.uint32), np.roll(S32, 5).view(np.uint32)
    text = "mad.lo.cc.u32 %r10, a, b, c; madc.hi.u32 %r11, a, b, 0; mov.b64 d, {%r10, %r11}"
    expected = a.astype(np.uint64) * b.astype(np.uint64) + c
    same(evaluate(text, "u64", ("u32", a), ("u32", b), ("u32", c)), expected)
    text = "mad.hi.cc.u32 %r10, a, b, c; madc.lo.cc.u32 %r11, a, c, b; addc.u32 d, 0, 0"
    carry = (exact(a) * exact(b) >> 32) + exact(c) >> 32
    carry = (exact(a) * exact(c) & 0xFFFFFFFF) + exact(b) + carry >> 32
    same(evaluate(text, "u32", ("u32", a), ("u32", b), ("u32", c)), carry.astype(np.uint32))


@pytest.mark.parametrize("kind", ["s32", "u32"])
def test_multiply_high_and_add(kind: str) -> None:
    a, b = S32.view(f"{'i' if kind[0] == 's' else 'u'}4"), T32.view(f"{'i' if kind[0] == 's' else 'u'}4")
    expected = wrap((exact(a) * exact(b) >> 32) + exact(a), kind)
    same(evaluate(f"mad.hi.{kind} d, a, b, a", kind, (kind, a), (kind, b)), expected)


@pytest.mark.parametrize(
    ("text", "function"),
    [
        ("and.b32 d, a, b", lambda a, b: a & b),
        ("or.b32 d, a, b", lambda a, b: a | b),
        ("xor.b32 d, a, -5", lambda a, b: a ^ -5),
        ("not.b32 d, a", lambda a, b: ~a),
        ("neg.s32 d, a", lambda a, b: -a),
        ("shl.b32 d, a, 5", lambda a, b: a << 5),
        ("shl.b32 d, a, 32", lambda a, b: 0),
        ("shr.s32 d, a, 5", lambda a, b: a >> 5),
        ("shr.s32 d, a, 99", lambda a, b: a >> 31),
        ("shr.u32 d, a, 5", lambda a, b: (a & 0xFFFFFFFF) >> 5),
        ("shr.u32 d, a, 40", lambda a, b: 0),
        ("bfe.u32 d, a, 4, 15", lambda a, b: (a & 0xFFFFFFFF) >> 4 & 0x7FFF),
        ("bfe.s32 d, a, 4, 3", lambda a, b: ((a >> 4 & 7) ^ 4) - 4),
        ("bfe.u32 d, a, 4, 0", lambda a, b: 0),
        ("bfi.b32 d, a, b, 8, 4", lambda a, b: b & ~0xF00 | (a & 15) << 8),
        ("shf.l.wrap.b32 d, a, b, 7", lambda a, b: ((b & 0xFFFFFFFF) << 32 | a & 0xFFFFFFFF) << 7 >> 32),
        ("shf.r.clamp.b32 d, a, b, 7", lambda a, b: ((b & 0xFFFFFFFF) << 32 | a & 0xFFFFFFFF) >> 7),
        ("popc.b32 d, a", lambda a, b: bin(a & 0xFFFFFFFF).count("1")),
        ("clz.b32 d, a", lambda a, b: 32 - (a & 0xFFFFFFFF).bit_length()),
        ("brev.b32 d, a", lambda a, b: int(f"{a & 0xFFFFFFFF:032b}"[::-1], 2)),
        ("lop3.b32 d, a, b, 255, 0xE8", lambda a, b: a & b | a & 255 | b & 255),
        ("prmt.b32 d, a, b, 0x5410", lambda a, b: a & 0xFFFF | (b & 0xFFFF) << 16),
        ("prmt.b32 d, a, b, 0x0009", lambda a, b: (a & 255) * 0x01010100 | (255 if a >> 15 & 1 else 0)),
    ],
)
def test_bit_operations(text: str, function) -> None:
    expected = wrap([function(int(a), int(b)) for a, b in zip(S32, T32, strict=True)], "s32")
    same(evaluate(text, "s32", ("s32", S32), ("s32", T32)), expected)


@pytest.mark.parametrize(
    ("opcode", "function"),
    [
        ("add.f32", lambda a, b: a + b),
        ("sub.f32", lambda a, b: a - b),
        ("mul.f32", lambda a, b: a * b),
        ("div.full.f32", lambda a, b: a / b),
        ("min.f32", np.fmin),
        ("max.f32", np.fmax),
        ("max.NaN.f32", np.maximum),
        ("min.NaN.f32", np.minimum),
        ("add.rn.f32", lambda a, b: a + b),
        ("sub.rn.f32", lambda a, b: a - b),
        ("mul.rn.f32", lambda a, b: a * b),
        ("div.rn.f32", lambda a, b: a / b),
        ("div.approx.f32", lambda a, b: a / b),
        ("copysign.f32", lambda a, b: np.copysign(b, a)),
    ],
)
def test_float_arithmetic(opcode: str, function) -> None:
    with np.errstate(all="ignore"):
        same(evaluate(f"{opcode} d, a, b", "f32", ("f32", F32), ("f32", G32)), function(F32, G32))


def test_flush_to_zero() -> None:
    tiny = np.array([1e-40, -1e-40, 1e-30], np.float32)
    result = evaluate("mul.ftz.f32 d, a, b", "f32", ("f32", tiny), ("f32", [1.0]))
    same(result[:3], np.array([0.0, -0.0, 1e-30], np.float32))
    assert np.signbit(result[1])
    same(evaluate("mul.f32 d, a, b", "f32", ("f32", tiny), ("f32", [1.0]))[:3], tiny)


@pytest.mark.parametrize("opcode", ["add", "sub", "mul", "div.full", "min", "max", "max.xorsign.abs"])
def test_subnormal_operands_and_results_are_flushed(opcode: str) -> None:
    """1e-40 is taken for 0, and so is what comes out of the normal 2e-38 and its neighbour, or of it and 1e-3."""
    a = np.array([1e-40, -1e-40, 2e-38, 2e-38, 3.0], np.float32)
    b = np.array([1.0, -1.0, -1.9999e-38, 1e3, 1e-40], np.float32)
    flat = [np.where(np.abs(v) < np.finfo(np.float32).tiny, v * np.float32(0), v) for v in (a, b)]
    with np.errstate(all="ignore"):
        expected = {
            "add": np.add,
            "sub": np.subtract,
            "mul": np.multiply,
            "div.full": np.divide,
            "min": np.fmin,
            "max": np.fmax,
            "max.xorsign.abs": lambda x, y: np.fmax(np.abs(x), np.abs(y)) * np.sign(np.sign(x) * np.sign(y) + 0.5),
        }[opcode](*flat).astype(np.float32)
    expected = np.where(np.abs(expected) < np.finfo(np.float32).tiny, np.float32(0), expected)
    name, *options = opcode.split(".")
    result = evaluate(".".join([name, *options[:1], "ftz", *options[1:], "f32 d, a, b"]), "f32", ("f32", a), ("f32", b))
    same(result[:5], expected)


@pytest.mark.parametrize("opcode", ["ex2.approx", "lg2.approx", "sqrt.rn", "rsqrt.approx", "rcp.rn", "abs", "neg"])
def test_functions_flush_subnormal_operands(opcode: str) -> None:
    values = np.array([1e-40, 0.0], np.float32)
    tiny, zero = evaluate(f"{opcode}.ftz.f32 d, a", "f32", ("f32", values))[:2]
    same(tiny, zero)


@pytest.mark.parametrize("opcode", ["sin", "cos"])
def test_trigonometry_flushes_subnormal_operands(opcode: str) -> None:
    result = evaluate(f"{opcode}.approx.ftz.f32 d, a", "f32", ("f32", np.array([1e-40], np.float32)))
    assert result[0] == {"sin": 0, "cos": 1}[opcode]


@pytest.mark.parametrize(
    ("text", "function"),
    [
        ("add.sat.f32 d, a, b", lambda a, b: a + b),
        ("sub.sat.f32 d, a, b", lambda a, b: a - b),
        ("mul.sat.f32 d, a, b", lambda a, b: a * b),
        ("fma.rn.sat.f32 d, a, b, a", lambda a, b: (a.astype(np.float64) * b + a).astype(np.float32)),
        ("fma.rn.ftz.sat.f32 d, a, b, a", lambda a, b: (a.astype(np.float64) * b + a).astype(np.float32)),
    ],
)
def test_saturation(text: str, function) -> None:
    """Between 0 and 1; not a number is 0."""
    with np.errstate(all="ignore"):
        expected = function(F32, G32)
    expected = np.clip(np.where(np.isnan(expected), np.float32(0), expected), 0, 1)
    result = evaluate(text, "f32", ("f32", F32), ("f32", G32))
    if "ftz" in text:
        expected = np.where(expected < np.finfo(np.float32).tiny, np.float32(0), expected)
    same(result, expected)


def test_fused_multiply_add_rounds_once() -> None:
    a, c = np.float32(1 + 2**-12), np.float32(-(1 + 2**-11))
    same(
        evaluate("fma.rn.f32 d, a, a, c", "f32", ("f32", [a]), ("f32", [0]), ("f32", [c])),
        np.full(32, 2.0**-24, np.float32),
    )


def test_min_with_sign_product() -> None:
    result = evaluate("min.xorsign.abs.f32 d, a, b", "f32", ("f32", [3, -3, 3, -3]), ("f32", [2, 2, -2, -2]))
    same(result[:4], np.array([2, -2, -2, 2], np.float32))


@pytest.mark.parametrize(
    ("opcode", "function"),
    [
        ("ex2.approx.ftz.f32", torch.exp2),
        ("lg2.approx.f32", torch.log2),
        ("sqrt.approx.ftz.f32", torch.sqrt),
        ("rsqrt.approx.f32", torch.rsqrt),
        ("rcp.approx.ftz.f32", torch.reciprocal),
        ("sin.approx.f32", torch.sin),
        ("cos.approx.f32", torch.cos),
        ("tanh.approx.f32", torch.tanh),
        ("abs.f32", torch.abs),
        ("neg.f32", torch.neg),
    ],
)
def test_functions(opcode: str, function) -> None:
    values = np.abs(G32[:24]) + np.float32(0.1)
    expected = function(torch.from_numpy(np.resize(values, 32))).numpy()
    np.testing.assert_allclose(evaluate(f"{opcode} d, a", "f32", ("f32", values)), expected, rtol=2e-7)


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("opcode", ["add", "sub", "mul", "max", "min"])
def test_half_precision(opcode: str, kind: str) -> None:
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}[kind]
    a, b = (torch.from_numpy(np.resize(v[:24], 32)).to(dtype) for v in (F32, G32))
    function = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "max": torch.maximum, "min": torch.minimum}[
        opcode
    ]
    bits = [t.view(torch.int16).numpy().view(np.uint16) for t in (a, b)]
    expected = function(a, b).view(torch.int16).numpy().view(np.uint16)
    patterns = [(kind, v if kind == "bf16" else v.view(np.float16)) for v in bits]
    same(evaluate(f"{opcode}.{kind} d, a, b", kind, *patterns).view(np.uint16), expected)
    packed = [("b32", v.astype(np.uint32) | np.roll(v, 1).astype(np.uint32) << np.uint32(16)) for v in bits]
    result = evaluate(f"{opcode}.{kind}x2 d, a, b", "b32", *packed)
    same(result.astype(np.uint16), expected)
    same((result >> 16).astype(np.uint16), np.roll(expected, 1))


@pytest.mark.parametrize(("opcode", "function"), [("add", np.add), ("min", np.minimum), ("max", np.maximum)])
@pytest.mark.parametrize("kind", ["s16", "u16"])
def test_packed_integers(opcode: str, function, kind: str) -> None:
    a, b = (values.view({"s16": np.int16, "u16": np.uint16}[kind]) for values in (S32, T32))
    result = evaluate(f"{opcode}.{kind}x2 d, a, b", "s32", ("s32", S32), ("s32", T32))
    same(result.view(a.dtype), function(a, b))


def test_packed_f32() -> None:
    joined = G32.view(np.uint32).astype(np.uint64) | (
        np.roll(G32, 1).view(np.uint32).astype(np.uint64) << np.uint64(32)
    )
    result = evaluate("fma.rn.f32x2 d, a, a, a", "b64", ("b64", joined))
    with np.errstate(all="ignore"):
        expected = (G32.astype(np.float64) * G32 + G32).astype(np.float32)
    same(result.astype(np.uint32).view(np.float32), expected)


def test_mixed_precision_addition() -> None:
    half = G32[:24].astype(np.float16)
    result = evaluate("add.rn.f32.f16 d, a, b", "f32", ("f16", half), ("f32", F32[:24]))
    same(result[:24], half.astype(np.float32) + F32[:24])


@pytest.mark.parametrize(
    "name", ["lt", "le", "gt", "ge", "eq", "ne", "ltu", "leu", "gtu", "geu", "equ", "neu", "nan", "num"]
)
def test_float_comparison(name: str) -> None:
    a, b = np.array([1, 2, 2, np.nan, 1, np.nan], np.float32), np.array([2, 1, 2, 1, np.nan, np.nan], np.float32)
    plain = {"lt": a < b, "le": a <= b, "gt": a > b, "ge": a >= b, "eq": a == b}
    ordered = ~(np.isnan(a) | np.isnan(b))
    plain |= {"ne": (a != b) & ordered, "num": ordered, "nan": ~ordered}
    expected = plain[name] if name in plain else plain[name[:2]] | ~ordered
    same(evaluate(f"setp.{name}.f32 d, a, b", "pred", ("f32", a), ("f32", b))[:6], expected)


@pytest.mark.parametrize(
    ("name", "function"), [("lt", np.less), ("ge", np.greater_equal), ("eq", np.equal), ("ne", np.not_equal)]
)
@pytest.mark.parametrize("kind", ["s32", "u32"])
def test_integer_comparison(name: str, function, kind: str) -> None:
    a, b = (v.view({"s32": np.int32, "u32": np.uint32}[kind]) for v in (S32, T32))
    same(evaluate(f"setp.{name}.{kind} d, a, b", "pred", (kind, a), (kind, b)), function(a, b))
    expected = function(a, b) & (b > 5)
    text = f"setp.gt.{kind} %p7, b, 5; setp.{name}.and.{kind} d|%p8, a, b, %p7"
    same(evaluate(text, "pred", (kind, a), (kind, b)), expected)


@pytest.mark.parametrize(
    ("name", "function"), [("lo", np.less), ("ls", np.less_equal), ("hi", np.greater), ("hs", np.greater_equal)]
)
def test_unsigned_comparison(name: str, function) -> None:
    a, b = S32.view(np.uint32), T32.view(np.uint32)
    same(evaluate(f"setp.{name}.u32 d, a, b", "pred", ("u32", a), ("u32", b)), function(a, b))


@pytest.mark.parametrize("combine", ["and", "or", "xor"])
def test_comparison_with_a_predicate_and_the_opposite_one(combine: str) -> None:
    flags = np.arange(32) % 3 == 0
    function = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[combine]
    for text, less in (
        (f"setp.lt.{combine}.s32 d, a, b, c", S32 < T32),
        (f"setp.lt.{combine}.s32 %p7|d, a, b, c", S32 >= T32),
    ):
        result = evaluate(text, "pred", ("s32", S32), ("s32", T32), ("pred", flags))
        same(result, function(less, flags))
    result = evaluate(
        "setp.lt.ftz.f32 d, a, b", "pred", ("f32", np.array([1e-40, 1e-30], np.float32)), ("f32", [1e-35])
    )
    same(result[:2], [1, 0])


def test_selection_and_predicates() -> None:
    flags = np.arange(32) % 3 == 0
    same(evaluate("selp.b32 d, a, b, c", "s32", ("s32", S32), ("s32", T32), ("pred", flags)), np.where(flags, S32, T32))
    text = """not.pred %p1, a; and.pred %p2, %p1, a; xor.pred %p3, %p1, a; mov.pred %p4, -1; or.pred %p2, %p2, %p3;
        and.pred d, %p2, %p4"""
    same(evaluate(text, "pred", ("pred", flags)), np.ones(32))


def test_packing_and_unpacking() -> None:
    text = "mov.b32 {%rs1, %rs2}, a; mov.b32 {_, %rs3}, b; mov.b32 d, {%rs2, %rs3}"
    expected = (S32.view(np.uint32) >> 16) | (T32.view(np.uint32) & np.uint32(0xFFFF0000))
    same(evaluate(text, "u32", ("s32", S32), ("s32", T32)), expected)


@pytest.mark.parametrize("mode", ["rzi", "rni", "rmi", "rpi"])
@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u16"])
def test_float_to_integer(kind: str, mode: str) -> None:
    values = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 1e20, -1e20, np.nan, 70000.4, 3e9], np.float32)
    round_ = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[mode]
    limits = np.iinfo(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 8}")
    wide = [limits.min if v != v and kind == "s64" else 0 if v != v else int(round_(np.float64(v))) for v in values]
    expected = [min(max(v, limits.min), limits.max) for v in wide]
    assert evaluate(f"cvt.{mode}.{kind}.f32 d, a", kind, ("f32", values))[:10].tolist() == expected


@pytest.mark.parametrize(
    ("text", "function"), [("rmi", np.floor), ("rpi", np.ceil), ("rzi", np.trunc), ("rni", np.rint)]
)
def test_rounding_to_integral_floats(text: str, function) -> None:
    same(evaluate(f"cvt.{text}.f32.f32 d, a", "f32", ("f32", F32)), function(F32))


def test_integer_conversions() -> None:
    same(evaluate("cvt.s64.s32 d, a", "s64", ("s32", S32)), S32.astype(np.int64))
    same(evaluate("cvt.u64.u32 d, a", "u64", ("u32", S32.view(np.uint32))), S32.view(np.uint32).astype(np.uint64))
    same(evaluate("cvt.s64.s8 d, a", "s64", ("s64", S64)), S64.astype(np.int8).astype(np.int64))
    same(evaluate("cvt.u16.u32 d, a", "u16", ("u32", S32.view(np.uint32))), S32.astype(np.uint16))
    same(evaluate("cvt.sat.s8.s32 d, a", "s32", ("s32", [300, -300, 5]))[:3], np.array([127, -128, 5]))
    same(evaluate("cvt.rn.f32.s32 d, a", "f32", ("s32", S32)), S32.astype(np.float32))
    same(evaluate("cvt.rn.f64.s64 d, a", "f64", ("s64", S64)), S64.astype(np.float64))


@pytest.mark.parametrize(("kind", "dtype"), [("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_half_conversions(kind: str, dtype: torch.dtype) -> None:
    values = torch.from_numpy(np.where(np.isnan(F32), np.float32(1), F32))
    expected = values.to(dtype).view(torch.int16).numpy().view(np.uint16)
    same(evaluate(f"cvt.rn.{kind}.f32 d, a", kind, ("f32", values.numpy())).view(np.uint16), expected)
    back = evaluate(f"cvt.f32.{kind} d, a", "f32", (kind, expected if kind == "bf16" else expected.view(np.float16)))
    same(back, values.to(dtype).float().numpy())
    packed = evaluate(f"cvt.rn.{kind}x2.f32 d, a, b", "b32", ("f32", [1.0]), ("f32", values.numpy()))
    same(packed.astype(np.uint16), expected)
    assert (packed >> 16 == int(torch.tensor(1.0, dtype=dtype).view(torch.int16))).all()


def test_round_toward_zero() -> None:
    values = np.array([1 + 2**-11 + 2**-12, -(1 + 2**-11 + 2**-12)], np.float32)
    assert evaluate("cvt.rz.f16.f32 d, a", "f16", ("f32", values))[:2].tolist() == [1.0, -1.0]
    assert evaluate("cvt.rz.bf16.f32 d, a", "bf16", ("f32", [1.998])).tolist()[:1] == [0x3FFF]


def test_conversion_without_negative_or_subnormal_values() -> None:
    values = np.array([-1.5, 2.5, -0.25, 1e-40], np.float32)
    assert evaluate("cvt.rn.relu.f16.f32 d, a", "f16", ("f32", values))[:3].tolist() == [0.0, 2.5, 0.0]
    assert evaluate("cvt.rpi.ftz.f32.f32 d, a", "f32", ("f32", values))[:4].tolist() == [-1.0, 3.0, -0.0, 0.0]
    assert evaluate("cvt.rpi.f32.f32 d, a", "f32", ("f32", values))[3] == 1


def test_tf32_rounding() -> None:
    values = np.array([1 + 2**-11, 1 + 2**-12, 1 + 2**-10], np.float32)
    result = evaluate("cvt.rna.tf32.f32 d, a", "f32", ("f32", values))
    assert result[:3].tolist() == [1 + 2**-10, 1.0, 1 + 2**-10]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("frobnicate.b32 d, a", "does not know frobnicate"),
        ("add.rm.f32 d, a, a", r"modifier \.rm of add"),
        ("add.s32 d, a", "with 2 operands"),
        ("add.s64 d, a, a", "32 bits is set as s64"),
        ("setp.lt.s32 d, a, a", "is set as pred"),
        ("cvt.rn.e4m3x2.f32 d, a, a", r"modifier \.e4m3x2"),
        ("mov.u32 d, %clock", "`%clock` is not supported"),
        ("add.f32 d, a, 1", "`1` is not supported as f32"),
        ("ld.b32 d, [%rd0]", "generic addresses"),
        ("bar.sync 1", "only unguarded barrier 0"),
        ("bra $nowhere", "no label"),
        ("call foo", "does not know call"),
        ("sub.cc.u32 d, a, a", r"modifier \.cc of sub"),
        ("tanh.approx.ftz.f32 d, a", r"modifier \.ftz of tanh"),
    ],
)
def test_the_unknown_is_an_error_that_says_where(text: str, reason: str) -> None:
    with pytest.raises(SimError, match=reason) as error:
        evaluate(text, "s32", ("s32", S32))
    assert error.value.kernel == "test" and error.value.line > 0 and text.split()[0] in error.value.instruction
