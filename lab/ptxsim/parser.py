"""PTX text to a list of instructions.

Only the syntax is handled here: comments, `.loc` notes, labels, guards, operand lists, register declarations with
their scopes (inline assembly opens scopes of its own) and the module's variables. What an instruction means is decided
in `decode.py`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .errors import SimError

FLOAT_ATOMIC = re.compile(r"\b(?:atom|red)\.(?:[\w:]+\.)*(?:b?f16(?:x2)?|f32|f64)\b")
"""A floating-point atomic or reduction in PTX text."""

_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)", re.S)
_PARAMETER = re.compile(r"\.param\s+(?P<attributes>.*?)(?P<name>[\w$]+)\s*(?P<array>\[\d*\])?\s*$", re.S)
_GUARD = re.compile(r"@(!?)([%\w$]+)\s+")
_LABEL = re.compile(r"([\w$]+)\s*:(?!:)\s*")
_LOCATION = re.compile(r"\.loc\s+\d+\s+\d+\s+\d+.*?//\s*([^\s@]+)")
_NAME = re.compile(r"(?<![\w$%])%?[A-Za-z_$][\w$]*")
_REGISTER_RANGE = re.compile(r"(%?[\w$]+?)<(\d+)>$")
_VARIABLE = re.compile(r"\.(global|const)\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[(\d+)\](?:\s*=\s*\{([^}]*)\})?")
_LOCAL = re.compile(r"\.local\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[(\d+)\]")
_IGNORED_DIRECTIVES = (".pragma", ".file")
REGISTER_BITS = {"pred": 1, "b16": 16, "u16": 16, "s16": 16, "f16": 16, "b32": 32, "u32": 32, "s32": 32, "f32": 32}
REGISTER_BITS |= {"b64": 64, "u64": 64, "s64": 64, "f64": 64, "f16x2": 32, "bf16": 16, "bf16x2": 32}


@dataclass(frozen=True, slots=True)
class Instruction:
    """One PTX instruction: `@!%p1 ld.global.v2.b32 {%r1, %r2}, [%rd1+8];`."""

    opcode: str
    operands: tuple[str, ...]
    guard: str | None
    guard_negated: bool
    line: int
    text: str
    source: str

    @property
    def base(self) -> str:
        """The operation without modifiers: `ld`."""
        return self.opcode.partition(".")[0]

    @property
    def modifiers(self) -> tuple[str, ...]:
        """Everything after the base, in order: `("global", "v2", "b32")`."""
        return tuple(self.opcode.split(".")[1:])


@dataclass
class Program:
    """A parsed kernel: instructions in order, and everything its declarations say."""

    name: str
    parameters: list[tuple[str, int]]  # (name, bytes)
    threads: int
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> (index, bits); predicates have 1 bit
    shared_symbols: set[str] = field(default_factory=set)
    constants: dict[str, bytes] = field(default_factory=dict)  # module-level tables
    local_symbols: dict[str, int] = field(default_factory=dict)  # name -> offset in a thread's local memory
    local_bytes: int = 0

    def error(self, reason: str, instruction: Instruction) -> SimError:
        """An error at an instruction of this program."""
        return SimError(
            reason, kernel=self.name, line=instruction.line, instruction=instruction.text, source=instruction.source
        )


def split_operands(text: str) -> list[str]:
    """Split at the commas outside braces and brackets: `{a, b}, [c+4], d` has three operands."""
    parts, depth, current = [], 0, ""
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append(current.strip())
            current = ""
        else:
            current += character
    return [*parts, current.strip()] if current.strip() else parts


def elements(operand: str) -> list[str]:
    """The members of a vector operand `{a, b}`; a plain operand is a vector of one."""
    return split_operands(operand[1:-1]) if operand.startswith("{") else [operand]


class _Scopes:
    """Register declarations by scope; names in inner scopes get a suffix, so that registers have one name space."""

    def __init__(self) -> None:
        self._open: list[tuple[str, dict[str, int], dict[str, int]]] = [("", {}, {})]
        self._opened = 0

    def open(self) -> None:
        self._opened += 1
        self._open.append((f"@{self._opened}" if self._opened > 1 else "", {}, {}))

    def close(self) -> None:
        self._open.pop()

    def declare(self, statement: str) -> None:
        """`.reg .b32 %r<58>, %x`"""
        match = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S)
        if match is None or match.group(1) not in REGISTER_BITS:
            raise SimError(f"register declaration `{statement}` is not supported")
        bits = REGISTER_BITS[match.group(1)]
        for name in match.group(2).split(","):
            ranged = _REGISTER_RANGE.match(name.strip())
            _, names, prefixes = self._open[-1]
            if ranged:
                prefixes[ranged.group(1)] = bits
            else:
                names[name.strip()] = bits

    def resolve(self, name: str) -> tuple[str, int] | None:
        """The flat name and width of a register, or None if `name` is no register."""
        for suffix, names, prefixes in reversed(self._open):
            if name in names:
                return name + suffix, names[name]
            stem = name.rstrip("0123456789")
            if stem != name and stem in prefixes:
                return name + suffix, prefixes[stem]
        return None


def parse(ptx: str) -> Program:
    """Parse a module with one `.entry`.

    Raises:
        SimError: the module has device functions, parameters by value that are no scalars, or syntax that is not PTX.
    """
    header = _ENTRY.search(ptx)
    if header is None:
        raise SimError("the PTX has no .entry")
    name = header.group(1)
    if re.search(r"^\s*(\.visible\s+|\.extern\s+|\.weak\s+)?\.func\b", ptx, re.M) or len(_ENTRY.findall(ptx)) > 1:
        raise SimError("device functions (.func) and modules with several entries are not supported", kernel=name)
    body_start = ptx.index("{", header.end())
    directives = ptx[header.end() : body_start]
    size = re.search(r"\.(?:req|max)ntid\s+(\d+)\s*(?:,\s*(\d+)\s*)?(?:,\s*(\d+))?", directives)
    if size is None or any(int(n or 1) != 1 for n in size.groups()[1:]):
        raise SimError(f"the block size is missing or not one-dimensional: {directives.strip()!r}", kernel=name)
    program = Program(name, _parameters(header.group(2), name), int(size.group(1)))
    if program.threads % 32:
        raise SimError(f"{program.threads} threads are no whole warps", kernel=name)
    module = ptx[: header.start()]
    program.shared_symbols.update(re.findall(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\]", module))
    for _, symbol, count, values in _VARIABLE.findall(module):
        program.constants[symbol] = bytes(int(v, 0) for v in values.split(",")) if values else bytes(int(count))
    _parse_body(program, ptx, body_start)
    return program


def _parameters(text: str, kernel: str) -> list[tuple[str, int]]:
    result = []
    for declaration in filter(str.strip, re.sub(r"//[^\n]*", "", text).split(",")):
        match = _PARAMETER.match(declaration.strip())
        types = re.findall(r"\.([busf]\d+)\b", match["attributes"]) if match else []
        if match is None or match["array"] or len(types) != 1:
            raise SimError(f"kernel parameter `{declaration.strip()}` is not supported", kernel=kernel)
        result.append((match["name"], int(types[0][1:]) // 8))
    return result


def _statements(ptx: str, start: int) -> list[tuple[str, int, str]]:
    """Cut the body into (statement, line, source line); `{`, `}` and labels, with their `:`, are statements too."""
    result: list[tuple[str, int, str]] = []
    line_number, pending, pending_line, source, depth = ptx.count("\n", 0, start), "", 0, "", 0
    for raw in ptx[start:].split("\n"):
        line_number += 1
        location = _LOCATION.search(raw)
        if location:
            source = location.group(1)
        rest = raw.partition("//")[0].strip()
        if re.match(r"\.loc\s", rest) or not rest:
            continue
        while rest:
            if not pending and rest[0] in "{}":
                depth += 1 if rest[0] == "{" else -1
                result.append((rest[0], line_number, source))
                if depth == 0:
                    return result
                rest = rest[1:].lstrip()
            elif not pending and (label := _LABEL.match(rest)):
                result.append((label.group(1) + ":", line_number, source))
                rest = rest[label.end() :]
            else:
                head, semicolon, rest = rest.partition(";")
                pending_line = pending_line if pending else line_number
                pending = f"{pending} {head.strip()}".strip()
                rest = rest.strip()
                if semicolon:
                    if pending:
                        result.append((pending, pending_line, source))
                    pending = ""
    raise SimError("the kernel body has no end")


def _parse_body(program: Program, ptx: str, start: int) -> None:
    scopes = _Scopes()
    for statement, line, source in _statements(ptx, start):
        if statement == "{":
            scopes.open()
        elif statement == "}":
            scopes.close()
        elif statement.endswith(":"):
            program.labels[statement[:-1]] = len(program.instructions)
        elif statement.startswith(".reg"):
            scopes.declare(statement)
        elif local := _LOCAL.match(statement):
            program.local_symbols[local.group(1)] = program.local_bytes
            program.local_bytes += -(-int(local.group(2)) // 16) * 16
        elif statement.startswith("."):
            if not statement.startswith(_IGNORED_DIRECTIVES):
                raise SimError("this directive is not supported", kernel=program.name, line=line, instruction=statement)
        else:
            program.instructions.append(_instruction(program, scopes, statement, line, source))


def _instruction(program: Program, scopes: _Scopes, statement: str, line: int, source: str) -> Instruction:
    def rename(match: re.Match[str]) -> str:
        found = scopes.resolve(match.group())
        if found is None:
            return match.group()
        flat, bits = found
        if flat not in program.registers:
            program.registers[flat] = (len(program.registers), bits)
        return flat

    guard = _GUARD.match(statement)
    rest = statement[guard.end() :] if guard else statement
    opcode, _, operands = rest.replace("\t", " ").partition(" ")
    renamed = tuple(_NAME.sub(rename, operand) for operand in split_operands(operands.strip()))
    guard_register = _NAME.sub(rename, guard.group(2)) if guard else None
    return Instruction(
        opcode, renamed, guard_register, bool(guard and guard.group(1)), line, " ".join(statement.split()), source
    )
