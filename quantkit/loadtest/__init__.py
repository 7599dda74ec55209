"""Load on an OpenAI-compatible server: what is sent when, what came of it, and what that is worth.

`draw` or `trace` makes `ask.Ask`s, `drive` sends them through `client.Client` at their time, each
comes back as an `answer.Answer`, and `row` makes a `row.Row` of all. `session` is a row after the
other. Nothing in here knows which server answers.
"""
