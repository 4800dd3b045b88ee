"""Seeded English-looking texts of 20 to 60 words for the workload ``embed``."""

from __future__ import annotations

import random

_TEXT = """
the of and to in a is that for it as was with be by on not he his but at are this have from or had an
they which one you were all her she there would their we him been has when who will no more if out so up
said what its about than into them can only other time new some could these two may first then do any
like my now over such our man me even most made after also well did many before must through years where
much your way down should because long each just state people those too mr how little good world make
very year still see own work men day get here between both life being under three never know same last
another while us off might great go come since against right came take used himself few house use during
without again place american around however home small found mrs part school thought went say general
once upon high every don does got united left number course war until always away something fact water
though less public put think almost hand enough took far head yet better set told nothing night end why
find going point asked later eyes knew city next program business give group toward days young let room
president side social present given several order national second possible rather per face among form
often important things looked early white case broker partition shipment invoice delivery warehouse
customer payment refund network sensor engine weather
"""
_WORDS = _TEXT.split()


def texts(count: int, seed: int) -> list[str]:
    """Return ``count`` texts of 20 to 60 words each; same seed, same texts."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(_WORDS, k=rng.randint(20, 60))).capitalize() + "." for _ in range(count)]
