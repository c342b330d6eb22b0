"""What is known of the devices that a run is measured against."""

PEAK_FLOPS = {
    # Google Cloud's pages on the TPU generations, a chip. A device of JAX is a chip from v4 on, and one of the two
    # TensorCores of a chip on v2, v3 and TPU7x.
    "TPU v2": 45e12 / 2,
    "TPU v3": 123e12 / 2,
    "TPU v4": 275e12,
    "TPU v4 lite": 138e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,
    # NVIDIA's data sheets, Tensor Cores without sparsity (half of the figure where they print the sparse one).
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA GH200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}
"""Dense bfloat16 operations per second of one device, by the start of its ``device_kind``."""


def peak_flops(device_kind: str) -> float | None:
    """None for a device that is not in the table: its MFU is not known."""
    names = [name for name in PEAK_FLOPS if (device_kind + " ").startswith((name + " ", name + "-"))]
    return PEAK_FLOPS[max(names, key=len)] if names else None
