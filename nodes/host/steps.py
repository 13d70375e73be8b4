"""Which step of a sampling run the host is in."""


def current_step(transformer_options):
    """Return the number, from 0, of the step that the host's `transformer_options` belong to.

    A correction evaluates the network away from the step's own place and says so in `transformer_options["iec"]`.
    Otherwise the sigma tells: an evaluation between two sigmas of the schedule belongs to the step that it is part of.
    """
    if "iec" in transformer_options:
        return transformer_options["iec"]["step"]
    schedule = transformer_options["sample_sigmas"].flatten()
    sigma = transformer_options["sigmas"].flatten()[0].to(schedule)
    descending = schedule[0] >= schedule[-1]
    begun = schedule >= sigma if descending else schedule <= sigma
    return min(max(int(begun.sum()) - 1, 0), max(len(schedule) - 2, 0))
