"""Claims of "Ensemble everything everywhere" (arXiv 2408.05446), and what became of them.

The paper: about 72 % on CIFAR-10 and 48 % on CIFAR-100 at Linf 8/255 without adversarial training (abstract; three self-ensembles);
Table 1, CIFAR-10: multi-resolution network 41.44, self-ensemble 53.12, three of them 71.88. These are AutoAttack's (`rand`) images
scored anew on fresh noise; AutoAttack returns the clean image where it gave up, so its own counter is lower (in the authors' log
43.75 against 62.50).

The re-evaluation: "Evaluating the Robustness of the 'Ensemble Everything Everywhere' Defense" (arXiv 2411.14834, second version):
62 -> 11 % on CIFAR-10 and 48 -> 14 % on CIFAR-100, by transfer from the mean of the heads' logits and averaging over noise.

At cpu scale the stack of resolutions by itself keeps its 13 points over a plain network; what falls is CrossMax's part (the claims
self-ensembling-adds, crossmax-over-mean and normalisation-over-none).
"""

from robench import zoo
from robench.claim import Claim, Quantity, Standing, Trial, above, near, robust

PAPER = zoo.entries()["multires_self_ensemble"].paper

CIFAR10, DIGITS = "Linf:8/255", "Linf:48/255"
RAND = "pyautoattack-rand"
# AutoAttack takes 20 draws a step on every example that stands. Below gpu scale the first of its two attacks stands for it, with
# fewer steps and draws, and on all examples: what AutoAttack gives up on, it returns clean.
RAND_CPU = "apgd-ce,steps=40,draws=4"
RAND_SMOKE = "apgd-ce,steps=15,draws=2"

MASKED = (
    "Refuted by arXiv 2411.14834: CrossMax and the noise hide the gradient. The mean of the heads' logits shows it, and images made on "
    "that transfer."
)
LEVEL = "Under the paper's attack it is level with adversarial training. "
SHORT = "At this scale it falls short of adversarial training even under the weaker attack. "

SMALL_GAIN = "On digits the stack alone is worth about 10 points, and about 5 under attacks that average over the noise. "

SMALL_NOISE = (
    "Under the direct attack the difference is too near 5 points to tell. Under transfer from the mean it is 10: fixed noise falls "
    "further than fresh, so here noise is more than a mask."
)

# The parts of the defense, taken away after training; the lab notes of the re-evaluation held the noise fixed and took 20 steps.
PART = "multires_ablation"
NOTES = "pgd-20"
TRANSFER = ("mean-transfer-40",)
FOOLED_ALIKE = Standing(
    ("reproduced",),
    ("broken",),
    "Images made on the mean of the same heads fool CrossMax about as often as the mean: what it adds is a hidden gradient "
    "(arXiv 2411.14834, lab notes).",
)


def crossmax_over(aggregation: str, threat: str) -> Quantity:
    """Return what CrossMax adds to another aggregation of the same heads, the noise held fixed."""
    one, other = (robust(f"{PART},aggregation={a}", threat, NOTES, TRANSFER) for a in ("crossmax", aggregation))
    return one - other


CLAIMS = [
    Claim(
        name="robust-without-adversarial-training",
        paper=PAPER,
        statement="A self-ensemble trained on clean images alone is more robust than a network trained the plain way.",
        source="Abstract; Table 1, CIFAR-10 self-ensemble",
        published="53.12 (three: 71.88); a plain network has about 0",
        expect=above(0.10),
        tolerance=0.05,
        trials=(
            Trial(
                "digits",
                robust("multires_self_ensemble", DIGITS, RAND_SMOKE) - robust("natural", DIGITS, "pgd-adam-20"),
                scales=("smoke",),
                standing={"smoke": Standing(("reproduced",), ("broken",), MASKED)},
            ),
            Trial(
                "cifar10",
                robust("multires_self_ensemble", CIFAR10, RAND_CPU) - robust("natural", CIFAR10, "pgd-adam-20"),
                scales=("cpu",),
            ),
            Trial(
                "cifar10",
                robust("multires_self_ensemble", CIFAR10, RAND) - robust("natural", CIFAR10, "pgd-adam-20"),
                scales=("gpu", "paper"),
            ),
        ),
    ),
    Claim(
        name="rivals-adversarial-training",
        paper=PAPER,
        statement="Without adversarial training the self-ensemble is about as robust as an adversarially trained network.",
        source="Abstract: +5 points over the best adversarially trained network then known on CIFAR-100, near it on CIFAR-10",
        published="about 72, best known 73.71",
        expect=above(-0.05),
        tolerance=0.05,
        trials=(
            Trial(
                "digits",
                robust("multires_self_ensemble", DIGITS, RAND_SMOKE) - robust("single_adv", DIGITS, "pgd-adam-20"),
                scales=("smoke",),
                standing={"smoke": Standing(("not reproduced",), ("broken",), SHORT + MASKED)},
            ),
            Trial(
                "cifar10",
                robust("multires_self_ensemble", CIFAR10, RAND_CPU) - robust("single_adv", CIFAR10, "pgd-adam-20"),
                scales=("cpu",),
                standing={"cpu": Standing(("reproduced",), ("broken",), LEVEL + MASKED)},
            ),
            Trial(
                "cifar10",
                robust("multires_self_ensemble", CIFAR10, RAND) - robust("single_adv", CIFAR10, "pgd-adam-20"),
                scales=("gpu", "paper"),
            ),
        ),
    ),
    Claim(
        name="multi-resolution-alone",
        paper=PAPER,
        statement="The noisy stack of resolutions by itself makes a network trained on clean images robust.",
        source="Table 1, CIFAR-10 multi-resolution backbone; Figure 6: about half of the gain",
        published="41.44; a plain network has about 0",
        expect=above(0.10),
        tolerance=0.05,
        trials=(
            Trial(
                "digits",
                robust("multires", DIGITS, RAND_SMOKE) - robust("natural", DIGITS, "pgd-adam-20"),
                scales=("smoke",),
                standing={"smoke": Standing(("not reproduced",), ("broken",), SMALL_GAIN)},
            ),
            Trial("cifar10", robust("multires", CIFAR10, RAND_CPU) - robust("natural", CIFAR10, "pgd-adam-20"), scales=("cpu",)),
            Trial("cifar10", robust("multires", CIFAR10, RAND) - robust("natural", CIFAR10, "pgd-adam-20"), scales=("gpu", "paper")),
        ),
    ),
    Claim(
        name="self-ensembling-adds",
        paper=PAPER,
        statement="CrossMax over the layers' heads makes the multi-resolution network more robust still.",
        source="Table 1, CIFAR-10; Figure 6: about half of the gain",
        published="53.12, its backbone alone 41.44",
        expect=above(0.05),
        tolerance=0.05,
        trials=(
            Trial(
                "digits",
                robust("multires_self_ensemble", DIGITS, RAND_SMOKE) - robust("multires", DIGITS, RAND_SMOKE),
                scales=("smoke",),
                standing={"smoke": Standing(("reproduced",), ("broken",), MASKED)},
            ),
            Trial(
                "cifar10",
                robust("multires_self_ensemble", CIFAR10, RAND_CPU) - robust("multires", CIFAR10, RAND_CPU),
                scales=("cpu",),
                standing={"cpu": Standing(("reproduced",), ("broken",), MASKED)},
            ),
            Trial(
                "cifar10",
                robust("multires_self_ensemble", CIFAR10, RAND) - robust("multires", CIFAR10, RAND),
                scales=("gpu", "paper"),
            ),
        ),
    ),
    Claim(
        name="crossmax-over-mean",
        paper=PAPER,
        statement="With the noise held fixed, CrossMax over the heads withstands a direct attack that breaks the mean of the same heads.",
        source="arXiv 2411.14834, lab notes on CIFAR-100: PGD-20, seed fixed at each forward",
        published="32.52, mean of logits 1.17",
        expect=above(0.05),
        tolerance=0.05,
        trials=(
            Trial("digits", crossmax_over("mean_of_logits", DIGITS), scales=("smoke",), standing={"smoke": FOOLED_ALIKE}),
            Trial("cifar10", crossmax_over("mean_of_logits", CIFAR10), standing={"cpu": FOOLED_ALIKE}),
        ),
    ),
    Claim(
        name="normalisation-over-none",
        paper=PAPER,
        statement="With the noise held fixed, CrossMax withstands a direct attack that breaks the k-th highest logit unnormalised.",
        source="arXiv 2411.14834, lab notes on CIFAR-100: PGD-20, seed fixed at each forward",
        published="32.52, third-highest logit 1.46",
        expect=above(0.05),
        tolerance=0.05,
        trials=(Trial("cifar10", crossmax_over("kth_highest", CIFAR10), standing={"cpu": FOOLED_ALIKE}),),
    ),
    Claim(
        name="fresh-noise-over-fixed",
        paper=PAPER,
        statement="Noise drawn anew at each forward withstands an attack that breaks the same defense with its noise held fixed.",
        source="arXiv 2411.14834, lab notes on CIFAR-100: PGD-20",
        published="56.05, seed fixed at each forward 32.52",
        expect=above(0.05),
        tolerance=0.05,
        trials=(
            Trial(
                "cifar10",
                robust(f"{PART},noise=fresh,aggregation=crossmax", CIFAR10, NOTES, (*TRANSFER, "mean-transfer-40,draws=4"))
                - robust(f"{PART},aggregation=crossmax", CIFAR10, NOTES, TRANSFER),
                standing={"cpu": Standing(("not reproduced",), ("holds",), SMALL_NOISE)},
            ),
        ),
    ),
    Claim(
        name="ensemble3-value",
        paper=PAPER,
        statement="Three self-ensembles keep about 72 % on CIFAR-10 without adversarial training.",
        source="Abstract; Table 1",
        published="71.88",
        expect=near(0.7188, 0.05),
        tolerance=0.05,
        trials=(Trial("cifar10", robust("multires_ensemble3", CIFAR10, RAND), scales=("paper",)),),
    ),
]


def test_claim(case, settle_case):  # type: ignore[no-untyped-def]
    """Settle each claim above on each of its data sets."""
    settle_case(case)
