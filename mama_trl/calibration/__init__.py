"""What a layer reads and should put out, measured on calibration sequences."""
