"""What all that acts in a sampling run shares: the run's plan, the rehearsal, noise, network calls, and calibration runs."""
