"""The one exception of the simulator."""

from __future__ import annotations


class SimError(Exception):
    """The program did something that is wrong on the device, or that the simulator does not know.

    The message names what and why. Where the error has a place in a program, `kernel`, `line` (1-based line of the PTX
    text) and `instruction` (its text) say where, and the message starts with them.
    """

    def __init__(
        self, reason: str, *, kernel: str = "", line: int = 0, instruction: str = "", source: str = ""
    ) -> None:
        self.reason, self.kernel, self.line, self.instruction, self.source = reason, kernel, line, instruction, source
        where = f"{kernel}: PTX line {line}{f' ({source})' if source else ''}: `{instruction}`: " if kernel else ""
        super().__init__(where + reason)
