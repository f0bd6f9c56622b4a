"""The table of versions in docs/notes/versions.md, made from `.ci/stacks` and the gates of `scfg_fast.versions`.

python -m lab.versions
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from scfg_fast.files import replacing
from scfg_fast.versions import GATES, release

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "notes" / "versions.md"
BEGIN, END = "<!-- python -m lab.versions -->\n", "<!-- end -->\n"


class Stack(NamedTuple):
    """A row of `.ci/stacks`; a version of "-" is the newest."""

    name: str
    torch: str
    diffusers: str
    transformers: str
    huggingface_hub: str


def stacks() -> list[Stack]:
    lines = (ROOT / ".ci" / "stacks").read_text(encoding="utf-8").splitlines()
    return [Stack(*line.split()) for line in lines if line and not line.startswith("#")]


def table() -> str:
    """Both tables, as Markdown."""
    lines = ["| set | torch | diffusers | transformers | huggingface_hub | absent |", "|---|---|---|---|---|---|"]
    for stack in stacks():
        closed = [g.feature for g in GATES if stack.diffusers != "-" and release(stack.diffusers) < release(g.version)]
        versions = ["newest" if version == "-" else version for version in stack[1:]]
        lines.append(f"| {' | '.join([stack.name, *versions, ', '.join(closed) or 'nothing'])} |")
    lines += ["", "| feature | diffusers | below it |", "|---|---|---|"]
    lines += [f"| {gate.feature} | {gate.version} | {gate.why} |" for gate in GATES]
    return "\n".join(lines) + "\n"


def main() -> None:
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    with replacing(PAGE) as file:
        file.write((head + BEGIN + table() + END + rest.partition(END)[2]).encode())


if __name__ == "__main__":
    main()
