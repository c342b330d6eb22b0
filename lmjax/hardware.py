"""What is known of the devices that programs run on, are compiled for and are measured against."""

from typing import Any, NamedTuple

import jax

PLATFORMS = ("cpu", "gpu", "tpu")


class Hardware(NamedTuple):
    """What a program is made for: ``tpu v5p``, ``gpu hopper``, ``cpu``."""

    platform: str
    """One of PLATFORMS."""
    generation: str = ""
    """Empty for devices that are not in the table."""

    def __str__(self) -> str:
        return f"{self.platform} {self.generation}".rstrip()

    def is_one_of(self, names: frozenset[str]) -> bool:
        """Whether its platform is among ``names``, or it itself."""
        return self.platform in names or str(self) in names


CPU = Hardware("cpu")

GPU_MEMORY_FRACTION = 0.9
"""Of a GPU's memory, what programs of lmjax have. JAX's own default is 0.75; NVIDIA's tips for language models with JAX
(docs.nvidia.com/jax-toolbox, GPU performance) have 0.9 or 0.8: what is left is for NCCL, the driver and libraries."""


class Known(NamedTuple):
    """A device."""

    hardware: Hardware
    peak_flops: float
    """Dense bfloat16 operations per second."""


def _tpu(generation: str, peak: float) -> Known:
    return Known(Hardware("tpu", generation), peak)


def _gpu(generation: str, peak: float) -> Known:
    return Known(Hardware("gpu", generation), peak)


DEVICES = {
    # Google Cloud's pages on the TPU generations, a chip. A device of JAX is a chip from v4 on, and one of the two
    # TensorCores of a chip on v2, v3 and TPU7x.
    "TPU v2": _tpu("v2", 45e12 / 2),
    "TPU v3": _tpu("v3", 123e12 / 2),
    "TPU v4": _tpu("v4", 275e12),
    "TPU v4 lite": _tpu("v4i", 138e12),
    "TPU v5 lite": _tpu("v5e", 197e12),
    "TPU v5e": _tpu("v5e", 197e12),
    "TPU v5": _tpu("v5p", 459e12),
    "TPU v5p": _tpu("v5p", 459e12),
    "TPU v6 lite": _tpu("v6e", 918e12),
    "TPU v6e": _tpu("v6e", 918e12),
    "TPU7x": _tpu("7x", 2307e12 / 2),
    # NVIDIA's data sheets, Tensor Cores without sparsity (half of the figure where they print the sparse one).
    "NVIDIA A100": _gpu("ampere", 312e12),
    "NVIDIA H100": _gpu("hopper", 989e12),
    "NVIDIA H100 NVL": _gpu("hopper", 835e12),
    "NVIDIA H100 PCIe": _gpu("hopper", 756e12),
    "NVIDIA H200": _gpu("hopper", 989e12),
    "NVIDIA H200 NVL": _gpu("hopper", 835e12),
    "NVIDIA GH200": _gpu("hopper", 989e12),
    "NVIDIA B200": _gpu("blackwell", 2250e12),
    "NVIDIA GB200": _gpu("blackwell", 2500e12),
    "NVIDIA L4": _gpu("ada", 121e12),
    "NVIDIA L40S": _gpu("ada", 362e12),
}
"""By the start of what JAX calls their ``device_kind``."""


def _known(device_kind: str) -> Known | None:
    names = [name for name in DEVICES if (device_kind + " ").startswith((name + " ", name + "-"))]
    return DEVICES[max(names, key=len)] if names else None


def hardware(device: Any) -> Hardware:
    """Of a device of JAX, here or of a topology."""
    known = _known(device.device_kind)
    return Hardware(device.platform) if known is None else known.hardware


def hardware_here() -> Hardware:
    """Of the devices of this process."""
    return hardware(jax.devices()[0])


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 operations per second; None for a device that is not in the table: its MFU is not known."""
    known = _known(device_kind)
    return None if known is None else known.peak_flops
