"""What all that acts in a sampling run shares: the run's plan, the rehearsal, noise, who answers an evaluation, and runs."""
