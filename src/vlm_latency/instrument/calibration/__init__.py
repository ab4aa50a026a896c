"""How far the instrument's numbers can be trusted, on the model and machine at hand.

Each proof runs one request many times, interleaved with what it is compared with, and ends in an
estimate with its interval. `calibrate` runs them all; `verdict` puts what they found into words.
"""

from vlm_latency.instrument.calibration.study import calibrate
from vlm_latency.instrument.calibration.verdict import verdict

__all__ = ["calibrate", "verdict"]
