"""How shards are handed to workers: one driver loop, over one worker in this process or over Ray actors."""
