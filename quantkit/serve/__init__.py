"""Serving: one engine thread that turns requests into token events, and an HTTP API over it.

Start reading at `engine.Engine`; a request travels ``api`` → `request.Request` →
`engine.Engine` → `scheduler.Scheduler` → `runner.Runner` → `sampler` → `detokenizer` → events.
"""
