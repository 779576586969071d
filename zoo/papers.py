"""The papers that the built-in defenses come from."""

from robench.zoo import Paper

ENSEMBLE_EVERYTHING = Paper(
    title="Ensemble everything everywhere: Multi-scale aggregation for adversarial robustness",
    arxiv="2408.05446",
    slug="ensemble_everything",
    bibtex="""@article{fort2024ensemble,
  title = {Ensemble everything everywhere: Multi-scale aggregation for adversarial robustness},
  author = {Fort, Stanislav and Lakshminarayanan, Balaji},
  journal = {arXiv preprint arXiv:2408.05446},
  year = {2024}
}""",
)

STRENGTH_IN_NUMBERS = Paper(
    title="Strength in Numbers: Trading-off Robustness and Computation via Adversarially-Trained Ensembles",
    arxiv="1811.09300",
    slug="strength_in_numbers",
    bibtex="""@article{grefenstette2018strength,
  title = {Strength in Numbers: Trading-off Robustness and Computation via Adversarially-Trained Ensembles},
  author = {Grefenstette, Edward and Stanforth, Robert and O'Donoghue, Brendan and Uesato, Jonathan and Swirszcz, Grzegorz and
    Kohli, Pushmeet},
  journal = {arXiv preprint arXiv:1811.09300},
  year = {2018}
}""",
)

REVISITING_ENSEMBLES = Paper(
    title="Revisiting Ensembles in an Adversarial Context: Improving Natural Accuracy",
    arxiv="2002.11572",
    slug="revisiting_ensembles",
    bibtex="""@article{saligrama2020revisiting,
  title = {Revisiting Ensembles in an Adversarial Context: Improving Natural Accuracy},
  author = {Saligrama, Aditya and Leclerc, Guillaume},
  journal = {arXiv preprint arXiv:2002.11572},
  year = {2020}
}""",
)

PGD_TRAINING = Paper(
    title="Towards Deep Learning Models Resistant to Adversarial Attacks",
    arxiv="1706.06083",
    slug="pgd_training",
    bibtex="""@article{madry2017towards,
  title = {Towards Deep Learning Models Resistant to Adversarial Attacks},
  author = {Madry, Aleksander and Makelov, Aleksandar and Schmidt, Ludwig and Tsipras, Dimitris and Vladu, Adrian},
  journal = {arXiv preprint arXiv:1706.06083},
  year = {2017}
}""",
)

FAST_TRAINING = Paper(
    title="Fast is better than free: Revisiting adversarial training",
    arxiv="2001.03994",
    slug="fast_training",
    bibtex="""@article{wong2020fast,
  title = {Fast is better than free: Revisiting adversarial training},
  author = {Wong, Eric and Rice, Leslie and Kolter, J. Zico},
  journal = {arXiv preprint arXiv:2001.03994},
  year = {2020}
}""",
)

TRADES = Paper(
    title="Theoretically Principled Trade-off between Robustness and Accuracy",
    arxiv="1901.08573",
    slug="trades",
    bibtex="""@article{zhang2019theoretically,
  title = {Theoretically Principled Trade-off between Robustness and Accuracy},
  author = {Zhang, Hongyang and Yu, Yaodong and Jiao, Jiantao and Xing, Eric P. and El Ghaoui, Laurent and Jordan, Michael I.},
  journal = {arXiv preprint arXiv:1901.08573},
  year = {2019}
}""",
)
