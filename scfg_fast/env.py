"""What this machine and this installation offer: versions, devices, and the backend of every operator.

`environment` is data (plain values, fit for JSON), `report` the same as text. Neither holds a path or a host name, so
that both can go into a bug report as they are.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import textwrap
from typing import Any

from ._version import __version__

PACKAGES = (
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "xformers",
    "accelerate",
    "huggingface_hub",
    "safetensors",
    "numpy",
    "pillow",
)


def package_versions() -> dict[str, str | None]:
    """Version of each of :data:`PACKAGES`, None where it is not installed. Imports none of them."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def default_device() -> str:
    """`"cuda"` if a CUDA device can be used, else `"mps"` if there is one, else `"cpu"`."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _devices() -> list[dict[str, Any]]:
    import torch

    devices: list[dict[str, Any]] = [
        {"device": "cpu", "name": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "device": f"cuda:{index}",
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    if torch.backends.mps.is_available():
        devices.append({"device": "mps", "name": "Metal"})
    return devices


def environment(device: str | None = None, dtype: str | None = None) -> dict[str, Any]:
    """The installation and the machine, as plain values.

    Args:
        device: to choose backends for; default `default_device()`.
        dtype: of the model that will run there, for example `"float16"`; None leaves out what depends on it.

    Returns:
        A dictionary with

        - `scfg_fast`, `python`, `platform`: text;
        - `packages`: name -> version, or None where it is not installed;
        - `cuda`: the CUDA (or ROCm) version that torch was built with, or None;
        - `devices`: a list of dictionaries with `device` and `name`, and what else is known of the device;
        - `default_device`: the device that the command line takes if none is named;
        - `device`, `dtype`: what the backends are chosen for;
        - `backends`: operator -> `{"backend": ..., "reasons": [why it is not Triton]}` there.
    """
    import torch
    from scfg_kernels import available_backends

    device = device or default_device()
    return {
        "scfg_fast": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": package_versions(),
        "cuda": torch.version.cuda or torch.version.hip,
        "devices": _devices(),
        "default_device": default_device(),
        "device": device,
        "dtype": dtype,
        "backends": {
            op: {"backend": backend, "reasons": list(reasons)}
            for op, (backend, reasons) in available_backends(device, getattr(torch, dtype) if dtype else None).items()
        },
    }


def _device_line(device: dict[str, Any]) -> str:
    details = []
    if "cores" in device:
        details.append(f"{device['cores']} cores, torch uses {device['threads']} thread(s)")
    if "capability" in device:
        details.append(f"compute capability {device['capability']}, {device['memory_gib']} GiB")
    return f"{device['device']:<14} {device['name']}" + "".join(f", {detail}" for detail in details)


def report(environment: dict[str, Any]) -> str:
    """The dictionary of :func:`environment` as text for people, without a line break at the end."""
    lines = [
        f"scfg-fast {environment['scfg_fast']}",
        "",
        "Versions",
        f"  {'python':<16} {environment['python']}",
        *(f"  {name:<16} {version or 'not installed'}" for name, version in environment["packages"].items()),
        f"  {'system':<16} {environment['platform']}",
        "",
        "Devices",
        *(f"  {_device_line(device)}" for device in environment["devices"]),
    ]
    if not any(device["device"].startswith("cuda") for device in environment["devices"]):
        why = "torch is built without CUDA" if environment["cuda"] is None else "torch finds no usable device"
        lines.append(f"  {'cuda':<14} none: {why}")
    where = environment["device"] + (f", {environment['dtype']}" if environment["dtype"] else "")
    lines += [f"  {'default':<14} {environment['default_device']}", "", f"Operators on {where}"]
    why_not: dict[str, list[str]] = {}
    for op, choice in environment["backends"].items():
        lines.append(f"  {op:<22} {choice['backend']}")
        for reason in choice["reasons"]:
            why_not.setdefault(reason.replace(op, "this operator"), []).append(op)
    if why_not:
        lines += ["", "Why not Triton"]
        for reason, ops in why_not.items():
            which = "all operators" if len(ops) == len(environment["backends"]) else ", ".join(ops)
            lines += textwrap.wrap(f"{which}: {reason}", 100, initial_indent="  ", subsequent_indent="    ")
    return "\n".join(lines)
