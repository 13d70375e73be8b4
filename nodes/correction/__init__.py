"""The nodes that correct a sampling run, and the one that measures how far the iteration contracts."""
