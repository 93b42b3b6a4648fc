"""The calls: the page's own jobs, and those of other clients as adapters over them."""
