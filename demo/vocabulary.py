"""What the demo model knows: subjects, styles and backgrounds, and how a caption names them."""

from __future__ import annotations

# The paper's Simple Animals (arXiv 2510.01549; list of DDPO, arXiv 2305.13301).
ANIMALS = (
    "cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf "
    "lizard beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck "
    "goose bee pig turkey fly llama camel bat gorilla hedgehog kangaroo"
).split()

OTHERS = (
    "penguin,owl,eagle,panda,koala,elephant,rhinoceros,hippopotamus,giraffe,crocodile,octopus,crab,lobster,"
    "snail,unicorn,peacock,parrot,flamingo,swan,sloth,skunk,badger,lady beetle,scorpion,"
    "red apple,banana,grapes,watermelon,strawberry,cherries,pineapple,lemon,carrot,broccoli,pizza,hamburger,"
    "doughnut,cookie,birthday cake,rocket,airplane,bicycle,sailboat,automobile,locomotive,house,balloon,guitar,"
    "trumpet,drum,key,umbrella,crown,gem stone,light bulb,soccer ball,basketball,teddy bear,alarm clock,"
    "sunflower,tulip,rose,cactus,evergreen tree,palm tree,star,sun,crescent moon,snowman,fire,mushroom"
).split(",")

SUBJECTS = tuple(ANIMALS) + tuple(OTHERS)

# Where the emoji's own English label is another word than the prompt's.
LABELS = {"sheep": "ewe", "squirrel": "chipmunk", "bee": "honeybee"}

STYLES = ("3d", "flat", "cartoon", "icon")

# Name -> sRGB of the middle of the gradient.
BACKGROUNDS = {
    "white": (244, 244, 244),
    "black": (22, 22, 24),
    "gray": (128, 130, 132),
    "red": (205, 45, 45),
    "orange": (240, 140, 40),
    "yellow": (245, 215, 65),
    "green": (60, 165, 75),
    "blue": (50, 100, 215),
    "purple": (130, 65, 180),
    "pink": (245, 155, 195),
    "brown": (120, 80, 50),
    "teal": (30, 155, 155),
}


def caption(subject: str, style: str | None = None, background: str | None = None, prefix: bool = False) -> str:
    """The training caption, for example "generate an image of a 3d fox on a blue background"."""
    words = f"{style} {subject}" if style else subject
    text = f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
    if background:
        text += f" on {'an' if background[0] in 'aeiou' else 'a'} {background} background"
    return f"generate an image of {text}" if prefix else text
