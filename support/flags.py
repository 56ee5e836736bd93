"""Flags that change nothing that is learned, but for rounding: where a run computes, and what it leaves."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from support.usage import InUTF8, NotBelow, Share, Steps, UsageError

Period = Annotated[Steps, NotBelow("num_envs")]  # a vector step of num_envs steps must not jump over one
PositivePeriod = Annotated[Period, Ge(1)]


@dataclass(frozen=True)
class RunFlags:
    """Where a run computes, what it says and what it leaves behind."""

    cuda: bool = True
    """train on the GPU when there is one (cleanRL)"""
    cuda_graphs: bool = False
    """act and learn through captured graphs; has not been run on a GPU yet"""
    torch_deterministic: bool = True
    """deterministic GPU kernels, so that a seed fixes every bit (cleanRL)"""
    log_frequency: PositivePeriod = 1_000
    """steps between points of losses, speed and ε (cleanRL: 100)"""
    plasticity_frequency: Period = 50_000
    """steps between measures of plasticity, on 512 transitions; 0 = none"""
    eval_frequency: Period = 0
    """steps between evaluations; 0 = none (DQN Zoo: 250_000)"""
    eval_episodes: Steps = 10
    """whole games per evaluation (cleanRL); 0 with --eval-steps"""
    eval_steps: Steps = 0
    """steps per evaluation; 0 with --eval-episodes (paper: 125_000)"""
    eval_epsilon: Share = 0.01
    """ε during evaluation (DQN Zoo)"""
    capture_video: bool = False
    """film the first game of each evaluation (cleanRL)"""
    save_model: bool = False
    """save the final agent as agent.pt, for --evaluate (cleanRL)"""
    keep_checkpoints: tuple[int, ...] = ()
    """steps whose checkpoints stay, besides the newest and the one before the first injection"""
    track: bool = False
    """mirror the curves to Weights & Biases: pip install wandb (cleanRL)"""
    wandb_project_name: Annotated[str, InUTF8()] = "plasticity-injection"
    """Weights & Biases project (cleanRL)"""
    wandb_entity: Annotated[str | None, InUTF8()] = None
    """Weights & Biases team or user (cleanRL)"""
    resume: str | None = None
    """folder of a run to go on with, bit for bit; takes no other flag"""
    fork: Annotated[str | None, InUTF8()] = None
    """checkpoint from which a new run starts, with other flags (docs/nothing-is-lost.md)"""
    evaluate: str | None = None
    """folder of a run whose agent.pt is to play its game; takes the --eval flags, and none of training"""

    def check_flags(self) -> None:
        """Raises UsageError where flags contradict each other."""
        if (self.eval_episodes > 0) == (self.eval_steps > 0):
            both = f"eval_episodes is {self.eval_episodes} and eval_steps {self.eval_steps}"
            fix = "give --eval-episodes 0 with --eval-steps, or the other way round"
            raise UsageError(f"{both}, but one of them says how long an evaluation is: {fix}")
        if self.capture_video and self.eval_frequency == 0 and self.evaluate is None:
            raise UsageError("capture_video films evaluation games and there are none: give --eval-frequency")
        given = [path for path in (self.resume, self.fork, self.evaluate) if path is not None]
        if len(given) > 1:
            fix = "give one of --resume, --fork and --evaluate"
            raise UsageError(f"resume, fork and evaluate exclude each other: {fix}")
