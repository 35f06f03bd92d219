"""What a bug report needs to say about the machine and the call."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["Run", "cpp_compiler", "environment"]

PACKAGES = ("torch-latent", "torch", "triton", "transformers", "accelerate", "gguf", "sympy", "networkx")


@dataclass(frozen=True)
class Run:
    """What was looked at, how it was called, and where."""

    target: str = ""
    notes: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


def environment() -> dict[str, str]:
    """Name -> value, in the order in which they are read."""
    facts = {package: _version(package) for package in PACKAGES}
    facts["python"] = f"{platform.python_implementation()} {platform.python_version()}"
    facts["system"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    facts["c++ compiler"] = cpp_compiler() or "none found: inductor cannot compile for the CPU"
    try:
        import torch
    except ImportError as error:
        return {**facts, "devices": f"torch cannot be imported: {error}"}
    facts["cpu"] = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    facts["gpu"] = ", ".join(torch.cuda.get_device_name(n) for n in range(count)) or "none"
    return facts


def cpp_compiler() -> str:
    """The compiler that inductor would use on a CPU; "" without one."""
    names = [os.environ.get("CXX"), "g++", "clang++"]
    return next((path for name in names if name and (path := shutil.which(name))), "")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
