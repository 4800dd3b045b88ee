"""The main job shown for real on one machine: servers, models, workers, requests, one kill, one table.

A shell like ``cli``: it may import everything, nothing imports it. Everything it starts listens on the
loopback address, on a free port, keeps its files in one folder and is stopped by its process id.
"""

import inferfleet.runtimes  # noqa: F401 - magika uses a runtime too, and what is set there holds for it
