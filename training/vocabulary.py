"""What the emoji model knows: its nouns, shapes, colours, places and the words people use for them."""

from typing import NamedTuple


class Noun(NamedTuple):
    """One thing the model can draw; `icon` is its name in the fluent-emoji-flat set."""

    word: str
    icon: str
    synonyms: tuple[str, ...]


_NOUN_TABLE = """
cat cat-face kitty kitten
dog dog-face puppy
rocket rocket spaceship
apple red-apple
banana banana
pizza pizza
burger hamburger hamburger
car automobile automobile
boat sailboat sailboat ship
plane airplane airplane
sunflower sunflower
tulip tulip
rose rose
cactus cactus
tree deciduous-tree
palm palm-tree
mushroom mushroom toadstool
strawberry strawberry
grapes grapes
lemon lemon
cherries cherries cherry
pineapple pineapple
watermelon watermelon melon
carrot carrot
cheese cheese-wedge
cookie cookie biscuit
donut doughnut doughnut
cake birthday-cake
key key
guitar guitar
crown crown
umbrella umbrella parasol
balloon balloon
gem gem-stone jewel
anchor anchor
lamp light-bulb bulb
clock alarm-clock
book closed-book
house house home
castle castle
tent tent
bus bus
tractor tractor
train locomotive locomotive
fish tropical-fish
whale spouting-whale
octopus octopus
crab crab
turtle turtle tortoise
frog frog toad
pig pig-face piglet
cow cow-face
panda panda
fox fox
lion lion
rabbit rabbit-face bunny
owl owl
penguin penguin
duck duck
butterfly butterfly
bee honeybee honeybee
ladybug lady-beetle ladybird
robot robot
heart red-heart
"""


def _parse_nouns(table: str) -> tuple[Noun, ...]:
    rows = (line.split() for line in table.strip().splitlines())
    return tuple(Noun(word, icon, tuple(synonyms)) for word, icon, *synonyms in rows)


NOUNS = _parse_nouns(_NOUN_TABLE)
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")

# No sprite of the table disappears on any of these: red and orange backgrounds would hide ten of them.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (245, 245, 245),
    "black": (30, 30, 30),
    "gray": (140, 145, 155),
    "pink": (250, 185, 205),
    "yellow": (255, 243, 160),
    "green": (120, 200, 120),
    "blue": (100, 160, 240),
    "purple": (165, 115, 215),
}
SHAPE_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 30, 40),
    "orange": (255, 130, 0),
    "yellow": (255, 220, 0),
    "green": (0, 150, 50),
    "blue": (20, 70, 220),
    "purple": (120, 30, 170),
}
BACKGROUND_NAMES = tuple(BACKGROUNDS)
SHAPE_COLOUR_NAMES = tuple(SHAPE_COLOURS)

# Centres in pixels (x, y) of a 64 x 64 picture, and edge lengths in pixels.
PICTURE_SIZE = 64
POSITIONS: dict[str, tuple[int, int]] = {
    "left": (16, 32),
    "right": (48, 32),
    "top": (32, 16),
    "bottom": (32, 48),
    "center": (32, 32),
}
POSITION_NAMES = tuple(POSITIONS)
SIZES: dict[str, int] = {"big": 32, "small": 24}
SIZE_NAMES = tuple(SIZES)

BACKGROUND_SYNONYMS: dict[str, tuple[str, ...]] = {"gray": ("gray", "grey")}
SIZE_PHRASES: dict[str, tuple[str, ...]] = {
    "big": ("big", "large", "huge"),
    "small": ("small", "little", "tiny"),
}
POSITION_PHRASES: dict[str, tuple[str, ...]] = {
    "left": ("left", "on the left", "at the left", "on the left side"),
    "right": ("right", "on the right", "at the right", "on the right side"),
    "top": ("top", "at the top", "on top", "up"),
    "bottom": ("bottom", "at the bottom", "below", "down"),
    "center": ("center", "in the center", "in the middle", "middle", "centered"),
}
# Per relation: phrases with the left or upper thing named first, then phrases with it named second.
RELATION_PHRASES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("left of", "to the left of"), ("right of", "to the right of")),
    (("above", "over", "on top of"), ("below", "under", "beneath")),
)
