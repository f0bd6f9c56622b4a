"""Muon for CPU ranks: orthogonalised momentum for hidden weights, AdamW for everything else.

For a weight seen as a matrix W [out, in * kh * kw] with gradient G::

    M <- beta M + G,   U = orthogonal(G + beta M),   W <- (1 - lr wd) W - 0.2 sqrt(max(out, in kh kw)) lr U

``orthogonal`` is five Newton-Schulz steps in float32 (bfloat16 is slower on CPUs without matrix units). The factor
gives every update the root mean square 0.2 lr, which is about AdamW's, so that both halves share one learning rate.
The steps are shared out: each rank orthogonalises its part of the matrices and one all-reduce collects them.

Reference: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024); the scale is that of
Liu et al., "Muon is scalable for LLM training" (2025).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """Replace the singular values of a float32 matrix [m, n] by values near one (about 0.7 to 1.2)."""
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide / (wide.norm() + 1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.Optimizer):
    """Muon for parameters with two or more dimensions; the first is the output.

    Every rank must pass the same parameters with equal (already averaged) gradients.

    Args:
        parameters: weights to train.
        lr: step size on AdamW's scale.
        momentum: decay of the momentum.
        weight_decay: decoupled decay, times lr.
    """

    def __init__(
        self, parameters: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        if any(p.ndim < 2 for group in self.param_groups for p in group["params"]):
            raise ValueError("Muon takes parameters with at least two dimensions")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Apply one update; parameters without a gradient are left alone."""
        if closure is not None:
            raise ValueError("Muon does not take a closure")
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            owners = _share_out(parameters, ranks)
            updates = []
            for parameter, owner in zip(parameters, owners, strict=True):
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].mul_(group["momentum"]).add_(parameter.grad)
                if owner == rank:
                    lookahead = parameter.grad.add(state["momentum"], alpha=group["momentum"])
                    updates.append(orthogonalise(lookahead.flatten(1)).flatten())
                else:
                    updates.append(torch.zeros(parameter.numel()))
            flat = torch.cat(updates)
            if ranks > 1:
                dist.all_reduce(flat)
            for parameter, update in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
                matrix = parameter.flatten(1)
                scale = 0.2 * max(matrix.shape) ** 0.5
                parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
                parameter.add_(update.view_as(parameter), alpha=-group["lr"] * scale)


def _share_out(parameters: list[torch.nn.Parameter], ranks: int) -> list[int]:
    """Owner of each parameter, such that the ranks' Newton-Schulz work is about equal."""
    cost = [p.numel() * min(p.flatten(1).shape) for p in parameters]
    load, owners = [0] * ranks, [0] * len(parameters)
    for index in sorted(range(len(parameters)), key=lambda i: -cost[i]):
        owners[index] = load.index(min(load))
        load[owners[index]] += cost[index]
    return owners
