"""`triptych doctor`: what this machine has, what is missing, and what would be used."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path
from typing import Any

import typer

from triptych import __version__
from triptych.cli.console import human_bytes
from triptych.cli.options import Findings

__all__ = ["doctor", "examine"]

_LIBRARIES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "huggingface-hub",
    "sentencepiece",
    "ftfy",
    "protobuf",
    "numpy",
    "pillow",
    "av",
    "pydantic",
    "typer",
    "rich",
    "msgspec",
    "xxhash",
    "greenlet",
    "psutil",
)
_OPTIONAL = ("torchvision",)
_CODECS = ("libx264",)
_CPU_INFO = Path("/proc/cpuinfo")


def doctor(
    as_json: Findings = False,
) -> None:
    """Say what this machine has, what is missing and what would be used.

    Exits with 1 if something that Triptych needs is missing.
    """
    found = examine()
    print(json.dumps(found) if as_json else _text(found))
    if found["missing"]:
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """The findings: JSON values only; `missing` lists what Triptych needs and cannot find, one sentence
    each."""
    libraries = {name: _version(name) for name in (*_LIBRARIES, *_OPTIONAL)}
    missing = [f"library {name} is not installed" for name in _LIBRARIES if libraries[name] is None]
    missing += _outside_ranges(libraries)
    found: dict[str, Any] = {
        "triptych": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "libraries": libraries,
    }
    for title, examiner in (("devices", _devices), ("media", _media), ("models", _models)):
        # One part that cannot even be looked at is a finding, and no reason to hide the others.
        try:
            found[title] = examiner(missing)
        except Exception as error:
            found[title] = None
            missing.append(f"{title} cannot be examined: {type(error).__name__}: {error}")
    found["missing"] = missing
    return found


def _version(library: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _outside_ranges(libraries: dict[str, str | None]) -> list[str]:
    """Installed versions that Triptych's own metadata excludes, if it is installed as a package."""
    import importlib.metadata

    from packaging.requirements import Requirement

    try:
        requirements = importlib.metadata.requires("triptych") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    wrong = []
    for text in requirements:
        requirement = Requirement(text)
        version = libraries.get(requirement.name)
        if requirement.marker is None and version and not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"library {requirement.name} is {version}, {requirement.specifier} is needed")
    return wrong


def _devices(missing: list[str]) -> dict[str, Any]:
    import psutil
    import torch

    from triptych.device import free_bytes, pick_device, pick_dtype

    memory = psutil.virtual_memory()
    chosen = pick_device("auto")
    devices: dict[str, Any] = {
        "cpu": {
            "name": _cpu_name(),
            "threads": torch.get_num_threads(),
            "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "memory_bytes": memory.total,
            "free_bytes": free_bytes(torch.device("cpu")),
        }
    }
    if chosen.type != "cpu":
        for index in range(torch.accelerator.device_count()):
            device = torch.device(chosen.type, index)
            devices[str(device)] = {
                "name": str(getattr(torch.get_device_module(device), "get_device_name", str)(index)),
                "free_bytes": free_bytes(device),
            }
    dtype = pick_dtype(None, chosen)
    return {
        "found": devices,
        "used": str(chosen),
        "dtype": str(dtype).removeprefix("torch.") if dtype else "as on disk",
    }


def _cpu_name() -> str:
    """The model, where Linux tells it; else what platform does, which is often the architecture alone."""
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.lower().startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _media(missing: list[str]) -> dict[str, Any]:
    import av
    from PIL import features

    codecs = {name: name in av.codecs_available for name in _CODECS}
    missing += [f"PyAV has no {name}: clips cannot be written" for name, there in codecs.items() if not there]
    pictures = {name: bool(features.check(name)) for name in ("webp", "avif", "jpg", "zlib")}
    missing += [f"Pillow has no {name}" for name, there in pictures.items() if not there and name != "avif"]
    libraries = {name: ".".join(map(str, version)) for name, version in av.library_versions.items()}
    return {"codecs": codecs, "pictures": pictures, "ffmpeg": libraries}


def _models(missing: list[str]) -> dict[str, Any]:
    from triptych.model import embedded_models

    names = sorted(embedded_models())
    if not names:
        missing.append("no embedded model is installed: name another with -m")
    return {"embedded": names}


def _text(found: dict[str, Any]) -> str:
    lines = [f"triptych {found['triptych']}, python {found['python']}, {found['system']}", "", "devices"]
    devices = found["devices"]
    if devices:
        for name, facts in devices["found"].items():
            lines.append(f"  {name:8} {_device_line(facts)}")
        lines.append(f"  used: {devices['used']}, dtype {devices['dtype']}")
    lines += ["", "libraries"]
    for name, version in found["libraries"].items():
        note = " (optional)" if name in _OPTIONAL else ""
        lines.append(f"  {name:16} {version or 'not installed'}{note}")
    if found["media"]:
        there = {**found["media"]["codecs"], **found["media"]["pictures"]}
        lines += [
            "",
            "media",
            "  " + ", ".join(f"{name} {'yes' if has else 'no'}" for name, has in there.items()),
        ]
    if found["models"]:
        lines += ["", "embedded models", "  " + (", ".join(found["models"]["embedded"]) or "none")]
    lines += ["", *(f"missing: {text}" for text in found["missing"])]
    return "\n".join([*lines, "" if found["missing"] else "nothing is missing"]).strip()


def _device_line(facts: dict[str, Any]) -> str:
    parts = [re.sub(r"\s+", " ", facts["name"])]
    if "threads" in facts:
        parts.append(f"{facts['threads']} threads on {facts['cores']} cores, {facts['capability']}")
        parts.append(f"{human_bytes(facts['memory_bytes'])} of memory")
    parts.append(f"{human_bytes(facts['free_bytes'])} free")
    return ", ".join(parts)
