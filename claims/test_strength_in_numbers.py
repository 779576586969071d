"""Claims of "Strength in Numbers" (arXiv 1811.09300).

Table 1b (the checkpoint best on test IFGSM; accuracy, 3 seeds, full CIFAR-10 test set) and 1c (500 steps):

                  clean  IFGSM5  PGD5  PGD20  black box | IFGSM500  PGD500
    Baseline       .95     .57    .29    .09     .26    |   .16       .04
    Ensemble2      .95     .65    .52    .38     .22    |   .13       .02
    Ensemble4      .93     .60    .48    .43     .24    |
    SingleAdv      .84     .57    .46    .45     .81    |   .46       .44
    DoubleAdv      .85     .60    .48    .47     .84    |   .47       .47
    Ensemble2Adv   .87     .64    .56    .52     .85    |   .55       .52
    Ensemble4Adv   .88     .67    .58    .52     .86    |
    SeparateEnsemble2Adv                                |   .49       .47

Its "PGD" is Adam on the image, projected: `pgd-adam` here.
"""

from robench import zoo
from robench.claim import Claim, Quantity, Standing, Trial, above, below, clean, near, robust

PAPER = zoo.entries()["single_adv"].paper

CIFAR10, DIGITS = "Linf:8/255", "Linf:48/255"
PGD = "pgd-adam-20"


def on_cifar10(defense: str, attack: str = PGD) -> Quantity:
    """Return robust accuracy at the paper's budget."""
    return robust(defense, CIFAR10, attack)


def on_digits(defense: str, attack: str = PGD) -> Quantity:
    """Return robust accuracy at the budget that digits' defenses are trained for."""
    return robust(defense, DIGITS, attack)


EASY = Standing(
    ("not reproduced", "underpowered"), ("broken", "open"),
    "On digits one small network learns the task: a second one trained with it adds nothing that 300 images show.",
)  # fmt: skip
SHORT_OF_SINGLE = Standing(
    ("not reproduced",), ("holds", "broken"),
    "Our records: after 5 epochs with one attack step the gain is -0.2 points [-1.2, 0.8] over three copies under the paper's attack and "
    "0.7 [-0.3, 1.6] under the strongest; one copy trained on a CPU gained 1.2. The paper has 7.",
)  # fmt: skip
LEVEL_WITH_DOUBLE = Standing(
    ("not reproduced",), ("broken",),
    "Our records: after 5 epochs with one attack step the larger network is level with the two or ahead, by 1.0 point [-0.1, 2.1] over "
    "three copies; the paper has 5 points the other way.",
)  # fmt: skip
COPIES_DIFFER = Standing(
    ("reproduced", "not reproduced"), ("holds", "broken"),
    "Our records: after 5 epochs the gain is 1.1 points [-0.1, 2.2] over three copies (0.6, 0.9 and 1.7) and was 2.6 for one trained on a "
    "CPU, so at this scale the training's own scatter decides; the paper has 3.",
)  # fmt: skip
SHORT_OF_SEPARATE = Standing(
    ("not reproduced",), ("broken",),
    "Our records: after 5 epochs with one attack step, members trained on their own, which takes as long, are 2.9 points [1.8, 3.9] ahead "
    "over three copies.",
)  # fmt: skip

CLAIMS = [
    Claim(
        name="adversarial-training-beats-ensembling",
        paper=PAPER,
        statement="An adversarially trained network is more robust than a clean ensemble of two.",
        source="Table 1a and 1c, PGD",
        published="SingleAdv .44, Ensemble2 .02 at 500 steps (.43, .30 at 20)",
        expect=above(0.0),
        tolerance=0.05,
        trials=(
            Trial("digits", on_digits("single_adv") - on_digits("ensemble2"), scales=("smoke",)),
            Trial("cifar10", on_cifar10("single_adv") - on_cifar10("ensemble2")),
        ),
    ),
    Claim(
        name="clean-ensemble-falls",
        paper=PAPER,
        statement="A clean ensemble of two has almost no robust accuracy left under many steps.",
        source="Table 1c, PGD500",
        published="Ensemble2 .02",
        expect=below(0.10),
        tolerance=0.05,
        trials=(
            Trial("digits", on_digits("ensemble2", "pgd-adam-50"), scales=("smoke",)),
            Trial("cifar10", on_cifar10("ensemble2", "pgd-adam-100")),
        ),
    ),
    Claim(
        name="joint-beats-single",
        paper=PAPER,
        statement="Two networks trained adversarially as one model are more robust than one network.",
        source="Table 1b, PGD20",
        published="Ensemble2Adv .52, SingleAdv .45",
        expect=above(0.0),
        tolerance=0.05,
        trials=(
            Trial("digits", on_digits("ensemble2_adv") - on_digits("single_adv"), scales=("smoke",), standing={"smoke": EASY}),
            Trial("cifar10", on_cifar10("ensemble2_adv") - on_cifar10("single_adv"), standing={"cpu": SHORT_OF_SINGLE}),
        ),
    ),
    Claim(
        name="joint-beats-double",
        paper=PAPER,
        statement="Two networks trained as one model beat one network of their total size.",
        source="Table 1b, PGD20",
        published="Ensemble2Adv .52, DoubleAdv .47",
        expect=above(0.0),
        tolerance=0.05,
        trials=(Trial("cifar10", on_cifar10("ensemble2_adv") - on_cifar10("double_adv"), standing={"cpu": LEVEL_WITH_DOUBLE}),),
    ),
    Claim(
        name="joint-beats-separate",
        paper=PAPER,
        statement="Training the members as one model beats averaging members trained on their own.",
        source="Table 1c, PGD500",
        published="Ensemble2Adv .52, SeparateEnsemble2Adv .47",
        expect=above(0.0),
        tolerance=0.05,
        trials=(
            Trial("digits", on_digits("ensemble2_adv") - on_digits("separate2_adv"), scales=("smoke",), standing={"smoke": EASY}),
            Trial("cifar10", on_cifar10("ensemble2_adv") - on_cifar10("separate2_adv"), standing={"cpu": SHORT_OF_SEPARATE}),
        ),
    ),
    Claim(
        name="separate-beats-single",
        paper=PAPER,
        statement="Averaging two networks trained adversarially on their own beats one of them.",
        source="Table 1c, PGD500",
        published="SeparateEnsemble2Adv .47, SingleAdv .44",
        expect=above(0.0),
        tolerance=0.03,
        trials=(Trial("cifar10", on_cifar10("separate2_adv") - on_cifar10("single_adv")),),
    ),
    Claim(
        name="joint-lifts-clean-accuracy",
        paper=PAPER,
        statement="Two networks trained adversarially as one model classify clean images better than one.",
        source="Table 1b, clean",
        published="Ensemble2Adv .87, SingleAdv .84",
        expect=above(0.0),
        tolerance=0.03,
        trials=(Trial("cifar10", clean("ensemble2_adv") - clean("single_adv"), standing={"cpu": COPIES_DIFFER}),),
    ),
    Claim(
        name="ensemble2-adv-value",
        paper=PAPER,
        statement="Ensemble2Adv keeps 52 % under PGD of 20 steps.",
        source="Table 1b, PGD20",
        published="Ensemble2Adv .52",
        expect=near(0.52, 0.03),
        tolerance=0.03,
        trials=(Trial("cifar10", on_cifar10("ensemble2_adv"), scales=("paper",)),),
    ),
]


def test_claim(case, settle_case):  # type: ignore[no-untyped-def]
    """Settle each claim above on each of its data sets."""
    settle_case(case)
