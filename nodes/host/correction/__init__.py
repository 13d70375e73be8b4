"""The correction in the host's sampling loop, the events and step plans that the frontend draws, and the contraction probe."""
