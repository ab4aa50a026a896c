"""Find out once per process whether the model hub can be reached, without repeated time-outs."""

from __future__ import annotations

import threading
from functools import cache

SECONDS = 6.0  # for a name server and a server together


@cache
def reachable() -> bool:
    """Ask the hub for its front page; where it does not answer, only its cache is read from here on.

    Proxies count. A process that was told to be offline is not asked.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    answered: list[bool] = []

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=SECONDS)
            answered.append(True)
        except Exception:  # whatever a client raises for a network that is not there
            answered.append(False)

    asking = threading.Thread(target=ask, daemon=True)  # a name server may take its time
    asking.start()
    asking.join(SECONDS)
    if answered != [True]:
        constants.HF_HUB_OFFLINE = True
    return answered == [True]


def unreachable(what: str, parameter: str) -> str:
    """Say what to do where the hub does not answer and its cache does not hold what is wanted."""
    from huggingface_hub import constants

    return (
        f"{what} is not in the local cache, and {constants.ENDPOINT} does not answer; connect to the "
        f"network, set HF_ENDPOINT to a mirror, or give a local folder as {parameter}"
    )
