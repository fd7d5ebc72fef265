"""Beginnings of texts that models continue: the prompts of `measure.generation_prompts`, the first so many of them.

They were written for this package: neutral English of several kinds, a sentence or two each.
"""

from __future__ import annotations

BEGINNINGS = (
    # a fact and its reason
    "Water boils at a lower temperature on a high mountain than at the sea, because",
    # code
    'def mean(values):\n    """Return the arithmetic mean of a list of numbers."""\n',
    # a story
    "Early in the morning, before anyone else was awake, Nora opened the old gate behind the mill and",
    # a dialogue
    '"Did you bring the map?" asked the older sister.\n"No," said the younger one, "but',
    # a list
    "Things to pack for a week in the mountains:\n1. a warm jacket\n2. a bottle of water\n3.",
    # an explanation
    "A library lends books to the people of a town. To borrow a book, a reader first",
    # instructions
    "To cook a simple vegetable soup, cut two carrots and one onion into small pieces. Then",
    # a letter
    "Dear neighbour,\nthank you for watering our garden last week. When we came home,",
)
