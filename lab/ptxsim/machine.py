"""Execution of a decoded kernel: a batch of CTAs runs in lockstep, one numpy operation per instruction.

All threads of the batch that stand at the lowest program counter run together until they branch, wait, exit, or reach
threads further on; that reconverges every structured program. Barriers are per CTA. A CTA that polls global memory (an
ordered load, an atomic operation that changes nothing) lets the others go first until an atomic operation changes
something. Where all that are left poll in vain, the kernel hangs. The CTAs of a cooperative launch are one batch, so
that they may wait for each other; those of any other see only what earlier ones have done when they poll (`residency`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .counters import Counters
from .decode import Barrier, Branch, Exit, Kernel
from .dtypes import POISON
from .errors import SimError
from .memory import ByteStore, GlobalMemory
from .residency import Residency
from .shared import Selection, SharedMemory
from .visibility import Visibility

THREADS_PER_BATCH = 2048
MAX_STEPS = 5_000_000  # instructions of one batch of that size; a kernel that needs more is taken to hang
MAX_POLLS = 100  # of every CTA that is left, in a row, without a change: nobody will make one

ORDERS = ("lockstep", "forward", "backward")

Mask = np.ndarray | None  # active threads; None: all of the batch
Grid = tuple[int, int, int]


class Batch:
    """The state of some CTAs of one launch.

    Attributes:
        size: threads in the batch; `threads` of them per CTA.
        registers: one array over the threads per register, unsigned bit patterns, bool for predicates. Never changed in
            place.
        special: `%tid.x` and so on.
        parameters: value of each kernel parameter, by name.
        warp, lane: of each thread; warps are numbered within their CTA.
    """

    def __init__(
        self,
        kernel: Kernel,
        memory: GlobalMemory,
        parameters: dict[str, int],
        grid: Grid,
        first: int,
        count: int,
        shared_bytes: int,
        counters: Counters,
        check_races: bool,
        order: str,
    ) -> None:
        program = kernel.program
        self.kernel, self.memory, self.parameters, self.counters = kernel, memory, parameters, counters
        self.threads, self.ctas = program.threads, count
        self.size = self.threads * count
        thread = np.arange(self.size)
        self.cta, self.lane = thread // self.threads, thread % 32
        self.warp = (thread % self.threads // 32).astype(np.uint32)
        self.registers: list[np.ndarray] = [np.zeros(0)] * len(program.registers)
        for index, bits in program.registers.values():
            self.registers[index] = np.zeros(self.size, bool) if bits == 1 else np.full(self.size, POISON[bits])
        self.carry = np.zeros(self.size, np.uint32)
        self.special = self._special(grid, first)
        self.shared = SharedMemory(
            count, shared_bytes, kernel.shared_granule, kernel.asynchronous, check_races, counters
        )
        self.check_races = check_races
        if memory.visibility is not None:
            memory.visibility.begin(first, count, self.threads)
        if memory.residency is not None:
            memory.residency.begin(first, self.threads)
        unit = 128 if kernel.warp_groups else 32
        turn = thread // unit
        self._turn = None if order == "lockstep" else turn if order == "forward" else turn[::-1].copy()
        self.active: Mask = None  # of the running segment, guards not included
        self.local = ByteStore(np.full(self.size * max(program.local_bytes, 16), 0xFF, np.uint8))
        self.epochs = np.zeros(count, np.uint32)
        self.polls = np.zeros(count, np.int64)  # per CTA, since an atomic operation last changed global memory
        self._everyone = np.ones(self.size, bool)
        self._set_tags()
        self.state: dict[str, object] = {}  # of opcode families, made on first use

    def _special(self, grid: Grid, first: int) -> dict[str, np.ndarray]:
        thread = (np.arange(self.size) % self.threads).astype(np.uint32)
        linear = first + self.cta
        position = (linear % grid[0], linear // grid[0] % grid[1], linear // (grid[0] * grid[1]))
        result = {
            "%tid.x": thread,
            "%laneid": thread % np.uint32(32),
            "%warpid": self.warp,
            "%ntid.x": np.full(self.size, self.threads, np.uint32),
            "WARP_SZ": np.full(self.size, 32, np.uint32),
        }
        for axis, place, extent in zip("xyz", position, grid, strict=True):
            result[f"%ctaid.{axis}"] = place.astype(np.uint32)
            result[f"%nctaid.{axis}"] = np.full(self.size, extent, np.uint32)
        for axis in "yz":
            result[f"%tid.{axis}"] = np.zeros(self.size, np.uint32)
            result[f"%ntid.{axis}"] = np.ones(self.size, np.uint32)
        return result

    def _set_tags(self) -> None:
        self.tags = self.epochs[self.cta] * np.uint32(64) + self.warp
        self._all = Selection(slice(None), np.arange(self.size), self.cta, self.tags)

    # ---- for the opcodes

    def write(self, index: int, value: np.ndarray, mask: Mask) -> None:
        """Set a register where the mask is set."""
        if mask is not None:
            value = np.where(mask, value, self.registers[index])
        elif value.shape != (self.size,):
            value = np.full(self.size, value)
        self.registers[index] = value

    def select(self, mask: Mask) -> Selection:
        """The active threads."""
        if mask is None:
            return self._all
        index = np.nonzero(mask)[0]
        return Selection(index, index, self.cta[index], self.tags[index])

    def active_warps(self, mask: Mask, width: int = 32) -> np.ndarray | None:
        """Numbers of the active warps (or groups of `width` threads) in the batch; None: all.

        Raises:
            SimError: a warp is active in part, where the instruction needs all its threads.
        """
        if mask is None:
            return None
        lanes = mask.reshape(-1, width)
        active = lanes.any(1)
        if not np.array_equal(active, lanes.all(1)):
            raise SimError("only some threads of a warp take part in an instruction that needs them all")
        return np.nonzero(active)[0]

    def note_poll(self, who: Selection) -> None:
        """Global memory has been read as a program does that waits for another one to change it."""
        self.polls[np.unique(who.ctas)] += 1

    # ---- the loop

    def run(self) -> None:
        """Execute until every thread has left.

        Raises:
            SimError: with the place in the program.
        """
        self._pc = np.zeros(self.size, np.int64)
        self._waiting = np.zeros(self.size, bool)
        self._end, self._steps, self._at = len(self.kernel.code), 0, 0
        try:
            with np.errstate(all="ignore"):
                while self._advance():
                    pass
        except SimError as error:
            if error.kernel:
                raise
            raise self._error(error.reason) from None
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise self._error(f"the simulator failed: {error!r}") from error
        self.counters.ctas += self.ctas

    def _error(self, reason: str) -> SimError:
        program = self.kernel.program
        return program.error(reason, program.instructions[min(self._at, self._end - 1)])

    def _advance(self) -> bool:
        """Run the threads at the lowest program counter up to the next event; False if nobody is left."""
        ready = ~self._waiting & (self._pc < self._end)
        if self.polls.any() and ready.any():
            polls = self.polls[self.cta]
            fewest = polls[ready].min()
            if fewest > MAX_POLLS:
                rule = "; unless the launch is cooperative, a CTA may only wait for those that started before it"
                rule = "" if self.memory.residency is None else rule
                raise SimError(f"every CTA that is left polls for what none of them will do: the kernel hangs{rule}")
            ready &= polls == fewest
        if self._turn is not None and ready.any():
            ready &= self._turn == self._turn[ready].min()
        positions = self._pc[ready]
        if not len(positions):
            if self._waiting.any():
                raise SimError("threads wait at a barrier for ever")
            return False
        pc = int(positions.min())
        active = ready & (self._pc == pc)
        further = positions[positions > pc]
        stop = int(further.min()) if len(further) else self._end
        mask = self.active = None if active.all() else active
        start, code = pc, self.kernel.code
        while True:
            if pc == self._end:
                self._pc[active] = pc
                break
            self._at = pc
            step = code[pc]
            pc += 1
            if callable(step):
                step(self, mask)
            elif isinstance(step, Barrier) and mask is None:
                self._next_epoch(slice(None))
            else:
                self._control(step, active, pc)
                break
            if pc >= stop:
                self._pc[active] = pc
                break
        self._steps += pc - start
        self.counters.warp_instructions += (pc - start) * (int(active.sum()) + 31) // 32
        limit = MAX_STEPS * max(1, self.size // THREADS_PER_BATCH)
        if self._steps > limit:
            raise SimError(f"more than {limit} instructions: the kernel seems to hang")
        return True

    def _control(self, step: Branch | Exit | Barrier, active: np.ndarray, following: int) -> None:
        """Move the active threads past a control instruction."""
        if isinstance(step, Barrier):
            self.active_warps(active)
            self._pc[active] = following
            self._waiting |= active
            self._release()
            return
        chosen = active
        if step.guard is not None:
            predicate = self.registers[step.guard]
            chosen = active & (~predicate if step.negated else predicate)
        self._pc[active] = following
        self._pc[chosen] = self._end if isinstance(step, Exit) else step.target
        if isinstance(step, Exit) and self._waiting.any():
            self._release()

    def _release(self) -> None:
        """Let the CTAs go whose living threads all wait."""
        shape = (self.ctas, self.threads)
        waiting = self._waiting.reshape(shape)
        complete = (waiting | (self._pc.reshape(shape) >= self._end)).all(1) & waiting.any(1)
        for cta in np.nonzero(complete)[0]:
            if len(np.unique(self._pc.reshape(shape)[cta][waiting[cta]])) > 1:
                raise SimError("the threads of a CTA wait at different bar.sync instructions")
        if complete.any():
            waiting[complete] = False
            self._next_epoch(complete)

    def _next_epoch(self, ctas: slice | np.ndarray) -> None:
        self.epochs[ctas] += np.uint32(1)
        if self.memory.visibility is not None:
            self.memory.visibility.barrier(ctas)
        self.counters.barriers += len(self.epochs[ctas])
        self._set_tags()


def launch(
    kernel: Kernel,
    memory: GlobalMemory,
    values: Sequence[int],
    grid: Grid,
    shared_bytes: int,
    counters: Counters,
    *,
    check_races: bool = True,
    order: str = "lockstep",
    cooperative: bool = False,
) -> None:
    """Execute every CTA of a grid, x fastest.

    Args:
        kernel: a decoded kernel.
        memory: the buffers it may touch; the module's constant tables are added.
        values: bit pattern of each parameter, in order; missing ones are 0.
        grid: number of CTAs per axis.
        shared_bytes: dynamic shared memory per CTA.
        counters: what happened is added here.
        check_races: look for missing barriers and waits in shared memory, and for missing order in global.
        order: `"lockstep"`, or one warp after another between barriers, `"forward"` or `"backward"`: slow, but another
            legal interleaving, under which a correct program gives the same bits.
        cooperative: all CTAs are resident at once, so that they may wait for each other; otherwise a CTA may only wait
            for those that started before it.

    Raises:
        SimError: see `errors`.
    """
    if order not in ORDERS:
        raise ValueError(f"order={order!r} is unknown; use one of {', '.join(ORDERS)}")
    program = kernel.program
    if len(values) > len(program.parameters):
        raise SimError(f"{program.name} has {len(program.parameters)} parameters, not {len(values)}")
    padded = [*values, *[0] * (len(program.parameters) - len(values))]
    parameters = {name: value for (name, _), value in zip(program.parameters, padded, strict=True)}
    for symbol, data in program.constants.items():
        parameters[symbol] = memory.add(np.frombuffer(bytearray(data), np.uint8), symbol).base
    total = grid[0] * grid[1] * grid[2]
    memory.visibility = Visibility(total, -(-program.threads // 32), kernel.protocol) if check_races else None
    memory.residency = None if cooperative or total == 1 else Residency()
    per_batch = total if cooperative else max(1, THREADS_PER_BATCH // program.threads)
    for first in range(0, total, per_batch):
        count = min(per_batch, total - first)
        Batch(kernel, memory, parameters, grid, first, count, shared_bytes, counters, check_races, order).run()
