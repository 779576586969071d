import json
from dataclasses import replace

from rich.console import Console

from robench import verdicts, zoo
from robench.claim import Claim, Quantity, Trial, above, clean, robust
from robench.estimate import Estimate
from robench.leaderboard import Finding
from robench.settlement import Settlement
from robench.zoo import Paper

PAPER = Paper(title="A paper", arxiv="0000.00000", bibtex="", slug="paper")


def settlement() -> Settlement:
    quantity: Quantity = clean("natural")
    claim = Claim("a-claim", PAPER, "It holds.", "Table 1", ".5", above(0.5), 0.05, (Trial("digits", quantity, scales=("smoke",)),))
    estimate = Estimate.proportion(80, 100)
    return Settlement(claim, "digits", "smoke", estimate, "reproduced", estimate, "holds", ("pgd-20",))


def test_every_rendering_says_the_same() -> None:
    made = settlement()
    console = Console(width=200)
    with console.capture() as capture:
        console.print(verdicts.as_table([made]))
    (listed,) = json.loads(verdicts.as_json([made]))
    assert listed["ours"]["value"] == 0.8
    for text in (capture.get(), verdicts.as_markdown([made])):
        for cell in ("a-claim", ".5", "80.0 % [71.1, 86.7] (n=100)", "reproduced", "holds"):
            assert cell in text


def test_an_outcome_that_is_not_stood_by_shows() -> None:
    made = settlement()
    assert made.as_stood_by
    other = Settlement(made.claim, "digits", "smoke", made.estimate, "not reproduced", made.strongest, "holds", ())
    assert not other.as_stood_by


def test_a_claim_is_told_in_the_rows_that_it_is_about() -> None:
    quantity = robust("natural", "Linf:16/510", "pgd-20") - robust("single_adv", "Linf:8/255", "pgd-20")
    made = settlement()
    of_both = replace(made, claim=replace(made.claim, name="both", trials=(Trial("digits", quantity, scales=("smoke",)),)), status="open")
    natural, adversarial = (zoo.parse(name).text for name in ("natural", "single_adv"))
    assert verdicts.by_row([made, of_both]) == {
        (natural, "digits", "smoke", None): [Finding("a-claim", "reproduced", "holds")],
        (natural, "digits", "smoke", "Linf:8/255"): [Finding("both", "reproduced", "open")],
        (adversarial, "digits", "smoke", "Linf:8/255"): [Finding("both", "reproduced", "open")],
    }
