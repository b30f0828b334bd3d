"""Trials of several methods under one protocol, and their tables."""
