"""The ``mmkern`` command: train a recipe, evaluate a run, draw a mask, say what runs where.

Everything heavy is imported inside the commands, so ``mmkern --help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass

TRAIN_HELP = """\
Train what a recipe describes. A recipe is a YAML file: the name of one that comes with mmkern, or a
path that ends in .yaml. Any key can be changed on the command line, with dots for nesting.

examples:
  mmkern train clip-emoji
      CLIP from scratch on emoji of five vendors, a few minutes on two CPU cores
  mmkern train clip-emoji train.epochs=2 output_dir=runs/short
  mmkern train clip-emoji train.loss=torch output_dir=runs/plain
      the same run through plain PyTorch's N x N loss, to compare
  torchrun --nproc_per_node 8 -m mmkern.cli train clip-vit-b-32 'data.path=PAIRS/{0000..4999}.tar'
      the paper's ViT-B/32; the same recipe on any number of GPUs

A run that was stopped goes on from its last checkpoint when the same command is given again.
"""

RECIPE_KEYS = """\
Keys are explained in docs/training.md, and with their defaults by
`python -m pydoc mmkern.train.recipe`.
"""

EVAL_HELP = """\
Measure a trained run and write RUN/metrics.json and pictures of the results beside it.

examples:
  mmkern eval runs/clip-emoji
      zero-shot accuracy on vendors that were never trained on, beside chance and pixel lookup;
      prompt wordings, retrieval, linear probe, robustness; about a minute on two CPU cores
  mmkern eval runs/clip-emoji evaluation.batch_size=64
  mmkern eval compare runs/clip-emoji runs/instructblip-emoji runs/llava-emoji-stage2
      runs that were measured, side by side on the pictures and questions that they share: one
      table, and compare.png and compare.json in the current directory
"""

COMPOSE_HELP = """\
Write an article with pictures from a folder: a language model writes it, says where pictures go and
what they show; a CLIP finds candidates, and the language model chooses. The result is a page and,
beside it, the document as JSON (docs/composition.md).

examples:
  mmkern compose --title "A day at the zoo" --pictures FOLDER --out zoo.html
      SmolLM2-135M, the CLIP of runs/clip-emoji; a .txt beside a picture says what it shows
  mmkern compose --title "Fruit" --pictures FOLDER --out fruit.html --text fruit.txt --count 3
      illustrate a text of your own, a paragraph a line, with three pictures
  mmkern compose ... --places 0,2 --language-model LM_FOLDER --clip runs/my-clip --index FILE
      pictures after the first and third paragraph; another language model and CLIP; keep the
      pictures' embeddings in FILE.safetensors and FILE.json
"""

MASK_HELP = """\
Draw which keys (across) each query row (down) may attend to: the masks of BLIP-2, InstructBLIP,
Flamingo and language models, as mmkern.layout.RowIntervals builds them. Without NAME, all of them.

examples:
  mmkern mask stage1
      BLIP-2's contrast and generation in one pass, at a size that fits a terminal
  mmkern mask multimodal_causal queries=32 text=24 lengths=17
      24 text slots of which 17 hold tokens
  mmkern mask causal prefix=32 length=16 left_pads=5 --png mask.png
      an image, five pads, then text, as processors pad to the left; also as a picture
  mmkern mask media image_of_token=0,1,1,2 latents=3 images=2 all_previous=1
      Flamingo: the image that each token belongs to, 0 for none
"""

INFO_HELP = """\
Versions, devices, and which implementation (cpp, triton, reference) each operator runs on, and why.

example:
  mmkern info
"""


class _Command(argparse.ArgumentParser):
    """A parser with a last part of its help that is only made when the help is shown."""

    ending: Callable[[], str] | None = None

    def format_help(self) -> str:
        self.epilog = self.ending() if self.ending else None
        return super().format_help()


def _shipped_recipes() -> str:
    """The recipes that come with mmkern, each with the first line of its file."""
    lines = ["recipes that come with mmkern:"]
    folder = resources.files("mmkern") / "recipes"
    for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if file.name.endswith(".yaml"):
            with file.open(encoding="utf-8") as text:
                first = text.readline()
            lines.append(f"  {file.name.removesuffix('.yaml')}\n      {first.lstrip('# ').strip()}")
    return "\n".join([*lines, "", RECIPE_KEYS])


def parser() -> argparse.ArgumentParser:
    """The command line's grammar."""
    top = argparse.ArgumentParser(
        prog="mmkern",
        description="Kernels, models and trainers for vision-language training.",
        epilog="`mmkern COMMAND --help` explains a command with examples.",
    )
    commands = top.add_subparsers(
        dest="command", metavar="COMMAND", required=True, parser_class=_Command
    )

    def add(
        name: str, summary: str, text: str, run: Callable[[argparse.Namespace], int]
    ) -> _Command:
        made: _Command = commands.add_parser(
            name,
            help=summary,
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.set_defaults(run=run)
        return made

    train = add("train", "train a recipe", TRAIN_HELP, _train)
    train.ending = _shipped_recipes
    train.add_argument("recipe", metavar="RECIPE", help="name of a recipe, or a path to a .yaml")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="change a recipe's key")
    evaluate = add("eval", "measure a trained run", EVAL_HELP, _evaluate)
    evaluate.add_argument(
        "directory", metavar="RUN", help="directory that `mmkern train` wrote; or `compare`"
    )
    evaluate.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="change a recipe's key; after `compare`, the runs",
    )
    article = add("compose", "an article with pictures", COMPOSE_HELP, _compose)
    article.add_argument("--title", required=True, help="of the article")
    article.add_argument("--pictures", required=True, metavar="FOLDER", type=Path)
    article.add_argument("--out", required=True, metavar="FILE.html", type=Path)
    article.add_argument("--text", metavar="FILE", type=Path, help="an article to illustrate")
    article.add_argument("--count", type=int, metavar="N", help="pictures wanted")
    article.add_argument("--places", metavar="0,2", help="paragraphs that pictures follow")
    article.add_argument("--clip", default="runs/clip-emoji", metavar="RUN", help="finds pictures")
    article.add_argument(
        "--language-model", default="smollm2", metavar="NAME", help="smollm2, or a folder"
    )
    article.add_argument("--index", metavar="FILE", type=Path, help="embeddings, kept")
    article.add_argument("--link", action="store_true", help="link to the pictures' files")
    mask = add("mask", "draw an attention mask", MASK_HELP, _mask)
    mask.ending = _known_masks
    mask.add_argument("name", nargs="?", metavar="NAME", help="one of the masks below")
    mask.add_argument(
        "sizes", nargs="*", metavar="key=value", help="change a size; lists by commas"
    )
    mask.add_argument("--png", metavar="FILE", type=Path, help="write a picture as well")
    add("info", "versions, devices, backends", INFO_HELP, _info)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it worked, 2 with one line on stderr when the user can mend it."""
    chosen = parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = chosen.run
    try:
        return run(chosen)
    except UserError as error:
        print(f"mmkern {chosen.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"mmkern {chosen.command}: stopped", file=sys.stderr)
        return 130


class UserError(Exception):
    """What the user can mend; shown as one line without a traceback."""


@contextmanager
def _user_errors() -> Iterator[None]:
    """Turn what a wrong key, a missing file or a missing package raises into ``UserError``.

    Any other exception, even a ValueError, is a defect and keeps its traceback.
    """
    try:
        # First, since it is what a package without the `train` extra fails at.
        from mmkern.compose import CompositionError
        from mmkern.data import ImageError, PairError, ShardError
        from mmkern.train.checkpoint import CheckpointError
        from mmkern.train.recipe import RecipeError
    except ImportError as error:
        raise UserError(f"{error}; pip install 'mmkern[train,data]'") from error
    try:
        yield
    except (
        *(RecipeError, CheckpointError, PairError, ShardError, ImageError),
        CompositionError,
    ) as error:
        raise UserError(_one_line(error)) from error
    except (FileNotFoundError, ImportError) as error:
        raise UserError(_one_line(error)) from error


def _one_line(error: Exception) -> str:
    text = str(error)
    if text.startswith("Caught "):  # in a loader's worker: its whole traceback, the error last
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return " ".join(text.split())


def _train(chosen: argparse.Namespace) -> int:
    with _user_errors():
        from mmkern.train.recipe import load_recipe
        from mmkern.train.run import finished, train

        recipe = load_recipe(chosen.recipe, chosen.overrides)
        already = finished(recipe.output_dir) is not None
        metrics = train(recipe)
    if _first_process():
        print(
            f"{'already trained: ' if already else ''}"
            f"{metrics['steps']:,} steps over {metrics['pairs']:,} pairs in "
            f"{metrics['train_seconds']:.0f} s, loss {metrics['loss']:.3f}; "
            f"next: mmkern eval {recipe.output_dir}"
        )
    return 0


def _evaluate(chosen: argparse.Namespace) -> int:
    if chosen.directory == "compare":
        return _compare(chosen.overrides)
    started = time.perf_counter()
    if wrong := [o for o in chosen.overrides if not o.startswith("evaluation.")]:
        raise UserError(f"{wrong[0]}: only keys under evaluation can change after training")
    directory = Path(chosen.directory)
    with _user_errors():
        import torch

        from mmkern.measure import measure, report
        from mmkern.train.recipe import load_recipe
        from mmkern.train.run import RECIPE_FILE, load_run, write_metrics

        _, model = load_run(directory)
        model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        recipe = load_recipe(directory / RECIPE_FILE, chosen.overrides)
        metrics = measure(directory, recipe, model)
    metrics["eval_seconds"] = round(time.perf_counter() - started, 1)
    print(report(recipe, write_metrics(directory, metrics)))
    written = sorted(path.name for path in directory.glob("*.png"))
    print(f"\nwritten to {directory}: {', '.join(['metrics.json', *written])}")
    return 0


def _compose(chosen: argparse.Namespace) -> int:
    with _user_errors():
        from mmkern.composition import run

        page, table = run(chosen, lambda line: print(line, file=sys.stderr, flush=True))
    print(f"written: {page} and {table}")
    return 0


def _compare(runs: Sequence[str]) -> int:
    if len(runs) < 2:
        raise UserError(f"compare: needs at least two runs, got {list(runs)}")
    with _user_errors():
        from mmkern.measure import compare

        print(compare([Path(run) for run in runs], Path()))
    print("\nwritten: compare.json, compare.png")
    return 0


def _info(chosen: argparse.Namespace) -> int:
    from mmkern import _library

    rows = _library.info()
    width = max(len(what) for what, _ in rows)
    for what, value in rows:
        print(f"{what:<{width}}  {value}")
    return 0


# A mask's arguments at a size that shows its form; None is absent.
MASKS: dict[str, dict[str, Any]] = {
    "unimodal": {"queries": 4, "text": 8, "lengths": [6], "left_pads": None},
    "bidirectional": {"queries": 4, "text": 8, "lengths": [6], "left_pads": None},
    "multimodal_causal": {"queries": 4, "text": 8, "lengths": [6], "left_pads": None},
    "stage1": {"queries": 4, "text": 8, "lengths": [6], "left_pads": None},
    "full": {"queries": 4, "keys": 12, "lengths": [9], "left_pads": None},
    "causal": {"length": 8, "prefix": 4, "lengths": None, "left_pads": [2]},
    "prefix_lm": {"prefix": 4, "length": 8, "lengths": [6], "left_pads": None},
    "media": {"image_of_token": [0, 1, 1, 1, 2, 2], "latents": 3, "images": 2, "all_previous": 0},
    "packed": {"documents": [0, 0, 0, 0, 1, 1, 1, -1], "causal": 1, "prefix": [1, 1] + 6 * [0]},
}


def _known_masks() -> str:
    """Every mask with its arguments, as they are typed."""
    lines = ["masks, with the sizes that are drawn unless changed:"]
    for name, sizes in MASKS.items():
        lines.append(f"  {name:<18} {' '.join(f'{k}={_typed(v)}' for k, v in sizes.items())}")
    return "\n".join(lines)


def _typed(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else "" if value is None else value


def draw_mask(name: str, changes: Sequence[str] = (), png: Path | None = None) -> str:
    """A mask as text, its sizes changed by `key=value`."""
    import torch

    from mmkern.layout import RowIntervals

    if name not in MASKS:
        raise UserError(f"no mask is called {name!r}; there are {', '.join(MASKS)}")
    sizes = dict(MASKS[name])
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or key not in sizes:
            raise UserError(f"{change}: expected key=value, key one of {', '.join(sizes)}")
        try:
            numbers = [int(part) for part in value.split(",") if part]
        except ValueError:
            raise UserError(f"{change}: expected whole numbers, separated by commas") from None
        many = isinstance(MASKS[name][key], list) or key in ("lengths", "left_pads")
        if not many and (len(numbers) != 1 or numbers[0] < 0):
            raise UserError(f"{change}: expected one number that is not negative")
        sizes[key] = (numbers or None) if many else numbers[0]
    one_row = {"image_of_token", "documents", "prefix"}
    arguments: dict[str, Any] = {
        key: torch.tensor([value] if key in one_row else value)
        if isinstance(value, list)
        else value
        for key, value in sizes.items()
    }
    if name == "packed":
        arguments["causal"] = bool(arguments["causal"])
        if arguments["prefix"] is not None:
            arguments["prefix"] = arguments["prefix"].bool()
    try:
        mask = getattr(RowIntervals, name)(**arguments)
    except ValueError as error:
        raise UserError(_one_line(error)) from error
    rows: list[tuple[str, int]] = [
        (part, sizes[part])
        for part in ("queries", "prefix", "text", "length")
        if isinstance(sizes.get(part), int) and sizes[part] > 0
    ]
    keys = rows
    if name == "stage1":
        keys = rows = [*rows, ("text'", sizes["text"])]
    elif name == "full":
        keys = [("keys", sizes["keys"])]
    elif name == "media":
        keys = [(f"image {i + 1}", sizes["latents"]) for i in range(sizes["images"])]
        rows = [("text", mask.queries)]
    return mask.plot(png, rows=rows, keys=keys)


def _mask(chosen: argparse.Namespace) -> int:
    if chosen.name is None:
        if chosen.png is not None:
            raise UserError("--png needs the name of a mask")
        print("\n\n".join(f"{name}\n{draw_mask(name)}" for name in MASKS))
        return 0
    try:
        print(draw_mask(chosen.name, chosen.sizes, chosen.png))
    except (ImportError, OSError) as error:
        raise UserError(_one_line(error)) from error
    return 0


def _first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    sys.exit(main())
