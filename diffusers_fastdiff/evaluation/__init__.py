"""Measuring samples. Nothing here is imported by the rest of the package."""
