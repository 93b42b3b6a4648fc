"""Compares every file of a bundle with the PyTorch network: `moebius-export verify`."""

from moebius_export.verify.results import Check, Report
from moebius_export.verify.run import VerifyOptions, verify

__all__ = ["Check", "Report", "VerifyOptions", "verify"]
