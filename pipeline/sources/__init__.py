"""Where images and masks come from: one file for each kind of source, listed in `registry`."""
