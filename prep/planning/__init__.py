"""The arithmetic of `prep plan`: pairing without hashes, bytes, batches, and what stands in the way."""
