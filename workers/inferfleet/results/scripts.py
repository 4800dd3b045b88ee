"""The atomic steps that run inside Redis, as Lua.

All are idempotent in what they mean: a repeated write changes nothing that stands and is counted beside it,
and a repeated reply is dropped by its reader, which knows the ids it has seen.

The counter's name is made here and not declared: declared, every row would carry a second key that almost
none uses, and a cluster would answer TRYAGAIN to every row of a slot that moves, for as long as it moves. The
name's hash tag is the result's whole key, so both are always in one slot. While that slot moves, a counter
that has no value yet may be out of this server's reach (``non local key``): that repeat is not counted,
rather than a result held back for as long as somebody takes to move a slot.
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
local function bare(body, hash)
  return hash and string.sub(body, 1, -(#hash + 36)) .. '}' or body
end
for i, key in ipairs(KEYS) do
  local body = ARGV[i + 2]
  if not redis.call('SET', key, body, 'PX', ttl, 'NX') then
    local standing = redis.pcall('GET', key)
    if type(standing) == 'table' then
      if not string.find(standing.err, 'WRONGTYPE', 1, true) then
        return standing
      end
      local n = #news
      news[n + 1], news[n + 2], news[n + 3] = i, 3, ''
    else
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
        local same = standing == body
          or not (old and new) and bare(standing, old) == bare(body, new)
        local counter = '{' .. key .. '}:again'
        local counted = redis.pcall('HINCRBY', counter, same and 'same' or 'differs', 1)
        if type(counted) == 'number' then
          redis.call('PEXPIRE', counter, ttl)
        elseif not string.find(counted.err, 'non local key', 1, true)
          and not string.find(counted.err, 'WRONGTYPE', 1, true) then
          return counted
        end
        local send = verdict == 1 and string.byte(wanted, i) == 49
        local n = #news
        news[n + 1], news[n + 2], news[n + 3] = i, verdict, send and standing or ''
      end
    end
  end
end
return news
"""
)
"""KEYS: result keys. ARGV: TTL in ms; one character a row, ``1`` where the standing body is wanted; bodies.

Returns for each row that was not written: its number from 1, its ``Verdict``, the standing body or ``""``.
Each such row is counted in the hash that ``wire.stored.again_key`` names, as ``wire.stored.repeats`` says.
"""

STANDS = _script(
    """
local missing = {}
for i, key in ipairs(KEYS) do
  if redis.call('EXISTS', key) == 0 then
    missing[#missing + 1] = i
  end
end
return missing
"""
)
"""KEYS: result keys. Returns the numbers, from 1, of those that do not stand."""

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
