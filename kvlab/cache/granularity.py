"""What is chosen, blocks or tokens, and who chooses: axes `evict` and `groups` of a cache."""

from __future__ import annotations

from kvlab.core import BadInput

CHOICES = {"all": "all", "per_layer": "layer", "per_head": "head"}


def settled(spec) -> dict[str, str]:
    """`evict` and `groups` of a `CacheSpec`, where the caller left them open. Raises `BadInput`."""
    if spec.groups not in ("auto", *CHOICES):
        raise BadInput("cache.groups", spec.groups, f"must be auto, {', '.join(CHOICES)}")
    if spec.evict not in ("auto", "block", "token"):
        raise BadInput("cache.evict", spec.evict, "must be auto, block or token")
    evict, groups = spec.evict, spec.groups
    if evict == "auto":
        published = spec.member.scored and spec.member.by_token is not None
        evict = "token" if published and not needs_blocks(spec) else "block"
    if groups == "auto":
        groups = "per_head" if evict == "token" else "all"
    return {"evict": evict, "groups": groups}


def check(spec) -> None:
    """Refuse what cannot be chosen so. Raises `BadInput`."""
    policy = spec.member
    if spec.budget.by_head and not (spec.by_token and spec.groups == "per_head"):
        raise BadInput("budget", spec.budget.name, "lets each head hold a number of tokens of its "
                       "own; cache.evict=token cache.groups=per_head, and a policy that scores")
    if spec.budget.by_head and spec.format.sinks:
        raise BadInput("format.sinks", spec.format.sinks, f"keeps first tokens apart for all heads "
                       f"of a block, and budget={spec.budget.name} gives each head blocks of its "
                       "own; format.sinks=0")
    if spec.budget.by_head and spec.format.residual:
        raise BadInput("format.residual", spec.format.residual, f"keeps newest blocks of all heads,"
                       f" and budget={spec.budget.name} gives each head blocks of its own; "
                       "format.residual=0")
    if spec.budget.across and not policy.waits:
        raise BadInput("budget", spec.budget.name, "has heads of all layers compete, and layers "
                       "choose one after another where no policy waits for the end of a context; "
                       "policy=kvzip, or budget=adakv")
    if spec.budget.looks:
        _check_lazy(spec)
    if spec.by_token:
        _check_tokens(spec, policy)
    elif policy.scored and policy.observes is None:
        needs = next(iter(needs_blocks(spec)), None)
        raise BadInput("policy", policy.name, "ranks tokens and no blocks; cache.evict=token"
                       + (f", which {needs}={getattr(spec, needs).name} stands against"
                          if needs else ""))  # fmt: skip
    elif spec.groups == "per_head":
        raise BadInput("cache.groups", "per_head", "a block holds tokens of all heads; "
                       "cache.evict=token chooses for each head")


def _check_lazy(spec) -> None:
    name = spec.budget.name
    if not spec.by_token:
        raise BadInput("budget", name, "looks at attention to single tokens; cache.evict=token, and"
                       " a policy that scores")
    if not spec.window.protected(1):
        raise BadInput("budget", name, "leaves lazy layers the window, and there is none; "
                       "window=sink")


def _check_tokens(spec, policy) -> None:
    if policy.by_token is None:
        raise BadInput("cache.evict", "token", f"policy={policy.name} ranks blocks and no "
                       "tokens; cache.evict=block, or a policy that scores: policy=snapkv")
    if policy.waits and spec.budget_percent is None and spec.bounded:
        key = "budget_blocks" if spec.budget_blocks is not None else "budget_bytes"
        raise BadInput(f"cache.{key}", getattr(spec, key), f"is exceeded by policy={policy.name}, "
                       "which holds the whole context until the model has repeated it; "
                       "cache.budget_percent")
    for axis, why in needs_blocks(spec).items():
        raise BadInput(axis, getattr(spec, axis).name, why)


def told(spec) -> str:
    """What to add to the name of a method that is not run at its published granularity, "" if it
    is: a published name means tokens, each head's own."""
    policy, size = spec.member, spec.block_size
    published = spec.by_token and spec.groups == "per_head"
    if published and policy.waits:  # where heads of all layers compete
        if spec.budget.across:
            return ""
        return "(within each layer)" if spec.budget.adapts else "(each head alike)"
    if not policy.scored or policy.by_token is None or published:
        return ""
    who = {"all": "all layers alike", "per_layer": "each layer", "per_head": "each head"}
    chunks = policy.name == "snapkv" and spec.groups == "per_layer"
    what = "tokens" if spec.by_token else f"blocks of {size}"
    name = " as ChunkKV" if chunks and not spec.by_token else ""
    return f"({what}, {who[spec.groups]}{name})"


def needs_blocks(spec) -> dict[str, str]:
    """Axes whose member needs each token in the place where it was stored -> why."""
    found = (
        ("window", spec.window.rerotate or not spec.window.middle,
         "decides itself which tokens stay; cache.evict=block, or window.middle=true"),
        ("prefix", spec.prefix.shares,
         "shares blocks, and here each head has its own tokens; cache.evict=block"),
        ("offload", spec.offload.keeps,
         "takes blocks, and tokens are given up here; cache.evict=block"),
        ("summary", spec.summary.stands,
         "stands for blocks, and tokens are given up here; cache.evict=block"),
        ("retrieval", spec.retrieval.selects,
         "chooses blocks by what they held when sealed; cache.evict=block"),
    )
    return {axis: why for axis, acts, why in found if acts}
