"""Where a model runs: a device that is there, memory that suffices, or parts of it on several devices."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qformats.errors import Unsupported, UsageError

if TYPE_CHECKING:
    import torch

    from qformats.checkpoint import Checkpoint

__all__ = ["check_memory", "checked", "dispatched"]

_HINT = 'use device="cpu", or device_map="auto" for a model that is larger than the device'


def checked(device: str | torch.device | None) -> torch.device | None:
    """The device by its name; ``UsageError('device')`` for one that this machine does not have."""
    import torch

    if device is None:
        return None
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch built without it, no driver, no such number, no such word
        (why, *_) = str(error).splitlines() or [type(error).__name__]
        raise UsageError("device", f"{str(device)!r} is no device of this machine: {why}", hint=_HINT) from None
    return found


def check_memory(checkpoint: Checkpoint, device: torch.device | None) -> None:
    """``UsageError('memory')`` where what is stored is more than the device, or this machine on its way there, has free."""
    needed = sum(raw.nbytes for raw in checkpoint.raw.values())
    for where, free in (("this machine", _free_here()), (str(device), _free_on(device))):
        if free is not None and needed > free:
            text = f"the weights are {needed >> 20} MiB, {where} has {free >> 20} MiB free"
            raise UsageError("memory", text, path=checkpoint.path, hint=_HINT)


def _free_here() -> int | None:
    """Bytes that can be had without swapping, None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), None)


def _free_on(device: torch.device | None) -> int | None:
    import torch

    if device is None or device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return int(free)


def dispatched(model: Any, device_map: str | Mapping[str, Any], offload_folder: str | Path | None) -> Any:
    """``model`` with its modules where ``device_map`` says, by accelerate: ``"auto"``, or devices, ``"cpu"``, ``"disk"`` by module names.

    Planes are never split or cast. ``Unsupported('accelerate-missing')`` without the package; ``UsageError('device-map')`` for a map that
    it refuses.
    """
    try:
        from accelerate import dispatch_model, infer_auto_device_map  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError:
        raise Unsupported("accelerate-missing", "device_map needs the package accelerate", hint="pip install accelerate") from None
    try:
        if device_map == "auto":
            device_map = infer_auto_device_map(model, no_split_module_classes=list(getattr(model, "_no_split_modules", None) or ()))
        if isinstance(device_map, str):
            raise ValueError(f"{device_map!r} is no map")
        return dispatch_model(model, device_map=dict(device_map), offload_dir=offload_folder, offload_buffers=True)
    except (ValueError, RuntimeError) as error:
        (why, *_) = str(error).splitlines()
        hint = 'device_map="auto", or a device for every module; offload_folder= names a directory for what goes to "disk"'
        raise UsageError("device-map", f"device_map={device_map!r}: {why}", hint=hint) from None
