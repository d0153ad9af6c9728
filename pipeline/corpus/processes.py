"""Which process owns a corpus, and whether it is known to be dead (`io.process_identity`)."""

from __future__ import annotations

from ..io.process_identity import Identity, this_process
from ..io.process_identity import is_dead as is_process_dead
from .records import Claim


def claim_of_this_process(command: str) -> Claim:
    """A claim that names this process."""
    host, boot, name_space, pid, started = this_process()
    return Claim(command=command, host=host, boot=boot, process=f"{name_space}/{pid}/{started}", pid=pid)


def is_dead(claim: Claim) -> bool:
    """Whether the process that made a claim has certainly ended; False where that cannot be known."""
    name_space, _, rest = claim.process.partition("/")
    started = rest.partition("/")[2]
    return is_process_dead(Identity(claim.host, claim.boot, name_space, claim.pid, started))
