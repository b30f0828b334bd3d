"""Digests of what the package computes, to show that moving its code changes nothing; see __main__.py."""
