"""`s2t env`: versions and devices, for a bug report. Prints no environment variable, no path and no name of a host."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import PackageNotFoundError, version


PACKAGES = ("transformers", "peft", "accelerate", "datasets", "trl", "evaluate")
OPTIONAL = ("math-verify", "bitsandbytes", "vllm", "deepspeed")


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def devices() -> str:
    """What torch computes on."""
    try:
        import torch
    except (ImportError, OSError) as error:  # a library of the GPU that is missing, say
        return f"torch cannot be imported: {error}"
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return f"{names} ({f'ROCm {torch.version.hip}' if torch.version.hip else f'CUDA {torch.version.cuda}'})"
    if torch.accelerator.is_available():
        return f"{torch.accelerator.device_count()} x {torch.accelerator.current_accelerator().type}"
    return "CPU"


def main() -> None:
    argparse.ArgumentParser(usage="%(prog)s", allow_abbrev=False).parse_args()
    lines = {
        "transformers-s2t": version_of("transformers-s2t"),
        "Python": platform.python_version(),
        "platform": platform.platform(),
        "torch": version_of("torch"),
        "devices": devices(),
        **{package: version_of(package) for package in (*PACKAGES, *OPTIONAL)},
    }
    print("\n".join(f"- {name}: {value}" for name, value in lines.items()))
