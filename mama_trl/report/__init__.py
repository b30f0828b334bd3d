"""report.json to pictures and one HTML page. Knows nothing of torch."""
