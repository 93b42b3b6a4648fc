"""`moebius-serve`: a page with a brush, and an HTTP API, over one warm `InpaintPipeline`. Extra `serve`; no torch."""
