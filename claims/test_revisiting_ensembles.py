"""Claims of "Revisiting Ensembles in an Adversarial Context" (arXiv 2002.11572).

Table 1 (CIFAR-10, ResNet-18, L2; accuracy in percent at each eps; the best configuration of 5 runs):

                                      0     .22    .35     .5    AUC(.5)
    Natural                         94.64  13.5   2.57    .44     .067
    Robust .22                      92.86  81.24  71.71  59.47    .722
    Robust .5                       88.30  81.31  78.11  68.73    .767
    8 x Robust .22                  93.95  83.95  78.92  68.79    .781
    Composite (.4, .05)             91.36  83.22  76.62  67.95    .769
    Two composites 90/10            91.61  84.15  78.01  69.99    .783

Table 2, left: members trained at .5, accuracy at .5: 1: 68.73, 2: 71.19, 4: 72.53, 8: 73.08, 12: 73.34, 16: 73.37.
The AUC column is the right-endpoint sum 2 (.22 A(.22) + .13 A(.35) + .15 A(.5)); it leaves out the natural accuracy.
The paper's ensembles have 8 members; 4 here, where Table 2 says most of the gain is had.
"""

from robench import zoo
from robench.claim import Claim, Quantity, Standing, Trial, above, clean, near, robust

PAPER = zoo.entries()["robust"].paper

PGD = "pgd-20"
SINGLE, WEAK, AVERAGE = "robust,eps=0.5", "robust,eps=0.22", "robust_average,k=4,eps=0.22"
# Digits are smaller and sparser: twice the members' radius is the target here as there.
DIGITS_SINGLE, DIGITS_AVERAGE = "robust,eps=2", "robust_average,k=4,eps=1"


def area_under_curve(defense: str) -> Quantity:
    """Return AUC(0.5) by the paper's sum."""
    shares = (("L2:0.22", 0.44), ("L2:0.35", 0.26), ("L2:0.5", 0.3))
    first, second, third = (robust(defense, threat, PGD) * weight for threat, weight in shares)
    return first + second + third


FOUR = Standing(
    ("not reproduced", "underpowered"), ("broken", "open"),
    "Four members at half the radius make up most of the gap to the network trained at the radius on digits, not all of it: "
    "about 6 points are left, and 300 images leave 4 of them in doubt.",
)  # fmt: skip

CLAIMS = [
    Claim(
        name="average-matches-stronger",
        paper=PAPER,
        statement="The average of networks trained at about half the radius is as robust as one trained at the radius.",
        source="Table 1, eps .5",
        published="8 x Robust .22: 68.79, Robust .5: 68.73",
        expect=near(0.0, 0.03),
        tolerance=0.03,
        trials=(
            Trial(
                "digits",
                robust(DIGITS_AVERAGE, "L2:2", PGD) - robust(DIGITS_SINGLE, "L2:2", PGD),
                scales=("smoke",),
                standing={"smoke": FOUR},
            ),
            Trial("cifar10", robust(AVERAGE, "L2:0.5", PGD) - robust(SINGLE, "L2:0.5", PGD)),
        ),
    ),
    Claim(
        name="average-lifts-clean-accuracy",
        paper=PAPER,
        statement="That average classifies clean images better than the one network.",
        source="Table 1, eps 0",
        published="8 x Robust .22: 93.95, Robust .5: 88.30",
        expect=above(0.0),
        tolerance=0.03,
        trials=(Trial("cifar10", clean(AVERAGE) - clean(SINGLE)),),
    ),
    Claim(
        name="averaging-lifts-robustness",
        paper=PAPER,
        statement="Averaging networks trained at a small radius makes them more robust at a larger one than each alone.",
        source="Table 1, eps .5",
        published="8 x Robust .22: 68.79, Robust .22: 59.47",
        expect=above(0.0),
        tolerance=0.03,
        trials=(Trial("cifar10", robust(AVERAGE, "L2:0.5", PGD) - robust(WEAK, "L2:0.5", PGD)),),
    ),
    Claim(
        name="average-wins-area",
        paper=PAPER,
        statement="Over all radii up to .5 the average is more robust than the one network trained at .5.",
        source="Table 1, AUC(.5)",
        published="8 x Robust .22: .781, Robust .5: .767",
        expect=above(0.0),
        tolerance=0.03,
        trials=(Trial("cifar10", area_under_curve(AVERAGE) - area_under_curve(SINGLE)),),
    ),
    Claim(
        name="composite-keeps-robustness",
        paper=PAPER,
        statement="A last layer trained on joined robust and near-natural features is about as robust as the robust network.",
        source="Table 1, eps .5",
        published="Composite 67.95, Robust .5: 68.73",
        expect=near(-0.0078, 0.05),
        tolerance=0.05,
        trials=(Trial("digits", robust("composite,eps=2,alpha=0.2", "L2:2", PGD) - robust(DIGITS_SINGLE, "L2:2", PGD), scales=("smoke",)),),
    ),
    Claim(
        name="average-value",
        paper=PAPER,
        statement="Eight networks trained at .22 keep 68.79 % at .5.",
        source="Table 1, eps .5",
        published="8 x Robust .22: 68.79",
        expect=near(0.6879, 0.03),
        tolerance=0.03,
        trials=(Trial("cifar10", robust("robust_average,k=8,eps=0.22", "L2:0.5", PGD), scales=("paper",)),),
    ),
]


def test_claim(case, settle_case):  # type: ignore[no-untyped-def]
    """Settle each claim above on each of its data sets."""
    settle_case(case)
