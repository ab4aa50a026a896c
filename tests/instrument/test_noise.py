from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vlm_latency.instrument import noise


def test_a_probe_counts_since_its_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stat = tmp_path / "stat"
    stat.write_text("cpu  1 2 3 4 5 6 7 100 0 0\ncpu0 1 2 3 4 5 6 7 100 0 0\n")
    monkeypatch.setattr(noise, "STAT", stat)
    switches = iter([10, 17])
    monkeypatch.setattr(noise, "_switches", lambda: next(switches))
    monkeypatch.setattr("os.sysconf", lambda name: 100)
    probe = noise.NoiseProbe()
    probe.start()
    stat.write_text("cpu  1 2 3 4 5 6 7 103 0 0\ncpu0 1 2 3 4 5 6 7 103 0 0\n")
    assert probe.stop() == {"involuntary_switches": 7, "steal_ms": 30.0}
    probe.close()


def test_elsewhere_than_linux_nothing_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noise, "STAT", tmp_path / "none")
    monkeypatch.setattr(noise, "resource", None)
    probe = noise.NoiseProbe()
    probe.start()
    assert probe.stop() == {"involuntary_switches": None, "steal_ms": None}
    probe.close()


def test_without_a_gpu_its_state_is_unknown() -> None:
    for device in ("cpu", torch.device("cpu")):
        assert set(noise.GpuProbe(device).sample().values()) == {None}


def test_throttle_reasons_are_named() -> None:
    assert noise._reasons(0x1 | 0x4 | 0x40) == "sw_power_cap,hw_thermal_slowdown"
    assert noise._reasons(0x1) == ""  # idle


@pytest.mark.gpu
def test_the_state_of_a_gpu_is_read() -> None:
    state = noise.GpuProbe(torch.device("cuda", 0)).sample()
    assert state["sm_clock_mhz"] > 0
    assert state["gpu_temperature_c"] > 0
    assert state["throttle_reasons"] is not None


def test_a_quiet_host_is_waited_for_and_the_waiting_told(monkeypatch: pytest.MonkeyPatch) -> None:
    canaries = iter([1.0, 2.0, 1.9, 1.2, 9.0])
    monkeypatch.setattr(noise, "host_canary_ms", lambda: next(canaries))
    host = noise.QuietHost(60.0)
    assert host.wait()[0] == 1.0  # nothing quicker is known yet
    canary, waited = host.wait()
    assert canary == 1.2
    assert waited > 0
    monkeypatch.setattr(host, "_seconds", 0.0)
    assert host.wait() == (9.0, 0.0)  # a host that stays slow is measured, and says so
