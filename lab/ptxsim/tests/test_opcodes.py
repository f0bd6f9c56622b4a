"""Every opcode that is registered, and every modifier that a decoder accepts, is in a unit test."""

from __future__ import annotations

import importlib
import inspect
from collections import defaultdict
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from lab.ptxsim.dtypes import PACKED, TYPES
from lab.ptxsim.opcodes import integer, memory_access
from lab.ptxsim.tests import test_arithmetic, test_matrix, test_memory, test_warp_and_control

decoding = importlib.import_module("lab.ptxsim.decode")  # the package has a function of this name
UNIT_TESTS = (test_arithmetic, test_matrix, test_memory, test_warp_and_control)
# Cache hints, memory order (`test_visibility`), and the types of operands.
NOT_ASKED_FOR = {*memory_access.HINTS, *TYPES, *PACKED, *integer.PACKED_KINDS}


def calls(test: Callable) -> list[dict[str, Any]]:
    """The arguments that pytest would call a parametrised test with; none if it takes others."""
    result: list[dict[str, Any]] = [{}]
    for mark in getattr(test, "pytestmark", []):
        names = mark.args[0]
        names = names.split(",") if isinstance(names, str) else names
        values = [value if len(names) > 1 else (value,) for value in mark.args[1]]
        result = [{**chosen, **dict(zip(names, value, strict=True))} for chosen in result for value in values]
    return result if set(inspect.signature(test).parameters) == set(result[0]) else []


def test_every_opcode_and_modifier_has_a_unit_test(monkeypatch: pytest.MonkeyPatch) -> None:
    accepted: defaultdict[str, set[str]] = defaultdict(set)
    tested: defaultdict[str, set[str]] = defaultdict(set)
    modifiers, decode_one = decoding.modifiers, decoding._decode_one

    def noted(instruction, *, ignore=(), known=()):
        ignore, known = tuple(ignore), tuple(known)
        accepted[instruction.base].update(ignore, known)
        return modifiers(instruction, ignore=ignore, known=known)

    def decoded(decoder, instruction):
        step = decode_one(decoder, instruction)
        tested[instruction.base].update(instruction.modifiers)
        return step

    opcodes = importlib.import_module("lab.ptxsim.opcodes")
    for module in (decoding, *vars(opcodes).values()):
        if isinstance(module, ModuleType) and hasattr(module, "modifiers"):
            monkeypatch.setattr(module, "modifiers", noted)
    monkeypatch.setattr(decoding, "_decode_one", decoded)
    decoding.decode.cache_clear()
    for module in UNIT_TESTS:
        for name, test in inspect.getmembers(module, inspect.isfunction):
            if name.startswith("test_"):
                for arguments in calls(test):
                    test(**arguments)
    assert sorted({"bra", "ret", "exit", *decoding._DECODERS} - tested.keys()) == []
    untested = {base: known - tested[base] - NOT_ASKED_FOR for base, known in accepted.items()}
    assert sorted(f"{base}.{modifier}" for base, missing in untested.items() for modifier in missing) == []
