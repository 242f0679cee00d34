"""Training from shards alone: `train.loop.run` reads pair tables and shards, nothing else of data preparation."""
