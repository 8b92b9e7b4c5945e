"""Sites of crystals that are not one whole atom: disorder, which no graph can hold."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

WHOLE = 1e-8  # how far from 1 the occupation of a whole atom may be


def partly_occupied_site(info: Mapping[str, Any]) -> str:
    """Return the complaint about the first site of Atoms that is not one whole atom, or nothing.

    Args:
        info: Of ASE's Atoms; its ``occupancy`` holds the shares of a site by element after a CIF.
    """
    occupancy = info.get("occupancy")
    for site in occupancy.values() if isinstance(occupancy, Mapping) else ():
        if isinstance(site, Mapping) and complaint(list(site), list(site.values())):
            return complaint(list(site), list(site.values()))
    return ""


def complaint(elements: Sequence[str], shares: Sequence[float], site: str = "a site") -> str:
    """Return what is wrong with a site unless it is one whole atom: less than one, more, NaN."""
    if len(elements) == len(shares) == 1 and abs(float(shares[0]) - 1) <= WHOLE:
        return ""
    told = ", ".join(f"{one} {share}" for one, share in zip_longest(elements, shares))
    how = "partly" if all(0 <= float(share) <= 1 for share in shares) else "impossibly"
    return f"{site} is {how} occupied ({told}); make it an ordered structure first"
