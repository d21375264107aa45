"""Many requests of a file, in OpenAI's batch format, answered into another file; one that is killed can go on.

`lines` reads requests, `ledger` writes answers and knows those of an earlier run, `run` keeps many under way. An
`Answerer` answers one: `app` in this process, `http` at a server.
"""
