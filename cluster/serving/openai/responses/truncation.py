"""`truncation: "auto"`: leaves out the oldest turns of a conversation that does not fit the context."""

from collections.abc import Callable, Sequence

from cluster.serving.openai.chat_schema import ChatRequest
from cluster.serving.openai.conversations import to_conversation
from cluster.serving.openai.responses.schema import Item, MessageItem
from cluster.serving.service import InferenceService
from cluster.serving.text.prompts import Prompt


async def cut_to_fit(
    items: Sequence[Item], chat_of: Callable[[Sequence[Item]], ChatRequest], service: InferenceService, client: str
) -> list[Item]:
    """Returns the items without the fewest oldest turns that make room for an answer; system turns stay.

    A turn begins with a user's message, so that no call is parted from its answer. Where not even the last turn fits,
    it is what is left. chat_of: makes a chat of items.  Raises InvalidRequest.
    """
    turns = [index for index, item in enumerate(items) if isinstance(item, MessageItem) and item.role == "user"]
    cuts = [0, *(index for index in turns if index)]

    async def fits(cut: int) -> bool:
        chat = chat_of(_from(items, cut))
        num_tokens = len(await service.tokenize(Prompt(chat=to_conversation(chat)), client))
        return num_tokens + (chat.max_completion_tokens or 1) <= service.info.max_model_len

    first, last = 0, len(cuts) - 1  # a later cut is shorter
    while first < last:
        middle = (first + last) // 2 if first else 0  # most conversations fit whole
        if await fits(cuts[middle]):
            last = middle
        else:
            first = middle + 1
    return _from(items, cuts[first])


def _from(items: Sequence[Item], cut: int) -> list[Item]:
    def stays(item: Item) -> bool:
        return isinstance(item, MessageItem) and item.role in ("system", "developer")

    return [item for index, item in enumerate(items) if index >= cut or stays(item)]
