"""The command line: an error that a user can fix ends in one message and a non-zero status."""

from __future__ import annotations

import difflib
import gc
import os
import re
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import copy
from functools import partial
from itertools import chain
from pathlib import Path
from traceback import clear_frames
from typing import Any

import click
import yaml
from kedro.framework.cli.project import run as kedro_run

from vlm_latency import settings
from vlm_latency.errors import UserError

# How Kedro's own sentences about a mistyped command begin.
KEDRO_REFUSALS = (
    "Pipeline contains no nodes",
    "Pipeline does not contain",
    "Pipeline input(s)",
    "module 'kedro.runner' has no attribute",
)

# New objects until the youngest are collected. What a command imports and reads stays, so that
# looking for garbage among it is in vain; measuring collects by itself, between runs.
SELDOM = 100_000

LISTS = (
    " A comma ends a parameter: write a list as words, exp4.sampling.max_new_tokens_list='8 16 32', "
    "and a text with a comma in conf/local/parameters.yml"
)


@click.group(name="vlm-latency")
def cli() -> None:
    """Commands of the vlm-latency project."""


class Terminated(KeyboardInterrupt):
    """The system, a scheduler or a container ends the command."""


class Run(click.Command):
    """Kedro's own ``run``, with ``--traceback`` beside its options."""

    def make_context(self, *args: Any, **options: Any) -> click.Context:
        with _one_message(_wants_traceback()):  # --params is read here
            try:
                return super().make_context(*args, **options)
            except click.UsageError as error:
                more = LISTS if "`params`" in error.message else ""
                if "unexpected extra argument" in error.message:
                    more = "; pipelines are named with --pipeline exp1 or --pipelines exp1,exp3"
                raise click.UsageError(error.message + more, error.ctx) from None

    def invoke(self, ctx: click.Context) -> Any:
        traceback = ctx.params.pop("traceback") or _wants_traceback()
        # Both spellings, --pipeline and --pipelines, stay: there is nothing to act on. An
        # environment without a folder is an error of its own, in which --async ends too.
        for known in (".*'--(pipeline|async)' is deprecated", "Parameters not found"):
            warnings.filterwarnings("ignore", message=known)
        gc.set_threshold(SELDOM)
        with _one_message(traceback):
            if names := ctx.params["pipelines"]:
                ctx.params["pipelines"] = [_together(names)]  # one pipeline, in its own order
            elif ctx.params["pipeline"]:
                ctx.params["pipeline"] = _together(ctx.params["pipeline"].split(","))
            return super().invoke(ctx)


def _together(names: list[str]) -> str:
    """Name the pipeline of several pipelines.

    Raises
    ------
    UserError
        With the nearest right name for one that is none.
    """
    from vlm_latency.pipeline_registry import register_pipelines

    registered = list(register_pipelines())
    if unknown := [name for name in names if name not in registered]:
        near = difflib.get_close_matches(unknown[0], registered, n=1)
        asked = f"; did you mean '{near[0]}'?" if near else ""
        known = ", ".join(name for name in registered if name.isidentifier())
        raise UserError(f"there is no pipeline '{unknown[0]}'{asked} Known are {known}")
    return ",".join(dict.fromkeys(names))


def _wants_traceback() -> bool:
    return bool(os.environ.get("VLM_LATENCY_TRACEBACK"))


@contextmanager
def _one_message(traceback: bool, hint: str = "\n(--traceback shows where)") -> Iterator[None]:
    before = _interrupt_when_terminated()
    try:
        yield
    except (KeyboardInterrupt, click.Abort) as error:
        terminated = isinstance(error, Terminated)
        told = "Terminated" if terminated else "Interrupted"
        click.echo(
            f"\n{told}. Finished runs are kept: the same command continues where it stopped.",
            err=True,
        )
        raise SystemExit(128 + (signal.SIGTERM if terminated else signal.SIGINT)) from None
    except click.ClickException:
        raise
    except Exception as error:
        found = user_error(error) or _no_environment(error)
        if traceback or found is None:
            raise
        clear_frames(error.__traceback__)  # ends a measurement's progress bar, and its line
        raise click.ClickException(f"{found}{hint}") from None
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _interrupt_when_terminated() -> Any:
    """Let SIGTERM end a command as Ctrl-C does, with its finished runs on the disk.

    Returns
    -------
    handler or None
        What SIGTERM did before; None outside of the main thread, where it cannot be changed.
    """

    def terminate(*_: Any) -> None:
        raise Terminated

    with suppress(ValueError):
        return signal.signal(signal.SIGTERM, terminate)
    return None


def user_error(error: BaseException | None) -> str | None:
    """Find the user's error inside what Kedro wrapped around it.

    Returns
    -------
    str or None
        Its message; ``None`` when this is a defect of the program, whose traceback is wanted.
    """
    while error is not None:
        if isinstance(error, UserError) or str(error).startswith(KEDRO_REFUSALS):
            return str(error)
        if isinstance(error, yaml.YAMLError):
            told = " ".join(str(error).split())
            return f"a parameter is not YAML (a text with ': ' or '{{' in it wants quotes): {told}"
        error = error.__cause__ or error.__context__
    return None


def _no_environment(error: Exception) -> str | None:
    """Name the environments that there are, where --env names a folder that is not there."""
    missing = re.search(r"not a valid directory: (\S.*)", str(error))
    if missing is None:
        return None
    asked = Path(missing[1])
    known = sorted({path.parent.name for path in asked.parent.glob("*/*.yml")} - {"base", "local"})
    return f"there is no environment '{asked.name}' in {asked.parent}; known are {', '.join(known)}"


@cli.command()
@click.option("--zoo-file", help="Of one's own models, laid over the built-in ones.")
def models(zoo_file: str | None) -> None:
    """List the models known by name: size, whether they fit here, weights."""
    with _one_message(_wants_traceback(), hint=""):
        from vlm_latency import listing

        line = "{:<20} {:>10}  {:>8}  {:<9}  {}"
        head = ("model.name", "parameters", "GiB bf16", "fits here", "weights")
        rows = listing.models(zoo_file)
        for row in chain([head], [next(rows)], rows):  # no head before an error
            click.echo(line.format(*row))
        click.echo(
            "\nA hub id, a folder with a checkpoint, or file.py:function is a model.name as well."
        )


@cli.command()
@click.argument("prefix", default="")
@click.pass_obj
def options(metadata: Any, prefix: str) -> None:
    """List every parameter: its values, default and meaning ('kedro options exp4': one group's)."""
    with _one_message(_wants_traceback(), hint=""):
        from vlm_latency import listing
        from vlm_latency.config_loader import ConfigLoader

        conf = str(metadata.project_path / settings.CONF_SOURCE)
        loader = ConfigLoader(conf, **dict[str, Any](settings.CONFIG_LOADER_ARGS))
        found = list(listing.options(loader.options, prefix))
        if not found:
            raise UserError(f"no parameter begins with '{prefix}'; 'kedro options' lists all")
        for name, values, default, meaning in found:
            click.secho(f"{name} = {default}", bold=True)
            click.echo(f"    {values}" + (f": {meaning}" if meaning else ""))
        if not prefix:
            click.echo(
                "\nGive them with --params name=value,name=value; for one experiment alone, "
                "measurement.* and flops.* as exp1.measurement.*, exp1.flops.*"
            )


def _params(read: Any, ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    """Read ``--params`` as Kedro does, but with ``${…}`` as text."""
    from vlm_latency.config_loader import shown, without_references

    return shown(read(ctx, param, without_references(value)))


run = Run(
    "run",
    callback=kedro_run.callback,
    help=f"{kedro_run.help} 'kedro models' lists models, 'kedro options' every parameter of --params.",
    params=[
        *map(copy, kedro_run.params),
        click.Option(["--traceback"], is_flag=True, help="Show the traceback of an error."),
    ],
)
for option in run.params:
    if option.name == "params":
        option.callback = partial(_params, option.callback)
cli.add_command(run)
