"""The reloaded checkpoint and the original, scored on the same suites and held-out text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from quantkit.data.render import render
from quantkit.data.sources import Source, iter_documents, iter_texts
from quantkit.errors import NotComparableError
from quantkit.evals.evaluate import evaluate
from quantkit.evals.suites import installed_folder, load_suites
from quantkit.job import Job, data_sources
from quantkit.models.load import load_runtime
from quantkit.models.runtime import Runtime
from quantkit.progress import Reporter
from quantkit.results import Results


def score(job: Job, runtime: Runtime, reporter: Reporter) -> tuple[Results, Results]:
    """Results of the checkpoint and of the original.

    Args:
        job: names the original, the suites and the text.
        runtime: the reloaded checkpoint.
        reporter: told of each of the two evaluations.

    Raises:
        NotComparableError: the job's baseline was scored on another model.
    """
    original = load_runtime(job.source, device=job.device)
    text = held_out_text(job, runtime.tokenizer)
    with reporter("evaluate") as progress:
        candidate = evaluate(
            runtime,
            reference=original if text is not None else None,
            suites=job.suites,
            text=text,
            seq_len=job.seq_len,
            max_tokens=job.max_tokens,
            progress=progress,
        )
    candidate = replace(
        candidate, cost={**candidate.cost, "reference_size_bytes": original.size_bytes}
    )
    if job.baseline is not None:
        baseline = Results.load(job.baseline)
        if baseline.fingerprint.get("model") != original.fingerprint["model"]:
            raise NotComparableError(
                f"{job.baseline}: was scored on another model than {job.source}",
                remedy="score the original with `quantkit eval`",
            )
        return candidate, baseline
    with reporter("evaluate the original") as progress:
        baseline = evaluate(
            original,
            suites=job.suites,
            text=text,
            seq_len=job.seq_len,
            max_tokens=job.max_tokens,
            progress=progress,
        )
    return candidate, baseline


def evidence(candidate: Results, baseline: Results) -> dict[str, Any]:
    """The scores without anything that differs between machines of one type."""

    def clean(results: Results) -> dict[str, Any]:
        summary = results.summary()
        summary["fingerprint"] = {
            k: v for k, v in summary["fingerprint"].items() if k not in ("host", "model")
        }
        return summary

    return {"candidate": clean(candidate), "baseline": clean(baseline)}


def held_out_text(job: Job, tokenizer: Any) -> str | None:
    """Text for perplexity and divergence that calibration has not seen.

    ``--text`` if given; else the traffic of every installed suite that the recipe does not
    calibrate on, rendered as the model would see it.
    """
    template = tokenizer.chat_template is not None
    if job.text is not None:
        if job.text.suffix in (".txt", ".md"):
            return "".join(iter_texts(Source(str(job.text))))
        documents = iter_documents(Source(str(job.text)))
        return "\n".join(render(d, tokenizer, chat_template=template) for d in documents)
    folder = installed_folder()
    if folder is None:
        return None
    used = {Path(source.path).resolve() for source in data_sources(job.recipe)}
    rendered = []
    for suite in load_suites([folder]):
        if suite.traffic is not None and suite.traffic.resolve() not in used:
            for document in iter_documents(Source(str(suite.traffic))):
                rendered.append(render(document, tokenizer, chat_template=template))
    return "\n".join(rendered) or None
