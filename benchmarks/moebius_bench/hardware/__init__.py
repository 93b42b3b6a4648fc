"""`scripts/prove-on-gpu.sh`: what of this project works on a machine, and how fast, as one report.

Each stage (`stages.STAGES`) runs in a process of its own within its own time. A stage that fails is recorded and the
others go on. The report is JSON (`report.HardwareReport`); the Markdown page and the table in docs/status.md are
rendered from it.
"""
