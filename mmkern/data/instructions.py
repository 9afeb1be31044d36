"""Instructions: how a question is put to a model, by the kind of task.

InstructBLIP (Dai et al., arXiv 2305.06500, section 2.2) writes ten to fifteen templates for each
task, and asks for short answers in words ("short", "briefly") where the data's answers are short.
The templates here are our own. One is drawn for each sample and epoch, from (seed, epoch, index).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from PIL import Image
from torch import Tensor

__all__ = ["TEMPLATES", "VERBATIM", "Question", "check_templates", "fill"]

VERBATIM = "verbatim"


class Question(TypedDict):
    """One question about one picture.

    Attributes:
        image: as the data set has it.
        kind: the task; its templates are ``TEMPLATES[kind]``.
        subject: what stands in the place of a template's "{}": the question itself, or what it
            asks for; "" for tasks whose templates are whole questions.
        answer: the right answer.
        index, epoch: what every random choice derives from.
    """

    image: Image.Image | Tensor
    kind: str
    subject: str
    answer: str
    index: int
    epoch: int


# Kind -> templates. Those that come with data of any kind first, then the emoji's.
TEMPLATES: dict[str, tuple[str, ...]] = {
    # A question as the data has it: conversations, and whatever brings its own instruction.
    VERBATIM: ("{}",),
    "caption": (
        "a short caption of the picture:",
        "a brief description of the picture:",
        "describe the picture briefly.",
        "in a few words, what does the picture show?",
        "give the picture a short caption.",
        "write one short sentence about the picture.",
        "what is in the picture? answer briefly.",
        "name what the picture shows, in short.",
        "say briefly what can be seen here.",
        "summarise the picture in a few words.",
        "a short text that fits the picture:",
        "briefly, this picture shows",
    ),
    "question": (
        "Question: {} Short answer:",
        "{} Answer briefly.",
        "{} Give a short answer.",
        "{} A short answer to the question is",
        "Q: {} A, in short:",
        "Look at the picture and answer briefly: {}",
        "Answer with a word or a short phrase. {}",
        "Here is a question about the picture: {} The short answer:",
        "Using the picture, give a short answer to this: {}",
        "What would be a brief reply to the question? {}",
        "Reply to the question in few words. {}",
        "{} Keep the answer short.",
    ),
    "choice": (
        "Question: {} Short answer:",
        "{} Choose one, and answer briefly.",
        "Choose the right one. {} Short answer:",
        "{} Say only which one.",
        "Which of them is right? {} Answer briefly.",
        "{} The right choice, in short, is",
        "Pick one of the options. {}",
        "From the picture, decide: {} Short answer:",
        "{} Name the right option briefly.",
        "Only one option fits the picture. {} Short answer:",
    ),
    "ask": (
        "Ask a question about the picture whose answer is: {}",
        "The answer is {}. Write a question about the picture that has it.",
        "Which question about this picture would be answered by {}?",
        "Make up a question about the picture that {} answers.",
        "A question about the picture with the answer {}:",
        "Given the picture and the answer {}, what was asked?",
        "Invent a question to which, for this picture, one replies {}.",
        "Someone looked at the picture and answered {}. The question was",
        "For the answer {}, write a question that needs the picture.",
        "Find a question for this picture and the answer {}.",
    ),
    "name": (
        "Question: what is this? Short answer:",
        "What is this? Answer briefly.",
        "What does the picture show? Short answer:",
        "Name this briefly.",
        "In a few words, what is this?",
        "What do you see? Answer in few words.",
        "Give a short name to what the picture shows.",
        "What is it called? Short answer:",
        "Say briefly what this is.",
        "Which emoji is this? Short answer:",
        "The short name of this is",
        "Question: what can be seen here? Short answer:",
    ),
    "class": (
        "Question: what kind of thing is this? Short answer:",
        "What kind of thing is this? Answer briefly.",
        "What sort of thing does the picture show? Short answer:",
        "Which class does this belong to? Answer with one word.",
        "Name the kind of thing, briefly.",
        "In one word, what type of thing is this?",
        "Classify the picture. Short answer:",
        "To which group of things does it belong? Short answer:",
        "What category is this? Answer briefly.",
        "Say in one word what sort of thing this is.",
        "The kind of thing shown here, in short:",
    ),
    "yes_no": (
        "Question: is there {} in the picture? Short answer:",
        "Is there {}? Answer yes or no.",
        "Does the picture show {}? Short answer:",
        "Can you see {}? Answer briefly.",
        "Yes or no: is this {}?",
        "Question: does this show {}? Short answer, yes or no:",
        "Is {} shown here? Answer briefly.",
        "Look for {}. Is there one? Short answer:",
        "Say yes or no. Is {} in the picture?",
        "Would you find {} here? Short answer:",
    ),
    "fine": (
        "Question: what kind of {} is this? Short answer:",
        "What kind of {} is this? Answer briefly.",
        "Which sort of {} does the picture show? Short answer:",
        "Name the kind of {}, in short.",
        "What type of {} is it? Answer with one word.",
        "In one word, which kind of {} is this?",
        "This is a kind of {}. Which? Short answer:",
        "Say briefly what kind of {} you see.",
        "Classify this {}. Short answer:",
        "To which group of {} does it belong? Answer briefly.",
    ),
    "either": (
        "Question: is this {}? Short answer:",
        "Is it {}? Answer briefly.",
        "Which is it, {}? Short answer:",
        "What does the picture show, {}? Answer briefly.",
        "Choose what the picture shows: {}. Short answer:",
        "Say which one this is: {}?",
        "Do you see {}? Name the right one briefly.",
        "Only one is right, {}. Short answer:",
        "Decide between them: {}? Answer briefly.",
        "{}? Answer with the one in the picture.",
    ),
    "clock": (
        "Question: what time is it? Short answer:",
        "What time is it? Answer briefly.",
        "What time does the clock show? Short answer:",
        "Read the clock. Short answer:",
        "Which time can be read here? Answer briefly.",
        "Tell the time, in short.",
        "Say briefly what time it is.",
        "The clock shows which time? Short answer:",
        "What does the clock say? Answer briefly.",
        "Look at the hands of the clock. The time, in short:",
    ),
    "colour": (
        "Question: what colour is this? Short answer:",
        "What colour is it? Answer briefly.",
        "Which colour does it have? Short answer:",
        "Name the colour, in one word.",
        "In which colour is it drawn? Answer briefly.",
        "Say briefly which colour this is.",
        "The colour of this, in short:",
        "What is its colour? Answer with one word.",
        "Which colour do you see? Short answer:",
        "Tell the colour. Short answer:",
    ),
    "keycap": (
        "Question: which key is this? Short answer:",
        "Which key is this? Answer briefly.",
        "What is written on the key? Short answer:",
        "Read the key, and answer briefly.",
        "What does the key say? Short answer:",
        "Name what is on the key, in short.",
        "Which sign does the key have? Answer briefly.",
        "Say briefly what the key shows.",
        "The key shows which sign? Short answer:",
        "Read what is on the button. Short answer:",
    ),
    "place": (
        "Question: what is at the {} of the picture? Short answer:",
        "What is at the {}? Answer briefly.",
        "Look at the {}. What is there? Short answer:",
        "Name what stands at the {}, in short.",
        "Which thing is at the {}? Short answer:",
        "Say briefly what you see at the {}.",
        "At the {} there is what? Short answer:",
        "Of the four pictures, which is at the {}? Short answer:",
        "The {} shows, in short:",
        "Tell what the {} shows. Answer briefly.",
    ),
    "count": (
        "Question: how many of the four are {}? Short answer:",
        "How many are {}? Answer with one word.",
        "Count those that are {}. Short answer:",
        "Of the four pictures, how many are {}? Answer briefly.",
        "Say in one word how many are {}.",
        "How many {} can you count? Short answer:",
        "The number of those that are {}, in one word:",
        "Look at all four. How many are {}? Short answer:",
        "Tell how many are {}. Answer briefly.",
        "Number of {} here, in short:",
    ),
}


def fill(template: str, subject: str) -> str:
    """A template with its "{}", if it has one, replaced; braces elsewhere are only braces."""
    return template.replace("{}", subject)


def check_templates(templates: Mapping[str, Sequence[str]]) -> None:
    """Refuse templates that cannot be filled.

    Raises:
        ValueError: a kind without templates, one with more than one "{}", or a kind of which some
            templates have a "{}" and some do not (the subject would get lost at times).
    """
    for kind, texts in templates.items():
        counts = {text.count("{}") for text in texts}
        if not texts or max(counts) > 1 or len(counts) > 1:
            raise ValueError(
                f"templates of kind {kind!r} must all have one '{{}}', or none, and be at least "
                f"one; got {list(texts)}"
            )
