"""What the study measures, in the order in which it is worth most: arms, tasks, jobs."""

from __future__ import annotations

from typing import NamedTuple

from kvlab.budget import DuoAttention, SimLayer
from kvlab.cache import CacheSpec
from kvlab.core import Variant
from kvlab.policy import Compactor, TriAttention
from kvlab.window import SinkWindow

BLOCK, WINDOW = 16, SinkWindow(4, 64)
BUDGETS = (25.0, 50.0, 12.5, 75.0)

# Tasks in the order of what they tell, each with the tokens that an answer may have (None: as many
# as its authors let it). RULER's 128 for needles let a lost model write on to no purpose.
CANDIDATES = {
    "niah_single_2": 48, "niah_multikey_1": 48, "niah_single_3": 64, "niah_multivalue": 80,
    "number_string": None, "niah_multiquery": 96, "niah_multikey_2": 48, "vt": None, "fwe": None,
    "kv_retrieval": None, "cwe": None, "niah_multikey_3": 64, "niah_single_1": 48,
    "passkey": None, "math_find": None,
}  # fmt: skip
REQUESTS = ("scbench_kv_requests", "scbench_vt_requests", "scbench_prefix_suffix_requests")
FORMATS = ("fp8", "int8", "int4", "k4v2", "fp8c", "int4g", "int2g")

# Policy and budget -> axes; those that read a file or have settings are in `axes_of`. Tokens are
# chosen by each head of each layer.
METHODS = {
    "snapkv": {}, "expected_attention": {}, "key_diff": {}, "key_norm": {}, "tova": {},
    "attention_mass": {}, "lagkv": {}, "compactor": {}, "kvzip": {}, "h2o": {},
    "snapkv adakv": {"budget": "adakv"}, "snapkv pyramid": {"budget": "pyramid"},
    "snapkv duo": {}, "snapkv simlayer": {}, "kvzip all_heads": {},
    "expected_attention adakv": {"budget": "adakv"}, "triattention": {},
    "snapkv chunks": {"evict": "block", "groups": "per_layer"},
}  # fmt: skip
FEW = ("snapkv", "snapkv adakv", "expected_attention", "key_diff", "tova", "attention_mass",
       "compactor", "kvzip all_heads")  # fmt: skip

POSSIBLE, MARGIN, MOST = 60.0, 30.0, 6  # percent, points over a guess, tasks


class Job(NamedTuple):
    """One process's work at a time, a run folder of its own.

    kind: probe (full cache alone), evict, formats, requests or prepare. tokens: of a prompt.
    """

    name: str
    kind: str
    model: str
    tokens: int = 0
    tasks: tuple[str, ...] = ()
    inside: bool = False
    budget: float = 0.0
    methods: tuple[str, ...] = ()
    items: int = 0

    @property
    def arms(self) -> int:
        """Caches that go through each item: with the full one and no context, and the controls."""
        more = {"probe": 1, "evict": 6, "formats": 1, "requests": 1}.get(self.kind, 0)
        return len(self.methods) + more

    @property
    def prompt_tokens(self) -> int:
        turns = 5 if self.kind == "requests" else 1
        return self.arms * self.items * len(self.tasks) * self.tokens * turns

    @property
    def decoded_tokens(self) -> int:
        """At most a third more than answers mostly have: a lost cache writes to the limit."""
        return sum(self.arms * self.items * (CANDIDATES.get(t) or 40) // 2 for t in self.tasks)


class Chosen(NamedTuple):
    """What a machine without a GPU has time for: parts of METHODS, FORMATS and REQUESTS. shared:
    formats in which contexts are shared."""

    methods: tuple[str, ...] = tuple(METHODS)
    formats: tuple[str, ...] = FORMATS
    requests: tuple[str, ...] = REQUESTS
    shared: tuple[str, ...] = ("bf16", "int8")

    @property
    def prepared(self) -> bool:
        """Whether a method reads what is measured of a model at the start."""
        return bool({"snapkv duo", "triattention"} & {*self.methods})


ALL = Chosen()


def variants(job: Job, files: dict[str, str]) -> list[Variant]:
    """The arms of a job; files: of what some methods read, methods without theirs are left out."""
    if job.kind == "formats":
        return [Variant(name, {"format": name}, CacheSpec(format=name, block_size=BLOCK))
                for name in job.methods]
    if job.kind == "requests":
        return [Variant(f"prefix=hash {name}", {"prefix": "hash", "format": name},
                        CacheSpec(prefix="hash", format=name, block_size=BLOCK))
                for name in job.methods]
    made = []
    for name in job.methods:
        if (axes := axes_of(name, files)) is not None:
            policy = axes["policy"] if isinstance(axes["policy"], str) else name.split()[0]
            spec = CacheSpec(format="bf16", block_size=BLOCK, window=WINDOW,
                             budget_percent=job.budget, **axes)
            about = {"policy": policy, "budget": spec.budget.name, "granularity": spec.granularity,
                     "cache.budget_percent": job.budget}
            told = f"{name} {job.budget:g}% {spec.granularity}"  # what is not as published says so
            made.append(Variant(told.rstrip(), about, spec))
    return made


def axes_of(name: str, files: dict[str, str]) -> dict | None:
    """Arguments of `CacheSpec` of a method; None where a file that it reads is not there."""
    axes = {"policy": name.split()[0], **METHODS[name]}
    if name == "snapkv duo":
        return axes | {"budget": DuoAttention(files["gates"])} if "gates" in files else None
    if name == "triattention":
        if "centres" not in files:
            return None
        return axes | {"policy": TriAttention(files["centres"])}
    if name == "snapkv simlayer":
        axes |= {"budget": SimLayer(None)}
    if name == "kvzip all_heads":
        axes |= {"budget": "all_heads"}
    if name == "compactor":
        axes |= {"policy": Compactor(sketch=48)}
    return axes


def probes(models: dict[str, list[int]], items: int, tasks=tuple(CANDIDATES),
           chosen: Chosen = ALL) -> list[Job]:  # fmt: skip
    """The first stage: what the full cache can do; and what some methods need of a model."""
    found = [Job(f"prepare-{model}", "prepare", model) for model in models if chosen.prepared]
    for model, lengths in models.items():
        for tokens in lengths:
            for task in tasks:
                found.append(Job(f"full-{model}-{tokens}-{task}", "probe", model, tokens, (task,),
                                 items=items))  # fmt: skip
    return sorted(found, key=lambda job: (job.kind != "prepare", -job.tokens))


def possible(scores: dict[str, tuple[float, float]], most: int = MOST) -> list[str]:
    """Tasks that a full cache can do, the most telling first; scores: of it and of no context, in
    percent."""
    done = [task for task in CANDIDATES if task in scores]
    good = [t for t in done if scores[t][0] >= POSSIBLE and scores[t][0] - scores[t][1] >= MARGIN]
    return good[:most]


def jobs(models: dict[str, list[int]], tasks: dict[tuple[str, int], list[str]], items: int,
         budgets=BUDGETS, chosen: Chosen = ALL) -> list[Job]:  # fmt: skip
    """The second stage, what matters most first. models: name -> lengths, the main one first;
    tasks: what each can do at each length; chosen: how much of the study."""
    main, *others = models
    base, *longer = models[main]
    few = tuple(name for name in FEW if name in chosen.methods)

    def evict(model, tokens, inside, budget, methods, count=items, most=MOST):
        side = "inside" if inside else "outside"
        return [Job(f"{side}-{model}-{tokens}-{task}-{budget:g}", "evict", model, tokens, (task,),
                    inside, budget, methods, count)
                for task in tasks.get((model, tokens), [])[:most]]  # fmt: skip

    every, found = chosen.methods, []
    first, *later = budgets
    found += evict(main, base, False, first, every)
    found += [Job(f"formats-{main}-{base}-{task}", "formats", main, base, (task,),
                  methods=chosen.formats, items=items) for task in tasks.get((main, base), [])]
    found += evict(main, base, True, first, every)
    found += [Job(f"requests-{main}-{tokens}-{task}", "requests", main, tokens, (task,),
                  methods=chosen.shared, items=max(1, items // 4))
              for tokens in (base, *longer[-1:]) for task in chosen.requests]
    for budget in later[:2]:
        found += evict(main, base, False, budget, every)
    for model in others:
        found += evict(model, models[model][0], False, first, every)
    fewer = max(1, 2 * items // 3), 4
    for tokens in longer:
        found += evict(main, tokens, False, first, few, *fewer)
    for budget in later[:2]:
        found += evict(main, base, True, budget, few)
    for model in others:
        found += evict(model, models[model][0], True, first, few)
        for budget in later[:1]:
            found += evict(model, models[model][0], False, budget, few)
    for budget in later[2:]:
        found += evict(main, base, False, budget, few)
    for tokens in longer:
        found += evict(main, tokens, True, first, few, *fewer)
        for budget in later[1:2]:
            found += evict(main, tokens, False, budget, few, *fewer)
    for budget in later[2:]:
        found += evict(main, base, True, budget, few)
    return found
