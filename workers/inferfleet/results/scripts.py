"""The two atomic steps that run inside Redis, as Lua.

Both are idempotent in what they mean: a repeated write changes nothing that stands, and a repeated reply is
dropped by its reader, which knows the ids it has seen.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple


class Script(NamedTuple):
    """A script and the name under which the server knows it."""

    text: str
    sha: str


def _script(text: str) -> Script:
    # SHA-1 is the server's own naming scheme, not a protection.
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


WRITE = _script(
    """
local ttl, wanted, news = ARGV[1], ARGV[2], {}
local function payload(body)
  return string.match(string.sub(body, -256), '"fleet_payload":"([^"]*)"}}$')
end
for i, key in ipairs(KEYS) do
  local body = ARGV[i + 2]
  if not redis.call('SET', key, body, 'PX', ttl, 'NX') then
    local standing = redis.call('GET', key)
    local old, new = payload(standing), payload(body)
    local differs = old and new and old ~= new
    local stood_error = string.sub(standing, 1, 8) == '{"error"'
    local verdict = 1
    if stood_error then
      if string.sub(body, 1, 8) ~= '{"error"' then
        redis.call('SET', key, body, 'PX', ttl)
        verdict = 0
      elseif differs then
        verdict = 2
      end
    elseif differs then
      verdict = 3
    end
    if verdict ~= 0 then
      local send = verdict == 1 and string.byte(wanted, i) == 49
      local n = #news
      news[n + 1], news[n + 2], news[n + 3] = i, verdict, send and standing or ''
    end
  end
end
return news
"""
)
"""KEYS: result keys. ARGV: TTL in ms; one character a row, ``1`` where the standing body is wanted; bodies.

Returns for each row that was not written: its number from 1, its ``Verdict``, the standing body or ``""``.
"""

REPLY = _script(
    """
local cap, ttl = ARGV[1], ARGV[2]
for i = 3, #ARGV, 4 do
  redis.call('XADD', KEYS[1], 'MAXLEN', '~', cap, '*',
    'id', ARGV[i], 'route', ARGV[i + 1], 'status', ARGV[i + 2], 'body', ARGV[i + 3])
end
redis.call('PEXPIRE', KEYS[1], ttl)
return 0
"""
)
"""KEYS: one reply stream. ARGV: length cap, TTL in ms, then id, route, status, body of each reply."""
