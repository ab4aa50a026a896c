"""Add an experiment in the three places that CONTRIBUTING names, run it, say where it is found."""

import json
import logging
import sys
from pathlib import Path

import pandas as pd
from pydantic import Field

from vlm_latency.experiments import EXPERIMENTS, Experiment, Fact
from vlm_latency.option_types import SamplingOptions


class SquareSampling(SamplingOptions):
    side: int = Field(32, description="pixels")


# One row,
EXPERIMENTS["exp9"] = Experiment(
    name="exp9",
    title="Squares",
    question="How long does a square take?",
    file="exp9_squares",
    phase="phase9",
    sampling=SquareSampling,
    facts=(Fact("runs of squares", ("runs",)),),
)

from vlm_latency.pipelines import reporting  # noqa: E402
from vlm_latency.pipelines.data_sampling.rules import RULES, Questions  # noqa: E402
from vlm_latency.vqa import sweep_sizes_requests  # noqa: E402


# one sampling rule
class Squares(Questions):
    def draw(self, options, questions, model) -> pd.DataFrame:
        side = options.sampling.side
        return sweep_sizes_requests([(side, side)], experiment="exp9").assign(output_length="2")

    def words(self, requests: pd.DataFrame) -> str:
        return f"{len(requests)} square"


RULES[SquareSampling] = Squares()
# and one report: a module of the package.
reporting.__path__.append(str(Path(__file__).parent))

from kedro.framework.project import pipelines  # noqa: E402
from kedro.framework.session import KedroSession  # noqa: E402
from kedro.framework.startup import bootstrap_project  # noqa: E402


def main(project: Path, output_dir: Path) -> None:
    bootstrap_project(project)
    said: list[str] = []
    logging.getLogger("vlm_latency").addFilter(
        lambda record: said.append(record.getMessage()) or True
    )
    hooks = logging.getLogger("vlm_latency.hooks")
    hooks.addFilter(lambda record: said.append(record.getMessage()) or True)
    given = {
        "output_dir": str(output_dir),
        "model": {"name": "null-model"},
        "exp9": {"sampling": {"side": 48}, "measurement": {"num_runs": 3}},
    }
    with KedroSession.create(project_path=project, env="smoke", runtime_params=given) as session:
        session.run(pipeline_names=["exp9"])
        catalog = session.load_context().catalog
        layers = {
            name: catalog.get(f"exp9.{name}").metadata["kedro-viz"]["layer"]
            for name in ("requests", "records", "result")
        }
        preview = json.loads(catalog.get("exp9.result").preview())
    print(
        json.dumps(
            {
                "pipelines": sorted(pipelines),
                "in all": any(
                    str(node.namespace).startswith("exp9") for node in pipelines["all"].nodes
                ),
                "said": said,
                "layers": layers,
                "preview": preview["statistics"],
                "page": (output_dir / "report" / "index.html").read_text(),
                "stages": sorted({str(node.namespace) for node in pipelines["exp9"].nodes}),
            }
        )
    )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
