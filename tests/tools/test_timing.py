"""The clocks of the bench. The device's is tried on a simulated one, whose time and whose host's
time pass only where the test says so: nothing here is measured.
"""

import pytest
import torch

pytest.importorskip("tabulate")
pytest.importorskip("tqdm")
import timing


class Device:
    """One queue. ``now`` is the host's time, ``free`` when the device will have done its work."""

    def __init__(self):
        self.now = self.free = 0.0

    def call(self, host_s, device_s, waits=False):
        def call():
            self.now += host_s
            self.spin(device_s)
            self.now = max(self.now, self.free) if waits else self.now

        return call

    def spin(self, seconds):
        self.free = max(self.free, self.now) + seconds

    def synchronize(self):
        self.now = max(self.now, self.free)

    def event(self, enable_timing):
        return Event(self)


class Event:
    def __init__(self, device):
        self.device = device

    def record(self):
        self.at = max(self.device.free, self.device.now)

    def query(self):
        return self.device.now >= self.at

    def synchronize(self):
        self.device.now = max(self.device.now, self.at)

    def elapsed_time(self, other):
        return 1e3 * (other.at - self.at)


@pytest.fixture
def device(monkeypatch):
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: device.spin(cycles / 1.755e9))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: device.now)
    return device


def measured(call):
    how = timing.How(rounds=5, warmup=3, clock=timing.device_clock, enough_s=0.006)
    (result,) = timing.measure([timing.Case("case", call, 1)], how, "", timing.rate_ratio)
    return result


@pytest.mark.parametrize("host_us", [5, 150, 1500])
def test_device_time_has_no_host_time_in_it(device, host_us):
    """Also where the host takes longer than the device, and at the first call, which compiles."""
    call, first = device.call(1e-6 * host_us, 137e-6), [device.call(3.0, 137e-6)]
    result = measured(lambda: (first.pop() if first else call)())
    assert result.ms == pytest.approx((0.137, 0.137, 0.137))
    assert result.host_us == pytest.approx(host_us)
    assert result.queued == 1 and "*" not in timing.table([result], "ratio")


def test_a_call_that_waits_for_the_device_is_marked(device):
    result = measured(device.call(100e-6, 137e-6, waits=True))
    assert result.queued == 0 and "*" in timing.table([result], "ratio")
