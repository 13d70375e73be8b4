"""Which step of a sampling run the host is in."""

from bisect import bisect


class Schedule:
    """A run's sigmas, read back once, and where on them an evaluation is."""

    def __init__(self, transformer_options):
        self.sigmas = transformer_options["sample_sigmas"].flatten().tolist()
        descending = self.sigmas[0] >= self.sigmas[-1]
        self._rising = [-sigma if descending else sigma for sigma in self.sigmas]
        self._sign = -1 if descending else 1

    @property
    def steps(self):
        """The number of steps."""
        return max(len(self.sigmas) - 1, 1)

    def position(self, sigma):
        """Return where on the schedule this sigma is, in steps: a step's number where it begins, and between two of them on
        the line.
        """
        value = self._sign * sigma
        index = min(max(bisect(self._rising, value + 1e-6 * abs(value)) - 1, 0), len(self._rising) - 1)
        here, then = self._rising[index], self._rising[min(index + 1, len(self._rising) - 1)]
        if then <= here:
            return float(index)
        share = (value - here) / (then - here)
        return float(index) if abs(share) < 1e-4 else index + min(max(share, 0.0), 1.0)

    def locate(self, transformer_options):
        """Return (number of the step from 0, position) of the evaluation that the host's `transformer_options` belong to.

        An IEC sampler says both, which spares the device a read. Otherwise the sigma tells: an evaluation between two sigmas
        of the schedule belongs to the step that it is part of.
        """
        told = transformer_options.get("iec")
        if told is not None:
            return told["step"], self.position(told["sigma"])
        position = self.position(transformer_options["sigmas"].flatten()[0].item())
        return min(int(position), self.steps - 1), position
