"""State that lives for one sampling run."""

import comfy.model_patcher


def keep_for_run(key, make_state):
    """Return an OUTER_SAMPLE wrapper that puts a fresh make_state(model_options) into `transformer_options[key]` for the
    run; model_options: of the run.

    Its `clear()` is called when the run ends, also on interrupt or error, and the guider's options are put back.
    """

    def outer_sample(executor, *args, **kwargs):
        guider = executor.class_obj
        before = guider.model_options
        guider.model_options = comfy.model_patcher.create_model_options_clone(before)
        state = guider.model_options["transformer_options"][key] = make_state(before)
        try:
            return executor(*args, **kwargs)
        finally:
            state.clear()
            guider.model_options = before

    return outer_sample
