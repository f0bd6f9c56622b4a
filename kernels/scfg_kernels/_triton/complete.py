r"""Completion of the cross-attention maps: products S x (columns), a block of columns per program.

    official   Y = S C,    X = (Y + (R - 1) S Y) / R              2 products
    paper      Y_1 = S C,  Y_(r+1) = S (C + Y_r),  X = Y_R / R    R products

The T columns of a conditional sample are cut into blocks of BLOCK_T; the start column of an unconditional sample is a
block with one column, so both halves run side by side in one grid. Columns are independent through all products: a
program that owns all N rows of its block needs no other program, and all products are one launch. That is the choice
while a single program reads S fast enough; for larger N rows are spread over programs and each product is a launch.

Arithmetic is fp32 without tensor cores: TF32 would cost the last bits that the argmax reads, and `tl.dot` in fp32 reads
S from shared memory with five-way bank conflicts. Here a lane owns every BLOCK_K-th inner index, S goes from memory to
registers in whole rows, and is used for BLOCK_T columns. One rounding, to the dtype of S, at the end. Results between
products are fp32 in memory, [column, N]. Bytes: S once per product and block of columns, from the L2 cache after the
first; C and X once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._launch import CompleteConfig, complete_config, device_guard


@triton.jit
def complete_kernel(
    self_map, cross_map, between, token_out, start_out, first, last, products, n, tokens, columns, unconditional,
    blocks, own, others, s_stride_b, s_stride_n, c_stride_b, c_stride_n,
    PAPER: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Products `first` .. `last` - 1 of `products`; X = own Y_previous + others S Y_previous in the last one."""
    job = tl.program_id(0)
    if job < unconditional:  # the start column of an unconditional sample
        sample = job.to(tl.int64)
        column = (columns - unconditional + sample) + tl.arange(0, BLOCK_T).to(tl.int64)  # row of `between`
        token = tl.arange(0, BLOCK_T)
        used = token < 1
        out = start_out + sample * n
    else:
        sample = ((job - unconditional) // blocks).to(tl.int64)
        token = (job - unconditional) % blocks * BLOCK_T + tl.arange(0, BLOCK_T)
        used = token < tokens
        column = sample * tokens + token
        out = token_out + sample * tokens * n
        sample += unconditional
    self_map += sample * s_stride_b
    cross_map += sample * c_stride_b

    for product in tl.range(first, last):
        is_last = product == products - 1
        previous = between + (product + 1) % 2 * columns.to(tl.int64) * n
        current = between + product % 2 * columns.to(tl.int64) * n
        for row_start in tl.range(tl.program_id(1) * BLOCK_N, n, tl.num_programs(1) * BLOCK_N):
            row = row_start + tl.arange(0, BLOCK_N)
            # One partial sum per lane and column, added up across lanes once per row block.
            partial = tl.zeros([BLOCK_T, BLOCK_N, BLOCK_K], tl.float32)
            for inner_start in tl.range(0, n, BLOCK_K):
                inner = inner_start + tl.arange(0, BLOCK_K)[None, None, :]
                s = tl.load(
                    self_map + row[None, :, None] * s_stride_n + inner,
                    mask=(row[None, :, None] < n) & (inner < n), other=0.0,
                )  # fmt: skip  # [1, BLOCK_N, BLOCK_K]
                inside = used[:, None, None] & (inner < n)
                x = tl.load(
                    cross_map + inner * c_stride_n + token[:, None, None],
                    mask=inside & ((product == 0) | PAPER), other=0.0,
                ).to(tl.float32)  # fmt: skip  # [BLOCK_T, 1, BLOCK_K]
                x += tl.load(previous + column[:, None, None] * n + inner, mask=inside & (product > 0), other=0.0)
                partial += x * s.to(tl.float32)
            total = tl.sum(partial, 2)  # [BLOCK_T, BLOCK_N]
            inside = used[:, None] & (row[None, :] < n)
            if is_last:
                here = column[:, None] * n + row[None, :]
                y = tl.load(previous + here, mask=inside & (product > 0) & (not PAPER), other=0.0)
                result = own * y + others * total
                tl.store(out + token[:, None] * n + row[None, :], result.to(token_out.dtype.element_ty), mask=inside)
            else:
                tl.store(current + column[:, None] * n + row[None, :], total, mask=inside)
        tl.debug_barrier()  # the next product reads what other threads of this program wrote


def launch(
    self_map: torch.Tensor,
    cross_map: torch.Tensor,
    unconditional: int,
    fidelity: str,
    powers: int,
    config: CompleteConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Completed token maps [B, T, N] and start maps [U, N]; `config` overrides the choice."""
    batch, n, tokens = cross_map.shape
    conditional = batch - unconditional
    token_out = self_map.new_empty((conditional, tokens, n))
    start_out = self_map.new_empty((unconditional, n))
    if batch == 0 or n == 0:
        return token_out, start_out
    paper = fidelity == "paper"
    products = powers if paper else 2
    # Official with one power is S C itself: 1 Y + 0 S Y.
    own, others = (0.0, 1.0 / powers) if paper else (1.0 / powers, (powers - 1.0) / powers)
    columns = conditional * tokens + unconditional
    between = torch.empty((2, columns, n), dtype=torch.float32, device=self_map.device)
    with device_guard(self_map.device):
        config = config or complete_config(n, tokens)
        blocks = triton.cdiv(tokens, config.block_t)
        row_programs = 1 if config.one_launch else triton.cdiv(n, config.block_n)
        at_once = products if config.one_launch else 1
        for first in range(0, products, at_once):
            complete_kernel[(unconditional + conditional * blocks, row_programs)](
                self_map, cross_map, between, token_out, start_out, first, first + at_once, products, n, tokens,
                columns, unconditional, blocks, own, others, self_map.stride(0), self_map.stride(1),
                cross_map.stride(0), cross_map.stride(1),
                PAPER=paper, BLOCK_T=config.block_t, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
                num_warps=config.num_warps, num_stages=config.num_stages, enable_fp_fusion=True,
            )  # fmt: skip
    return token_out, start_out
