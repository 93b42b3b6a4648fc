"""What the command `moebius-inpaint` does beside parsing its options: pair files, fill, report."""
