"""Searches for settings: what is searched, who searches, and what came out."""

from bilevel_lightning.search.results import Results
from bilevel_lightning.search.space import Range, Space, shipped_spaces
from bilevel_lightning.search.study import Unusable, open_study, work

__all__ = ["Range", "Results", "Space", "Unusable", "open_study", "shipped_spaces", "work"]
