"""Bytes and shared-memory wavefronts of the attention kernels at real layer sizes, by the simulator's counters.

Writes the table of `kernels/README.md`, and the commit beside its command:

    PYTHONPATH=.:kernels python -m tests.benchmarks.attention_counters

Rows are whole programs of the layer; the other programs do the same on other rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from scfg_kernels import cross_attention_map, propagate
from scfg_kernels.testing import as_layout

from benchmarks.report import environment
from lab.ptxsim import simulated
from tests.kernels.cases import random_maps, random_qkv

README = Path(__file__).parents[2] / "kernels" / "README.md"
HEADER = "| layer | Q and O | map | K | V or X | wavefronts | of the ideal |\n|---|---|---|---|---|---|---|\n"
LAYERS = {
    # name: (shape [batch, heads, queries, keys, head_dim], dtype, columns of `propagate` or 0)
    "SD 1.5 16x16 self": ((1, 8, 256, 256, 160), torch.float16, 0),
    "SD 1.5 16x16 cross": ((1, 8, 256, 77, 160), torch.float16, 0),
    "SD 1.5 8x8 self": ((1, 8, 64, 64, 160), torch.float16, 0),
    "SD 1.5 32x32 cross, 64 rows": ((1, 8, 64, 77, 80), torch.float16, 0),
    "SD 1.5 64x64 cross, 64 rows": ((1, 8, 64, 77, 40), torch.float16, 0),
    "SDXL 32x32 self, 64 rows": ((1, 20, 64, 1024, 64), torch.float16, 0),
    "SDXL 32x32 cross, 64 rows": ((1, 20, 64, 77, 64), torch.float16, 0),
    "SDXL 32x32 cross in fp32, 32 rows": ((1, 20, 32, 77, 64), torch.float32, 0),
    "head size 72 cross, 64 rows": ((1, 16, 64, 77, 72), torch.float16, 0),
    "`propagate`, SDXL 64x64, 64 rows": ((1, 10, 64, 4096, 64), torch.float16, 77),
}


def measured(name: str) -> str:
    """One row of the table."""
    shape, dtype, columns = LAYERS[name]
    rng = torch.Generator().manual_seed(0)
    q, k, v = (as_layout(x, "projection") for x in random_qkv(rng, shape, dtype))
    x = random_maps(rng, shape[0], shape[3], columns) if columns else v
    with simulated(80, check_races=False) as run:
        results = (
            (propagate(q, k, x, backend="triton"), None) if columns else cross_attention_map(q, k, v, backend="triton")
        )
    counters = run.launches[0].counters

    def times(**tensors: torch.Tensor | None) -> str:
        """Bytes moved over bytes there are."""
        used = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        moved = sum(counters.traffic[name].moved_bytes for name in used)
        return f"{moved / sum(tensor.nbytes for tensor in used.values()):.2f}" if used else ""

    cells = [
        name,
        times(q=q, out=results[0]),
        times(mean=results[1]),
        times(k=k),
        times(**{"x" if columns else "v": x}),
    ]
    wavefronts = f"{counters.shared_wavefronts / counters.shared_wavefronts_ideal:.2f}"
    return f"| {' | '.join(cells)} | {counters.shared_wavefronts:,} | {wavefronts} |"


def with_table(text: str, rows: Sequence[str], commit: str) -> str:
    """The page with other rows and another commit.

    Raises:
        ValueError: it has no such table, or no command with a commit.
    """
    lines = HEADER + "".join(f"{row}\n" for row in rows)
    text, tables = re.subn(re.escape(HEADER) + r"(?:\|.*\n)*", lambda _: lines, text)
    text, commands = re.subn(r"(attention_counters`, at commit )\w+", lambda match: match[1] + commit, text)
    if (tables, commands) != (1, 1):
        raise ValueError(f"the page has {tables} tables and {commands} commands, expected one of each")
    return text


if __name__ == "__main__":
    found = []
    for layer in LAYERS:
        found.append(measured(layer))
        print(found[-1], flush=True)
    page = README.read_text(encoding="utf-8")
    README.write_text(with_table(page, found, environment()["commit"][:7]), encoding="utf-8")
    print(f"wrote {README.name}")
