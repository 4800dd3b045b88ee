"""What all verbs share: loading them late, the common options, errors in one line, printing."""

from __future__ import annotations

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from inferfleet.errors import InferfleetError

if TYPE_CHECKING:
    from inferfleet.config import Config
    from inferfleet.routes import RouteTable


class Session:
    """One run of the command line: where the settings are, and the settings once somebody asks."""

    def __init__(self, config_path: Path | None = None, debug: bool = False) -> None:
        self.config_path = config_path
        self.debug = debug

    @cached_property
    def _loaded(self) -> tuple[Config, dict[str, str]]:
        from inferfleet.config import load_with_origins

        return load_with_origins(self.config_path, os.environ)

    @property
    def config(self) -> Config:
        """The settings; raises ConfigError."""
        return self._loaded[0]

    @property
    def secrets(self) -> frozenset[str]:
        """What must not be printed, as far as the settings have been read."""
        loaded = self.__dict__.get("_loaded")
        return frozenset() if loaded is None else frozenset(loaded[0].known_secrets)

    @property
    def origins(self) -> dict[str, str]:
        """Where each setting came from, by dotted key."""
        return self._loaded[1]

    @cached_property
    def routes(self) -> RouteTable:
        """The routes of the routes file, or those that the control plane has applied last.

        Raises ConfigError, and ControlError where the control plane does not answer.
        """
        path = self.config.routes_path
        if path is None:
            from inferfleet.route_reader import read_routes

            return read_routes(self.config)
        from inferfleet.routes import load_routes

        return load_routes(path, self.config.fleet.name)

    @property
    def routes_origin(self) -> str:
        """Where the routes come from, for messages."""
        return str(self.config.routes_path or "the control plane")


pass_session = click.make_pass_decorator(Session)


def _set_config_path(context: click.Context, _parameter: click.Parameter, value: Path | None) -> None:
    if value is not None:
        context.ensure_object(Session).config_path = value


def _set_debug(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        context.ensure_object(Session).debug = True


def with_common_options(command: click.Command) -> click.Command:
    """Let ``--config`` and ``--debug`` be given behind the verb too."""
    if isinstance(command, click.Group):
        for each in command.commands.values():
            with_common_options(each)
        if not command.invoke_without_command:
            return command
    taken = {option for parameter in command.params for option in parameter.opts}
    common: list[click.Parameter] = [
        click.Option(
            ["--config", "config_path"],
            type=click.Path(dir_okay=False, path_type=Path),
            expose_value=False,
            callback=_set_config_path,
            help="The settings; by default $INFERFLEET_CONFIG, else ./fleet.toml.",
        ),
        click.Option(
            ["--debug"],
            is_flag=True,
            expose_value=False,
            callback=_set_debug,
            help="Show a traceback where something fails.",
        ),
    ]
    command.params.extend(each for each in common if not taken.intersection(each.opts))
    return command


class LazyGroup(click.Group):
    """A group whose verbs are imported when they are called; ``--help`` imports none of them.

    ``verbs`` maps a name to ``module:attribute`` and its one-line summary.
    """

    def __init__(self, *args: Any, verbs: Mapping[str, tuple[str, str]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._verbs = verbs

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the verbs in the order of a day's work."""
        return list(self._verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import a verb; ``None`` for one that does not exist."""
        if cmd_name not in self._verbs:
            return None
        module, _, attribute = self._verbs[cmd_name][0].partition(":")
        return with_common_options(cast(click.Command, getattr(importlib.import_module(module), attribute)))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the verbs' summaries without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in self._verbs.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb; a misspelt one is wrong use, with the nearest right one."""
        if args and args[0] not in self._verbs and not args[0].startswith("-"):
            from inferfleet.tables import nearest

            ctx.fail(f'no such verb "{args[0]}"{nearest(args[0], self._verbs)}')
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb; a failure becomes one line on standard error, with ``--debug`` a traceback."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception as error:
            session = ctx.find_object(Session) or Session()
            if session.debug:
                sys.excepthook = _shown_without(session.secrets)
                raise
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise
            raise click.ClickException(_without(session.secrets, _one_line(error))) from error


def _shown_without(secrets: Collection[str]) -> Callable[[type[BaseException], BaseException, Any], None]:
    """Return what prints an error that ends the process, with its traceback and no secret."""

    def show(_kind: type[BaseException], error: BaseException, _trace: Any) -> None:
        click.echo(_without(secrets, "".join(traceback.format_exception(error))), nl=False, err=True)

    return show


def _without(secrets: Collection[str], text: str) -> str:
    from inferfleet.tables import masked

    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        text = text.replace(secret, "***")
    return str(masked("", text))


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, InferfleetError):
        return text
    return f"{type(error).__name__}: {text} (not foreseen; --debug shows where)"


def echo_json(value: object) -> None:
    """Print a value as indented JSON."""
    import msgspec

    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def echo_table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print aligned columns; numbers stand right."""
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headings, *texts, strict=True)]
    right = [
        bool(rows) and all(isinstance(row[i], int | float) for row in rows) for i in range(len(headings))
    ]
    for line in ([heading.upper() for heading in headings], *texts):
        cells = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ]
        click.echo("  ".join(cells).rstrip())
