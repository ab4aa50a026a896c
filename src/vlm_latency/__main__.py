"""``python -m vlm_latency FOLDER`` writes a project that ``kedro run`` works in.

Who installed the package without its repository has no ``conf`` and no ``pyproject.toml``: both are
written from what the package brings.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import click

from vlm_latency.errors import UserError

CONF = Path(__file__).parent / "conf"  # in the repository a link to the project's own

PYPROJECT = """\
# A project of vlm-latency: parameters are in conf, 'kedro run' works here.
[tool.kedro]
package_name = "vlm_latency"
project_name = "vlm-latency"
kedro_init_version = "{version}"
source_dir = "."
"""


def write_project(folder: Path) -> None:
    """Write ``conf`` and ``pyproject.toml`` into a folder, which is made where it is missing.

    Raises
    ------
    UserError
        When one of them is there already, the folder cannot be written, or the package was
        installed without its ``conf``.
    """
    from kedro import __version__

    conf, project = folder / "conf", folder / "pyproject.toml"
    if found := [path for path in (conf, project) if path.exists()]:
        raise UserError(f"{found[0]} is there already; give a new folder for the project")
    if not (CONF / "base" / "catalog.yml").is_file():
        raise UserError(
            f"{CONF} does not hold the project's configuration; install from a wheel ('pip wheel "
            ". --no-deps' in the repository), or work in the repository itself"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copytree(CONF, conf, ignore=shutil.ignore_patterns("local"))
        (conf / "local").mkdir()
        project.write_text(PYPROJECT.format(version=__version__), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write the project {folder}: {error.strerror}") from error


@click.command(name="python -m vlm_latency")
@click.argument("folder", type=click.Path(path_type=Path))
def main(folder: Path) -> None:
    """Write a project into FOLDER: conf and pyproject.toml, as 'kedro run' needs them."""
    try:
        write_project(folder)
    except UserError as error:
        raise click.ClickException(str(error)) from None
    click.echo(f"{folder} is a project now: cd {folder} && kedro run --env smoke")


if __name__ == "__main__":
    main()
