"""Argument checks, arrays, atomic files: what every room needs. Imports nothing of the package."""
