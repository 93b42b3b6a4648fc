"""What a bundle is run on: scenes, recorded trajectories, ranges of every value."""
