"""By what number a connection is judged, and where that number comes from."""
