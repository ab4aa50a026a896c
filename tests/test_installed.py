"""An installed package, without its repository, is told how to work and then works."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from vlm_latency.__main__ import write_project
from vlm_latency.errors import UserError

PROJECT = Path(__file__).parents[1]


def test_a_project_is_written_without_ones_own_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = tmp_path / "installed"
    shutil.copytree(PROJECT / "conf", conf)
    (conf / "local" / "parameters.yml").write_text("model: {name: mine}")
    monkeypatch.setattr("vlm_latency.__main__.CONF", conf)
    folder = tmp_path / "some where" / "study"
    write_project(folder)
    written = {p.relative_to(folder / "conf") for p in (folder / "conf").rglob("*.yml")}
    own = {p.relative_to(conf) for p in conf.rglob("*.yml")} - {Path("local/parameters.yml")}
    assert written == own
    assert (folder / "conf" / "local").is_dir()
    with pytest.raises(UserError, match="is there already"):
        write_project(folder)


def test_an_installation_without_conf_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlm_latency.__main__.CONF", tmp_path / "none")
    with pytest.raises(UserError, match="install from a wheel"):
        write_project(tmp_path / "study")
    assert not (tmp_path / "study").exists()


@pytest.mark.slow
def test_a_wheel_makes_a_project_that_runs(tmp_path: Path) -> None:
    """Build, install into a folder of its own, write a project, run the smoke test in it."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name in ("src", "conf"):
        skipped = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
        shutil.copytree(PROJECT / name, source / name, symlinks=True, ignore=skipped)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(PROJECT / name, source)
    (source / "conf" / "local" / "parameters.yml").write_text("model: {name: mine}")

    def python(*words: str, folder: Path = tmp_path) -> str:
        done = subprocess.run(
            [sys.executable, *words],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(target)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    offline = ("--no-index", "--no-deps", "--quiet")
    python("-m", "pip", "wheel", str(source), "--no-build-isolation", *offline)
    (wheel,) = tmp_path.glob("*.whl")
    python("-m", "pip", "install", *offline, "--target", str(target), str(wheel))
    assert python("-c", "import vlm_latency as v; print(v.__file__)").startswith(str(target))
    python("-m", "vlm_latency", "study")
    project = tmp_path / "study"
    assert not list((project / "conf" / "local").iterdir())
    parameters = yaml.safe_load((project / "conf" / "base" / "parameters.yml").read_text())
    assert parameters == yaml.safe_load((PROJECT / "conf" / "base" / "parameters.yml").read_text())
    smoke = ("run", "--env", "smoke", "--pipeline", "exp1", "--params", "model.name=null-model")
    python("-m", "kedro", *smoke, folder=project)
    (page,) = project.glob("data/**/report/index.html")
    assert "</html>" in page.read_text(encoding="utf-8")
