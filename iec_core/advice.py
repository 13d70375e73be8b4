"""Advice for the user, with which several error messages end."""

TRY_PRECISION = "Try another precision of the model, or fewer patches on it."
