"""What a training step minimizes: losses, their balance, timesteps and noise. Needs torch only."""
