"""Reports as pages: one HTML file each, without scripts and without a network."""
