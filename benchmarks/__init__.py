"""Measurements of tp_mrs; see README.md in this folder."""
