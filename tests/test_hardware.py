"""What is told of the machine, and the one XLA flag that importing the package sets."""

import os
import subprocess
import sys

import jax
import pytest

from marc_jax import hardware


def test_a_cpu_counts_no_device_memory_but_the_process_does():
    assert jax.devices()[0].platform != "cpu" or hardware.device_peak() is None
    assert 0.01 < hardware.peak_gib() < 1000
    assert jax.__version__ in hardware.described()


def test_the_peak_of_an_unknown_device_is_0():
    class Device:
        device_kind = "abacus"

    assert hardware.peak_flops(Device()) == 0.0
    Device.device_kind = "NVIDIA H200"
    assert hardware.peak_flops(Device()) == 989e12


@pytest.mark.parametrize("given, kept", [
    ("", "--xla_gpu_enable_triton_gemm=false"),
    ("--xla_cpu_enable_fast_math=false", "--xla_cpu_enable_fast_math=false --xla_gpu_enable_triton_gemm=false"),
    ("--xla_gpu_enable_triton_gemm=true", "--xla_gpu_enable_triton_gemm=true"),
])  # fmt: skip
def test_a_users_flags_of_xla_stand(given, kept):
    code = "import os, marc_jax; print(os.environ['XLA_FLAGS'])"
    told = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "XLA_FLAGS": given}, capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == kept
