"""Where calibration data comes from: which kind a source is, and reading what it holds."""
