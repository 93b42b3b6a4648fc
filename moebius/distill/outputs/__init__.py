"""What a run shows: sample pictures and logs."""
