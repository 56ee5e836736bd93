"""Reset of moments: the optimizer forgets, and no weight changes."""

import pytest
import torch
from conftest import all_same, moments_of, random_batch, same, trained, weights

from alternatives.reset_moments import ALTERNATIVE
from dqn_injection_atari import Args
from support.usage import UsageError


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop"])
@pytest.mark.parametrize("whose", ["head", "all"])
def test_moments_and_counts_of_the_head_or_of_all_are_gone_and_no_weight_changes(optimizer, whose):
    learner = trained(intervention="reset-moments", reset_moments_of=whose, optimizer=optimizer)
    before = weights(learner.q_network)
    of_encoder = moments_of(learner, "encoder")
    assert len(of_encoder) == 6 and len(moments_of(learner, "head.theta")) == 4
    learner.intervene(step=10)
    assert same(weights(learner.q_network), before)
    assert same(weights(learner.target_network), before), "as in every other arm"
    assert moments_of(learner, "head.theta") == {}
    kept = of_encoder if whose == "head" else {}
    assert all_same(moments_of(learner, "encoder"), kept)
    learner.update(random_batch(9))
    if optimizer == "adam":
        steps = {path: moments_of(learner, path)[f"{path}.bias"]["step"] for path in ("head.theta.output",)}
        assert steps == {"head.theta.output": 1}
        (of_encoder_now,) = moments_of(learner, "encoder.0")["encoder.0.bias"]["step"].view(1).tolist()
        assert of_encoder_now == (4 if whose == "head" else 1)


def test_the_first_step_after_it_is_that_of_an_optimizer_which_knows_nothing_of_the_head():
    """As after a head reset, whose control it is: Adam's first step is lr · g / (|g| + eps)."""
    learner = trained(intervention="reset-moments")
    learner.intervene(step=10)
    parameter = learner.learning_head().output.bias
    before = parameter.detach().clone()
    learner.update(random_batch(9))
    gradient = parameter.grad
    assert (gradient.abs() > 0).any()
    expected = before - learner.args.learning_rate * gradient / (gradient.abs() + 1.5e-4)
    torch.testing.assert_close(parameter.detach(), expected, atol=1e-8, rtol=1e-5)


def test_initial_norms_stay_and_growth_counts_from_then_on():
    learner = trained(intervention="reset-moments", injection_step=(), injection_trigger="norm")
    before = dict(learner.norms.initial)
    assert learner.norms.growth(learner.growing()) != 1
    learner.intervene(step=10)
    assert learner.norms.initial == before
    assert learner.norms.growth(learner.growing()) == 1, "or the norm would trigger it again at once"


def test_whose_moments_is_a_setting_that_only_it_and_a_baseline_take():
    assert not ALTERNATIVE.draws_head and not ALTERNATIVE.draws_encoder
    assert Args(intervention="reset-moments", injection_step=(5,)).reset_moments_of == "head"
    for intervention in ("reset-moments", "none"):
        Args(intervention=intervention, injection_step=(5,), reset_moments_of="all")
    with pytest.raises(UsageError, match="which only --intervention reset-moments looks at"):
        Args(intervention="reset-head", injection_step=(5,), reset_moments_of="all")
    with pytest.raises(UsageError, match="one of head, all: change --reset-moments-of"):
        Args(intervention="reset-moments", injection_step=(5,), reset_moments_of="encoder")
    with pytest.raises(
        UsageError, match=r"which only --intervention injection, reset-head, .+ or fire looks at"
    ):
        Args(intervention="reset-moments", injection_step=(5,), moments="keep")


def test_q_values_stay_to_the_bit():
    learner = trained(intervention="reset-moments", reset_moments_of="all", bf16=True)
    obs = random_batch(4).observations
    with torch.no_grad():
        before = learner.online(obs)
        learner.intervene(step=10)
        assert torch.equal(learner.online(obs), before)
