"""What the kernels of two parts share: flash attention of one head that keeps what its softmax needs, map tiles, and
products of them.

    part 1   rows of one head:        O by online softmax over tiles of keys,
                                      m[n] = max_t s[n, t],  w[n] = 1 / (H sum_t 2^(s[n, t] - m[n]))
    part 2   a tile of the map:       S[n, t] = sum_h 2^(s_h[n, t] - m_h[n]) w_h[n]      heads in order

with s = scale log2(e) q k^T in fp32. A row of scores of all heads does not fit a program, so part 2 forms the scores
again. Both are loops over plain two-dimensional products, whose operands are copied ahead asynchronously. Heads whose
size is no power of two are two tiles side by side (160 = 128 + 32 columns).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._columns import column_tiles, load_operand, row_sums


@triton.jit
def load_columns(
    base, row, rows, stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, ALIGN: tl.constexpr
):  # fmt: skip
    """Columns FIRST .. FIRST + WIDTH of some rows of one head [N, DIM]: [row, WIDTH], zero outside."""
    column = FIRST + tl.arange(0, WIDTH)[None, :]
    pointers = base + row[:, None] * (stride * ALIGN) + column
    return tl.load(pointers, mask=(row[:, None] < rows) & (column < DIM), other=0.0)


@triton.jit
def store_columns(
    base, values, row, rows, stride, FIRST: tl.constexpr, WIDTH: tl.constexpr, DIM: tl.constexpr, ALIGN: tl.constexpr
):  # fmt: skip
    """The counterpart of `load_columns`, from values of any dtype."""
    column = FIRST + tl.arange(0, WIDTH)[None, :]
    pointers = base + row[:, None] * (stride * ALIGN) + column
    tl.store(pointers, values.to(base.dtype.element_ty), mask=(row[:, None] < rows) & (column < DIM))


@triton.jit
def _scores(
    q1, q2, k, key, keys, stride, scale,
    COLUMNS_1: tl.constexpr, COLUMNS_2: tl.constexpr, HEAD_DIM: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """scale q k^T of one head, fp32, -inf beyond the last key. Both parts take their scores from here, so that the
    maxima of part 1 are those of part 2's scores, and the map is as accurate as a softmax in one sweep."""
    k1 = load_columns(k, key, keys, stride, 0, COLUMNS_1, HEAD_DIM, ALIGN)
    result = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
    if COLUMNS_2 > 0:
        k2 = load_columns(k, key, keys, stride, COLUMNS_1, COLUMNS_2, HEAD_DIM, ALIGN)
        result = tl.dot(q2, tl.trans(k2), result, input_precision=PRECISION)
    return tl.where(key[None, :] < keys, result * scale, float("-inf"))


@triton.jit
def attend_rows(
    q, k, v, row, rows, keys, scale, q_stride, k_stride, v_stride,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    WITH_OUTPUT: tl.constexpr, BLOCK_N: tl.constexpr, COLUMNS_1: tl.constexpr, COLUMNS_2: tl.constexpr,
    VALUES_1: tl.constexpr, VALUES_2: tl.constexpr,
):  # fmt: skip
    """Part 1 for rows of one head, q, k, v at its first element: m, H w, and O in two tiles (zeros if not wanted)."""
    BLOCK_M: tl.constexpr = row.shape[0]
    q1 = load_columns(q, row, rows, q_stride, 0, COLUMNS_1, HEAD_DIM, ALIGN)
    q2 = q1
    if COLUMNS_2 > 0:
        q2 = load_columns(q, row, rows, q_stride, COLUMNS_1, COLUMNS_2, HEAD_DIM, ALIGN)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    parts = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # of the row sums, one per key of a tile
    out1 = tl.zeros([BLOCK_M, VALUES_1], tl.float32)
    out2 = tl.zeros([BLOCK_M, VALUES_2 if VALUES_2 > 0 else 1], tl.float32)
    for start in tl.range(0, keys, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        p = _scores(q1, q2, k, key, keys, k_stride, scale, COLUMNS_1, COLUMNS_2, HEAD_DIM, ALIGN, PRECISION)
        previous = top
        top = tl.maximum(top, tl.max(p, 1))  # finite: a tile has at least one key
        p = tl.exp2(p - top[:, None])
        shrink = tl.exp2(previous - top)
        parts = parts * shrink[:, None] + p
        if WITH_OUTPUT:
            weights = p.to(v.dtype.element_ty)
            v1 = load_columns(v, key, keys, v_stride, 0, VALUES_1, VALUE_DIM, ALIGN)
            out1 = tl.dot(weights, v1, out1 * shrink[:, None], input_precision=PRECISION)
            if VALUES_2 > 0:
                v2 = load_columns(v, key, keys, v_stride, VALUES_1, VALUES_2, VALUE_DIM, ALIGN)
                out2 = tl.dot(weights, v2, out2 * shrink[:, None], input_precision=PRECISION)
    return top, 1.0 / row_sums(parts), out1, out2


@triton.jit
def map_tile(
    q, k, top, weight, row, key, heads, rows, keys, scale, q_stride_h, q_stride_n, k_stride_h, k_stride_n,
    HEAD_DIM: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, COLUMNS_1: tl.constexpr,
    COLUMNS_2: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Part 2: S at [row, key], fp32, 0 beyond the last key. q and k, m and w [H, N] at a sample's first element."""
    BLOCK_M: tl.constexpr = row.shape[0]
    BLOCK_N: tl.constexpr = key.shape[0]
    result = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for head in tl.range(0, heads, num_stages=STAGES):
        q_head = q + head * (q_stride_h * ALIGN)
        k_head = k + head * (k_stride_h * ALIGN)
        q1 = load_columns(q_head, row, rows, q_stride_n, 0, COLUMNS_1, HEAD_DIM, ALIGN)
        q2 = q1
        if COLUMNS_2 > 0:
            q2 = load_columns(q_head, row, rows, q_stride_n, COLUMNS_1, COLUMNS_2, HEAD_DIM, ALIGN)
        p = _scores(q1, q2, k_head, key, keys, k_stride_n, scale, COLUMNS_1, COLUMNS_2, HEAD_DIM, ALIGN, PRECISION)
        at = head * rows + row
        own_top = tl.load(top + at, mask=row < rows, other=0.0)
        own_weight = tl.load(weight + at, mask=row < rows, other=0.0)
        result += tl.exp2(p - own_top[:, None]) * own_weight[:, None]
    return result


@triton.jit
def store_statistics(
    q, k, top, weight, row, head, heads, rows, keys, scale, q_stride_h, q_stride_n, k_stride_h, k_stride_n,
    HEAD_DIM: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
    COLUMNS_1: tl.constexpr, COLUMNS_2: tl.constexpr,
):  # fmt: skip
    """Part 1 without output: m and w of some rows of one head. q and k, m and w [H, N] at a sample's first element."""
    k += head * (k_stride_h * ALIGN)
    own_top, own_weight, _, _ = attend_rows(
        q + head * (q_stride_h * ALIGN), k, k, row, rows, keys, scale, q_stride_n, k_stride_n, k_stride_n,
        HEAD_DIM, HEAD_DIM, ALIGN, PRECISION, False, BLOCK_N, COLUMNS_1, COLUMNS_2, COLUMNS_1, COLUMNS_2,
    )  # fmt: skip
    tl.store(top + head * rows + row, own_top, mask=row < rows)
    tl.store(weight + head * rows + row, own_weight / heads, mask=row < rows)


@triton.jit
def map_product(
    q, k, x, top, weight, row, first, heads, rows, keys, columns, scale, q_stride_h, q_stride_n, k_stride_h, k_stride_n,
    x_stride_n, x_stride_t,
    HEAD_DIM: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr, COLUMNS_1: tl.constexpr,
    COLUMNS_2: tl.constexpr, STAGES: tl.constexpr, MAP_N: tl.constexpr, BLOCK_T1: tl.constexpr, BLOCK_T2: tl.constexpr,
    SCALAR: tl.constexpr,
):  # fmt: skip
    """Rows of S times columns first .. of x [keys, columns], fp32, in two tiles (zeros if the second has no width). S
    is formed MAP_N keys at a time, by `map_tile`; SCALAR is that of `load_operand`."""
    BLOCK_M: tl.constexpr = row.shape[0]
    column1, column2 = column_tiles(first, BLOCK_T1, BLOCK_T2)
    total1 = tl.zeros([BLOCK_M, BLOCK_T1], tl.float32)
    total2 = tl.zeros([BLOCK_M, column2.shape[0]], tl.float32)
    for start in tl.range(0, keys, MAP_N, num_stages=1):
        key = start + tl.arange(0, MAP_N)
        tile = map_tile(
            q, k, top, weight, row, key, heads, rows, keys, scale, q_stride_h, q_stride_n, k_stride_h, k_stride_n,
            HEAD_DIM, ALIGN, PRECISION, COLUMNS_1, COLUMNS_2, STAGES,
        )  # fmt: skip
        x1 = load_operand(x, key, column1, x_stride_n, x_stride_t, keys, columns, SCALAR)
        total1 = tl.dot(tile, x1, total1, input_precision=PRECISION)
        if BLOCK_T2 > 0:
            x2 = load_operand(x, key, column2, x_stride_n, x_stride_t, keys, columns, SCALAR)
            total2 = tl.dot(tile, x2, total2, input_precision=PRECISION)
    return total1, total2
