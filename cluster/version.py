"""The version of this package. The chart's appVersion is the same."""

__version__ = "0.1.0"
