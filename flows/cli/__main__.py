"""`python -m paracaption.flows.cli`: the command line where no console script is installed."""

from .command import main

main()
