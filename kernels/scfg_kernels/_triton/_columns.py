"""Columns of maps: what propagation and completion load, multiply and store. All arithmetic is fp32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_matrix(base, row, column, row_stride, column_stride, rows, columns):
    """[row, column] of a matrix, fp32, zero outside."""
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    pointers = base + row[:, None] * row_stride + column[None, :] * column_stride
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def load_operand(base, inner, column, row_stride, column_stride, rows, columns, SCALAR: tl.constexpr):
    """`load_matrix` for a product. Loads of one shape are given one layout, that of the widest vectors among them, and
    rows of 77 elements cannot be read in vectors: such a matrix is SCALAR, loaded in a shape of its own, its
    transpose."""
    if SCALAR:
        tile = tl.trans(load_matrix(base, column, inner, column_stride, row_stride, columns, rows))
    else:
        tile = load_matrix(base, inner, column, row_stride, column_stride, rows, columns)
    return tile


@triton.jit
def store_matrix(base, row, column, values, row_stride, column_stride, rows, columns):
    """The counterpart of `load_matrix`, in the dtype of `base`."""
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    pointers = base + row[:, None] * row_stride + column[None, :] * column_stride
    tl.store(pointers, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def row_sums(x):
    """Sums of neighbours, of their sums, and so on: bits that do not depend on how the compiler lays x out."""
    width: tl.constexpr = x.shape[1]
    if width == 1:
        result = tl.reshape(x, [x.shape[0]])
    else:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], width // 2, 2]))
        result = row_sums(even + odd)
    return result


@triton.jit
def column_tiles(first, BLOCK_T1: tl.constexpr, BLOCK_T2: tl.constexpr):
    """Columns `first` .. as two tiles side by side; the second has one if it has no width."""
    return first + tl.arange(0, BLOCK_T1), first + BLOCK_T1 + tl.arange(0, BLOCK_T2 if BLOCK_T2 > 0 else 1)


@triton.jit
def store_product(
    total1, total2, cross_map, previous, current, out, row, first, product, products, n, columns, y_columns,
    own, others, c_stride_n, c_stride_t, y_stride,
    PAPER: tl.constexpr, BLOCK_T1: tl.constexpr, BLOCK_T2: tl.constexpr,
):  # fmt: skip
    """What follows a product of S and columns `first` .. in completion: the last one stores X, [columns, n], the others
    what the next one multiplies, [n, y_stride]."""
    column1 = first + tl.arange(0, BLOCK_T1)
    column2 = first + BLOCK_T1 + tl.arange(0, total2.shape[1])
    if product == products - 1:
        have_y = tl.where(product > 0, n, 0)
        total1 = own * load_matrix(previous, row, column1, y_stride, 1, have_y, y_columns) + others * total1
        store_matrix(out, row, column1, total1, 1, n, n, columns)
        if BLOCK_T2 > 0:
            total2 = own * load_matrix(previous, row, column2, y_stride, 1, have_y, y_columns) + others * total2
            store_matrix(out, row, column2, total2, 1, n, n, columns)
    else:
        if PAPER:
            total1 += load_matrix(cross_map, row, column1, c_stride_n, c_stride_t, n, columns)
            total2 += load_matrix(cross_map, row, column2, c_stride_n, c_stride_t, n, columns)
        store_matrix(current, row, column1, total1, y_stride, 1, n, y_columns)
        if BLOCK_T2 > 0:
            store_matrix(current, row, column2, total2, y_stride, 1, n, y_columns)
