"""The contract between the stages: rows, shards, options, keys and errors.

Nothing here knows a model's name, a pixel or a tensor; everything else of pairline imports it.
"""
