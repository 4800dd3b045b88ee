"""Roles and tokens: only hashes are kept, a changed file counts at once, what is wrong grants nothing."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inferfleet.coordinator.limits import MAX_IDENTITIES, RateLimit
from inferfleet.coordinator.tokens import (
    Caller,
    Role,
    TokenBook,
    append_line,
    new_token,
    parse_line,
    parse_role,
    token_line,
)
from inferfleet.errors import ConfigError
from inferfleet.testing.clock import FakeClock

ALICE = Caller("alice", Role.DEPLOYER)


def book(path: Path, *lines: str, now: float = 0.0) -> TokenBook:
    path.write_text("\n".join(lines))
    return TokenBook(path, lambda: now)


def rewrite(path: Path, text: str) -> None:
    """Replace the file as an editor does, with another time even on a coarse clock."""
    path.write_text(text)
    found = path.stat()
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns + 1_000_000))


def test_a_token_is_256_random_bits_and_only_its_hash_is_written() -> None:
    """Two are never alike, and the line does not hold the token."""
    first, second = new_token(), new_token()

    assert first != second
    assert len(first.removeprefix("ifl_")) == 43
    assert first not in token_line(first, ALICE)
    assert first.removeprefix("ifl_") not in token_line(first, ALICE)


@given(
    name=st.from_regex(r"[a-z0-9][a-z0-9-]{0,20}", fullmatch=True),
    role=st.sampled_from(Role),
    expires=st.none() | st.integers(1, 4_000_000_000),
    routes=st.none() | st.frozensets(st.sampled_from(["a", "b", "c-d"]), min_size=1),
)
def test_a_line_says_what_it_was_written_from(
    name: str, role: Role, expires: int | None, routes: frozenset[str] | None
) -> None:
    """Writing and reading are each other's inverse."""
    caller = Caller(name, role, routes)
    found = parse_line(token_line("t", caller, expires), "here")
    assert (found.caller, found.expires_s) == (caller, expires)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "alice",
        "alice deployer",
        "alice deployer sha256:12",
        "alice deployer md5:" + "0" * 64,
        "Alice deployer sha256:" + "0" * 64,
        "alice chief sha256:" + "0" * 64,
        "alice deployer sha256:" + "0" * 64 + " until=2027",
        "alice deployer sha256:" + "0" * 64 + " expires=soon",
        "coordinator deployer sha256:" + "0" * 64,
        "local deployer sha256:" + "0" * 64,
        "alice deployer sha256:" + "0" * 64 + " routes=",
        "alice deployer sha256:" + "0" * 64 + " routes=a,,b",
        "alice deployer sha256:" + "0" * 64 + " routes=../a",
    ],
)
def test_a_line_that_is_wrong_is_refused_with_its_place(line: str) -> None:
    """The place is named, the hash is not repeated."""
    with pytest.raises(ConfigError, match=r"^tokens line 3: ") as caught:
        parse_line(line, "tokens line 3")
    assert "0" * 64 not in str(caught.value)


def test_an_unknown_role_names_the_nearest() -> None:
    """A slip of the finger is mended at once."""
    with pytest.raises(ConfigError, match="deployer"):
        parse_role("deploier")


def test_a_token_is_known_by_its_hash_and_no_other_is(tmp_path: Path) -> None:
    """Neither the hash itself nor a part of the token opens anything."""
    token = new_token()
    line = token_line(token, ALICE)
    found = book(tmp_path / "tokens", "# who may what", "", line + "  # her laptop")

    assert found.caller(token) == ALICE
    for wrong in ("", token[:-1], token + "x", token.upper(), line.split()[2], "\ud800"):
        assert found.caller(wrong) is None


def test_an_expired_token_is_nobodys(tmp_path: Path) -> None:
    """From the second on that its line names."""
    lines = [token_line("a", ALICE, 100), token_line("b", ALICE)]

    assert book(tmp_path / "t", *lines, now=99).caller("a") == ALICE
    assert book(tmp_path / "t", *lines, now=100).caller("a") is None
    assert book(tmp_path / "t", *lines, now=100).caller("b") == ALICE


def test_a_changed_file_counts_at_once(tmp_path: Path) -> None:
    """A line that is added grants, one that is deleted grants no more, a file that is gone grants nothing."""
    path = tmp_path / "tokens"
    found = book(path, token_line("a", ALICE))
    rewrite(path, token_line("b", ALICE))

    assert (found.caller("a"), found.caller("b")) == (None, ALICE)
    path.unlink()
    assert found.caller("b") is None


def test_a_wrong_line_stops_the_start_and_later_only_itself(tmp_path: Path) -> None:
    """A typo made at night locks nobody out but its own token."""
    path = tmp_path / "tokens"
    with pytest.raises(ConfigError, match="line 2"):
        book(path, token_line("a", ALICE), "bob viewer nothing")
    found = book(path, token_line("a", ALICE))
    rewrite(path, f"bob viewer nothing\n{token_line('c', ALICE)}")

    assert (found.caller("a"), found.caller("c")) == (None, ALICE)


def test_a_file_that_others_may_write_is_refused(tmp_path: Path) -> None:
    """Who may write it may be anybody."""
    path = tmp_path / "tokens"
    path.write_text(token_line("a", ALICE))
    path.chmod(0o666)
    with pytest.raises(ConfigError, match="chmod 600"):
        TokenBook(path, lambda: 0)
    with pytest.raises(ConfigError, match="cannot be read"):
        TokenBook(tmp_path / "none", lambda: 0)


def test_appending_makes_a_file_for_its_owner_alone(tmp_path: Path) -> None:
    """Also where a last line has no end, and where the file was open to others."""
    path = tmp_path / "tokens"
    append_line(path, token_line("a", ALICE))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text(path.read_text().rstrip("\n"))
    path.chmod(0o644)
    append_line(path, token_line("b", ALICE))

    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    found = TokenBook(path, lambda: 0)
    assert (found.caller("a"), found.caller("b")) == (ALICE, ALICE)


def test_a_token_may_be_bound_to_routes() -> None:
    """Without any it may change all."""
    assert Caller("a", Role.ADMIN).may_change("x")
    assert not Caller("a", Role.ADMIN, frozenset({"y"})).may_change("x")


# How often


def test_a_burst_passes_and_then_so_many_a_second() -> None:
    """The wait that is named is enough, and no longer than it must be."""
    clock = FakeClock()
    limit = RateLimit(2, 3, clock.monotonic)

    assert [limit.wait_s("a") for _ in range(3)] == [0, 0, 0]
    wait_s = limit.wait_s("a")
    assert wait_s == pytest.approx(0.5)
    assert limit.wait_s("b") == 0
    clock.advance(wait_s)
    assert limit.wait_s("a") == 0
    assert limit.wait_s("a") > 0


@given(st.lists(st.floats(0, 5), max_size=60))
def test_never_more_than_the_burst_and_the_rate(pauses: list[float]) -> None:
    """Over any span, however the requests are spread."""
    clock = FakeClock()
    limit = RateLimit(2, 4, clock.monotonic)
    began = clock.monotonic()
    granted = 0
    for pause in pauses:
        clock.advance(pause)
        granted += limit.wait_s("a") == 0
        assert granted <= 4 + 2 * (clock.monotonic() - began) + 1e-6


def test_identities_are_forgotten_within_a_bound() -> None:
    """Whoever comes under ten thousand names fills no memory."""
    limit = RateLimit(1, 1, FakeClock().monotonic)
    for number in range(MAX_IDENTITIES + 50):
        limit.wait_s(str(number))
    assert len(limit._left) == MAX_IDENTITIES
