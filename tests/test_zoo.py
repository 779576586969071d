"""Every registered defense keeps the contract; names are read strictly; plugins come in by one door and fail alone."""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from robench import aggregate, data, noise, plugins, targets, zoo
from robench.cost import counted
from robench.defense import Ensemble
from robench.errors import UserError
from robench.fingerprint import state_hash
from robench.noise import Draw
from robench.recipe import Recipe, Stage, learning_rate
from robench.zoo import Paper, Scale, Setting, Specimen

ENTRIES = zoo.entries()  # also makes robench_zoo importable by its entry point's name
from robench_zoo import multiresolution  # noqa: E402
from robench_zoo.backbones import backbone  # noqa: E402
from robench_zoo.ensemble_everything import SelfEnsemble  # noqa: E402

NAMES = tuple(ENTRIES)
REQUIRED = """
natural baseline single_adv double_adv ensemble2 ensemble4 ensemble2_adv ensemble4_adv separate2_adv separate4_adv gated2_adv
robust robust_average composite composite_pair
multires multires_self_ensemble multires_ensemble3 multires_adv multires_self_ensemble_adv multires_ensemble3_adv
"""
SETTINGS: dict[str, tuple[str, tuple[int, int, int]]] = {"smoke": ("digits", (3, 16, 16)), "cpu": ("cifar10", (3, 32, 32))}
BATCH = 3
PAPER = Paper("A title", "0000.00000", "@misc{a}", "a_slug")


@functools.cache
def built(text: str, scale: Scale = "smoke", seed: int = 0) -> Specimen:
    """Build a defense once; tests only read it."""
    dataset, shape = SETTINGS.get(scale, SETTINGS["cpu"])
    specimen = zoo.parse(text).build(Setting(dataset, 10, shape, scale, seed))
    specimen.defense.eval()
    return specimen


def images(scale: str) -> Tensor:
    return torch.rand(BATCH, *SETTINGS[scale][1], generator=torch.Generator().manual_seed(1))


def draw(number: int) -> Draw:
    return Draw(5, torch.arange(BATCH), number)


def parameters(specimen: Specimen) -> int:
    return sum(p.numel() for p in specimen.defense.parameters())


def test_every_defense_of_the_papers_is_registered() -> None:
    assert set(REQUIRED.split()) <= set(NAMES)
    assert not zoo.failures()


@pytest.mark.parametrize("name", ["natural", "ensemble2", "single_adv", "ensemble2_adv", "separate2_adv"])
def test_strength_in_numbers_trains_as_it_says(name: str) -> None:
    # arXiv 1811.09300, section 4.2, "all models": 500,000 iterations of 128 images, rate 0.1, times 0.2 after 30k, 60k and 90k.
    specimen = zoo.parse(f"{name},backbone=resnet8-16").build(zoo.Setting("cifar10", 10, (3, 32, 32), "paper", 0))
    for stage in specimen.stages:
        steps = stage.recipe.epochs * math.ceil(50_000 / 128)
        assert steps == pytest.approx(500_000, rel=0.002)
        rates = [learning_rate(stage.recipe, step, steps) for step in (0, 29_900, 30_200, 59_900, 60_300, 89_900, 90_400, steps - 1)]
        assert rates == pytest.approx([0.1, 0.1, 0.02, 0.02, 0.004, 0.004, 0.0008, 0.0008])


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_says_where_it_comes_from(name: str) -> None:
    entry = ENTRIES[name]
    assert entry.name == name
    assert type(entry.version) is int
    assert entry.version >= 1
    assert entry.summary.endswith((".", ")"))
    assert entry.paper.title
    assert entry.paper.slug.isidentifier()
    assert entry.paper.arxiv in entry.paper.bibtex
    assert len(entry.paper.arxiv) == 10
    assert entry.origin.endswith(".py)")


@pytest.mark.parametrize("scale", ["smoke", "cpu"])
@pytest.mark.parametrize("name", NAMES)
def test_a_defense_keeps_the_contract(name: str, scale: Scale) -> None:
    specimen = built(name, scale)
    defense, x = specimen.defense, images(scale).requires_grad_()
    with counted(defense) as cost:
        logits = defense(x, draw(0))
    predictors = defense.predictors(x, draw(0))
    assert logits.shape == (BATCH, 10)
    assert predictors.ndim == 3
    assert (predictors.shape[0], predictors.shape[2]) == (BATCH, 10)
    assert bool(torch.isfinite(predictors).all())
    assert torch.equal(defense.aggregate(predictors), logits)
    # As the code of arXiv 2408.05446 has it, a self-ensemble passes its backbone a second time for the backbone's own prediction.
    passes = 2 if any(isinstance(m, SelfEnsemble) and m.backbone.pipeline.variant == "as_published" for m in defense.modules()) else 1
    assert defense.members()
    assert cost.forwards == passes * len(defense.members()) * BATCH
    loss = functional.cross_entropy(logits, torch.arange(BATCH), reduction="sum")
    (gradient,) = torch.autograd.grad(loss, x)
    assert bool(torch.isfinite(gradient).all())
    assert bool((gradient.flatten(1).abs().amax(1) > 0).all())
    assert cost.backwards == cost.forwards
    with torch.no_grad():
        assert torch.equal(defense(x, draw(0)), logits)
        if defense.random:
            assert not torch.equal(defense(x, draw(1)), logits)
        else:
            assert torch.equal(defense(x), logits)


@pytest.mark.parametrize("name", NAMES)
def test_a_defense_keeps_to_the_device_of_its_images(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tensors that have a device and no values, so that no GPU is needed: mixing two devices raises."""
    # Whether logits are finite is a question to their values.
    monkeypatch.setattr(aggregate, "_checked", lambda logits: logits)
    defense = zoo.parse(name).build(Setting("digits", 10, SETTINGS["smoke"][1], "smoke", 0)).defense.eval()
    caches = (multiresolution._resizing, multiresolution._luma, noise._on_device)
    for kept in caches:
        kept.cache_clear()
    with FakeTensorMode() as fake, torch.no_grad():
        tensors = [*defense.named_parameters(), *defense.named_buffers()]
        state = {key: fake.from_tensor(tensor).to("cuda") for key, tensor in tensors}
        x = torch.zeros(BATCH, *SETTINGS["smoke"][1], device="cuda")
        logits = torch.func.functional_call(defense, state, (x, Draw(5, torch.arange(BATCH, device="cuda"))))
    for kept in caches:
        kept.cache_clear()
    assert (logits.device.type, logits.shape) == ("cuda", (BATCH, 10))


@pytest.mark.parametrize("name", NAMES)
def test_the_stages_name_what_is_there(name: str) -> None:
    for scale in ("smoke", "cpu"):
        specimen = built(name, scale)
        assert specimen.stages
        for stage in specimen.stages:
            module = specimen.defense.get_submodule(stage.module)
            parts = [module.get_submodule(path) for path in stage.trainable] or [module]
            assert all(list(part.parameters()) for part in parts)
            assert stage.recipe.augmentation != "crop-flip" or scale == "cpu", "digits must not be mirrored"


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_of_a_setting_decides_the_weights(name: str) -> None:
    dataset, shape = SETTINGS["smoke"]
    again = zoo.parse(name).build(Setting(dataset, 10, shape, "smoke", 0))
    other = zoo.parse(name).build(Setting(dataset, 10, shape, "smoke", 1))
    assert state_hash(again.defense) == state_hash(built(name).defense)
    assert again.stages == built(name).stages
    assert state_hash(other.defense) != state_hash(again.defense)
    assert all(stage.seed != first.seed for stage, first in zip(other.stages, again.stages, strict=True))


def test_building_leaves_the_global_generator_alone() -> None:
    before = torch.random.get_rng_state()
    zoo.parse("multires_self_ensemble").build(Setting("digits", 10, (3, 16, 16), "smoke", 0))
    assert torch.equal(torch.random.get_rng_state(), before)


def start(specimen: Specimen, number: int) -> tuple[str, Any, int, tuple[str, ...]]:
    """Return all that decides what a stage's training comes to."""
    stage: Stage = specimen.stages[number]
    return state_hash(specimen.defense.get_submodule(stage.module)), stage.recipe, stage.seed, stage.trainable


@pytest.mark.parametrize("scale", ["smoke", "cpu"])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("single_adv", "separate2_adv"),
        ("separate2_adv", "separate4_adv"),
        ("robust,eps=0.22", "robust_average,k=4,eps=0.22"),
        ("robust,eps=0.4", "composite,eps=0.4"),
        ("composite", "composite_pair"),
        ("multires", "multires_self_ensemble"),
        ("multires_self_ensemble", "multires_ablation"),
        ("multires_self_ensemble", "multires_layer"),
        ("multires_self_ensemble", "multires_weighted"),
        ("natural", "crossmax_ensemble"),
    ],
)
def test_defenses_share_their_first_stage(one: str, other: str, scale: Scale) -> None:
    assert start(built(one, scale), 0) == start(built(other, scale), 0)


def test_an_ablation_is_the_self_ensemble_with_parts_taken_away() -> None:
    whole = built("multires_self_ensemble").defense
    x = images("smoke")
    with torch.no_grad():
        same = built("multires_ablation,noise=fresh,aggregation=crossmax").defense
        assert torch.equal(same(x, draw(2)), whole(x, draw(2)))
        fewer = built("multires_ablation,noise=fresh,heads=2").defense
        assert torch.equal(fewer.predictors(x, draw(2)), whole.predictors(x, draw(2))[:, -2:])
        assert torch.allclose(fewer(x, draw(2)), whole.predictors(x, draw(2))[:, -2:].mean(1))
        # One and the same noise for every image, wherever it stands in whatever batch.
        fixed = built("multires_ablation").defense
        assert torch.allclose(fixed(x.flip(0), draw(1)).flip(0), fixed(x, draw(2)), atol=1e-5)
        assert torch.allclose(fixed(x[:1].repeat(3, 1, 1, 1)).std(0), torch.zeros(10), atol=1e-5)


def test_a_layer_is_one_predictor_of_the_self_ensemble() -> None:
    x, whole = images("smoke"), built("multires_ablation").defense
    with torch.no_grad():
        for layer in (0, 4):
            alone = built(f"multires_layer,layer={layer}").defense
            assert torch.equal(alone(x), whole.predictors(x)[:, layer])


def test_checkpoints_are_of_one_training() -> None:
    specimen = built("multires_checkpoints,k=2")
    first, last = start(specimen, 0), start(specimen, 1)
    assert (first[0], first[2]) == (last[0], last[2])
    assert first[1] == dataclasses.replace(last[1], epochs=last[1].epochs - 1)
    assert last[1].schedule == "constant"


def test_learned_weights_combine_the_predictors() -> None:
    defense, x = built("multires_weighted").defense, images("smoke")
    with torch.no_grad():
        predictors = defense.predictors(x, draw(0))
        torch.testing.assert_close(defense.aggregate(predictors), predictors.mean(1))
        defense.combination.logits_of_weights[2] = 1e3  # type: ignore[index, operator, union-attr]
        torch.testing.assert_close(defense.aggregate(predictors), predictors[:, 2])


def test_members_start_apart() -> None:
    for name in ("ensemble4", "separate4_adv", "robust_average"):
        defense = built(name).defense
        hashes = [state_hash(member) for member in defense.members()]
        assert len(set(hashes)) == len(hashes)
    assert start(built("natural"), 0)[1:] != start(built("single_adv"), 0)[1:]


@pytest.mark.parametrize("scale", ["smoke", "cpu", "gpu"])
def test_double_adv_has_twice_the_parameters(scale: Scale) -> None:
    ratio = parameters(built("double_adv", scale)) / parameters(built("single_adv", scale))
    assert 1.8 < ratio < 2.2
    assert built("double_adv", scale).stages == built("single_adv", scale).stages


@pytest.mark.slow
@pytest.mark.parametrize("name", ["double_adv", "multires_self_ensemble"])
def test_a_defense_works_at_gpu_scale(name: str) -> None:
    defense = built(name, "gpu").defense
    with torch.no_grad():
        logits = defense(images("cpu"), draw(0))
    assert logits.shape == (BATCH, 10)
    assert bool(torch.isfinite(logits).all())


# Backbones


def network(name: str, classes: int = 10, **settings: Any) -> torch.nn.Module:
    with noise.isolated_generator(0):
        return backbone(name, classes, **settings)


@pytest.mark.parametrize(
    ("name", "classes", "count"),
    [
        # The counts that other implementations state: 0.70 million for CIFAR-100, 36.5 million, 11.17 million for CIFAR-10.
        ("wrn-16-2", 100, 703_284),
        pytest.param("wrn-28-10", 10, 36_479_194, marks=pytest.mark.slow),
        pytest.param("resnet18", 10, 11_173_962, marks=pytest.mark.slow),
    ],
)
def test_a_backbone_has_the_published_number_of_parameters(name: str, classes: int, count: int) -> None:
    assert sum(p.numel() for p in network(name, classes).parameters()) == count


@pytest.mark.parametrize(
    "name",
    [
        "wrn-16-2", "resnet8-16", "resnet8-16s2",
        pytest.param("resnet18", marks=pytest.mark.slow), pytest.param("resnet18-unnormalised", marks=pytest.mark.slow),
        pytest.param("timm:test_vit", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_a_backbone_is_built_by_name(name: str) -> None:
    channels = 3 if name.startswith("timm") else 12
    side = 160 if name.startswith("timm") else 16
    made = network(name, channels=channels).eval()
    with torch.no_grad():
        logits = made(torch.rand(2, channels, side, side, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (2, 10)
    assert bool(torch.isfinite(logits).all())


def test_the_stride_of_the_stem_halves_the_image() -> None:
    x = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    whole, halved = (network(name).stages(network(name).stem(x)) for name in ("resnet8-16", "resnet8-16s2"))  # type: ignore[operator, union-attr]
    assert (whole.shape[-1], halved.shape[-1]) == (4, 2)


@pytest.mark.parametrize(
    "name", ["", "wrn", "wrn-27-10", "wrn-4-10", "wrn-x-y", "wrn-28-0", "wrn-28-1.5", "resnet8-", "resnet8-0", "resnet8-s2", "vgg"]
)
def test_an_unknown_backbone_is_an_error_of_one_line(name: str) -> None:
    with pytest.raises(UserError, match=r"^unknown backbone .*; write wrn-28-10, resnet8-32, resnet18, resnet152 or timm:NAME$"):
        network(name)


@pytest.mark.slow
def test_an_unknown_model_of_timm_is_an_error_of_one_line() -> None:
    with pytest.raises(UserError, match=r"^timm has no model 'resnet1'$"):
        network("timm:resnet1")


# Names with parameters


def test_parameters_are_read_by_their_types() -> None:
    named = zoo.parse("robust_average,k=4,eps=8/255,weights=0.5/0.5/0.5/0.5")
    assert named.values == {"k": 4, "eps": 8 / 255, "weights": "0.5/0.5/0.5/0.5", "backbone": None}
    assert type(named.values["k"]) is int
    assert zoo.parse("robust,backbone=wrn-16-2").values["backbone"] == "wrn-16-2"
    assert zoo.parse("robust, eps = 1 ").values["eps"] == 1.0


@pytest.mark.parametrize(
    "text", [*NAMES, "robust,eps=1/3", "robust_average,eps=1e-3,k=2", "multires_self_ensemble,k=4,variant=as_described"]
)
def test_the_full_text_reads_back_as_the_same(text: str) -> None:
    named = zoo.parse(text)
    again = zoo.parse(named.text)
    assert (again.text, again.values) == (named.text, named.values)
    assert again.entry.factory is named.entry.factory


def test_the_text_names_every_parameter() -> None:
    assert zoo.parse("robust_average,k=4").text == "robust_average,k=4,eps=0.22,weights=uniform"
    assert zoo.parse("baseline").text == "natural"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("naturel", "unknown defense 'naturel' (did you mean 'natural'"),
        ("robust_average,epsilon=1", "has no parameter 'epsilon'; it has k, eps, weights, backbone (did you mean 'eps'"),
        ("robust,eps=big", "eps='big' is not of type float"),
        ("robust,eps=1/0", "eps='1/0' is not of type float"),
        ("robust,eps=1,eps=2", "is given 'eps' twice"),
        ("robust,eps=1e400", "eps='1e400' is not of type float"),
        ("robust_average,k=2.5", "k='2.5' is not of type int"),
        ("robust,eps", "eps needs a value, as in eps=0.5"),
        ("robust,", "has no parameter ''"),
    ],
)
def test_a_wrong_name_is_an_error_of_one_line(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        zoo.parse(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("robust_average,k=0", "an average needs k of at least 1, not 0"),
        ("robust_average,k=2,weights=a/b", "weights='a/b' is neither uniform nor numbers as in 0.5/0.3/0.2"),
        ("robust_average,k=2,weights=0.5/0.3/0.2", "must be 2 numbers"),
        ("multires,variant=as_dreamt", "variant 'as_dreamt' is not one of as_published, as_described"),
        ("multires_self_ensemble,k=1", "k = 1 must be between 2 and the number of predictors, 5"),
        ("multires_ablation,noise=off", "noise 'off' is not one of fresh, fixed"),
        ("multires_ablation,aggregation=vote", "aggregation 'vote' is not one of crossmax, kth_highest, median_of_logits, mean_of_logits"),
        ("multires_ablation,heads=6", "heads = 6 must be between 1 and the number of predictors, 5, or 0 for all"),
        ("multires_ablation,aggregation=crossmax,heads=2,k=3", "k = 3 must be between 2 and the number of predictors, 2"),
        ("natural,backbone=vgg", "unknown backbone 'vgg'"),
    ],
)
def test_a_value_that_does_not_fit_is_an_error_before_training(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        zoo.parse(text).build(Setting("digits", 10, (3, 16, 16), "smoke", 0))
    assert message in str(caught.value)


# Plugins


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, zoo.Entry]:
    """A copy of the registry: nothing that a test registers stays."""
    entries = dict(zoo.entries())
    monkeypatch.setattr(zoo, "_ENTRIES", entries)
    monkeypatch.setattr(plugins, "_FAILURES", {})
    monkeypatch.setattr(plugins, "_loaded", set(plugins._loaded))
    for name in list(sys.modules):
        if name.startswith(("robench_plugin_", "temporary_zoo")):
            monkeypatch.delitem(sys.modules, name)
    return entries


def plugin(name: str, more: str = "") -> str:
    """Return the source of a plugin that registers one defense."""
    return (
        "import torch\n"
        "from robench.defense import Plain\n"
        "from robench.zoo import Paper, Specimen, register\n\n\n"
        "@register(paper=Paper('T', '0000.00000', '@misc{t}', 'slug'), version=3)\n"
        f"def {name}(setting, *, width: int = 2):\n"
        "    '''A defense of a stranger.'''\n"
        f"    return Specimen(Plain(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(setting.classes))))\n\n\n{more}\n"
    )


def some_defense(setting: Setting) -> Specimen:
    """A defense."""
    return Specimen(Ensemble([torch.nn.Flatten()], lambda logits: logits[:, 0]))


@pytest.mark.parametrize("classes", [5, 11])
def test_a_defense_of_other_classes_is_refused_before_it_is_trained(registry: dict[str, zoo.Entry], classes: int, tmp_path: Path) -> None:
    def narrow(_setting: Setting) -> Specimen:
        """A defense."""
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(768, classes))
        return Specimen(Ensemble([network], lambda logits: logits[:, 0]), (Stage(Recipe(1, 0.1), 0),))

    zoo.register(paper=PAPER, version=1)(narrow)
    with pytest.raises(UserError, match=rf"^narrow returns outputs of shape \(2, {classes}\); digits needs logits of shape \(batch, 10\)$"):
        targets.trained(zoo.parse("narrow"), data.load("digits", "test"), scale="smoke", cache=tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_name_taken_twice_names_both_origins(registry: dict[str, zoo.Entry]) -> None:
    zoo.register(paper=PAPER, version=1)(some_defense)
    assert registry["some_defense"].origin.endswith("test_zoo.py)")
    with pytest.raises(UserError, match=r"'some_defense' is taken twice: by .*test_zoo.py\) and by .*test_zoo.py\)"):
        zoo.register(paper=PAPER, version=1)(some_defense)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: 1 / 0, r"cannot be built for digits, scale smoke: ZeroDivisionError: division by zero$"),
        (lambda: None, r"returns NoneType and not a robench.zoo.Specimen$"),
    ],
)
def test_a_factory_that_makes_no_defense_is_one_line(registry: dict[str, zoo.Entry], made: Callable[[], Any], message: str) -> None:
    @zoo.register(paper=PAPER, version=1)
    def odd_factory(setting: Setting) -> Specimen:
        """A factory of a stranger's."""
        return made()  # type: ignore[no-any-return]

    with pytest.raises(UserError, match=r"^the zoo's odd_factory " + message):
        zoo.parse("odd_factory").build(Setting("digits", 10, (3, 16, 16), "smoke", 0))


def test_an_alias_that_is_taken_registers_nothing(registry: dict[str, zoo.Entry]) -> None:
    with pytest.raises(UserError, match=r"'natural' is taken twice: by robench_zoo.strength_in_numbers \("):
        zoo.register(paper=PAPER, version=1, alias="natural")(some_defense)
    assert "some_defense" not in registry


def test_a_file_that_is_dropped_into_a_package_is_found(
    registry: dict[str, zoo.Entry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "temporary_zoo"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "a_good_one.py").write_text(plugin("first_stranger"))
    (folder / "b_bad_one.py").write_text(plugin("half_registered", "raise OSError('no weights here\\nsecond line')"))
    (folder / "c_unreadable.py").write_text("def (:\n")
    (folder / "d_good_one.py").write_text(plugin("second_stranger"))
    monkeypatch.syspath_prepend(tmp_path)
    plugins.import_tree("temporary_zoo")
    assert {"first_stranger", "second_stranger"} == set(registry) - set(NAMES)
    failures = {failure.origin: failure.reason for failure in zoo.failures()}
    assert failures.pop("module temporary_zoo.b_bad_one") == "OSError: no weights here"
    assert failures.pop("module temporary_zoo.c_unreadable").startswith("SyntaxError: ")
    assert not failures
    assert registry["first_stranger"].origin == f"temporary_zoo.a_good_one ({folder / 'a_good_one.py'})"
    with pytest.raises(UserError, match=r"unknown defense 'half_registered'.*b_bad_one failed to load \(OSError: no weights here\)"):
        zoo.parse("half_registered")


def test_a_plugin_file_registers_its_defense(registry: dict[str, zoo.Entry], tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(plugin("mine_alone"))
    zoo.discover([path])
    zoo.discover([path])
    named = zoo.parse("mine_alone,width=3")
    assert (named.text, named.entry.version, named.entry.summary) == ("mine_alone,width=3", 3, "A defense of a stranger.")
    defense = named.build(Setting("digits", 10, (3, 16, 16), "smoke", 0)).defense
    assert defense(torch.zeros(2, 3, 16, 16)).shape == (2, 10)
    assert "mine_alone" in zoo.entries()
    assert not zoo.failures()


def test_a_plugin_file_that_ends_the_program_is_listed(registry: dict[str, zoo.Entry], tmp_path: Path) -> None:
    path = tmp_path / "ends.py"
    path.write_text("raise SystemExit(3)\n")
    zoo.discover([path])
    assert [failure.reason for failure in zoo.failures()] == ["SystemExit: 3"]


def test_a_plugin_file_that_fails_is_listed_and_the_rest_works(registry: dict[str, zoo.Entry], tmp_path: Path) -> None:
    bad, good = tmp_path / "bad.py", tmp_path / "good.py"
    bad.write_text(plugin("lost", "import a_module_that_nobody_has"))
    good.write_text(plugin("found"))
    zoo.discover([bad, good])
    assert "lost" not in registry
    assert "found" in registry
    (failure,) = zoo.failures()
    assert failure.origin == f"plugin file {bad}"
    assert failure.reason == "ModuleNotFoundError: No module named 'a_module_that_nobody_has'"


def test_a_plugin_that_takes_a_known_name_is_an_error(registry: dict[str, zoo.Entry], tmp_path: Path) -> None:
    path = tmp_path / "thief.py"
    path.write_text(plugin("natural"))
    with pytest.raises(UserError, match=r"'natural' is taken twice: by robench_zoo.strength_in_numbers .* and by .*thief.py"):
        zoo.discover([path])
    assert registry["natural"] is ENTRIES["natural"]


@pytest.mark.parametrize(("name", "message"), [("absent.py", "does not exist"), ("plugin.txt", "is not a Python file")])
def test_a_plugin_that_is_no_python_file_is_an_error(registry: dict[str, zoo.Entry], tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "plugin.txt").write_text("text")
    with pytest.raises(UserError, match=message):
        zoo.discover([tmp_path / name])


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("robust_average,k=4,eps=1", "robust_average,k=4,eps=1.0"),
        ("multires_self_ensemble,k=3,variant=as_published", "multires_self_ensemble"),
        ("baseline,epochs=20", "natural,epochs=20"),
        ("a-stranger's,k=3", "a-stranger's,k=3"),
    ],
)
def test_a_short_name_leaves_out_defaults_and_means_the_same(text: str, short: str) -> None:
    full = zoo.parse(text).text if "stranger" not in text else text
    assert zoo.short(full) == short
    assert "stranger" in text or zoo.parse(short).text == full
