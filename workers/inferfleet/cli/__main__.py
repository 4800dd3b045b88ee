"""``python -m inferfleet.cli``: the command where its script is not on the path."""

from inferfleet.cli import main

main()
