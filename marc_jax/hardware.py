"""The machine a process runs on: its name, its peak, and the most memory that was held."""

import os
import platform
import resource
import sys

import jax

# Dense bfloat16 FLOP/s of one device, as its vendor gives them, by the beginning of JAX's device_kind.
PEAK = {
    "NVIDIA H200": 989e12, "NVIDIA H100": 989e12, "NVIDIA A100": 312e12, "TPU v6 lite": 918e12, "TPU v6e": 918e12,
    "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5p": 459e12, "TPU v5": 459e12, "TPU v4": 275e12,
}  # fmt: skip


def described() -> str:
    """One line for reports: backend, kind and number of devices, CPU cores, version of jax."""
    device = jax.devices()[0]
    kind = platform.processor() or platform.machine() if device.platform == "cpu" else device.device_kind
    devices = f"{device.platform} ({kind}), {jax.device_count()} device(s)"
    return f"{devices}, {os.cpu_count()} CPU cores, jax {jax.__version__}"


def peak_flops(device) -> float:
    """Dense bfloat16 FLOP/s of a device; 0 where it is not in the table."""
    return next((flops for kind, flops in PEAK.items() if device.device_kind.startswith(kind)), 0.0)


def device_peak() -> int | None:
    """Most bytes that the fullest of our devices ever held; None where the backend does not count (a CPU)."""
    told = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((stats["peak_bytes_in_use"] for stats in told if "peak_bytes_in_use" in stats), default=None)


def process_peak() -> int:
    """Most bytes of main memory that this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_gib() -> float:
    """Of the fullest device where it tells, else of this process."""
    peak = device_peak()
    return (process_peak() if peak is None else peak) / 2**30
