"""Times a graph of static sites (`moebius-export web`) in a real browser."""
