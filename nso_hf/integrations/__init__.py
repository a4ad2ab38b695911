"""Doors into other packages."""
