"""The stores of a project looked after: one module for each mode of `prep cache`, `prep/upkeep/modes.py` picks."""
