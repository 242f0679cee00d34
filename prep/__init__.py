"""Data preparation in three stages that meet only in files: scan, pairs, cache.

Each stage is one typed function: `prep.scan.scan`, `prep.pairs.pairs`, `prep.cache.cache`.
"""
