"""A recipe as a plan's job, and a run made to fit its memory before anything is loaded.

Only config.json of a model is read. On a CPU nothing is planned: host memory has no such phases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch

from sparring.algorithms.registry import find_loss, knob_defaults
from sparring.errors import CheckpointError, MemoryBudgetError, UserError
from sparring.models import checkpoint
from sparring.models.hub import config_of
from sparring.models.lora import LoraConfig
from sparring.models.memory import free_bytes
from sparring.models.nf4_files import stored_as_nf4
from sparring.models.transformer import Decoder
from sparring.recipe import Recipe
from sparring.train.cards import Card, all_cards, find_card
from sparring.train.plan import MICRO_BATCH_TOKENS, MODES, Plan, gib, predict, propose
from sparring.train.plan_job import CONTEXT_BYTES, Job, Settings, Trained, Work, trained_as
from sparring.train.policy import MAX_RUNNING, Policy, pick_device, set_memory_saving, work_of

Algorithm = Literal["grpo", "ppo", "sft", "dpo"]
DEFAULT_TOKENS, DEFAULT_MODE = 8192, "none"
"""What "auto" is where nothing is planned."""
NOMINAL = 1.05
"""A card's memory by its name, at most so many times what programs can use of it."""


def algorithm_of(recipe: Recipe) -> Algorithm:
    """The command that a recipe is for, as its sections tell."""
    if recipe.value is not None:
        return "ppo"
    if recipe.loss.name == "sft" or not recipe.reward:
        return "sft"
    return "grpo"


def trained_of(recipe: Recipe, path: str = "") -> Trained:
    """The policy of a recipe by its config.json; path: another model than model.path."""
    section = recipe.model
    config = config_of(path or section.path)
    shape = checkpoint.family_of(config).config(config)
    lora = recipe.lora
    return Trained(
        config=shape,
        item=4 if _dtype_name(recipe, config) == "float32" else 2,
        is_quantised=section.quantization == "nf4" or stored_as_nf4(config),
        rank=lora.rank if lora is not None else 0,
        targets=LoraConfig(target_modules=lora.target_modules).targets()
        if lora is not None
        else frozenset(),
        optimizer=recipe.optimizer.name,
        keeps_16bit=frozenset(section.keep_16bit),
        head=section.head,
        embedding=section.embedding,
        kv_dtype=recipe.rollout.kv_dtype,
    )


def _trained_as(recipe: Recipe, model: Decoder) -> Trained:
    """A loaded policy as it stands, trained and sampled from as the recipe says."""
    return replace(
        trained_as(model),
        optimizer=recipe.optimizer.name,
        keeps_16bit=frozenset(recipe.model.keep_16bit),
        head=recipe.model.head,
        embedding=recipe.model.embedding,
        kv_dtype=recipe.rollout.kv_dtype,
    )


def dtype_of(recipe: Recipe) -> str:
    """The name of the type that the policy computes in."""
    return _dtype_name(recipe, config_of(recipe.model.path))


def _dtype_name(recipe: Recipe, config: Any) -> str:
    if recipe.model.dtype != "auto":
        return recipe.model.dtype
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    return name.removeprefix("torch.").replace("float64", "float32")


def job_of(
    recipe: Recipe,
    *,
    algorithm: Algorithm | None = None,
    prompt_tokens: int = 0,
    model: Decoder | None = None,
) -> Job:
    """What a recipe asks for; prompt_tokens 0: an assumption within the recipe's limits.

    model: the policy itself, where it is loaded.
    """
    algorithm = algorithm or algorithm_of(recipe)
    policy = trained_of(recipe) if model is None else _trained_as(recipe, model)
    work = _work(recipe, algorithm, policy, prompt_tokens)
    critic = _critic(recipe, policy) if algorithm == "ppo" else None
    return Job(
        policy=policy,
        work=work,
        reference=_reference(recipe, algorithm),
        critic=critic,
        shares_trunk=critic is not None and not (recipe.value and recipe.value.path),
        passes=recipe.train.passes,
        mini_steps=recipe.train.mini_steps,
        samples=algorithm in ("grpo", "ppo"),
        most_completions=MAX_RUNNING if recipe.data.eval else 0,
    )


def _work(recipe: Recipe, algorithm: Algorithm, policy: Trained, prompt_tokens: int) -> Work:
    train, limit = recipe.train, recipe.model.max_tokens or policy.config.max_tokens
    if algorithm in ("sft", "dpo"):
        rows = train.conversations_per_step if algorithm == "sft" else train.pairs_per_step
        longest = min(limit, train.micro_batch_tokens or DEFAULT_TOKENS)
        size = 1 if algorithm == "sft" else 2
        return Work(
            prompts=rows, group_size=size, prompt_tokens=1, completion_tokens=longest // size
        )
    return work_of(recipe.rollout, limit, prompt_tokens)


def _reference(recipe: Recipe, algorithm: Algorithm) -> str:
    loss = recipe.loss
    if algorithm == "ppo":
        coefficient = recipe.advantage.knobs.get("kl_coef", 0.0)
    elif algorithm == "dpo":
        coefficient = 0.0 if loss.knobs.get("reference_free") else 1.0
    elif algorithm == "grpo":
        defaults = knob_defaults(find_loss(loss.name))
        coefficient = loss.knobs.get("kl_coef", defaults.get("kl_coef", 0.0))
    else:
        coefficient = 0.0
    if not coefficient:
        return "none"
    if recipe.lora is None:
        return "weights"
    return "adapter" if recipe.model.adapter else "base"


def _critic(recipe: Recipe, policy: Trained) -> Trained:
    """The critic of [value]: on the policy's trunk, or on a model of its own."""
    section = recipe.value
    path, rank = ("", 16) if section is None else (section.path, section.rank)
    everywhere = LoraConfig().targets()
    if not path:
        # rank 0: the head alone is trained; no layer has an adapter
        targets = everywhere if rank else frozenset()
        return replace(policy, rank=max(rank, 1), targets=targets, has_head=False)
    own = trained_of(recipe, path)
    return replace(
        own, rank=rank, targets=everywhere, is_quantised=False, has_head=False, head="16bit"
    )


def settings_of(recipe: Recipe) -> Settings:
    """The settings that a recipe names; 0 and "auto" stand for what is to be chosen."""
    train, rollout = recipe.train, recipe.rollout
    return Settings(
        micro_batch_tokens=train.micro_batch_tokens or DEFAULT_TOKENS,
        checkpointing=DEFAULT_MODE if train.checkpointing == "auto" else train.checkpointing,
        offload=train.offload,
        mlp_tile_tokens=train.mlp_tile_tokens,
        kv_bytes=0 if rollout.kv_memory == "auto" else int(rollout.kv_memory),
        max_running=MAX_RUNNING,
        caches_weights=None if rollout.cache_weights == "auto" else rollout.cache_weights,
    )


def plan_recipe(
    recipe: Recipe, job: Job, *, budget: int | None, card: Card
) -> tuple[Plan, Plan | None]:
    """The plan of the recipe as a run takes it, and the fastest that fits the budget.

    What the recipe leaves out or "auto" is what a run would decide; values that it gives and that
    do not fit make the first a plan that does not fit. The second is None where there is no budget
    ("auto" is then 8192 tokens, no checkpoints). Raises MemoryBudgetError where nothing fits.
    """
    wanted = settings_of(recipe)
    if budget is None:
        return predict(job, wanted, card=card), None
    best = propose(job, wanted, budget=budget, card=card)
    asked = _fitting(recipe, job, budget, card)
    if asked is None:
        asked = replace(predict(job, wanted, card=card), budget=budget)
    return asked, best


def fit_memory(
    recipe: Recipe, algorithm: Algorithm, say: Callable[[str], None], loaded: Policy | None = None
) -> Recipe:
    """The recipe with every "auto" of memory decided, and the allocator held to run.memory.

    Call it before anything is on the device; loaded: a policy that is there all the same, whose
    own checkpointing counts and gives way where it does not fit. On a GPU run.memory becomes bytes:
    what it says, or what is free now, read here once. Raises MemoryBudgetError, with the proposal,
    where micro_batch_tokens and checkpointing as the recipe has them do not fit.
    """
    device = pick_device() if loaded is None else loaded.model.device
    if device.type != "cuda":
        return _decided(recipe, settings_of(recipe))
    if loaded is None:
        # the one way to set it after the process began; the public one is a variable read at import
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")
    budget = hold_budget(recipe.run.memory, device, say)
    recipe = recipe.model_copy(update={"run": recipe.run.model_copy(update={"memory": budget})})
    model = None if loaded is None else loaded.model
    if model is not None:
        recipe = _as_set(recipe, model)
    job = job_of(recipe, algorithm=algorithm, model=model)
    if job.policy.item != 2:
        say("memory is not planned for float32 on a GPU: attention runs in plain torch there")
        return _decided(recipe, settings_of(recipe))
    card = _card_of(device)
    try:
        chosen = _chosen(recipe, job, budget, card)
    except MemoryBudgetError:
        if model is None:
            raise
        chosen = propose(job, settings_of(recipe), budget=budget, card=card)
    say(_told(chosen))
    decided = _decided(recipe, chosen.settings)
    if model is not None:
        set_memory_saving(model, decided)
    return decided


def _as_set(recipe: Recipe, model: Decoder) -> Recipe:
    """The recipe with the checkpointing that a loaded model has, where it has one."""
    kept = model.checkpointing
    if kept.mode == "none":
        return recipe
    train = {"checkpointing": kept.mode, "offload": kept.offload}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=train)})


def hold_budget(
    memory: int | Literal["auto"], device: torch.device, say: Callable[[str], None]
) -> int:
    """Bytes that a process may take, context included, by run.memory; the allocator is told.

    A card sold as 24 GB has less that programs can use: memory just above that means all of it.
    Raises MemoryBudgetError where it is far above.
    """
    # the allocator's limits are set by a card's number
    index = torch.cuda.current_device() if device.index is None else device.index
    device = torch.device("cuda", index)
    total = int(torch.cuda.get_device_properties(device).total_memory)
    free = free_bytes(device) + torch.cuda.memory_reserved(device)
    if memory == "auto":
        torch.cuda.set_per_process_memory_fraction(1.0, device)
        return free
    budget = memory
    if total < budget <= NOMINAL * total:
        say(f"run.memory is {gib(budget)}; programs can use {gib(total)} of this card: all of it")
        budget = total
    if budget > total:
        raise MemoryBudgetError(
            f"[run] memory = {gib(budget)}, but {torch.cuda.get_device_name(device)} has"
            f' {gib(total)}; give it at most that, or "auto"'
        )
    if budget > free + CONTEXT_BYTES:
        say(f"run.memory is {gib(budget)}, but only {gib(free)} are free now: others use the card")
    torch.cuda.set_per_process_memory_fraction(max(0, budget - CONTEXT_BYTES) / total, device)
    return budget


def _chosen(recipe: Recipe, job: Job, budget: int, card: Card) -> Plan:
    """The recipe's own settings where they fit, its open ones decided; else MemoryBudgetError."""
    found = _fitting(recipe, job, budget, card)
    if found is not None:
        return found
    train, wanted = recipe.train, settings_of(recipe)
    best = propose(job, wanted, budget=budget, card=card)
    lines = "\n".join(proposal_lines(best))
    raise MemoryBudgetError(
        f"micro_batch_tokens = {train.micro_batch_tokens or 'auto'} with checkpointing ="
        f' "{train.checkpointing}" do not fit into {gib(budget)}: they take'
        f" {gib(predict(job, wanted, card=card).total)}. The fastest that"
        f' fits (or write "auto"):\n{lines}'
    )


def _fitting(recipe: Recipe, job: Job, budget: int, card: Card) -> Plan | None:
    """What a run takes, or None where values that the recipe gives do not fit.

    "auto" is the fastest that fits. A key that is left out has its default where that fits, and is
    as good as "auto" where it does not.
    """
    train, wanted = recipe.train, settings_of(recipe)
    given = train.model_fields_set
    modes = MODES if train.checkpointing == "auto" else (train.checkpointing,)
    tokens = (train.micro_batch_tokens,) if train.micro_batch_tokens else MICRO_BATCH_TOKENS
    attempts = [(modes, tokens)]
    if not {"checkpointing", "micro_batch_tokens"} <= given:
        attempts.append(
            (
                modes if "checkpointing" in given else MODES,
                tokens if "micro_batch_tokens" in given else MICRO_BATCH_TOKENS,
            )
        )
    for modes, tokens in attempts:
        is_open = len(modes) > 1 or len(tokens) > 1
        try:
            return propose(
                job, wanted, budget=budget, card=card, modes=modes, tokens=tokens,
                may_offload=is_open,
            )  # fmt: skip
        except MemoryBudgetError:
            continue
    return None


def proposal_lines(plan: Plan) -> list[str]:
    """Recipe lines to paste."""
    settings = plan.settings
    lines = []
    if plan.budget is not None:
        lines += ["[run]", f'memory = "{plan.budget / 2**30:g}GiB"']
    lines += [
        "[train]",
        f"micro_batch_tokens = {settings.micro_batch_tokens}",
        f'checkpointing = "{settings.checkpointing}"',
    ]
    if settings.offload:
        lines.append("offload = true")
    return lines


def _told(plan: Plan) -> str:
    settings = plan.settings
    kv = f", {gib(settings.kv_bytes)} for keys and values" if plan.rollout is not None else ""
    return (
        f"memory: {gib(plan.total)} of {gib(plan.budget or plan.total)} planned;"
        f" {settings.micro_batch_tokens} tokens a micro-batch, checkpointing"
        f" {settings.checkpointing}{kv}"
    )


def _decided(recipe: Recipe, settings: Settings) -> Recipe:
    """The recipe with the settings in the place of what it left open."""
    train = recipe.train.model_copy(
        update={
            "micro_batch_tokens": settings.micro_batch_tokens,
            "checkpointing": settings.checkpointing,
            "offload": settings.offload,
        }
    )
    rollout = recipe.rollout
    if settings.kv_bytes:
        found = {"kv_memory": settings.kv_bytes, "cache_weights": bool(settings.caches_weights)}
        rollout = rollout.model_copy(update=found)
    return recipe.model_copy(update={"train": train, "rollout": rollout})


def _card_of(device: torch.device) -> Card:
    """The table's card of that name, or one with this one's arch; it ranks settings, no more."""
    major, minor = torch.cuda.get_device_capability(device)
    return replace(_named(device) or all_cards()["H200"], arch=10 * major + minor)


def own_card() -> Card | None:
    """This machine's card where it has one and the table has it."""
    return _named(torch.device("cuda")) if torch.cuda.is_available() else None


def _named(device: torch.device) -> Card | None:
    """The table's card that has the device's name."""
    try:
        return find_card(torch.cuda.get_device_name(device))
    except UserError:
        return None


def cost_of(recipe: Recipe, algorithm: Algorithm, card: Card) -> tuple[str, dict[str, float]]:
    """What a step of this recipe costs on a card, in words and as numbers.

    The recipe's own settings are taken, or the fastest that fit the card where they do not. Without
    a model, or where nothing fits, the words say so and there are no numbers.
    """
    if not recipe.model.path:
        return "memory and time of the run are not told: the recipe names no model", {}
    budget = card.usable if recipe.run.memory == "auto" else int(recipe.run.memory)
    try:
        config_of(recipe.model.path, fetch=False)
        job = job_of(recipe, algorithm=algorithm)
        asked, best = plan_recipe(recipe, job, budget=budget, card=card)
    except (CheckpointError, MemoryBudgetError) as error:
        return f"memory and time of the run are not told: {error}", {}
    plan = asked if asked.fits or best is None else best
    assert plan.seconds is not None, "a card is named"
    source = "measured card" if card.is_measured else "estimate"
    words = (
        f"a step of {algorithm} takes about {gib(plan.total)} and {plan.seconds.total:.1f} s on"
        f" {card.name} ({source}) with completions of full length"
        f" ({plan.settings.micro_batch_tokens} tokens a micro-batch, checkpointing"
        f' "{plan.settings.checkpointing}"); {recipe.train.steps} steps:'
        f" {recipe.train.steps * plan.seconds.total / 60:.0f} min; other cards: `sparring plan`"
    )
    name = f"planned_{algorithm}"
    return words, {f"{name}_bytes": plan.total, f"{name}_step_seconds": plan.seconds.total}
