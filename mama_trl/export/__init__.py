"""What leaves the house: formats beside the ordinary checkpoint."""
