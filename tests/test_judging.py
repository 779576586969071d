"""How good an image is against a defense, and that choosing by it does not choose luck."""

import torch
from torch import Tensor, nn

from robench.attacks.judging import JUDGING, judge
from robench.defense import Defense, as_defense
from robench.noise import Draw, normal

IDS = torch.arange(400)


class Shaken(Defense):
    """Two classes and one that never wins; the margin is the image's first value and noise of deviation 1."""

    random = True

    def predictors(self, x: Tensor, draw: Draw | None = None) -> Tensor:
        noise = normal(draw or Draw(0, torch.arange(len(x))), "shaken", (1,))
        margin = x.flatten(1)[:, :1] + noise.to(x)
        return torch.cat([-margin / 2, margin / 2, torch.full_like(margin, -4)], dim=1)[:, None]

    def aggregate(self, logits: Tensor) -> Tensor:
        return logits[:, 0]

    def members(self) -> list[nn.Module]:
        return []


def test_a_deterministic_defense_puts_all_that_fool_it_first() -> None:
    class First(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :3]

    x, y = torch.rand(400, 1, 2, 2), torch.zeros(400, dtype=torch.int64)
    judged = judge(as_defense(First()), x, y, examples=IDS, seed=0)
    fooled = x.flatten(1)[:, :3].argmax(1) != 0
    assert torch.equal(judged.share, fooled.float())
    assert judged.score[fooled].min() > judged.score[~fooled].max()
    torch.testing.assert_close(judged.shown, x.flatten(1)[:, None, :3].log_softmax(-1))


def test_a_random_defense_is_judged_over_all_draws() -> None:
    y = torch.zeros(400, dtype=torch.int64)
    shares = []
    for value in (-3.0, 0.0, 3.0):
        judged = judge(Shaken().eval(), torch.full((400, 1, 1, 1), value), y, examples=IDS, seed=0)
        torch.testing.assert_close(judged.share * len(JUDGING), (judged.share * len(JUDGING)).round())
        shares.append(float(judged.share.mean()))
    assert shares[0] < 0.01
    assert abs(shares[1] - 0.5) < 0.02
    assert shares[2] > 0.99


def test_of_many_images_the_better_are_chosen_more_surely_than_by_their_share() -> None:
    """Ten images of each example, one better than the rest: how often it is the one chosen."""
    y, better, judged = torch.zeros(400, dtype=torch.int64), 0, []
    for number in range(10):
        x = torch.full((400, 1, 1, 1), 0.2 if number == better else -0.2)
        judged.append(judge(Shaken().eval(), x, y, examples=IDS + 1000 * number, seed=0))
    chosen = [torch.stack([getattr(j, by) for j in judged]).argmax(0) == better for by in ("score", "share")]
    assert chosen[0].sum() > chosen[1].sum() > 40
