"""The parts that methods which select blocks by content are made of.

A method cuts tokens into blocks in some order, gives each pair of a query block and a key block a
score (`scores`), keeps some pairs by a rule (`rules`), and attends to them and to what remains
(`remainders`), by block lists (`lists`). `keep` has rules as values, which are functions as a
user's own rules are; both see a call as `Pooled` tokens. `pools` ranks scores of several rows
together. Blocks that the tokens themselves make are `clusters`, which stand on `filled` tiles;
`cluster_errors` chooses among them.
"""

from diffattn.routing.keep import Above, AboveMean, Count, Mass, Share
from diffattn.routing.lists import layout_of_blocks
from diffattn.routing.pooled import Pooled
from diffattn.routing.remainders import REMAINDERS, attention_of_blocks
from diffattn.routing.rules import above, kept_blocks, mass, neighbours, row_threshold, top
from diffattn.routing.scores import mean_scores, part_scores

__all__ = [
    "REMAINDERS",
    "Above",
    "AboveMean",
    "Count",
    "Mass",
    "Pooled",
    "Share",
    "above",
    "attention_of_blocks",
    "kept_blocks",
    "layout_of_blocks",
    "mass",
    "mean_scores",
    "neighbours",
    "part_scores",
    "row_threshold",
    "top",
]
