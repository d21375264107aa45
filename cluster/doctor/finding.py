"""One thing that the doctor found."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Finding:
    """advice: what to do; "": nothing is wrong.  missing: nothing can be served until that is done."""

    subject: str
    found: str
    advice: str = ""
    missing: bool = False

    @property
    def mark(self) -> str:
        return "missing" if self.missing else "look" if self.advice else "ok"

    def __str__(self) -> str:
        return f"{self.mark}  {self.subject}: {self.found}" + (f" → {self.advice}" if self.advice else "")
