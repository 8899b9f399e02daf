"""The data contract: rows, shards, manifests; how they are stored, read and verified. Imports no stage, no torch."""
