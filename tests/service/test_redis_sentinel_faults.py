"""A master dies and its replica is promoted: the outlet follows, and what the failover lost is told."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from inferfleet.redis_access import Place
from tests.support.redis_cluster import RedisSentinel
from tests.support.redis_writer import Writer, missing, repeats
from tests.support.scale import pick
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.service, pytest.mark.fault]
Record = Any
"""``record_property`` of pytest: a figure for the summary of faults."""


@pytest.mark.parametrize("sentinels", pick([3], [1, 3]))
def test_a_failover_is_followed_and_its_loss_is_told(
    data_folder: Path, sentinels: int, record_property: Record
) -> None:
    """The replica is cut off before the master dies, so confirmed results are lost: every one is counted."""
    with RedisSentinel(data_folder, sentinels) as pair:
        place = Place(mode="sentinel", nodes=pair.addresses, sentinel_master=pair.NAME, timeout_s=1.0)
        writer = Writer(place)
        with capture_logs() as logs:
            writer.publish(pick(1000, 10_000))
            writer.wait_done("the first rows are confirmed", 60)
            kept = writer.published
            with pair.master.client() as client:
                wait_until(
                    lambda: client.execute_command("WAIT", 1, 100) == 1, 10, "the replica has what there is"
                )
                pair.replica.pause()
                # Else the frozen replica would find in its socket what was sent to it meanwhile.
                client.execute_command("CLIENT", "KILL", "TYPE", "replica")
            writer.publish(pick(300, 3000))
            writer.wait_done("rows are confirmed that the replica never hears of", 60)
            confirmed = writer.published
            pair.master.kill()
            died_at = time.monotonic()
            pair.replica.resume()
            writer.publish(200)
            writer.wait_away()
            pair.wait_promoted()
            writer.wait_done("every row is confirmed by the new master", 30)
            back_s = time.monotonic() - died_at
        assert writer.outlet.close(5) == 0
        with pair.replica.client() as client:
            gone = missing(client, writer.published)
            counted = repeats(client, writer.published)

    record_property(
        f"F16 {sentinels} sentinels",
        f"{confirmed} confirmed before the failover, {len(gone)} lost and {writer.lost.total()} told; "
        f"writing again after {back_s:.1f} s",
    )
    # What the replica had stands, what it never heard of is lost, and what came after the failover stands.
    assert gone == list(range(kept, confirmed))
    assert writer.lost == {"digits": len(gone)}
    assert sum(entry["lost"] for entry in logs if entry["event"] == "results_lost") == len(gone)
    assert set(counted) <= {"same"}
    assert [entry["event"] for entry in logs][-1] in ("results_back", "results_lost")
