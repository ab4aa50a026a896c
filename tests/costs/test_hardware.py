"""The table of devices, and the roofline."""

import numpy as np
import pytest

from vlm_latency.costs import Hardware, hardware, known_device
from vlm_latency.costs.roofline import roofline_ms, utilisation
from vlm_latency.errors import UserError


def test_every_row_has_peaks_and_a_source() -> None:
    names = (
        "H100",
        "H100 PCIe",
        "H100 NVL",
        "H200",
        "H200 NVL",
        "A100",
        "A100 80GB PCIe",
        "A100 40GB",
        "L4",
        "L40S",
        "RTX 4090",
        "Jetson Orin",
    )
    for device in map(hardware, names):
        assert device.name in names
        assert len(device.source) > 20
        # dense bf16 is above fp32, and each within what a device of these years does
        assert 20e12 < device.flops_per_s["bfloat16"] < 1000e12
        assert device.flops_per_s["bfloat16"] > device.flops_per_s["float32"]
        assert 100e9 < device.bytes_per_s < 5000e9


@pytest.mark.parametrize(
    ("full_name", "row"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB PCIe"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-PCIE-40GB", "A100 40GB"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ],
)
def test_devices_are_known_by_their_full_name(full_name: str, row: str) -> None:
    found = known_device(full_name)
    assert found is not None
    assert found.name == row


def test_unknown_devices() -> None:
    assert known_device("x86_64") is None
    # boards of a known chip whose peaks are others, or are not published
    for name in (
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA Jetson Orin Nano Developer Kit",
    ):
        assert known_device(name) is None
    with pytest.raises(UserError, match="expected one of H100, H100 PCIe, H100 NVL"):
        hardware("x86_64")


def test_peaks_by_dtype() -> None:
    h100 = hardware("H100")
    assert h100.peak("bfloat16") == 989.4e12
    assert h100.peak("float32") == 66.9e12
    with pytest.raises(UserError, match="no peak of H100 in int8"):
        h100.peak("int8")
    measured = Hardware.from_ceilings(
        {"flops_per_s": 3.0, "bytes_per_s": 2.0, "launch_overhead_us": 1.0}
    )
    assert measured.measured
    assert measured.peak("float32") == 3.0


def test_each_side_of_the_roofline() -> None:
    machine = Hardware.from_ceilings(
        {"flops_per_s": 1e12, "bytes_per_s": 1e9, "launch_overhead_us": 10.0}
    )
    flops = np.array([2e9, 1e6, 0.0, 0.0])
    moved = np.array([1e6, 3e6, 1e3, 0.0])
    launches = np.array([10, 10, 1000, 0])
    ms, side = roofline_ms(flops, moved, launches, machine, "float32")
    np.testing.assert_allclose(ms, [2 + 0.1, 3 + 0.1, 0.001 + 10, 0])
    assert side.tolist() == ["compute", "memory", "launch", None]


def test_utilisation_is_a_share_of_the_peak() -> None:
    shares = utilisation([5e9, 5e9, 0.0], [10.0, 0.0, np.nan], 1e12)
    np.testing.assert_allclose(shares, [0.5, np.nan, np.nan])
