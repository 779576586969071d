"""The defense contract: structure, draws and the cost counted at the members."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from robench import aggregate, noise, zoo
from robench.aggregate import crossmax, majority_vote, mean_of_logits
from robench.cost import Cost, counted
from robench.defense import Defense, Ensemble, FreshDraws, Plain, as_defense, member_draw
from robench.noise import Draw

CLASSES = 4


def network(seed: int) -> nn.Module:
    with noise.isolated_generator(seed):
        return nn.Sequential(nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 4 * 4, CLASSES)).double()


def images(count: int = 5) -> Tensor:
    return torch.rand(count, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(count))


class Noisy(Defense):
    """One network behind noise that is added to the image; it keeps the draws it was given."""

    random = True

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.network = network(seed)
        self.draws: list[Draw | None] = []

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        self.draws.append(draw)
        if draw is not None:
            x = x + noise.normal(draw, "noisy", tuple(x.shape[1:])).to(x)
        logits: Tensor = self.network(x)
        return logits[:, None]

    def aggregate(self, logits: Tensor) -> Tensor:
        return logits[:, 0]

    def members(self) -> list[nn.Module]:
        return [self.network]


def draw_of(count: int = 5, seed: int = 0, number: int = 0) -> Draw:
    return Draw(seed, torch.arange(count), number)


# Structure


@pytest.mark.parametrize("aggregator", [mean_of_logits, majority_vote, crossmax])
def test_an_ensemble_is_its_networks_and_what_combines_them(aggregator) -> None:
    networks = [network(seed) for seed in range(3)]
    ensemble, x = Ensemble(networks, aggregator), images()
    predictors = ensemble.predictors(x)
    assert predictors.shape == (5, 3, CLASSES)
    for i, one in enumerate(networks):
        assert torch.equal(predictors[:, i], one(x))
    assert ensemble(x).shape == (5, CLASSES)
    assert torch.equal(ensemble(x), aggregator(predictors))
    assert torch.equal(ensemble.aggregate(predictors), aggregator(predictors))
    assert ensemble.members() == networks
    assert not ensemble.random
    assert len(list(ensemble.parameters())) == 12


def test_one_network_and_the_mean_are_that_network() -> None:
    one, x = network(0), images()
    assert torch.equal(Ensemble([one], mean_of_logits)(x), one(x))


def test_plain_wraps_a_module_and_tells_nothing() -> None:
    module, x = network(1), images()
    plain = as_defense(module)
    assert isinstance(plain, Plain)
    assert plain.predictors(x).shape == (5, 1, CLASSES)
    assert torch.equal(plain(x), module(x))
    assert plain.members() == [module]
    assert not plain.random
    assert Plain(module, random=True).random
    assert as_defense(plain) is plain


@pytest.mark.parametrize("method", ["predictors", "aggregate", "members", "forward"])
def test_a_defense_without_structure_says_so(method: str) -> None:
    with pytest.raises(NotImplementedError):
        getattr(Defense(), method)(*([] if method == "members" else [images()]))


def test_an_ensemble_of_ensembles_has_the_inner_networks_as_members() -> None:
    leaves = [network(seed) for seed in range(5)]
    inner = Ensemble(leaves[:2], mean_of_logits), Ensemble(leaves[2:4], crossmax)
    outer, x = Ensemble([*inner, leaves[4]], mean_of_logits), images()
    assert outer.members() == leaves
    assert torch.equal(outer.predictors(x), torch.stack([inner[0](x), inner[1](x), leaves[4](x)], 1))
    assert not outer.random
    assert Ensemble([Ensemble([Noisy(0), leaves[0]], mean_of_logits), leaves[1]], mean_of_logits).random


# Draws


def test_random_members_take_draws_of_their_own() -> None:
    noisy = [Noisy(0) for _ in range(3)]
    for one in noisy:
        one.load_state_dict(noisy[0].state_dict())
    ensemble, x = Ensemble([*noisy, network(1)], mean_of_logits), images()
    predictors = ensemble.predictors(x, draw_of())
    # The same weights and the same draw of the ensemble, and yet different noise.
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not torch.isclose(predictors[:, i], predictors[:, j]).any()
    assert torch.equal(ensemble.predictors(x, draw_of()), predictors)
    again = ensemble.predictors(x, draw_of(number=1))
    assert not torch.isclose(again[:, :3], predictors[:, :3]).any()
    assert torch.equal(again[:, 3], predictors[:, 3])
    assert all(torch.equal(one.draws[0].examples, torch.arange(5)) for one in noisy if one.draws[0])


def test_without_a_draw_members_get_none() -> None:
    noisy = Noisy(0)
    Ensemble([noisy], mean_of_logits)(images())
    assert noisy.draws == [None]
    assert member_draw(None, 3) is None


def test_member_draws_keep_the_examples_and_the_number() -> None:
    draw = draw_of(seed=5, number=7)
    for member in range(3):
        derived = member_draw(draw, member)
        assert derived is not None
        assert (derived.number, derived.examples is draw.examples) == (7, True)
        assert derived.seed != 5


def distinct_noises(draws: list[Draw | None]) -> int:
    return len(torch.unique(torch.cat([noise.normal(draw, "noisy", (8,)) for draw in draws if draw]), dim=0))


def draws_of_a_tree(seed: int) -> list[Draw | None]:
    """Return the draws of four members, and of four members of each."""
    members = [member_draw(draw_of(1, seed), i) for i in range(4)]
    return [*members, *(member_draw(member, j) for member in members for j in range(4))]


def test_members_of_nested_ensembles_do_not_share_noise() -> None:
    for seed in (0, 1, -1, 2**40):
        assert distinct_noises([draw_of(1, seed), *draws_of_a_tree(seed)]) == 21


def test_members_do_not_share_noise_with_those_of_another_seed() -> None:
    # An attack and its scoring take neighbouring seeds.
    seeds = range(-2, 3)
    assert distinct_noises([draw for seed in seeds for draw in (draw_of(1, seed), *draws_of_a_tree(seed))]) == 21 * len(seeds)


def test_a_random_defense_does_not_depend_on_the_batch() -> None:
    ensemble, x = Ensemble([Noisy(0), Noisy(1)], mean_of_logits), images(6)
    whole = ensemble(x, Draw(3, torch.arange(6), 2))
    order = torch.tensor([4, 0, 5])
    assert torch.allclose(ensemble(x[order], Draw(3, order, 2)), whole[order], rtol=1e-12)


def test_fresh_draws_takes_the_next_draw_each_time() -> None:
    noisy, x = Noisy(0), images()
    fresh = FreshDraws(noisy, seed=9)
    outputs = [fresh(x) for _ in range(3)]
    assert all(not torch.isclose(a, b).any() for a, b in pairwise(outputs))
    assert [(draw.seed, draw.number) for draw in noisy.draws if draw] == [(9, 0), (9, 1), (9, 2)]
    again = FreshDraws(noisy, seed=9)
    assert all(torch.equal(again(x), output) for output in outputs)


# Cost


def count(defense: Defense, work) -> tuple[int, int]:
    with counted(defense) as cost:
        work()
    return cost.forwards, cost.backwards


def test_cost_adds() -> None:
    assert Cost(1, 2) + Cost(10, 20) == Cost(11, 22)


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("draws", [1, 4])
def test_members_times_draws_are_counted(members: int, draws: int) -> None:
    ensemble, x = Ensemble([Noisy(seed) for seed in range(members)], mean_of_logits), images(5).requires_grad_(True)

    def attack_step() -> None:
        loss = torch.stack([ensemble(x, draw_of(number=number)).logsumexp(1).sum() for number in range(draws)]).mean()
        torch.autograd.grad(loss, x)

    assert count(ensemble, attack_step) == (5 * members * draws, 5 * members * draws)


def test_forwards_alone_are_counted_without_gradients() -> None:
    ensemble, x = Ensemble([network(0), network(1)], mean_of_logits), images(7)
    with torch.no_grad():
        assert count(ensemble, lambda: ensemble(x)) == (14, 0)
    with torch.inference_mode():
        assert count(ensemble, lambda: ensemble(x)) == (14, 0)
    # A graph that nothing goes back through costs no backward.
    assert count(ensemble, lambda: ensemble(x.requires_grad_(True))) == (14, 0)


def test_a_network_that_is_a_member_twice_counts_at_each_forward_once() -> None:
    shared, x = network(0), images(5).requires_grad_(True)
    ensemble = Ensemble([shared, shared], mean_of_logits)
    assert count(ensemble, lambda: torch.autograd.grad(ensemble(x).sum(), x)) == (10, 10)


class Named(Defense):
    """A network that takes its images by name and returns its logits by name."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network(0)

        def forward(self, *, pixels: Tensor) -> dict[str, Tensor]:
            return {"logits": self.inner(pixels)}

    def __init__(self) -> None:
        super().__init__()
        self.network = self.Network()

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        return self.network(pixels=x)["logits"][:, None]

    def aggregate(self, logits: Tensor) -> Tensor:
        return logits[:, 0]

    def members(self) -> list[nn.Module]:
        return [self.network]


def test_what_goes_in_and_comes_out_by_name_is_counted() -> None:
    defense, x = Named(), images(5).requires_grad_(True)
    assert count(defense, lambda: torch.autograd.grad(defense(x).sum(), x)) == (5, 5)


def test_a_vote_lets_nothing_back() -> None:
    ensemble, x = Ensemble([network(0), network(1)], majority_vote), images(3)
    assert not ensemble(x.requires_grad_(True)).requires_grad
    assert count(ensemble, lambda: ensemble(x)) == (6, 0)


def test_only_members_that_the_gradient_reaches_count() -> None:
    ensemble, x = Ensemble([network(0), network(1)], mean_of_logits), images(3).requires_grad_(True)
    assert count(ensemble, lambda: ensemble.predictors(x)[:, 0].sum().backward()) == (6, 6)
    # Through the first member alone.
    assert count(ensemble, lambda: (ensemble(x), ensemble.networks[0](x).sum().backward())) == (9, 3)


def test_the_innermost_predictors_are_those_behind_every_aggregation() -> None:
    """On the very noise that the defense itself sees; a flat one's are its own."""
    defense = zoo.parse("multires_ensemble3").build(zoo.Setting("digits", 10, (3, 16, 16), "smoke", 0)).defense.eval()
    assert isinstance(defense, Ensemble)
    x, draw = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)), Draw(0, torch.arange(2), 5)
    with torch.no_grad():
        inner, outer = defense.innermost(x, draw), defense.predictors(x, draw)
        assert defense.nested
        assert inner.shape[1] % 3 == 0
        assert inner.shape[1] > 3
        for i, (network, part) in enumerate(zip(defense.networks, inner.chunk(3, dim=1), strict=True)):
            assert isinstance(network, Defense)
            assert not network.nested
            torch.testing.assert_close(network.aggregate(part), outer[:, i])
            torch.testing.assert_close(network.innermost(x, draw), network.predictors(x, draw))


def test_nested_ensembles_count_their_leaves_once() -> None:
    inner = Ensemble([network(0), network(1)], mean_of_logits)
    outer, x = Ensemble([inner, network(2)], mean_of_logits), images(4).requires_grad_(True)
    assert count(outer, lambda: outer(x).sum().backward()) == (12, 12)


def test_a_plain_module_counts_as_one_member() -> None:
    plain, x = as_defense(network(0)), images(4).requires_grad_(True)
    assert count(plain, lambda: plain(x).sum().backward()) == (4, 4)


class TwoHeads(nn.Module):
    """Gives two logit tensors, as a backbone with two heads does."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.other = network(0), network(1)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        return self.backbone(x), [self.other(x)]


class Heads(Defense):
    def __init__(self) -> None:
        super().__init__()
        self.body = TwoHeads()

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        first, (second,) = self.body(x)
        return torch.stack([first, second], 1)

    def aggregate(self, logits: Tensor) -> Tensor:
        return aggregate.mean_of_logits(logits)

    def members(self) -> list[nn.Module]:
        return [self.body]


def test_a_member_with_several_heads_is_passed_back_through_once() -> None:
    heads, x = Heads(), images(4).requires_grad_(True)
    assert count(heads, lambda: heads(x).sum().backward()) == (4, 4)


def test_two_backwards_through_one_forward_count_twice() -> None:
    # As an attack does that takes the gradient of every class.
    ensemble, x = Ensemble([network(0), network(1)], mean_of_logits), images(3).requires_grad_(True)

    def two_targets() -> None:
        logits = ensemble(x)
        for target in (0, 1):
            torch.autograd.grad(logits[:, target].sum(), x, retain_graph=True)

    assert count(ensemble, two_targets) == (6, 12)


def test_a_count_runs_inside_the_block() -> None:
    ensemble, x = Ensemble([network(0)], mean_of_logits), images(2)
    with counted(ensemble) as cost:
        ensemble(x)
        assert cost.forwards == 2
        ensemble(x)
        assert cost.forwards == 4


def stopped_by_an_error(ensemble: Ensemble) -> None:
    with counted(ensemble):
        raise KeyError


def hooks(defense: Defense) -> int:
    return sum(len(member._forward_hooks) for member in defense.members())


def test_no_hook_is_left_behind() -> None:
    ensemble, x = Ensemble([network(0), network(1)], mean_of_logits), images(2)
    before = ensemble(x)
    with counted(ensemble) as cost:
        assert hooks(ensemble) == 2
        assert torch.equal(ensemble(x), before)
    assert hooks(ensemble) == 0
    ensemble(x)
    assert cost.forwards == 4
    with pytest.raises(KeyError):
        stopped_by_an_error(ensemble)
    assert hooks(ensemble) == 0


def test_counting_does_not_change_the_gradient() -> None:
    ensemble, x = Ensemble([network(0), network(1)], mean_of_logits), images(3).requires_grad_(True)
    expected = torch.autograd.grad(ensemble(x).logsumexp(1).sum(), x)[0]
    with counted(ensemble):
        found = torch.autograd.grad(ensemble(x).logsumexp(1).sum(), x)[0]
    assert torch.equal(found, expected)
