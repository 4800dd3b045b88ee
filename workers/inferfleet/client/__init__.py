"""The producer's side: submit, wait, map; sync and async."""
