"""The names of the control plane's keys in Redis, all in one cluster slot, and the scripts that write them.

All that one script touches is declared as a key, so that a server checks the caller's rights on each.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

MAX_REVISIONS = 10_000
"""How many revisions the stream keeps, about: what the history shows, and where a worker finds its own."""
MAX_REPORTS = 10_000
"""How many entries the stream of one route's summaries keeps, about; each holds one flush of one worker."""
REPORTS_TTL_MS = 3_600_000
INDEX_KEPT_S = 600
"""How long the index of workers names one that is silent; one that lives enters itself with each report."""


class Keys:
    """The names for one fleet."""

    def __init__(self, fleet: str) -> None:
        self._prefix = f"{{{fleet}}}:"
        self.head = self._prefix + "head"
        self.routes = self._prefix + "routes"
        self.revisions = self._prefix + "revisions"
        self.audit = self._prefix + "audit"
        self.rollouts = self._prefix + "rollouts"
        self.lease = self._prefix + "lease"
        self.tokens = self._prefix + "lease:token"
        self.index = self._prefix + "workers:index"

    def __repr__(self) -> str:
        return f"Keys({self._prefix})"

    def worker(self, member: str) -> str:
        """Return the key of a worker's report; ``member`` is ``POOL:ID``."""
        return f"{self._prefix}workers:{member}"

    def paused(self, route: str) -> str:
        """Return the key whose existence pauses a route."""
        return f"{self._prefix}paused:{route}"

    def sent(self, member: str) -> str:
        """Return the key that remembers which summaries of a worker came last."""
        return f"{self._prefix}workers:{member}:sent"

    def reports(self, route: str) -> str:
        """Return the key of a route's summaries."""
        return f"{self._prefix}reports:{route}"


class Script(NamedTuple):
    """A script and the name under which the server knows it."""

    text: str
    sha: str


def _script(text: str) -> Script:
    # SHA-1 is the server's own naming scheme, not a protection.
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


COMMIT = _script(
    """
local head, routes, revisions, audit, rollouts, lease = unpack(KEYS)
local wanted, holds, fresh, most = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
if holds ~= '' and redis.call('GET', lease) ~= holds then
  return 'fenced'
end
if (redis.call('GET', head) or '') ~= wanted then
  return 'moved'
end
local function follows(stream, number)
  local last = redis.call('XREVRANGE', stream, '+', '-', 'COUNT', 1)[1]
  return number == '' or not last or tonumber(string.match(last[1], '^%d+')) < tonumber(number)
end
if not follows(revisions, ARGV[6]) or not follows(audit, ARGV[7]) then
  return 'behind'
end
local at = 8
local function take()
  at = at + 1
  return ARGV[at - 1]
end
local function append(stream, ...)
  for i = 1, tonumber(take()) do
    local words = {...}
    for _, word in ipairs({take() .. '-0', 'hash', take(), 'body', take()}) do
      words[#words + 1] = word
    end
    redis.call('XADD', stream, unpack(words))
  end
end
local function replace(key)
  for i = 1, tonumber(take()) do
    local name, value = take(), take()
    if value == '' then
      redis.call('HDEL', key, name)
    else
      redis.call('HSET', key, name, value)
    end
  end
end
append(revisions, 'MAXLEN', '~', most)
append(audit)
if ARGV[5] == '1' then
  redis.call('DEL', routes)
end
replace(routes)
replace(rollouts)
redis.call('SET', head, fresh)
return 'done'
"""
)
"""KEYS: head, routes, revisions, audit, rollouts, lease. ARGV: the head document that must stand (empty:
none), the lease that must stand (empty: any), the new head document, the bound of the revisions, ``1`` where
a new epoch empties the routes, the first numbers of revisions and of audit entries (empty: there are none);
then four lists, each behind its length: revisions and audit entries (number, hash, body), routes and rollouts
(name, value; empty: gone).

Only the first write can be refused by a full or read-only server, so nothing is ever half done.
"""

LEAD = _script(
    """
local standing = redis.call('GET', KEYS[1])
if standing then
  local token, holder = string.match(standing, '^(%d+) (.*)$')
  if holder ~= ARGV[1] then
    return false
  end
  redis.call('PEXPIRE', KEYS[1], ARGV[2])
  return tonumber(token)
end
local token = redis.call('INCR', KEYS[2])
redis.call('SET', KEYS[1], token .. ' ' .. ARGV[1], 'PX', ARGV[2])
return token
"""
)
"""KEYS: lease, counter of tokens. ARGV: holder, TTL in ms. Returns the token, nothing while another holds."""

REMOVE = _script(
    """
if redis.call('GET', KEYS[1]) == ARGV[1] then
  return redis.call('DEL', KEYS[1])
end
return 0
"""
)
"""KEYS: a lease or a pause. ARGV: what must stand there, as it is stored. Returns whether it stood."""

REPORT = _script(
    """
local worker, index, sent = KEYS[1], KEYS[2], KEYS[3]
local member, report, ttl, id, most, kept = unpack(ARGV)
local now = tonumber(redis.call('TIME')[1])
if report ~= '' then
  redis.call('SET', worker, report, 'PX', ttl)
  redis.call('ZADD', index, now, member)
  redis.call('ZREMRANGEBYSCORE', index, '-inf', now - tonumber(ARGV[7]))
end
if #KEYS == 3 or redis.call('GET', sent) == id then
  return 0
end
local at, lost, refused = 8, 0, nil
for i = 4, #KEYS do
  local words = {}
  for n = 1, tonumber(ARGV[at]) do
    words[2 * n - 1], words[2 * n] = n, ARGV[at + n]
  end
  local added = redis.pcall('XADD', KEYS[i], 'MAXLEN', '~', most, '*', unpack(words))
  if type(added) == 'table' and added.err then
    lost, refused = lost + #words / 2, added
  else
    redis.call('PEXPIRE', KEYS[i], kept)
  end
  at = at + tonumber(ARGV[at]) + 1
end
if lost > 0 and lost == #ARGV - 7 - (#KEYS - 3) then
  return refused
end
redis.call('SET', sent, id, 'PX', kept)
return lost
"""
)
"""KEYS: the worker's report, the index of workers, what the worker sent last, then streams of summaries.
ARGV: the worker's name in the index, its report (empty: none), its TTL in ms, the id of these summaries, the
bound of a stream, its TTL in ms, how many seconds the index keeps a silent worker, then for each stream how
many summaries, and those. Summaries that came already, by their id, are not added again. Returns how many
a stream refused while others took theirs; where all are refused, the error.
"""
