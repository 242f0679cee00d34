"""Caches of other trainers, brought into the stores of `prep cache` as far as they are proven to be equal.

`prep.importing.run.import_cache` is the way in. A new format is a module here that offers what `found.Cache` asks for,
and a line in `run.FORMATS`; the word by which its files name a family is in the family's entry (`elsewhere`).
"""
