"""Serving: one engine thread that turns requests into token events, and an HTTP API over it.

Start reading at `engine.Engine`; a request travels ``api`` → `request.Request` →
`engine.Engine` → `scheduler.Scheduler` (which asks a policy and `memory.Memory`) → `worker.Worker`
→ `runner.Runner` → `answer.Answer` (logits, grammar, sampler, detokenizer) → events.
"""
