"""One self-contained HTML page over whatever results lie under a folder."""

from vlm_latency.page.build import build_page
from vlm_latency.page.collect import Study, collect_results

__all__ = ["Study", "build_page", "collect_results"]
