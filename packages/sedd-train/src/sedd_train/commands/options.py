"""Options as argparse reads them; one that a command does not have is answered by the one that was meant."""

from __future__ import annotations

import argparse
import difflib
from typing import NoReturn

__all__ = ["Options"]

MEANT = {  # what other commands and other programs call it
    "--checkpoint": ("--init", "checkpoint"),
    "--init": ("--checkpoint", "checkpoint"),
    "--model": ("--checkpoint", "--init", "checkpoint"),
    "--data": ("--corpus",),
    "--dataset": ("--corpus",),
    "--text": ("text", "--prefix"),
    "--run": ("--checkpoint", "run", "checkpoint"),
    "--output": ("--page", "output"),
    "--output-dir": ("--output", "output"),
    "--lr": ("--learning-rate",),
    "--epochs": ("--steps",),
    "--prompt": ("--prefix", "text"),
    "--num-samples": ("--num",),
}


class Options(argparse.ArgumentParser):
    """A command's options."""

    def error(self, message: str) -> NoReturn:
        """End with 2, after the usage and what is wrong."""
        words = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
        unknown = [word for word in words if word not in self._option_string_actions]
        super().error(message + "".join(self._meant(word) for word in dict.fromkeys(unknown)))

    def _meant(self, word: str) -> str:
        """What to write in the place of an option that there is not."""
        options = [name for name in self._option_string_actions if name.startswith("--")]
        places = [action.dest for action in self._actions if not action.option_strings]
        for name in MEANT.get(word, ()):
            if name in options:
                text = str(self._option_string_actions[name].help).partition(". ")[0].partition(" (default")[0]
                return f"; {word} is called {name} here: {text}"
            if name in places:
                return f"; {name} stands without {word} here, see the usage"
        near = difflib.get_close_matches(word, options, n=1, cutoff=0.75)
        return f"; did you mean {near[0]}?" if near else ""
