"""The correction in the host's sampling loop, the events and the step plan that the frontend draws, and the probe."""
