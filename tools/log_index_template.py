"""Writes the index template of inferfleet's log lines for Elasticsearch and OpenSearch.

    .venv/bin/python -m tools.log_index_template > deploy/logs/index-template.json

Every field has the type that the vocabulary gives it, so no line is refused for another line's sake; what is
in no vocabulary is text under ``labels``.
"""

from __future__ import annotations

import json
from typing import Any

from inferfleet.telemetry.vocabulary import KEYS

STREAM = "logs-inferfleet-*"
_ALWAYS: dict[str, dict[str, Any]] = {
    "@timestamp": {"type": "date"},
    "message": {"type": "text"},
    "log.level": {"type": "keyword"},
    "ecs.version": {"type": "keyword"},
    "event.action": {"type": "keyword"},
}


def index_template() -> dict[str, Any]:
    """Return the template; a text is searched by its words, and a traceback is kept without an index."""
    fields = dict(_ALWAYS)
    for name, key in KEYS.items():
        field: dict[str, Any] = {"type": key.type}
        if key.type == "keyword":
            field["ignore_above"] = 1024
        if key.type in ("long", "double"):
            field["ignore_malformed"] = True
        if name == "exception":
            field["index"] = False
        fields[key.name(name)] = field
    properties: dict[str, Any] = {}
    for dotted, field in sorted(fields.items()):
        *way, last = dotted.split(".")
        at = properties
        for step in way:
            at = at.setdefault(step, {"properties": {}})["properties"]
        at[last] = field
    labels = {"labels": {"path_match": "labels.*", "mapping": {"type": "keyword", "ignore_above": 1024}}}
    return {
        "index_patterns": [STREAM],
        "data_stream": {},
        "priority": 200,
        "template": {
            "mappings": {"dynamic_templates": [labels], "properties": properties},
        },
        "_meta": {"description": "log lines of inferfleet"},
    }


if __name__ == "__main__":
    print(json.dumps(index_template(), indent=2))
