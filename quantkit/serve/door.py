"""The door between the API and the engine: lets requests in and keeps the books on them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from quantkit.errors import QuantkitError
from quantkit.serve.events import Event, Failed, Finished, TokenEvent
from quantkit.serve.policy.admission import Admission, Refusal
from quantkit.serve.stream import EventStream
from quantkit.serve.tracing import Span, Trace
from quantkit.serve.traffic import Traffic

if TYPE_CHECKING:
    from quantkit.serve.capture import Capture
    from quantkit.serve.config import ServeConfig
    from quantkit.serve.engine import Engine
    from quantkit.serve.policy.tiers import Tenant
    from quantkit.serve.request import Request


class RefusedError(QuantkitError):
    """Admission let a request not in."""

    def __init__(self, refusal: Refusal) -> None:
        remedy = f"try again in {refusal.retry_after} s" if refusal.retry_after else None
        super().__init__(refusal.message, remedy=remedy)
        self.refusal = refusal


@dataclass
class _Ticket:
    """A request that is in; ``prompt`` is what was said, if the answer is to be captured."""

    request: Request
    prompt: dict[str, Any] | None
    trace: Trace | None
    first: float | None = None
    last: float = 0.0
    tokens: int = 0
    text: list[str] = field(default_factory=list)


class Door:
    """Admission, deadlines and metrics of every request. Only the event loop calls it."""

    def __init__(
        self,
        engine: Engine,
        config: ServeConfig,
        capture: Capture | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._capture = capture
        self._clock = clock
        self._ttft = {tier.name: tier.ttft for tier in config.tiers}
        self.admission = Admission(config.tiers, config.tenants, clock())
        self.traffic = Traffic(engine.metrics.registry, config, self.admission.waiting, capture)

    def knock(self, tenant: Tenant, *, charge: bool = False) -> None:
        """Before a prompt is tokenized: turn away who is over a limit, whatever it asks.

        Args:
            tenant: who asks.
            charge: count the request now, because it never comes to `open`.

        Raises:
            RefusedError: over a limit of the tenant.
        """
        refusal = self.admission.knock(tenant, self._clock(), charge=charge)
        if refusal is not None:
            self.traffic.ended(tenant, refusal.code, None)
            raise RefusedError(refusal)

    async def open(
        self,
        tenant: Tenant,
        requests: Sequence[Request],
        prompts: Sequence[dict[str, Any] | None],
        trace: Trace | None = None,
    ) -> EventStream:
        """Let requests in, all or none, and return their events.

        Args:
            tenant: whose they are.
            requests: what to run.
            prompts: for each, what to capture it with: ``{"messages": [...]}`` or
                ``{"prompt": ...}``; None is never captured.
            trace: where their spans go.

        Raises:
            RefusedError: over a limit of the tenant, or too late for its tier.
            RequestError, QueueFullError, StoppedError: by the engine.
            CompilerBusyError: too many grammars wait.
        """
        # First, because what can never run counts for nobody's rate.
        requests = [await self._prepared(request) for request in requests]
        tokens = {request.id: len(request.prompt_ids) for request in requests}
        refusal = self.admission.admit(tenant, tokens, self._clock())
        if refusal is not None:
            for _ in requests:
                # Its own limits are not a promise that was broken.
                self.traffic.ended(tenant, refusal.code, False if refusal.status == 503 else None)
            raise RefusedError(refusal)
        target = self._ttft[tenant.tier]
        wanted = self._capture is not None and self._capture.wants()
        tickets = [
            _Ticket(
                replace(
                    request,
                    tenant=tenant.name,
                    tier=tenant.tier,
                    deadline=None if target is None else request.arrival + target,
                ),
                prompt if wanted else None,
                trace,
            )
            for request, prompt in zip(requests, prompts, strict=True)
        ]
        try:
            return EventStream(
                self._engine,
                [ticket.request for ticket in tickets],
                lambda index, event: self._observe(tenant, tickets[index], event),
            )
        except BaseException:
            for ticket in tickets:
                self.admission.ended(ticket.request.id, 0, self._clock())
            raise

    async def _prepared(self, request: Request) -> Request:
        """A request that can run, with its grammar. Long prompts and grammars take their time,
        which is not the event loop's."""
        await asyncio.to_thread(self._engine.check, request)
        return await self._engine.grammars.attach_soon(request)

    def _observe(self, tenant: Tenant, ticket: _Ticket, event: Event) -> None:
        now = self._clock()
        if ticket.prompt is not None and isinstance(event, TokenEvent | Finished):
            ticket.text.append(event.text)
        if isinstance(event, TokenEvent):
            if ticket.first is None:
                ticket.first = now
                self.admission.started(ticket.request.id, now)
                self.traffic.first_token(tenant, now - ticket.request.arrival)
            else:
                self.traffic.next_token(tenant, now - ticket.last)
            ticket.last = now
            ticket.tokens += 1
        elif isinstance(event, Finished | Failed):
            if ticket.first is None and isinstance(event, Finished) and event.reason != "cancelled":
                # Scored without a token: its prompt was read, and counts as measured.
                self.admission.started(ticket.request.id, now)
            self.admission.ended(ticket.request.id, ticket.tokens, now)
            prompt = event.prompt_tokens if isinstance(event, Finished) else 0
            self.traffic.computed(tenant, prompt, ticket.tokens)
            outcome = event.reason if isinstance(event, Finished) else "failed"
            self.traffic.ended(tenant, outcome, self._in_time(ticket, event, now))
            self._keep(ticket, outcome)
            if ticket.trace is not None:
                span = Span(
                    start=ticket.request.arrival,
                    first_token=ticket.first,
                    end=now,
                    outcome=outcome,
                    input_tokens=prompt,
                    output_tokens=ticket.tokens,
                    tenant=tenant.name,
                    tier=tenant.tier,
                )
                ticket.trace.record(span)

    def _keep(self, ticket: _Ticket, outcome: str) -> None:
        """Capture an answer that came to its end."""
        if self._capture is None or ticket.prompt is None or outcome not in ("stop", "length"):
            return
        text = "".join(ticket.text)
        if "messages" in ticket.prompt:
            said = [*ticket.prompt["messages"], {"role": "assistant", "content": text}]
            self._capture.offer({"messages": said})
        else:
            self._capture.offer(ticket.prompt | {"completion": text})

    @staticmethod
    def _in_time(ticket: _Ticket, event: Finished | Failed, now: float) -> bool | None:
        deadline = ticket.request.deadline
        if isinstance(event, Failed):
            return None if event.invalid else False
        if ticket.first is None:
            # Scored without a token, or its client left: too early to say, unless it is late.
            late = deadline is not None and now > deadline and event.reason == "cancelled"
            return False if late else None
        return deadline is None or ticket.first <= deadline
