"""Advice for the user, with which several error messages end."""

TRY_PRECISION = "Load the model in another precision, or remove patches from it."
