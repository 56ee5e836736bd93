"""Has the final agents of runs play 30 whole games each, and keeps the scores.

    python img/play_agents.py games.csv runs/FOLDER runs/FOLDER ...

A run has an agent.pt (--save-model). Its agent plays as --evaluate has it play. The file has a row for each
game: the name of the run's folder, the game's number, and its raw score. img/draw_effects.py reads it.

A file that exists grows: agents whose games it has do not play again.
"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dqn_injection_atari import Args, agent_path, evaluate_saved, load_agent
from support.machine import pick_device
from support.process import ends_in_one_line
from support.usage import UsageError, reading, words_given

GAMES = 30


def runs_that_played(path: Path) -> set[str]:
    """The folders' names of the runs whose games a file has."""
    if not path.exists():
        return set()
    with (
        reading(path, "scores of games", "give the file that this script wrote, or a new name"),
        open(path, encoding="utf-8", newline="") as file,
    ):
        return {row["run"] for row in csv.DictReader(file)}


def main() -> None:
    with ends_in_one_line():
        target, *folders = words_given() or [""]
        if not folders:
            raise UsageError(
                "give a file and runs: python img/play_agents.py NAME.csv runs/FOLDER runs/FOLDER"
            )
        if Path(target).suffix != ".csv":
            raise UsageError(f"the scores go to {target}, but it must end in .csv: give another name")
        agents = [agent_path(folder) for folder in folders]
        device = pick_device(Args.cuda, Args.torch_deterministic, Args.tf32)
        for agent in agents:
            load_agent(agent, device)  # one that cannot be loaded is found before any has played
        played = runs_that_played(Path(target))
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        with open(target, "a", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            if file.tell() == 0:
                table.writerow(["run", "game", "score"])
            for agent in agents:
                name = agent.resolve().parent.name
                if name in played:
                    print(f"{name} has played")
                    continue
                print(name)
                played.add(name)
                scores = evaluate_saved(Args(evaluate=str(agent), eval_episodes=GAMES))
                table.writerows((name, number, f"{score:g}") for number, score in enumerate(scores, start=1))
                file.flush()


if __name__ == "__main__":
    main()
