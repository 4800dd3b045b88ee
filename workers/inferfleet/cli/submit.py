"""``inferfleet submit`` and ``inferfleet result``: requests in, results out, as lines of JSON."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from queue import Empty, SimpleQueue
from typing import IO, TYPE_CHECKING, Any

import click

from inferfleet.cli.frame import Session, echo_json, pass_session
from inferfleet.errors import ConfigError
from inferfleet.routes import Route

if TYPE_CHECKING:
    from inferfleet.client import Client, Request, Result
    from inferfleet.client.outcome import Outcome

MAX_IN_FLIGHT = 10_000
DEFAULT_TIMEOUT_S = 60.0
_DELAYS_S = (0.02, 0.5)


@click.command(
    epilog='Example: echo \'{"id": "a", "body": {"inputs": [...]}}\' | inferfleet submit digits - --wait'
)
@click.argument("route_name", metavar="ROUTE")
@click.argument("file", metavar="[FILE|-]", type=click.File("rb"), required=False)
@click.option("--sample", type=click.IntRange(min=1), help="Make N valid random requests instead of a file.")
@click.option("--seed", type=int, help="Make the same samples again.")
@click.option("--wait", is_flag=True, help="Wait for the results and print them as lines of JSON.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    default=DEFAULT_TIMEOUT_S,
    show_default=True,
    help="Seconds to wait after the last request was sent.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was sent as JSON.")
@pass_session
def submit(
    session: Session,
    route_name: str,
    file: IO[bytes] | None,
    sample: int | None,
    seed: int | None,
    wait: bool,
    timeout: float,
    as_json: bool,
) -> None:
    """Send requests to ROUTE.

    FILE holds one request a line: {"id": "order-42", "key": "k", "headers": {}, "body": {...}}. All but the
    body may be left out; a body that is a string is sent as its text, "body_base64" as its bytes.
    """
    if (file is None) == (sample is None):
        raise click.UsageError("give either FILE (- for standard input) or --sample N")
    route = session.routes.named(route_name)
    if wait and not any(each.kind in ("redis", "reply") for each in route.results):
        raise ConfigError(
            f'route "{route.name}" keeps no results in Redis; --wait needs "redis" in its results, '
            'or "reply" on RabbitMQ'
        )
    from inferfleet.cli.lines import read_requests, sampled
    from inferfleet.client import Client, ClientError

    requests: Iterable[Request]
    requests = read_requests(file) if file is not None else sampled(session.config, route, sample or 0, seed)
    started_at = time.monotonic()
    with Client(session.config, reply=wait) as client, _progress(sample, wait) as bar:
        sending = _Sending(client, route, bar)
        try:
            sending.run(requests, timeout if wait else None)
            client.flush()
        except ClientError as error:
            raise ClientError(f"{error} (sent before that: {len(sending.ids)})") from None
    _say_what_was_sent(route, sending, time.monotonic() - started_at, wait, as_json)
    if sending.missing:
        raise click.ClickException(
            f"{len(sending.missing)} of {len(sending.ids)} results did not come within {timeout:g} s, "
            f"the first is {sending.missing[0]}{sending.why}; `inferfleet status` shows whether a worker runs"
        )


class _Sending:
    """One run of ``submit``: what was sent, what came back, and what did not."""

    def __init__(self, client: Client, route: Route, bar: Any) -> None:
        self.ids: list[str] = []
        self.answered: dict[str, int] = {"ok": 0, "error": 0}
        self.missing: list[str] = []
        self.why = ""
        self._client = client
        self._route = route
        self._bar = bar
        self._open: dict[int, str] = {}
        self._came: SimpleQueue[tuple[int, Outcome]] = SimpleQueue()

    def run(self, requests: Iterable[Request], timeout_s: float | None) -> None:
        """Send all, and with ``timeout_s`` print each result as it comes."""
        for number, request in enumerate(requests):
            if timeout_s is None:
                self.ids.append(self._client.send(self._route.name, request))
            else:
                self._send_and_print(number, request, timeout_s)
            self._bar.sent()
        if timeout_s is None:
            return
        ends_at = time.monotonic() + timeout_s
        while self._open and self._print_next(ends_at - time.monotonic()):
            pass
        self._look_last()

    def _send_and_print(self, number: int, request: Request, timeout_s: float) -> None:
        from inferfleet.client import ClientError

        def done(outcome: Outcome) -> None:
            self._came.put((number, outcome))

        request_id = self._client.send(self._route.name, request, done)
        self.ids.append(request_id)
        self._open[number] = request_id
        while self._came.qsize() or len(self._open) >= MAX_IN_FLIGHT:
            if not self._print_next(timeout_s):
                raise ClientError(
                    f"route {self._route.name}: none of {len(self._open)} requests in flight was answered "
                    f"for {timeout_s:g} s; `inferfleet status` shows whether a worker runs"
                )

    def _print_next(self, wait_s: float) -> bool:
        """Print the next result that comes within ``wait_s``; false if none does."""
        try:
            number, outcome = self._came.get(timeout=max(0.0, wait_s))
        except Empty:
            return False
        self._open.pop(number, None)
        self._print(outcome)
        return True

    def _print(self, outcome: Outcome) -> None:
        from inferfleet.client import Result

        if not isinstance(outcome, Result):
            raise outcome
        self.answered[outcome.status] += 1
        self._bar.answered()
        click.echo(as_line(outcome))

    def _look_last(self) -> None:
        """What did not come may stand all the same, or be an answer to another payload."""
        from inferfleet.client import ResultTimeout

        for request_id in dict.fromkeys(self._open.values()):
            try:
                self._print(self._client.result(request_id, 0.0, route=self._route.name))
            except ResultTimeout as error:
                self.missing.append(request_id)
                self.why = error.why


@click.command(epilog="Example: inferfleet result digits order-42 --timeout 10")
@click.argument("route_name", metavar="ROUTE")
@click.argument("ids", metavar="ID...", nargs=-1, required=True)
@click.option("--follow", is_flag=True, help="Wait, and print each result as soon as it is there.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    help=f"Seconds to wait for what is not there yet; {DEFAULT_TIMEOUT_S:g} with --follow, else 0.",
)
@click.option("--json", "as_json", is_flag=True, help="Print lines of JSON.")
@pass_session
def result(
    session: Session,
    route_name: str,
    ids: tuple[str, ...],
    follow: bool,
    timeout: float | None,
    as_json: bool,
) -> None:
    """Read the results of IDs on ROUTE from Redis."""
    route = session.routes.named(route_name)
    from inferfleet.client import Client

    wait_s = timeout if timeout is not None else DEFAULT_TIMEOUT_S if follow else 0.0
    wanted = list(dict.fromkeys(ids))
    found: dict[str, Result] = {}
    with Client(session.config, reply=False) as client:
        for news in _standing(client, route.name, wanted, wait_s):
            found[news.id] = news
            if follow:
                _show(news, as_json)
    if not follow:
        for request_id in wanted:
            if request_id in found:
                _show(found[request_id], as_json)
    missing = [request_id for request_id in wanted if request_id not in found]
    if missing:
        raise click.ClickException(
            f"no result of {', '.join(missing[:5])}{' …' if len(missing) > 5 else ''} on route {route.name}: "
            "not answered yet, expired, or never sent; --follow waits"
        )


def _standing(client: Client, route: str, ids: list[str], wait_s: float) -> Iterator[Result]:
    """Yield each result once, as it comes to stand; looks ever less often until the time is up."""
    ends_at = time.monotonic() + wait_s
    left, (delay_s, longest_s) = ids, _DELAYS_S
    while True:
        found = client.peek(route, left)
        yield from found.values()
        left = [request_id for request_id in left if request_id not in found]
        wait_s = ends_at - time.monotonic()
        if not left or wait_s <= 0:
            return
        time.sleep(min(delay_s, wait_s))
        delay_s = min(longest_s, delay_s * 2)


def as_line(outcome: Result) -> str:
    """Return a result as one line of JSON."""
    import msgspec

    line = {
        "id": outcome.id,
        "route": outcome.route,
        "status": outcome.status,
        "body": msgspec.Raw(outcome.body),
    }
    return msgspec.json.encode(line).decode()


def _show(outcome: Result, as_json: bool) -> None:
    if as_json:
        click.echo(as_line(outcome))
    else:
        click.echo(f"{outcome.id}  {outcome.status}  {outcome.body.decode()}")


def _say_what_was_sent(route: Route, sending: _Sending, seconds: float, wait: bool, as_json: bool) -> None:
    count = len(sending.ids)
    if wait:
        ok, failed = sending.answered["ok"], sending.answered["error"]
        text = f"sent {count}, answered {ok + failed} ({ok} ok, {failed} error) in {seconds:.1f} s"
        click.echo(text, err=True)
    elif as_json:
        echo_json({"route": route.name, "topic": route.source.name, "sent": count, "ids": sending.ids})
    else:
        hint = f"; `inferfleet result {route.name} {sending.ids[0]}` reads the first" if count else ""
        click.echo(f"sent {count} to {route.source.name} in {seconds:.1f} s{hint}")


class _Silent:
    """Draws nothing: where there is no terminal."""

    def sent(self) -> None:
        """One more was sent."""

    def answered(self) -> None:
        """One more was answered."""


def _progress(total: int | None, wait: bool) -> AbstractContextManager[Any]:
    """Return a progress bar on standard error, or nothing where that is no terminal."""
    if not sys.stderr.isatty():
        return nullcontext(_Silent())
    from inferfleet.cli.lines import Bar

    return Bar(total, wait)
