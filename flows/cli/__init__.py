"""The command line, in `app`. Importing this package imports nothing that takes time: see `command`."""
