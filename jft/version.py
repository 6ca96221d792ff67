"""The version of jft, as manifests and `jft --version` tell it."""

__version__ = "0.1.0"
