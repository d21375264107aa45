"""The command `chat`: talks with a served model, turn by turn.

`session` keeps the conversation, `slash` has the /commands, `lines` reads turns from a terminal or a pipe, `answer`
prints an answer while it grows, `command` joins them.
"""
