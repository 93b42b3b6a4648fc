"""Pictures and masks: read, written, converted, blended and compared."""
