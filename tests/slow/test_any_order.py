"""A run folder as a state machine: run, killed at any file operation, gone on with, changed, exported, verified and
prepared for publishing in any order. What is there is always whole, or known to be unfinished.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ..forked import started
from .campaign import Place, content, debris, differences, told_in_one_line
from .test_disturbed import EACH

pytestmark = pytest.mark.slow
RECIPES = st.sampled_from(["a", "b"])
NUMBERS = st.integers(1, 60)


class RunFolder(RuleBasedStateMachine):
    """`holds`: the recipe of the finished run; `begun`: of the unfinished one; `unsure`: a kill may have been late."""

    place: Place
    wanted: dict[str, dict[str, bytes]]
    steps = 0

    @initialize()
    def begin(self) -> None:
        self.out = self.place.folder / "out"
        shutil.rmtree(self.out, ignore_errors=True)
        self.holds: str | None = None
        self.begun: str | None = None

    def run(self, command: list[str], number: int = 0) -> Any:
        type(self).steps += 1
        done = self.place.disturbed(command, self.out, number, "kill") if number else self.place.whole(command)
        assert "Traceback" not in done.stderr, done.stderr
        if done.returncode in (1, 2) and not (command[0] == "verify" and "wrong: " in done.stderr):  # a line a problem
            assert told_in_one_line(done), done.stderr
        return done

    def look(self) -> None:
        """After a kill: whether the run was finished already."""
        finished = (self.out / "manifest.json").is_file() and (self.out / "quantized").is_dir()
        if finished:
            name = '"name": "a"' in (self.out / "manifest.json").read_text()
            self.holds, self.begun = ("a" if name else "b"), None
        else:
            self.holds = None

    @rule(recipe=RECIPES)
    def quantize(self, recipe: str) -> None:
        done = self.run(self.place.quantize(self.out, recipe))
        other = self.holds or self.begun
        if other in (None, recipe):
            assert done.returncode == 0, done.stderr
            self.holds, self.begun = recipe, None
        elif done.returncode == 0:  # of the other nothing was begun
            assert self.holds is None
            self.holds, self.begun = recipe, None
        else:
            assert done.returncode == 2, done.stderr

    @rule(recipe=RECIPES)
    def overwrite(self, recipe: str) -> None:
        done = self.run(self.place.quantize(self.out, recipe, "--overwrite"))
        assert done.returncode == 0, done.stderr
        self.holds, self.begun = recipe, None

    @rule(recipe=RECIPES, number=NUMBERS, overwrite=st.booleans())
    def killed(self, recipe: str, number: int, overwrite: bool) -> None:
        before = self.holds, self.begun
        done = self.run(self.place.quantize(self.out, recipe, *(["--overwrite"] if overwrite else [])), number)
        if done.returncode >= 0:
            assert done.returncode in (0, 2), done.stderr
        if done.returncode != 2:
            self.look()
            if self.holds is None:
                self.begun = recipe if overwrite or before[1] in (None, recipe) else before[1]

    @precondition(lambda self: self.holds is not None)
    @rule()
    def export(self) -> None:
        done = self.run(["export", str(self.out), "--target", "vllm", "--overwrite"])
        assert done.returncode == 0, done.stderr
        done = self.run(["verify", str(self.out / "export" / "vllm"), "--no-forward"])
        assert done.returncode == 0, done.stderr

    @rule(number=NUMBERS)
    def export_killed(self, number: int) -> None:
        done = self.run(["export", str(self.out), "--target", "vllm", "--overwrite"], number)
        assert done.returncode in (-9, 0 if self.holds else 2), done.stderr

    @rule()
    def verify(self) -> None:
        """An artifact that a killed --overwrite has not come to yet is sound, too."""
        done = self.run(["verify", str(self.out), "--no-forward"])
        there = content(self.out / "quantized") if (self.out / "quantized").is_dir() else {}
        sound = any(differences(there, wanted) == [] for wanted in self.wanted.values())
        assert (done.returncode == 0) == sound, (done.stdout, done.stderr)

    @rule()
    def publish(self) -> None:
        """Nothing has been evaluated: refused."""
        done = self.run(["publish", str(self.out), "--to", "org/name"])
        assert done.returncode == 2, done.stderr

    @invariant()
    def whole(self) -> None:
        if self.holds is not None:
            held = content(self.out / "quantized")
            assert differences(held, self.wanted[self.holds]) == []

    def teardown(self) -> None:
        """One more command mends whatever was left."""
        if not hasattr(self, "out"):
            return
        done = self.run(self.place.quantize(self.out, "a", "--overwrite"))
        assert done.returncode == 0, done.stderr
        assert differences(content(self.out / "quantized"), self.wanted["a"]) == []
        assert debris(self.out) == []


def test_a_run_folder_in_any_order(tell: Callable[[str], None]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "said").mkdir()
        with started(folder / "said") as python:
            place = Place(folder, python)
            place.prepare()
            wanted = {}
            for recipe in "ab":
                assert place.whole(place.quantize(folder / recipe, recipe)).returncode == 0
                wanted[recipe] = content(folder / recipe / "quantized")
            machine = type("Machine", (RunFolder,), {"place": place, "wanted": wanted})
            chosen = settings(
                max_examples=max(2, EACH // 4), stateful_step_count=10, deadline=None, derandomize=True, database=None,
                suppress_health_check=list(HealthCheck), print_blob=False,
            )  # fmt: skip
            run_state_machine_as_test(machine, settings=chosen)
            tell(f"state machine: {machine.steps} commands")
