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
