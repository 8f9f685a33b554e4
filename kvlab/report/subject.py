"""What runs are about, for the head of a page: model, data, documents, tokens; a processor."""

from __future__ import annotations

from kvlab.report.source import Run

PREDICTED = "perplexity_delta_percent"  # its count is of predicted tokens, one less than tokens
ASKED = ("needle_recall_percent", "task_score_percent")  # their counts are of questions
MODELS = {"reference": "the reference model", "random": "random weights",
          "reference_outliers": "the reference model with key outliers",
          "qwen3_0_6b_random": "Qwen3-0.6B's shapes with random weights"}  # fmt: skip


def subject(runs: list[Run]) -> str:
    """`the reference model, held-out books, 4 documents x 16,384 tokens, 20 questions`; "" where
    the rows say nothing of it, as those of replayed traces. Behind that `CPU`, where no run had
    another device."""
    rows = [row for run in runs for row in run.rows]
    traces = list(dict.fromkeys(str(r["params"]["trace"]) for r in rows if "trace" in r["params"]))
    if traces:
        *first, last = traces
        return f"trace{'s' * bool(first)} {', '.join(first)}{' and ' * bool(first)}{last}"
    models = list(dict.fromkeys(filter(None, map(_model, runs))))
    parts = [" and ".join(models), _data(runs, rows), _documents(rows), _tokens(rows),
             _questions(rows)]  # fmt: skip
    told = ", ".join(filter(None, parts))
    return told + ", CPU" * bool(told and all(run.on_cpu for run in runs))


def titled(asked: str, about: str) -> str:
    """A question and what it was measured on: `How many bits? The reference model, ...`."""
    if not about:
        return asked
    return f"{asked}{'' if asked.endswith('?') else ':'} {about[:1].upper()}{about[1:]}"


def _model(run: Run) -> str:
    """The name it goes by in the rows; of a file with a short one, the run's name."""
    names = list(dict.fromkeys(str(r["params"]["model"]) for r in run.rows
                               if r["params"].get("model")))  # fmt: skip
    told = [MODELS.get(n, n if len(n) > 2 else run.label) for n in names]
    return " and ".join(dict.fromkeys(told))


def _data(runs: list[Run], rows: list[dict]) -> str:
    if not any(row["name"] in (PREDICTED, *ASKED) for row in rows):
        return ""
    return " and ".join(dict.fromkeys(filter(None, (run.data for run in runs))))


def _documents(rows: list[dict]) -> str:
    found = {}
    for row in rows:
        tokens, count = row["params"].get("tokens") or 0, row["count"]
        if row["name"] == PREDICTED and count and tokens > 1 and count % (tokens - 1) == 0:
            found[count // (tokens - 1), tokens] = None
    return " and ".join(f"{n} document{'s' * (n > 1)} x {t:,} tokens" for n, t in sorted(found))


def _tokens(rows: list[dict]) -> str:
    """Lengths that were measured without text."""
    if any(row["name"] == PREDICTED for row in rows):
        return ""
    found = sorted({r["params"]["tokens"] for r in rows if _whole(r["params"].get("tokens"))})
    if not found:
        return ""
    shown = found if len(found) <= 3 else [found[0], found[-1]]
    joined = (" to " if len(found) > 3 else " and ").join(f"{n:,}" for n in shown)
    return f"{joined} tokens"


def _questions(rows: list[dict]) -> str:
    counts = sorted({int(r["count"]) for r in rows if r["name"] in ASKED and r["count"]})
    if not counts:
        return ""
    ends = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    return f"{ends} questions a variant"


def _whole(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
