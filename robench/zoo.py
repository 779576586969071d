"""The zoo's one door: defenses register here, the built-in ones by the same way as anyone else's.

A defense is a function from a `Setting` to a `Specimen`; its name is the function's. Functions are found as `plugins` says, by the
entry point group ``robench.zoo``.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from robench import parameters, plugins
from robench.defense import Defense
from robench.errors import UserError, nearest
from robench.noise import isolated_generator
from robench.parameters import Value
from robench.plugins import Failure
from robench.recipe import Stage, with_epochs

Scale = Literal["smoke", "cpu", "gpu", "paper"]
GROUP = "robench.zoo"
EPOCHS = "epochs"
"""What every trained defense can be asked for beside its own parameters."""


@dataclass(frozen=True)
class Paper:
    """Where a defense or a claim comes from.

    Attributes:
        title: the paper's title.
        arxiv: its arXiv identifier, or an empty string.
        bibtex: its BibTeX entry.
        slug: a short name for markers and tables.
    """

    title: str
    arxiv: str
    bibtex: str
    slug: str


@dataclass(frozen=True)
class Setting:
    """What a defense is built for.

    Attributes:
        dataset: the data set's name.
        classes: its number of classes.
        image_shape: (channels, height, width).
        scale: how much computation there is.
        seed: tells independently trained copies apart.
    """

    dataset: str
    classes: int
    image_shape: tuple[int, int, int]
    scale: Scale
    seed: int


@dataclass(frozen=True)
class Specimen:
    """A defense, untrained, and the stages that train it, in order. Without stages it is ready as it is.

    Raises:
        UserError: for parts of other types.
    """

    defense: Defense
    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.defense, Defense):
            raise UserError(
                f"a specimen's defense is of type {type(self.defense).__name__} and no Defense; robench.defense.Plain wraps a module"
            )
        if not isinstance(self.stages, tuple) or not all(isinstance(stage, Stage) for stage in self.stages):
            raise UserError("a specimen's stages are no tuple of robench.recipe.Stage")


Factory = Callable[..., Specimen]


@dataclass(frozen=True)
class Entry:
    """A registered defense: its factory, integer version (raise it when its weights or outputs change), paper and origin."""

    name: str
    factory: Factory = field(repr=False)
    version: int
    paper: Paper
    origin: str
    alias_of: str | None = None

    def defaults(self) -> dict[str, Value]:
        """Return the defense's parameters and their defaults."""
        return parameters.keyword_parameters(self.factory)

    @property
    def summary(self) -> str:
        """The first line of the factory's docstring."""
        return (inspect.getdoc(self.factory) or "").partition("\n")[0]


@dataclass(frozen=True)
class Named:
    """An entry with all its parameters, as ``robust_average,k=8,eps=0.22`` names it.

    Attributes:
        entry: the defense.
        values: of its own parameters.
        epochs: of its first stage of training, the others in proportion, as ``natural,epochs=20`` names it; None for the recipes' own.
    """

    entry: Entry
    values: dict[str, Value]
    epochs: int | None = None

    @property
    def text(self) -> str:
        """The full name: every parameter is written, so that it means the same when a default changes."""
        return parameters.written(self.entry.alias_of or self.entry.name, self.values | {EPOCHS: self.epochs})

    @property
    def trained_as(self) -> int | str:
        """What tells its training apart beside weights, outputs and recipe: its version.

        A plugin's code may train otherwise by a parameter that shows in training alone, as a dropout's rate, and so is told by its name.
        """
        own = self.entry.factory.__module__.partition(".")[0] == "robench_zoo"
        return self.entry.version if own else f"{self.entry.version} of {parameters.written(self.entry.name, self.values)}"

    def build(self, setting: Setting) -> Specimen:
        """Return the untrained defense and its training stages; what draws from torch's generators is seeded by the setting.

        Raises:
            UserError: if the factory fails or returns no specimen, or nothing is trained and epochs are named.
        """
        try:
            with isolated_generator(setting.seed):
                specimen = self.entry.factory(setting, **self.values)
        except UserError:
            raise
        except Exception as error:  # a stranger's code may fail in any way
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"the zoo's {self.text} cannot be built for {setting.dataset}, scale {setting.scale}: {line}") from error
        if not isinstance(specimen, Specimen):
            raise UserError(f"the zoo's {self.text} returns {type(specimen).__name__} and not a robench.zoo.Specimen")
        if self.epochs is None:
            return specimen
        if not specimen.stages:
            raise UserError(f"{self.entry.name} is not trained, so it has no epochs")
        return Specimen(specimen.defense, with_epochs(specimen.stages, self.epochs))


_ENTRIES: dict[str, Entry] = {}
plugins.track(lambda: _ENTRIES)


def register(*, paper: Paper, version: int, alias: str | None = None) -> Callable[[Factory], Factory]:
    """Register a defense under its function's name, and under `alias` too if given.

    The function takes a `Setting` and keyword-only parameters with defaults, and returns a `Specimen`.

    Raises:
        UserError: if the name is taken, naming both origins, or the version, the paper or the function is not as above.
    """

    def add(factory: Factory) -> Factory:
        parameters.check_registration(f"defense {factory.__name__!r}", factory, version, ("setting",))
        if not isinstance(paper, Paper):
            raise UserError(f"defense {factory.__name__!r}: its paper is of type {type(paper).__name__} and not a robench.zoo.Paper")
        origin = f"{factory.__module__} ({inspect.getsourcefile(factory) or 'no file'})"
        names = [factory.__name__] + ([alias] if alias else [])
        for name in names:
            if name in _ENTRIES:
                raise UserError(f"the defense name {name!r} is taken twice: by {_ENTRIES[name].origin} and by {origin}")
        for name in names:
            _ENTRIES[name] = Entry(name, factory, version, paper, origin, None if name == names[0] else names[0])
        return factory

    return add


def discover(files: Iterable[Path] = ()) -> None:
    """Import every plugin once: the entry points of group ``robench.zoo``, then `files`.

    A plugin that fails to import is kept in `failures` with its reason, and the others load all the same.

    Raises:
        UserError: for a name taken twice, or a plugin file that does not exist.
    """
    plugins.discover(GROUP)
    plugins.load(files)


def entries() -> dict[str, Entry]:
    """Return every registered defense by name, sorted."""
    discover()
    return dict(sorted(_ENTRIES.items()))


def failures() -> list[Failure]:
    """Return the plugins that failed to import."""
    discover()
    return plugins.failures()


def parse(text: str) -> Named:
    """Read a defense's name and parameters: ``natural``, ``robust_average,k=8,eps=0.22``, ``natural,epochs=20``.

    Raises:
        UserError: for an unknown name or parameter (naming the nearest), or a value of the wrong type.
    """
    name, *settings = text.split(",")
    known = entries()
    if name not in known:
        broken = "".join(f"; {f.origin} failed to load ({f.reason})" for f in failures())
        raise UserError(f"unknown defense {name!r}{nearest(name, known)}; `robench zoo list` shows all{broken}")
    entry = known[name]
    own, epochs = entry.defaults(), None
    if EPOCHS not in own:
        every = [s for s in settings if s.partition("=")[0].strip() == EPOCHS]
        settings = [s for s in settings if s not in every]
        if every:
            epochs = int(parameters.read_settings(f"defense {name!r}", _every_defense, every, {EPOCHS: None})[EPOCHS] or 0)
            if epochs < 1:
                raise UserError(f"defense {name!r}: epochs={epochs} trains nothing; write 1 or more")
    return Named(entry, own | parameters.read_settings(f"defense {name!r}", entry.factory, settings, own), epochs)


def short(text: str) -> str:
    """Return a full name without the parameters that are at their default, as a user would type it; one not registered as it is."""
    try:
        named = parse(text)
    except UserError:
        return text
    other = {key: value for key, value in named.values.items() if value != named.entry.defaults()[key]}
    return parameters.written(named.entry.alias_of or named.entry.name, other | {EPOCHS: named.epochs})


def _every_defense(*, epochs: int) -> None:
    """Give the type of what every trained defense can be asked for."""
