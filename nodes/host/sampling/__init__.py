"""Code shared by everything that acts in a sampling run: its plan, the rehearsal, noise, network calls, calibration runs."""
