"""The search for the settings of a sampling run that is fast enough at the least error."""
