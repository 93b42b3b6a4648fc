"""A static site that runs a bundle in a browser."""
