"""Tiers under overload, simulated: the policies themselves in front of a model of step times.

    python -m benchmarks.serve_tiers_simulation [--requests 600] [--json]

Requests arrive as a Poisson process at a multiple of what the server can finish; 20 % of them are
paid. A step takes ``base + prompt tokens × per_prompt_token + answers × per_answer``, so the clock
is exact and a run repeats to the bit. Each row is one way to serve the same arrivals:

    paid alone   the tiers' policy with nobody else there: the unloaded value
    first come   first come, first served
    tiers        the tiers' policy, everybody let in
    + admission  the same, and requests that would be late are refused at the door

The steps are those of `serve.scheduler`: who waits is admitted in the policy's order or stops a
victim, every answer gets a token, and prompts share a chunk of tokens.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from benchmarks.tier_load import Workload, make_tiers, show, summary, tier_of
from quantkit.serve.policy.admission import Admission
from quantkit.serve.policy.order import Entry, FirstCome, Policy
from quantkit.serve.policy.tiered import Tiered
from quantkit.serve.policy.tiers import Tenant


@dataclass(frozen=True)
class Machine:
    """Seconds that a step takes, and its limits. By default about SmolLM2-135M on two cores."""

    base: float = 0.005
    per_prompt_token: float = 0.0012
    per_answer: float = 0.002
    max_sequences: int = 16
    prefill_chunk: int = 128


@dataclass(eq=False)
class Job:
    """A request on its way."""

    entry: Entry
    answer_tokens: int
    first_token: float | None = None
    end: float | None = None
    refused: bool = False

    @property
    def tier(self) -> str:
        return self.entry.tier

    @property
    def ttft(self) -> float:
        assert self.first_token is not None
        return self.first_token - self.entry.arrival


@dataclass
class Simulation:
    """The loop of an engine over a clock of its own."""

    machine: Machine
    policy: Policy
    admission: Admission | None = None
    tenants: dict[str, Tenant] = field(default_factory=dict)
    promises: dict[str, float | None] = field(default_factory=dict)
    now: float = 0.0
    waiting: list[Job] = field(default_factory=list)
    running: list[Job] = field(default_factory=list)

    def run(self, jobs: Sequence[Job]) -> None:
        """Serve jobs, sorted by arrival, to the end."""
        arriving = iter(jobs)
        upcoming = next(arriving, None)
        while upcoming or self.waiting or self.running:
            if upcoming and not (self.waiting or self.running):
                self.now = max(self.now, upcoming.entry.arrival)
            while upcoming and upcoming.entry.arrival <= self.now:
                self._arrive(upcoming)
                upcoming = next(arriving, None)
            self._step()

    def _arrive(self, job: Job) -> None:
        if self.admission is not None:
            tenant, prompt = self.tenants[job.entry.tenant], {job.entry.id: job.entry.prompt_tokens}
            job.refused = self.admission.admit(tenant, prompt, job.entry.arrival) is not None
        if not job.refused:
            promise = self.promises.get(job.entry.tier)
            if promise is not None:
                job.entry = job.entry._replace(deadline=job.entry.arrival + promise)
            self.waiting.append(job)

    def _step(self) -> None:
        self._admit()
        decodes = [job for job in self.running if not job.entry.prompt_left]
        chunks = list(self._chunks())
        for job in decodes:
            self.policy.served(job.entry, 1)
        for job, tokens in chunks:
            self.policy.served(job.entry, tokens)
        read = sum(tokens for _, tokens in chunks)
        machine = self.machine
        self.now += (
            machine.base + read * machine.per_prompt_token + len(decodes) * machine.per_answer
        )
        for job, tokens in chunks:
            job.entry = job.entry._replace(prompt_left=job.entry.prompt_left - tokens)
        for job in [*decodes, *(job for job, _ in chunks if not job.entry.prompt_left)]:
            self._token(job)

    def _admit(self) -> None:
        entries = [job.entry for job in self.waiting]
        order = self.policy.waiting_order(entries, self._entries(), self.now)
        for job in [self.waiting[i] for i in order]:
            if len(self.running) >= self.machine.max_sequences:
                victim = self.policy.victim(self._entries(), job.entry, self.now)
                if victim is None:
                    return
                stopped = self.running.pop(victim)
                # What it generated is kept and has to be read again, beside its prompt.
                left = stopped.entry.prompt_tokens + stopped.entry.output_tokens
                stopped.entry = stopped.entry._replace(prompt_left=left)
                self.waiting.append(stopped)
            self.waiting.remove(job)
            self.running.append(job)

    def _chunks(self) -> Iterator[tuple[Job, int]]:
        left = self.machine.prefill_chunk
        for i in self.policy.prefill_order(self._entries(), self.now):
            tokens = min(left, self.running[i].entry.prompt_left)
            if tokens:
                left -= tokens
                yield self.running[i], tokens

    def _token(self, job: Job) -> None:
        job.entry = job.entry._replace(output_tokens=job.entry.output_tokens + 1)
        if job.first_token is None:
            job.first_token = self.now
            if self.admission is not None:
                self.admission.started(job.entry.id, self.now)
        if job.entry.output_tokens == job.answer_tokens:
            job.end = self.now
            self.running.remove(job)
            if self.admission is not None:
                self.admission.ended(job.entry.id, job.answer_tokens, self.now)

    def _entries(self) -> list[Entry]:
        return [job.entry for job in self.running]


def make_jobs(workload: Workload, requests: int, rate: float, seed: int = 0) -> list[Job]:
    """Poisson arrivals at ``rate`` requests a second."""
    arrivals = islice(workload.arrivals(random.Random(seed), rate), requests)
    prompt, longest = workload.prompt_tokens, workload.longest
    return [
        Job(Entry(f"r{i}", at, prompt, prompt, 0, longest, tenant, tier_of(tenant)), answer)
        for i, (at, tenant, answer) in enumerate(arrivals)
    ]


def saturation(machine: Machine, workload: Workload, requests: int) -> float:
    """Requests a second when there are always more: everybody arrives at once."""
    jobs = make_jobs(workload, requests, rate=1e9)
    simulation = Simulation(machine, FirstCome())
    simulation.run(jobs)
    return len(jobs) / simulation.now


def compare(
    machine: Machine, workload: Workload, requests: int = 600, load: float = 1.5
) -> dict[str, dict]:
    """Name of a way to serve → tier → `summary`; ``alone`` is one request in an idle server."""
    full = saturation(machine, workload, min(requests, 200))
    lone = make_jobs(workload, 1, rate=1.0)
    Simulation(machine, FirstCome()).run(lone)
    # The promise of the paid tier is what it should get; free is promised an answer, some time.
    tiers = make_tiers(3 * lone[0].ttft, 60.0)
    tenants = {tenant.name: tenant for tenant in workload.tenants}

    def serve(policy: Policy, only: str | None = None, *, shed: bool = False) -> dict:
        jobs = make_jobs(workload, requests, load * full)
        jobs = [job for job in jobs if only in (None, job.tier)]
        admission = Admission(tiers, list(tenants.values()), 0.0) if shed else None
        promises = {tier.name: tier.ttft for tier in tiers} if shed else {}
        Simulation(machine, policy, admission, tenants, promises).run(jobs)
        return summary(jobs)

    return {
        "alone": {"ttft": lone[0].ttft, "saturation": full},
        "paid alone": serve(Tiered(tiers), "paid"),
        "first come": serve(FirstCome()),
        "tiers": serve(Tiered(tiers)),
        "+ admission": serve(Tiered(tiers), shed=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--load", type=float, default=1.5, help="multiple of saturation")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    results = compare(Machine(), Workload(), arguments.requests, arguments.load)
    if arguments.json:
        print(json.dumps(results, indent=2))
        return
    alone = results.pop("alone")
    print(f"one request alone: TTFT {alone['ttft']:.2f} s; saturation {alone['saturation']:.2f}/s")
    show(results)


if __name__ == "__main__":
    main()
