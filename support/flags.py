"""Flags of any run that change speed, storage or reporting, and no number in a curve of returns."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from support.usage import NotBelow, Share, Steps, UsageError

Period = Annotated[Steps, NotBelow("num_envs")]  # a vector step of num_envs steps must not jump over one
PositivePeriod = Annotated[Period, Ge(1)]


@dataclass(frozen=True)
class RunFlags:
    """Where a run computes, what it says and what it leaves behind."""

    cuda: bool = True
    """train on the GPU when there is one (cleanRL)"""
    cuda_graphs: bool = False
    """frames on the GPU if they fit, acting and learning through CUDA graphs. Has not been run on a GPU yet"""
    torch_deterministic: bool = True
    """choose deterministic GPU kernels, so that a seed fixes the run bit by bit (cleanRL)"""
    log_frequency: PositivePeriod = 1_000
    """steps between points of the losses, speed and ε curves; losses are means over that interval (cleanRL: 100)"""
    plasticity_frequency: Period = 50_000
    """steps between points of the plasticity curves, measured on 512 replayed transitions; 0 = none"""
    eval_frequency: Period = 0
    """steps between evaluations; 0 = none (DQN Zoo: 250_000)"""
    eval_episodes: Steps = 10
    """whole games per evaluation, played in parallel (cleanRL); 0 with --eval-steps"""
    eval_steps: Steps = 0
    """steps per evaluation, of whose games those that ended count; 0 with --eval-episodes (DQN Zoo, paper: 125_000)"""
    eval_epsilon: Share = 0.01
    """ε during evaluation (DQN Zoo double_q)"""
    capture_video: bool = False
    """write an mp4 of the first game of each evaluation to the run's folder `videos` (cleanRL)"""
    save_model: bool = False
    """save the final agent as `agent.pt` in the run's folder, for --evaluate (cleanRL)"""
    track: bool = False
    """mirror TensorBoard to Weights & Biases, which must be installed (cleanRL)"""
    wandb_project_name: str = "plasticity-injection"
    """Weights & Biases project (cleanRL)"""
    wandb_entity: str | None = None
    """Weights & Biases entity, i.e. team or user (cleanRL)"""
    resume: str | None = None
    """go on with the run in this folder from its newest good checkpoint, bit for bit; takes no other flag"""
    fork: str | None = None
    """start a new run from this checkpoint, in its arguments but for those given; docs/nothing-is-lost.md says which may be"""
    evaluate: str | None = None
    """train nothing, but play with the agent that --save-model left in this run's folder and print the scores"""

    def check_flags(self) -> None:
        """Refuses flags that contradict each other.

        Raises:
            UsageError: see above.
        """
        if (self.eval_episodes > 0) == (self.eval_steps > 0):
            given = f"eval_episodes is {self.eval_episodes} and eval_steps {self.eval_steps}, but one of them says how long an"
            raise UsageError(f"{given} evaluation is: give --eval-episodes 0 with --eval-steps, or the other way round")
        if self.capture_video and self.eval_frequency == 0 and self.evaluate is None:
            raise UsageError("capture_video films evaluation games and there are none: give --eval-frequency")
        if sum(value is not None for value in (self.resume, self.fork, self.evaluate)) > 1:
            raise UsageError("resume, fork and evaluate exclude each other: give one of --resume, --fork and --evaluate")
