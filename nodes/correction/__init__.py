"""The nodes that correct a sampling run, and the node that measures how much the correction iteration contracts."""
