"""What does an intervention change in an agent? Does it, looks, makes two updates, looks after each.

It takes any module, optimizer and intervention: hold an implementation of your own against it.

    def look():
        return Audited(network=agent.online, target=agent.target, optimizer=agent.optimizer, ...)

    faults = faults_of_injection(audit(look, agent.inject))
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn as nn

from support.optimizers import num_trainable
from support.usage import UsageError

ENCODER = "φ"  # the names of the parts that an injection knows
OLD_HEAD = "θ"
NEW_HEAD = "θ′₁"
FROZEN_TWIN = "θ′₂"
SAME_GRADIENT = 1e-3  # relative difference up to which two ways to compute a gradient may differ by rounding

Extent = Literal["none", "part", "all"]
Parameters = dict[str, dict[str, torch.Tensor]]  # {part: {name in the part: values}}
# of one parameter, as an optimizer has it: its moments, the count of its steps
State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Audited:
    """An agent as it is now. Nothing of it is copied, so updates and interventions show."""

    network: nn.Module
    """the online one, which is trained: obs → Q-values (B, actions)"""
    target: nn.Module
    """the target network, of the same kind"""
    optimizer: torch.optim.Optimizer
    parts: dict[str, str]
    """{name: path in `network`} of what is told apart, each with parameters. The encoder is called φ; an
    injection's heads are θ, θ′₁ and θ′₂. A part may be there only after the intervention"""
    obs: torch.Tensor
    """a batch that the network takes"""
    formula: Callable[[torch.Tensor], torch.Tensor]
    """obs → Q-values by the equation, written out with the network's own parameters"""
    update: Callable[[], Any]
    """makes one gradient step"""


@dataclass(frozen=True)
class PartFindings:
    """What became of a part."""

    changed: Extent
    """at the intervention: whether all entries of all its parameters did, some, or none"""
    first_update: Extent
    """whether all its parameters moved, some, or none; a parameter moves where one of its entries does"""
    second_update: Extent
    in_optimizer: Extent
    """after the intervention: whether all its parameters are in the optimizer, some, or none"""
    moments: str
    """at the intervention the optimizer's state was kept, emptied, zeroed, zeroed in part, copied (from
    another part), shared (with one, which is wrong), changed; or it was empty and is so still. Several, where
    its parameters differ"""


@dataclass(frozen=True)
class Findings:
    """What an intervention did to an agent."""

    parts: dict[str, PartFindings]
    max_abs_delta_q: float
    """the largest change of Q at the intervention"""
    target_outputs_equal: bool
    """after it, whether the target network gives what the online one does"""
    target_state_equal: bool
    """the same of their state dicts, which may say more than the outputs do: which heads are in use"""
    target_changed: bool
    """whether the target network's outputs or state changed at all"""
    target_equal_before: bool
    """whether it was a copy already; then being one afterwards shows nothing"""
    target_shares_weights: bool
    """whether a parameter that learns is the target network's, too, which then moves with every update"""
    gradient_error: float
    """how far the encoder's gradient is from that of the formula, as a share of its length: the largest
    after the intervention and after the two updates"""
    trainable_before: int
    trainable_after: int
    new_reaches_q: bool
    """whether Q depends on what was drawn anew. Recycled units must not be felt before they have learned"""
    new_head_is_old: bool
    """whether θ′₁ has, right after the intervention, a tensor of weights that θ has"""
    thawed: bool = False
    """whether a parameter that is frozen after the intervention is to learn after the updates"""
    moving_buffers: tuple[str, ...] = ()
    """the frozen parts that have a buffer which an update changes, as the statistics of a batch norm"""


@dataclass(frozen=True)
class Snapshot:
    """Copies of what may change."""

    parameters: Parameters
    moments: dict[str, dict[str, State]]  # {part: {name in the part: its state}}, of those that have any
    q_values: torch.Tensor
    target_q_values: torch.Tensor
    target_state: dict[str, Any]


def audit(look: Callable[[], Audited], intervene: Callable[[], Any]) -> Findings:
    """Does the intervention and makes two updates, and says what happened. The agent stays changed.

    Before it, the agent should have learned a little, and its target network should not be a copy of the
    online one: else there is nothing to see in some of the findings.

    Args:
        look: gives the agent as it is when called; an intervention may have put new objects in its place
        intervene: does the intervention to that agent

    Raises:
        UsageError: there is no part φ, or one without parameters; or weights of φ are frozen; or the network
            gives two outputs for one input, or numbers that are not finite, before the intervention or after
            an update.
    """
    agent = look()
    refuse_noise(agent)
    before = snapshot(agent)
    trainable_before = num_trainable(agent.network)
    target_equal_before = same_outputs(agent) and same_state(agent)

    intervene()
    agent = look()
    after = snapshot(agent)
    new = changed_entries(before.parameters, after.parameters)
    in_optimizer = known_parameters(agent)
    moments = what_became_of_moments(agent, before.moments, after.moments)
    outputs_equal = same_outputs(agent)
    state_equal = same_state(agent)
    shared_with_target = target_shares_weights(agent)
    trainable_after = num_trainable(agent.network)
    reaches_q = new_reaches_q(agent, new)
    gradient_errors = [gradient_error(agent)]
    frozen = frozen_parameters(agent)
    buffers = buffers_of_frozen(agent)

    updated = []
    for _ in range(2):
        agent.update()
        agent = look()
        refuse_noise(agent)  # an update may have called network.train()
        updated.append(copy_parameters_of(agent))
        gradient_errors.append(gradient_error(agent))
    first, second = updated
    thawed = not frozen <= frozen_parameters(agent)

    moved_first = changed_entries(after.parameters, first)
    moved_second = changed_entries(first, second)
    parts = {}
    for part in agent.parts:
        parts[part] = PartFindings(
            changed=extent(entries(new[part])),
            first_update=extent(moving(moved_first[part])),
            second_update=extent(moving(moved_second[part])),
            in_optimizer=extent(in_optimizer[part]),
            moments=moments[part],
        )
    target_as_before = torch.equal(before.target_q_values, after.target_q_values)
    target_as_before = target_as_before and equal_states(before.target_state, after.target_state)
    return Findings(
        parts=parts,
        max_abs_delta_q=(after.q_values - before.q_values).abs().max().item(),
        target_outputs_equal=outputs_equal,
        target_state_equal=state_equal,
        target_changed=not target_as_before,
        target_equal_before=target_equal_before,
        target_shares_weights=shared_with_target,
        gradient_error=max(gradient_errors),
        trainable_before=trainable_before,
        trainable_after=trainable_after,
        new_reaches_q=reaches_q,
        new_head_is_old=shares_weights(after.parameters),
        thawed=thawed,
        moving_buffers=moved_buffers(buffers, agent),
    )


# Looking


@torch.no_grad()
def refuse_noise(agent: Audited) -> None:
    q_values = agent.network(agent.obs).clone()
    if not q_values.isfinite().all():
        raise UsageError(
            "the network gives numbers that are not finite: audit one that has learned less, "
            "or lower its learning rate"
        )
    if not torch.equal(agent.network(agent.obs), q_values):
        raise UsageError(
            "the network gives two outputs for the same obs: leave dropout and noise out of the audit, "
            "by network.eval(), also at the end of an update that calls network.train()"
        )


def frozen_parameters(agent: Audited) -> set[str]:
    return {name for name, parameter in agent.network.named_parameters() if not parameter.requires_grad}


def buffers_of_frozen(agent: Audited) -> dict[str, dict[str, torch.Tensor]]:
    """{part: {name: copy of a buffer}} of the parts of which no parameter learns."""
    copies = {}
    for part, path in agent.parts.items():
        module = agent.network.get_submodule(path)
        if not any(parameter.requires_grad for parameter in module.parameters()):
            copies[part] = {name: buffer.clone() for name, buffer in module.named_buffers()}
    return copies


def moved_buffers(before: dict[str, dict[str, torch.Tensor]], agent: Audited) -> tuple[str, ...]:
    moved = []
    for part, buffers in before.items():
        module = agent.network.get_submodule(agent.parts[part])
        if not equal_states(buffers, dict(module.named_buffers())):
            moved.append(part)
    return tuple(moved)


def parameters_of(agent: Audited) -> Parameters:
    """The very tensors, by part."""
    if ENCODER not in agent.parts:
        raise UsageError(f"the parts are {', '.join(agent.parts)}: name the encoder's path, as {ENCODER}")
    found: Parameters = {}
    for part, path in agent.parts.items():
        found[part] = dict(agent.network.get_submodule(path).named_parameters())
        if not found[part]:
            raise UsageError(f"{part}, at {path}, has no parameters: name a part that has some")
    return found


def copy_parameters_of(agent: Audited) -> Parameters:
    copies: Parameters = {}
    for part, parameters in parameters_of(agent).items():
        copies[part] = {name: values.detach().clone() for name, values in parameters.items()}
    return copies


def state_of(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> State:
    """What the optimizer knows of a parameter, nothing before its first update."""
    known = optimizer.state.get(parameter, {})
    return {name: torch.as_tensor(value) for name, value in known.items() if value is not None}


def target_shares_weights(agent: Audited) -> bool:
    of_target = {parameter.data_ptr() for parameter in agent.target.parameters()}
    learning = [parameter for parameter in agent.network.parameters() if parameter.requires_grad]
    return any(parameter.data_ptr() in of_target for parameter in learning)


def copy_moments_of(agent: Audited) -> dict[str, dict[str, State]]:
    copies: dict[str, dict[str, State]] = {}
    for part, parameters in parameters_of(agent).items():
        copies[part] = {}
        for name, parameter in parameters.items():
            state = state_of(agent.optimizer, parameter)
            if state:
                copies[part][name] = {key: value.clone() for key, value in state.items()}
    return copies


@torch.no_grad()
def snapshot(agent: Audited) -> Snapshot:
    target_state = {}
    for name, value in agent.target.state_dict().items():
        target_state[name] = value.clone() if isinstance(value, torch.Tensor) else value
    return Snapshot(
        parameters=copy_parameters_of(agent),
        moments=copy_moments_of(agent),
        q_values=agent.network(agent.obs).clone(),
        target_q_values=agent.target(agent.obs).clone(),
        target_state=target_state,
    )


def equal_states(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether two state dicts say the same."""
    if a.keys() != b.keys():
        return False
    for name, value in a.items():
        if isinstance(value, torch.Tensor):
            if not torch.equal(value, b[name]):
                return False
        elif value != b[name]:
            return False
    return True


def same_state(agent: Audited) -> bool:
    return equal_states(agent.network.state_dict(), agent.target.state_dict())


@torch.no_grad()
def same_outputs(agent: Audited) -> bool:
    return torch.equal(agent.network(agent.obs), agent.target(agent.obs))


def known_parameters(agent: Audited) -> dict[str, torch.Tensor]:
    """{part: whether the optimizer holds each of its parameters, (parameters,) bool}."""
    held: set[int] = set()
    for group in agent.optimizer.param_groups:
        held.update(map(id, group["params"]))
    known = {}
    for part, parameters in parameters_of(agent).items():
        known[part] = torch.tensor([id(parameter) in held for parameter in parameters.values()])
    return known


# Comparing


def extent(truths: torch.Tensor) -> Extent:
    """Whether all of them are true, a part, or none."""
    if truths.all():
        return "all"
    if truths.any():
        return "part"
    return "none"


def entries(masks: dict[str, torch.Tensor]) -> torch.Tensor:
    """All entries of a part's masks, in one row."""
    return torch.cat([mask.flatten() for mask in masks.values()])


def moving(masks: dict[str, torch.Tensor]) -> torch.Tensor:
    """Of each of a part's parameters, whether one of its entries is in the mask."""
    return torch.stack([mask.any() for mask in masks.values()])


def changed_entries(before: Parameters, after: Parameters) -> Parameters:
    """Which entries are others now, as masks of the shapes that there are now; all of a part that is new."""
    masks: Parameters = {}
    for part, parameters in after.items():
        old = before.get(part, {})
        masks[part] = {}
        for name, values in parameters.items():
            if name in old and old[name].shape == values.shape:
                masks[part][name] = old[name] != values
            else:
                masks[part][name] = torch.ones_like(values, dtype=torch.bool)
    return masks


def shares_weights(parameters: Parameters) -> bool:
    """Whether the new head has one of the old head's tensors, but for those whose numbers are all equal."""
    old_head = parameters.get(OLD_HEAD, {})
    for name, values in parameters.get(NEW_HEAD, {}).items():
        differ = bool((values != values.flatten()[0]).any())
        if differ and name in old_head and torch.equal(values, old_head[name]):
            return True
    return False


def what_became_of(before: State, after: State, parameter: torch.Tensor) -> str:
    """Of the optimizer's state of one parameter."""
    if not after:
        return "emptied" if before else "empty"
    if not before:
        return "new"
    if equal_states(before, after):
        return "kept"
    moments_are_zero = True
    for name, values in after.items():
        if name not in before or before[name].shape != values.shape:
            return "changed"
        if values.shape != parameter.shape:  # the count of steps, which is no moment
            if not torch.equal(values, before[name]):
                return "changed"
            continue
        if bool(((values != 0) & (values != before[name])).any()):
            return "changed"
        moments_are_zero = moments_are_zero and not values.any()
    return "zeroed" if moments_are_zero else "zeroed in part"


def what_became_of_moments(
    agent: Audited, before: dict[str, dict[str, State]], after: dict[str, dict[str, State]]
) -> dict[str, str]:
    """Of each part's, in the words of `PartFindings.moments`."""
    found = {}
    all_parameters = parameters_of(agent)
    for part, parameters in all_parameters.items():
        words = set()
        for name, parameter in parameters.items():
            states = (before.get(part, {}).get(name, {}), after[part].get(name, {}))
            words.add(what_became_of(*states, parameter))
        if words == {"kept", "zeroed in part"}:
            words = {"zeroed in part"}
        if words & {"new", "changed"}:
            for other in all_parameters:
                if other != part and same_moments(after[part], after[other]):
                    words = {"copied"}
        found[part] = ", ".join(sorted(words))
    for part in shared_moments(agent):
        found[part] = "shared"
    return found


def same_moments(a: dict[str, State], b: dict[str, State]) -> bool:
    """Whether two parts have the same ones, parameter by parameter."""
    return a.keys() == b.keys() and all(equal_states(a[name], b[name]) for name in a)


def shared_moments(agent: Audited) -> set[str]:
    """Parts whose moments are another part's very tensors, so that the updates of both change them."""
    owners: dict[int, str] = {}
    sharing = set()
    for part, parameters in parameters_of(agent).items():
        for parameter in parameters.values():
            for value in agent.optimizer.state.get(parameter, {}).values():
                if not isinstance(value, torch.Tensor):
                    continue
                owner = owners.setdefault(value.data_ptr(), part)
                if owner != part:
                    sharing |= {owner, part}
    return sharing


# The encoder's gradient, and what Q depends on


def encoder_gradient(agent: Audited, q_values: torch.Tensor) -> torch.Tensor:
    """Of a sum of the Q-values with fixed random weights, as one vector."""
    parameters = list(agent.network.get_submodule(agent.parts[ENCODER]).parameters())
    if not all(parameter.requires_grad for parameter in parameters):
        raise UsageError(f"{ENCODER} has frozen weights: it is to learn on, set requires_grad of all of them")
    weights = torch.randn(q_values.shape, generator=torch.Generator().manual_seed(0))
    total = (q_values * weights.to(q_values.device)).sum()
    gradients = torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def gradient_error(agent: Audited) -> float:
    """How far the encoder's gradient is from that of the formula, as a share of its length."""
    of_network = encoder_gradient(agent, agent.network(agent.obs))
    of_formula = encoder_gradient(agent, agent.formula(agent.obs))
    difference = torch.linalg.vector_norm(of_network - of_formula).item()
    length = torch.linalg.vector_norm(of_formula).item()
    if difference == 0:
        return 0.0
    if length == 0:
        return math.inf
    return difference / length


@torch.no_grad()
def new_reaches_q(agent: Audited, new: Parameters) -> bool:
    """Whether Q changes, by a bit, where what was drawn anew is drawn once more.

    That is what changed and is not zero. It is drawn with either sign, so that no unit with a ReLU misses it.
    """
    q_values = agent.network(agent.obs).clone()
    kept = copy_parameters_of(agent)
    for sign in (1, -1):
        generator = torch.Generator().manual_seed(0)
        for part, parameters in parameters_of(agent).items():
            for name, parameter in parameters.items():
                drawn = torch.randn(parameter.shape, generator=generator).to(parameter.device)
                other = sign * drawn * parameter.abs().mean()
                mask = new[part][name] & (parameter != 0)
                parameter.copy_(torch.where(mask, other, parameter))
        reached = not torch.equal(agent.network(agent.obs), q_values)
        for part, parameters in parameters_of(agent).items():
            for name, parameter in parameters.items():
                parameter.copy_(kept[part][name])
        if reached:
            return True
    return False


# Judging


def faults_of_injection(findings: Findings, freeze: bool = True) -> list[str]:
    """What is not as an injection has to be, a line each; nothing where all is right.

    Args:
        freeze: whether all heads but θ′₁ are to be frozen; False where all learn
    """
    faults = []
    parts = findings.parts
    missing = [part for part in (ENCODER, OLD_HEAD, NEW_HEAD, FROZEN_TWIN) if part not in parts]
    if missing:
        raise UsageError(f"there is no part {', '.join(missing)}: name its path in the network")

    # at the injection
    if findings.max_abs_delta_q != 0:
        change = f"Q changes at the injection, by up to {findings.max_abs_delta_q:.1e}"
        faults.append(f"{change}: θ′₁ and θ′₂ must be equal, and their difference come before the sum")
    for part in (ENCODER, OLD_HEAD):
        if parts[part].changed != "none":
            faults.append(f"{part} changes at the injection")
    for part in (NEW_HEAD, FROZEN_TWIN):
        if parts[part].changed == "none":
            faults.append(f"{part} is not drawn anew")
    if findings.new_head_is_old:
        faults.append(f"{NEW_HEAD} has weights of {OLD_HEAD}: it is not drawn anew")

    # in the updates
    learning = [ENCODER, NEW_HEAD]
    if not freeze:
        learning = list(parts)
    for part, found in parts.items():
        if part in learning:
            if found.in_optimizer != "all":
                faults.append(f"{part} is not in the optimizer, or not all of it")
            if "none" in (found.first_update, found.second_update):
                faults.append(f"{part} does not change at an update: it never learns")
            # φ and θ may have died in part; what was just drawn stands still only behind a dead φ
            elif part in (NEW_HEAD, FROZEN_TWIN) and "part" in (found.first_update, found.second_update):
                faults.append(
                    f"{part} changes in part at an update: is it frozen in part, or {ENCODER} dead?"
                )
        elif found.first_update != "none" or found.second_update != "none":
            faults.append(f"{part} changes at an update: it is not frozen")
    if findings.thawed:
        faults.append("after an update weights are to learn that were frozen: call set_trainable() there")
    for part in findings.moving_buffers:
        faults.append(f"{part} has buffers that change at an update: requires_grad does not freeze those")

    # the optimizer's state
    if parts[ENCODER].moments == "emptied":
        faults.append(f"{ENCODER} has lost its moments: the optimizer was made anew")
    elif parts[ENCODER].moments != "kept":
        faults.append(f"{ENCODER}'s moments are not kept: {parts[ENCODER].moments}")
    if parts[NEW_HEAD].moments not in ("empty", "emptied", "copied"):
        faults.append(f"{NEW_HEAD}'s moments are neither empty nor a copy of {OLD_HEAD}'s")

    # the target network, and the encoder's gradient
    if not findings.target_outputs_equal or not findings.target_state_equal:
        faults.append("the target stays behind: it is no copy of the online network after the injection")
    elif findings.target_equal_before:
        faults.append("the target was a copy before: make an update after a sync, or it shows nothing")
    if findings.target_shares_weights:
        faults.append("the target has weights of the online network that learn: give it copies of them")
    if not findings.gradient_error <= SAME_GRADIENT:
        off = f"it is off by {findings.gradient_error:.1%}"
        faults.append(f"{ENCODER}'s gradient is not that of the whole sum, {off}: is a head detached?")
    return faults


def faults_of_recycling(findings: Findings) -> list[str]:
    """The same of a recycling of dormant units, in a network without normalisation whose parameters all have
    moments; some units must be dormant.

    It does not see where more outgoing weights are zero than need be, what is between recycled units, nor
    whether the moments that are zero are those of recycled weights.
    """
    faults = []
    if all(found.changed == "none" for found in findings.parts.values()):
        faults.append("nothing was recycled: silence some units first")
    for part, found in findings.parts.items():
        if found.changed == "all":
            faults.append(f"{part} changes as a whole, not just its dormant units")
        if found.changed != "none" and found.moments != "zeroed in part":
            faults.append(f"{part}'s moments are {found.moments}: those of recycled weights become zero")
    if findings.new_reaches_q:
        faults.append(
            "recycled units reach Q: other outgoing weights were set to zero than theirs; "
            "are channels and columns in one order?"
        )
    if findings.target_changed:
        faults.append("the target changes, which waits for its next sync")
    return faults


# Showing


def table(rows: dict[str, Findings]) -> str:
    """Findings of {name of a row: what was found} as a table in Markdown.

    A part with a star is meant in part. A target that is "–" is as it was before. The gradient of φ is that
    of the formula, or off by a share of its length.
    """
    lines = [["arm", "changed", "updates", "optimizer", "moments", "ΔQ", "target", "∇φ", "trained"]]
    for name, findings in rows.items():
        lines.append([name, *cells(findings)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["".ljust(width, "-") for width in widths])
    padded = []
    for line in lines:
        columns = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        padded.append(f"| {' | '.join(columns)} |")
    return "\n".join(padded)


def cells(findings: Findings) -> list[str]:
    """One row of `table`, without its name."""
    parts = findings.parts
    updates = names_of({part: found.first_update for part, found in parts.items()})
    second = names_of({part: found.second_update for part, found in parts.items()})
    if second != updates:
        updates = f"{updates}; {second}"
    in_optimizer = names_of({part: found.in_optimizer for part, found in parts.items()})
    if in_optimizer == " ".join(parts):
        in_optimizer = "all"
    gradient = f"off by {findings.gradient_error:.0%}"
    if findings.gradient_error <= SAME_GRADIENT:
        gradient = "✓"
    trained = rounded(findings.trainable_before)
    if findings.trainable_after != findings.trainable_before:
        trained += f" → {rounded(findings.trainable_after)}"
    return [
        names_of({part: found.changed for part, found in parts.items()}),
        updates,
        in_optimizer,
        moments_in_words(parts),
        f"{findings.max_abs_delta_q:.1g}",
        target_in_words(findings),
        gradient,
        trained,
    ]


def names_of(extents: dict[str, Extent]) -> str:
    """φ θ*: the parts of which all is meant, and with a star those of which a part is."""
    names = []
    for part, how_far in extents.items():
        if how_far == "all":
            names.append(part)
        elif how_far == "part":
            names.append(f"{part}*")
    return " ".join(names) or "–"


def moments_in_words(parts: dict[str, PartFindings]) -> str:
    """kept φ, emptied θ: the parts by what became of their moments."""
    by_word: dict[str, list[str]] = {}
    for part, found in parts.items():
        by_word.setdefault(found.moments, []).append(part)
    return ", ".join(f"{word} {' '.join(names)}" for word, names in by_word.items())


def target_in_words(findings: Findings) -> str:
    if findings.target_outputs_equal and findings.target_state_equal:
        return "copy"
    if not findings.target_changed:
        return "–"
    if findings.target_outputs_equal:
        return "copy but for its state"
    return "another"


def rounded(count: int) -> str:
    """A number of parameters: 1.69M, 279k, 802."""
    if count >= 1e6:
        return f"{count / 1e6:.3g}M"
    if count >= 1e3:
        return f"{count / 1e3:.3g}k"
    return str(count)
