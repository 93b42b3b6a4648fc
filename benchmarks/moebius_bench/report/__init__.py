"""Reports: text, HTML, and the messages that both share."""
