"""What a user can do: sentences with which several refusals end."""

TRY_PRECISION = "Try another precision of the model, or fewer patches on it."
