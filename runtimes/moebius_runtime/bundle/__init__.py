"""The bundle on disk: manifest, graph files, engine passports."""

from moebius_runtime.bundle.bundle import Bundle

__all__ = ["Bundle"]
