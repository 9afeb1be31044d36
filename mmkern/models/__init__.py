"""Whole systems, one file each."""
