"""`python -m paracaption.flows.cli`: the command line where no console script is installed."""

from .. import stopping
from . import main

stopping.run(main)
