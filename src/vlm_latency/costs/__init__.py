"""What a request costs, without running it: FLOPs, bytes, launches, memory, and the time they bound.

`add_costs` gives records their columns; `CostModel` answers for single shapes;
`vlm_latency.costs.prediction` predicts latency from them, `vlm_latency.costs.workload` that of
requests that were not run.
"""

from vlm_latency.costs.hardware import Hardware, hardware, known_device
from vlm_latency.costs.model import CostModel
from vlm_latency.costs.shapes import PARTS, RequestShape
from vlm_latency.costs.table import add_costs
from vlm_latency.costs.verdict import Verdict, verdict

__all__ = [
    "PARTS",
    "CostModel",
    "Hardware",
    "RequestShape",
    "Verdict",
    "add_costs",
    "hardware",
    "known_device",
    "verdict",
]
