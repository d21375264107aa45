"""One thing that the doctor found."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """advice: what to do; "": nothing is wrong.  missing: nothing can be served until that is done."""

    subject: str
    found: str
    advice: str = ""
    missing: bool = False
