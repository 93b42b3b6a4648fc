"""`moebius-export verify`: whether every file of a bundle is the PyTorch network, and where it is not."""

from moebius_export.verify.results import Check, Report
from moebius_export.verify.run import VerifyOptions, verify

__all__ = ["Check", "Report", "VerifyOptions", "verify"]
