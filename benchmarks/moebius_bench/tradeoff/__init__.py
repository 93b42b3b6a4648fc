"""Time against quality of modes and single options."""
