"""The parts of a server that HTTP calls need, handed to each family's router. Knows no HTTP."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from cluster.serving.health import HealthState
from cluster.serving.live.feed import LiveFeed
from cluster.serving.live.operations import Operations
from cluster.serving.model_names import adapter_of
from cluster.serving.openai.responses.background import Responses
from cluster.serving.openai.responses.kept import KeptResponses
from cluster.serving.service import InferenceService


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """aliases: further names by which clients may ask for the model.
    metrics: returns a scrape of this node in Prometheus' text format; raises Unavailable.
    now_s: seconds since 1970, for `created`.
    live: what watchers see of the cluster; None: nothing, and no page.
    operations: changes of the cluster; None: there are no calls for them.
    responses: those that are kept; in this process by default.
    """

    service: InferenceService
    health: HealthState
    metrics: Callable[[], Awaitable[bytes]]
    now_s: Callable[[], float]
    aliases: tuple[str, ...] = ()
    live: LiveFeed | None = None
    operations: Operations | None = None
    responses: Responses = field(default_factory=lambda: Responses(KeptResponses()))

    @property
    def model_names(self) -> tuple[str, ...]:
        """Returns the name that answers have, then the further ones."""
        return (self.service.info.model_id, *self.aliases)

    def adapter_of(self, name: str | None) -> str:
        """The adapter of a name that a body has for its model, "" for the base alone. None asks for the base.

        Raises NotFound for a model that is not served.
        """
        return adapter_of(name, self.model_names, self.service.adapters())

    def shown_model(self, name: str | None) -> str:
        """The name that an answer has for its model: an adapter's, or the model's first one."""
        return name if name is not None and name not in self.model_names else self.service.info.model_id
