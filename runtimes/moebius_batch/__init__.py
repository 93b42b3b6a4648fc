"""Sharded bulk jobs over `moebius_runtime`: folders, tars, tables, object stores; `moebius-batch`. See docs/bulk.md."""
