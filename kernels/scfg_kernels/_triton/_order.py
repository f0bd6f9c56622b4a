"""Order among the programs of one launch, so that what depends on all of another part needs no launch of its own.

Three forms, all without a host round trip; the first two do not assume that all programs are resident at once:

    last one out    every program announces what it has stored; whoever sees that all others have goes on alone
    tickets         a program works on the part that its ticket names. Parts that others wait for have the lower
                    tickets, so whoever waits, waits for programs that have already started and that wait for no one
                    later: no deadlock, in whatever order the device starts programs (the argument of single-pass scans)
    meeting         programs wait for each other, and go on with what they hold in registers. That needs all of them
                    resident: the launch is cooperative, which the driver refuses if they do not fit

Counters are int32 in global memory and zero between launches: the last program sets them back. Only integers are added,
and every sum over other programs' results is taken in a fixed order, so results do not depend on who came last.

Memory order: `announce` is a barrier of the program and then a release by one thread; `wait`, and the last
announcement, is an acquire by one thread and then a barrier. With the two barriers that orders the stores and loads of
all threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import triton
import triton.language as tl

from .._launch import may_keep

_KEPT: dict[torch.device, torch.Tensor] = {}


@triton.jit
def take_ticket(ticket):
    """0, 1, 2, ... in the order in which programs ask."""
    return tl.atomic_add(ticket, 1, sem="relaxed")


@triton.jit
def announce(counter):
    """Everything this program has stored is visible to who sees the count; returns the count before."""
    tl.debug_barrier()
    before = tl.atomic_add(counter, 1, sem="acq_rel")
    tl.debug_barrier()
    return before


@triton.jit
def wait(counter, number):
    """Until `number` programs have announced themselves at `counter`; their stores can be read then."""
    seen = tl.atomic_add(counter, 0, sem="acquire")
    while seen < number:
        seen = tl.atomic_add(counter, 0, sem="acquire")
    tl.debug_barrier()


@triton.jit
def leave(counters, finished, programs, LENGTH: tl.constexpr):
    """The last thing a program does: the last of `programs` sets all LENGTH (a power of two) counters to zero."""
    if announce(finished) == programs - 1:
        tl.store(counters + tl.arange(0, LENGTH), tl.zeros([LENGTH], tl.int32))


@triton.jit
def meet(counter, number):
    """Until as many programs have come here as make `number` announcements, those at earlier meetings of this counter
    included; what they have stored can be read then. In a cooperative launch only."""
    announce(counter)
    wait(counter, number)


@triton.jit
def leave_meeting(counter, number):
    """The last thing a program does that has met others: the one that makes the `number`-th announcement sets the
    counter back."""
    if announce(counter) == number - 1:
        tl.store(counter, 0)


@contextmanager
def counters(device: torch.device, number: int) -> Iterator[torch.Tensor]:
    """At least `number` zeros, int32, for one launch, which leaves them zero.

    Kept from launch to launch on a device's default stream, whose launches never overlap; a launch that fails forgets
    them. On other streams every launch has zeros of its own (`may_keep` says why).
    """
    if not may_keep(device):
        yield torch.zeros(number, dtype=torch.int32, device=device)
        return
    zeros = _KEPT.pop(device, None)
    if zeros is None or zeros.numel() < number:
        zeros = torch.zeros(max(1024, triton.next_power_of_2(number)), dtype=torch.int32, device=device)
    yield zeros
    _KEPT[device] = zeros
