"""`/v1/responses`: OpenAI's newer API, whose answers are kept, and may be made while nobody waits.

`routes` takes the calls, `creating` the one that makes a response. `history` finds the conversation that it answers,
`items` makes a chat of it. `making` follows the answer to its end and `writing` makes events of it; `background` does
so while nobody waits, and `store` keeps them all. `schema` has the bodies that come, `response_body` the one that goes.
"""
